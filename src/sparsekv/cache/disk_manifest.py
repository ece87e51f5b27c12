"""What a passive folder says of itself: manifest.json, and the index it names.

    manifest.json                 format, whose entries, which files, their checksums; replaced as one
    index-<generation>.safetensors    columns and slots of every layer, and the checksums of every block
    entries-<serial>.safetensors      keys and values (see `disk_log`)

The manifest is the truth: it carries a checksum of itself and of the index, which carries those of the entries. What it
doesn't name does not count, so a process may die at any moment: the folder is what the last manifest says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError
from safetensors.numpy import load, save

from sparsekv.cache.disk_log import BLOCK_ROWS, DTYPES, DiskLog, failed
from sparsekv.cache.entry_request import EntryRequest, Ints
from sparsekv.cache.pages import LayerIndex
from sparsekv.cache.places import Places
from sparsekv.errors import ConfigError
from sparsekv.files import sync_folder, write_atomically

MANIFEST = "manifest.json"
FORMAT = "sparsekv passive store"
VERSION = 1
OWN_FILES = ("index-*.safetensors", "entries-*.safetensors", "index-*.tmp", f"{MANIFEST}.tmp")
"""Patterns of the files that belong to a store."""


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json.

    Attributes
    ----------
    generation : how often the folder was flushed
    fingerprint : whose entries these are, field by field
    note : what the user of the store wants to find again
    dtype, width, file_rows : of the entries and their files; None before the first put
    serial : number of the newest file
    index, index_checksum : the index file, and XXH3 of its bytes
    files : name, chunk number, rows used and checksum (XXH3 of its blocks' checksums) of every file of entries
    """

    generation: int = 0
    fingerprint: dict[str, Any] = field(default_factory=dict)
    note: dict[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    width: int | None = None
    file_rows: int | None = None
    serial: int = 0
    index: str | None = None
    index_checksum: str | None = None
    files: list[dict[str, Any]] = field(default_factory=list)

    @property
    def names(self) -> set[str]:
        """Files that it refers to."""
        return {str(one["name"]) for one in self.files} | ({self.index} if self.index else set())

    @property
    def torch_dtype(self) -> torch.dtype | None:
        return next((dtype for dtype, name in DTYPES.items() if name == self.dtype), None)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace manifest.json, and have the folder's list of files written down."""
    body = {"format": FORMAT, "version": VERSION, **asdict(manifest)}
    text = json.dumps({**body, "checksum": _sum_of(body)}, indent=1, ensure_ascii=False)
    sync_folder(folder)  # the files that it names, before it does
    write_atomically(folder / MANIFEST, text + "\n")
    sync_folder(folder)


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder, or None in one that holds nothing yet.

    Raises
    ------
    ConfigError
        A manifest that is damaged or of another version; other files where there is no manifest.
    """
    path = folder / MANIFEST
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        _check_unused(folder)
        return None
    except OSError as error:
        raise failed(path, error, "read") from error
    try:
        body = json.loads(text)
        checksum = body.pop("checksum")
    except (ValueError, AttributeError, KeyError, TypeError):
        raise _damaged(path, "is damaged: it can't be parsed") from None
    if body.get("format") != FORMAT:
        raise _damaged(path, "was not written by a passive store")
    if body.get("version") != VERSION:
        raise ConfigError(
            f"passive folder '{folder}' has format version {body.get('version')}, this sparsekv reads {VERSION}; use "
            "another folder"
        )
    if checksum != _sum_of(body):
        raise _damaged(path, "is damaged: it does not match its own checksum")
    return Manifest(**{key: value for key, value in body.items() if key not in ("format", "version")})


def write_index(
    folder: Path, generation: int, layers: Mapping[int, LayerIndex], log: DiskLog
) -> tuple[str, str]:
    """Write the index of a generation and return its name and checksum."""
    arrays: dict[str, Ints] = {}
    for layer, entry in layers.items():
        places = entry.places
        held = places.slot >= 0
        arrays[f"layers.{layer}.counts"] = places.counts()
        arrays[f"layers.{layer}.columns"] = places.column[held]
        arrays[f"layers.{layer}.slots"] = places.slot[held]
    for number, chunk in log.files().items():
        arrays[f"sums.{number}"] = chunk.sums[: _blocks(chunk.used)].view(np.int64)
    name, data = f"index-{generation:08d}.safetensors", save(arrays)
    write_atomically(folder / name, data)
    return name, xxhash.xxh3_128_hexdigest(data)


def read_index(folder: Path, manifest: Manifest, page_size: int, log: DiskLog) -> dict[int, LayerIndex]:
    """Take up the files of a manifest in `log`, and return the layers.

    Raises
    ------
    ConfigError
        A file that is missing, cut, damaged, or not the one that the manifest means.
    """
    path = folder / str(manifest.index)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise _damaged(path, "is missing") from None
    except OSError as error:
        raise failed(path, error, "read") from error
    if xxhash.xxh3_128_hexdigest(data) != manifest.index_checksum:
        raise _damaged(path, "is damaged: it does not match its checksum in the manifest")
    try:
        arrays = load(data)
    except SafetensorError as error:
        raise _damaged(path, f"is damaged: {error}") from error
    for one in manifest.files:
        sums = arrays[f"sums.{one['number']}"].view(np.uint64)
        if len(sums) != _blocks(one["used"]) or _file_sum(sums) != one["checksum"]:
            raise _damaged(path, f"does not fit {one['name']}: their checksums differ")
        log.reopen(one["number"], one["name"], one["used"], sums)
    layers = {}
    for name, counts in arrays.items():
        if name.endswith(".counts"):
            layer = int(name.split(".")[1])
            columns, slots = (arrays[f"layers.{layer}.{kind}"] for kind in ("columns", "slots"))
            request = EntryRequest(counts, columns, int(columns.max(initial=-1)))
            layers[layer] = LayerIndex(Places(page_size))
            layers[layer].append(request, slots)
    return layers


def files_of(log: DiskLog) -> list[dict[str, Any]]:
    """What a manifest says of the files of a log."""
    return [
        {
            "name": chunk.path.name,
            "number": number,
            "used": chunk.used,
            "checksum": _file_sum(chunk.sums[: _blocks(chunk.used)]),
        }
        for number, chunk in log.files().items()
    ]


def remove_strays(folder: Path, named: set[str]) -> None:
    """Remove files of a store that its manifest does not name: a process died before it wrote one that does."""
    for pattern in OWN_FILES:
        for path in folder.glob(pattern):
            if path.name not in named:
                path.unlink(missing_ok=True)


def _check_unused(folder: Path) -> None:
    others = sorted(p.name for p in folder.iterdir() if p.name != ".lock" and p.name != f"{MANIFEST}.tmp")
    if any(name.startswith(("entries-", "index-")) for name in others):
        raise _damaged(folder / MANIFEST, f"is missing, but there is '{others[0]}'")
    if others:
        raise ConfigError(
            f"passive folder '{folder}' holds other files ('{others[0]}'); give an empty folder, or one of its own"
        )


def _blocks(rows: int) -> int:
    return -(-rows // BLOCK_ROWS)


def _file_sum(sums: Ints) -> str:
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(sums).tobytes())


def _sum_of(body: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True, ensure_ascii=False).encode())


def _damaged(path: Path, what: str) -> ConfigError:
    return ConfigError(
        f"passive file '{path}' {what}; restore the folder from a copy, or remove it and start again"
    )
