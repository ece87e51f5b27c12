"""The cache of converted models, and the manifest in each folder that says whether it is whole."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import IO, Any

MANIFEST = "sparsekv.json"
_FORMAT = 1
_SMALL_BYTES = 8 * 2**20  # files up to this size are hashed on every check, larger ones only on a full check


def sha256_of(stream: IO[bytes], copy_to: IO[bytes] | None = None) -> str:
    """Hexadecimal SHA-256 of a binary stream; with `copy_to`, what is read is written there as well."""
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
        if copy_to is not None:
            copy_to.write(block)
    return digest.hexdigest()


def write_manifest(folder: Path, **origin: Any) -> None:
    """Record size and SHA-256 of every file of `folder`, and `origin`: where the model came from."""
    files = {}
    for path in sorted(p for p in folder.iterdir() if p.is_file() and p.name != MANIFEST):
        with path.open("rb") as stream:
            files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(stream)}
    text = json.dumps({"format": _FORMAT, **origin, "files": files}, indent=2)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a converted folder, or None where there is no readable one."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if (
        not isinstance(manifest, dict)
        or manifest.get("format") != _FORMAT
        or not isinstance(manifest.get("files"), dict)
    ):
        return None
    return manifest


def damage(folder: Path, *, full: bool = False, **origin: Any) -> str | None:
    """What is wrong with a converted folder, in words; None if it is whole.

    Args:
        folder: the folder.
        full: hash the weights too. Without it their size is checked, and the hashes of the small files.
        origin: entries that the manifest must hold with these values.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return f"no readable {MANIFEST}"
    for key, expected in origin.items():
        if manifest.get(key) != expected:
            return f"{key} is {manifest.get(key)!r}, expected {expected!r}"
    for name, recorded in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        size = path.stat().st_size
        if size != recorded["bytes"]:
            return f"{name} has {size} bytes, expected {recorded['bytes']}"
        if full or size <= _SMALL_BYTES:
            with path.open("rb") as stream:
                found = sha256_of(stream)
            if found != recorded["sha256"]:
                return f"{name} has sha256 {found}, expected {recorded['sha256']}"
    return None
