"""Whole and broken checkpoints, and whether one belongs to a config. Imports no torch.

A checkpoint is whole when its manifest says so. The manifest is written last, with size and SHA-256 of every other
file: a process that dies before leaves none, and a file that was cut or changed after does not match.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sparsekv.errors import ConfigError
from sparsekv.files import write_atomically
from sparsekv.models.folder import sha256_of
from sparsekv.training.config import TrainConfig
from sparsekv.training.output import (
    CONFIG_FILE,
    CURRICULUM_FILE,
    public_settings,
    read_training_config,
    remove_partial,
)

MANIFEST = "manifest.json"
_FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d+)")

FREE_KEYS = frozenset(
    {
        "output_dir",
        "device",
        "resume",
        "report_to",
        "progress",
        "log_every",
        "save_every",
        "keep_checkpoints",
        "save_dtype",
        "relevance.start_share",
    }
)
"""What may differ between a checkpoint and the run that goes on from it: nothing that changes a step."""


class Latest(NamedTuple):
    """The newest whole checkpoint of a folder, if any, and the newer ones that are broken: path -> reason."""

    path: Path | None
    skipped: dict[Path, str]


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies."""
    return output_dir / f"checkpoint-{step}"


def step_of(checkpoint: Path) -> int:
    """The finished steps of a checkpoint, from its name."""
    match = _NAME.fullmatch(checkpoint.name)
    if match is None:
        raise ConfigError(f"'{checkpoint}' is not a checkpoint: its name must be checkpoint-STEP")
    return int(match.group(1))


def seal(checkpoint: Path) -> None:
    """Declare a checkpoint whole: call it once, after every process has written its files.

    Files are flushed to the disk before the manifest is, so that losing power leaves no manifest of lost data.
    """
    files = {}
    for path in _files(checkpoint):
        with path.open("rb") as stream:
            files[path.relative_to(checkpoint).as_posix()] = {
                "bytes": path.stat().st_size,
                "sha256": sha256_of(stream),
            }
            os.fsync(stream.fileno())
    text = json.dumps({"format": _FORMAT, "files": files}, indent=2)
    write_atomically(checkpoint / MANIFEST, text + "\n")


def clear(checkpoint: Path) -> None:
    """Remove what a broken checkpoint left, before its step is saved again.

    Raises
    ------
    ConfigError
        If it is whole: checkpoints are written once.
    """
    if not checkpoint.exists():
        return
    if damage(checkpoint) is None:
        raise ConfigError(f"checkpoint '{checkpoint}' is there and whole; it is not written again")
    shutil.rmtree(checkpoint)


def damage(checkpoint: Path, *, contents: bool = True) -> str | None:
    """What is wrong with a checkpoint, in words; None if it is whole. Without `contents`, only sizes are compared."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"].items() if manifest["format"] == _FORMAT else None
    except FileNotFoundError:
        return "it was not finished"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} cannot be read"
    if files is None:
        return f"its {MANIFEST} is of another version"
    for name, expected in files:
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
        if not contents:
            continue
        with path.open("rb") as stream:
            if sha256_of(stream) != expected["sha256"]:
                return f"{name} is corrupt"
    return None


def list_checkpoints(output_dir: Path) -> list[Path]:
    """All checkpoints of a folder, whole or not, the latest first."""
    if not output_dir.is_dir():
        return []
    found = [path for path in output_dir.iterdir() if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def latest_whole(output_dir: Path) -> Latest:
    """The newest whole checkpoint, and why newer ones were passed over.

    path, skipped = latest_whole(folder)
    """
    skipped: dict[Path, str] = {}
    for checkpoint in list_checkpoints(output_dir):
        reason = damage(checkpoint)
        if reason is None:
            return Latest(checkpoint, skipped)
        skipped[checkpoint] = reason
    return Latest(None, skipped)


def rotate(output_dir: Path, keep: int, *, best: int | None = None) -> list[Path]:
    """Remove all but the `keep` newest whole checkpoints, broken ones, and what a killed process left of `final/`.

    As in transformers the best checkpoint is one of the `keep`, and stays beside the newest one where that is 1.

    Folders of that name which show no sign of this project (neither a manifest nor a curriculum's state) stay.

    Call it in one process, after the newest one was sealed. While none is whole, no checkpoint is removed. Contents
    were hashed when they were sealed and are hashed again before anything resumes; here sizes are enough.

    Parameters
    ----------
    keep : int >= 1
    best : int, optional
        The step of the best checkpoint so far, where evaluations say one.

    Returns
    -------
    list of Path
        The checkpoints that were removed, oldest first.

    Raises
    ------
    ConfigError
        If `keep` is less than 1.
    """
    if keep < 1:
        raise ConfigError(f"keep_checkpoints must be at least 1, got {keep}")
    remove_partial(output_dir)
    every = list_checkpoints(output_dir)
    whole = [path for path in every if damage(path, contents=False) is None]
    kept = whole[:keep]
    older = [path for path in whole[keep:] if step_of(path) == best]
    if older:
        kept = [*whole[: max(keep - 1, 1)], *older]
    ours = [path for path in every if (path / MANIFEST).exists() or (path / CURRICULUM_FILE).exists()]
    removed = sorted((path for path in ours if path not in kept), key=step_of) if kept else []
    for path in removed:
        (path / MANIFEST).unlink(
            missing_ok=True
        )  # first, so that half a removal leaves nothing that looks whole
        shutil.rmtree(path)
    return removed


def check_config(checkpoint: Path, config: TrainConfig) -> None:
    """Raise unless a checkpoint was made with this config, `FREE_KEYS` apart.

    Absolute paths are compared by their last part: checkpoints hold no more of them (`public_settings`).

    Raises
    ------
    ConfigError
        Names the first key that differs, in the order of TrainConfig, with both values.
    """
    if not (checkpoint / CONFIG_FILE).is_file():
        raise ConfigError(f"checkpoint '{checkpoint}' has no {CONFIG_FILE}; it was not written by sparsekv")
    check_settings(checkpoint, public_settings(read_training_config(checkpoint)), public_settings(config))


def check_settings(
    checkpoint: Path, old: Mapping[str, Any], new: Mapping[str, Any], *, what: str = "config"
) -> None:
    """Raise unless a checkpoint's settings are those of the run that is to go on from it, `FREE_KEYS` apart.

    `what` they are settings of, for the message.

    Raises
    ------
    ConfigError
        Names the first key that differs, in the order of `new`, with both values.
    """
    old, new = dict(_flat(old)), dict(_flat(new))
    if old.get("dtype") == "auto":  # a run records what that means by now; one that began earlier may go on
        old["dtype"] = new.get("dtype")
    keys = [key for key in dict.fromkeys([*new, *old]) if not {key, re.split(r"[.\[]", key)[0]} & FREE_KEYS]
    changed = [key for key in keys if old.get(key) != new.get(key)]
    if changed:
        first = changed[0]
        also = f" (also {', '.join(changed[1:4])}{', …' if len(changed) > 4 else ''})" if changed[1:] else ""
        raise ConfigError(
            f"checkpoint '{checkpoint}' is of another {what}: {first} was {old.get(first)!r}, now "
            f"{new.get(first)!r}{also}; use another output_dir, or the {what} it was made with"
        )


def _files(checkpoint: Path) -> list[Path]:
    paths = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    return [path for path in paths if path.relative_to(checkpoint).as_posix() != MANIFEST]


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as dotted keys; lists and plain values are leaves."""
    if isinstance(value, Mapping) and value:
        for key, each in value.items():
            yield from _flat(each, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value
