"""A folder of safetensors files and a manifest that names them: whole, or refused.

    manifest.json                        format, what the writer says, name, size and SHA-256 of every file
    <part>-<writing>.safetensors         tensors

The manifest is replaced last and as one; files that it does not name do not count. So a kill while writing leaves the
session of before.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from sparsekv.errors import ConfigError
from sparsekv.files import sync_folder, write_atomically

MANIFEST = "manifest.json"
FORMAT = "sparsekv session"
VERSION = 1
_OWN = re.compile(r"[a-z]+(-\d+)?-[0-9a-f]{8}\.safetensors(\.tmp)?|manifest\.json(\.tmp)?|\.lock")


def write_session(
    folder: str | Path, header: dict[str, Any], parts: Iterable[tuple[str, dict[str, Tensor]]]
) -> None:
    """Write (or replace) a session; `parts` are asked for one after the other.

    Raises
    ------
    ConfigError
        If the folder holds anything else, or can't be written; a session that it held stays.
    """
    target = Path(folder).expanduser()
    writing = secrets.token_hex(4)
    lock = FileLock(str(target / ".lock"))
    files: dict[str, dict[str, Any]] = {}
    try:
        target.mkdir(parents=True, exist_ok=True)
        _refuse_others(target)
        lock.acquire(timeout=0)
        for name, tensors in parts:
            data = save({key: value.detach().cpu().contiguous() for key, value in tensors.items()})
            file = f"{name}-{writing}.safetensors"
            files[name] = {"file": file, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            write_atomically(target / file, data)
        body = {"format": FORMAT, "version": VERSION, **header, "files": files}
        text = json.dumps({**body, "sha256": _sum(body)}, indent=1, ensure_ascii=False)
        sync_folder(target)
        write_atomically(target / MANIFEST, text + "\n")
        sync_folder(target)
        # Whatever else there is belongs to no session: nobody else writes while the lock is held.
        stays = {one["file"] for one in files.values()}
        _remove(target, [path.name for path in target.glob("*.safetensors*") if path.name not in stays])
    except Timeout:
        raise ConfigError(f"session folder '{target}' is being written by another process") from None
    except BaseException as error:
        if not _is_named(target, writing):
            _remove(target, [one["file"] for one in files.values()])
        if isinstance(error, OSError):
            raise ConfigError(
                f"session folder '{target}' cannot be written: {error.strerror or error}"
            ) from error
        raise
    finally:
        lock.release()


def read_header(folder: str | Path) -> dict[str, Any]:
    """What `write_session` was told, and `files`.

    Raises
    ------
    ConfigError
        No session, or a manifest that was cut, changed, or written by another version.
    """
    path = Path(folder).expanduser() / MANIFEST
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"session folder '{path.parent}' has no {MANIFEST}: no session was saved there"
        ) from None
    except OSError as error:
        raise ConfigError(f"session file '{path}' cannot be read: {error.strerror or error}") from error
    except ValueError:
        raise ConfigError(f"session file '{path}' is damaged: it is no JSON") from None
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise ConfigError(f"session file '{path}' was not written by sparsekv")
    if body.get("version") != VERSION:
        raise ConfigError(
            f"session '{path.parent}' has version {body.get('version')!r}; this sparsekv reads {VERSION}"
        )
    if body.pop("sha256", None) != _sum(body):
        raise ConfigError(f"session file '{path}' is damaged: its checksum is wrong")
    return body


def read_part(folder: str | Path, header: dict[str, Any], name: str) -> dict[str, Tensor]:
    """The tensors of one part.

    Raises
    ------
    ConfigError
        A file that is missing, cut or changed.
    """
    entry = header["files"][name]
    path = Path(folder).expanduser() / entry["file"]
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"session file '{path}' is missing") from None
    except OSError as error:
        raise ConfigError(f"session file '{path}' cannot be read: {error.strerror or error}") from error
    if len(data) != entry["bytes"]:
        raise ConfigError(f"session file '{path}' is damaged: {len(data)} bytes, not {entry['bytes']}")
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise ConfigError(f"session file '{path}' is damaged: its checksum is wrong")
    try:
        tensors: dict[str, Tensor] = load(data)
    except SafetensorError as error:
        raise ConfigError(f"session file '{path}' cannot be read: {' '.join(str(error).split())}") from error
    return tensors


def _sum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def _refuse_others(folder: Path) -> None:
    """Raise a ConfigError if a folder holds files that no session wrote: they might be in its way, or it in theirs."""
    names = sorted(path.name for path in folder.iterdir())
    others = [name for name in names if not _OWN.fullmatch(name)]
    if MANIFEST in names:
        try:
            body = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            format_found = body.get("format") if isinstance(body, dict) else None
        except ValueError:
            format_found = FORMAT  # a damaged session may be written over
        if format_found != FORMAT:
            others.append(MANIFEST)
    if others:
        raise ConfigError(
            f"session folder '{folder}' holds other files ('{others[0]}'); give it one of its own"
        )


def _is_named(folder: Path, writing: str) -> bool:
    """The manifest is that of this writing already, so its files must stay."""
    try:
        return f"-{writing}.safetensors" in (folder / MANIFEST).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def _remove(folder: Path, names: Iterable[str]) -> None:
    """Remove files; one that can't be is left for the next writing."""
    for name in names:
        for path in (folder / name, folder / f"{name}.tmp"):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
