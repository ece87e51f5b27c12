"""The output folder of a run: one identity, one writer at a time, extended by running again."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from sparsekv.errors import ConfigError
from sparsekv.evaluation.records import SCHEMA_VERSION, JsonLines
from sparsekv.files import existing_part, write_atomically

LOCK_NAME = ".lock"
RUN_NAME = "run.json"

Identity = Mapping[str, Any]
"""What must not change between the runs that share a folder: field -> value (JSON)."""


class RunFolder:
    """A folder that belongs to one run; use it as a context manager (it holds the folder's lock).

    Raises
    ------
    ConfigError
        On entering, if the path is not a usable folder, holds something else, or another process is writing
        to it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.predictions = JsonLines(self.path / "predictions.jsonl")
        self.costs = JsonLines(self.path / "costs.jsonl")
        self._lock = FileLock(str(self.path / LOCK_NAME))

    def __enter__(self) -> RunFolder:
        try:
            check_usable(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ConfigError(f"output_dir '{self.path}': another process is writing to it") from None
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ConfigError(f"output_dir '{self.path}' cannot be written: {error.strerror}") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def read_run(self) -> dict[str, Any]:
        """The content of run.json, or {} in a new folder."""
        return read_run(self.path)

    def write_run(self, run: Mapping[str, Any]) -> None:
        """Replace run.json."""
        self.write(RUN_NAME, json.dumps(run, indent=2, ensure_ascii=False) + "\n")

    def write(self, name: str, content: str | bytes) -> None:
        """Write one file of the folder through a temporary name."""
        write_atomically(self.path / name, content)


def read_run(path: Path) -> dict[str, Any]:
    """The content of a folder's run.json, or {} where there is none."""
    file = path / RUN_NAME
    if not file.exists():
        return {}
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        run = None
    if not isinstance(run, dict) or not isinstance(run.get("identity"), dict):
        raise ConfigError(
            f"output_dir '{path}': its run.json was not written by sparsekv; use another output_dir"
        )
    if run.get("schema_version") != SCHEMA_VERSION:
        raise ConfigError(
            f"output_dir '{path}' holds schema_version {run.get('schema_version')}, this version writes "
            f"{SCHEMA_VERSION}; use another output_dir"
        )
    return run


def check_usable(path: Path) -> None:
    """Raise a ConfigError unless the path can become, or already is, a run's folder."""
    existing_part(path)
    if not path.is_dir() or (path / RUN_NAME).exists():
        return
    foreign = [p.name for p in path.iterdir() if p.name != LOCK_NAME and not p.name.endswith(".tmp")]
    if foreign:
        raise ConfigError(
            f"output_dir '{path}' is not empty and holds no run of sparsekv (found '{sorted(foreign)[0]}'); "
            "use another output_dir"
        )


def check_kind(path: Path, before: Mapping[str, Any], *, variants: bool) -> None:
    """Raise a ConfigError if a folder's run is of one model and this one of variants, or the other way round."""
    if before and ("variants" in before["identity"]) != variants:
        kinds = ("one model", "several variants")
        raise ConfigError(
            f"output_dir '{path}' holds a run of {kinds[not variants]}, this one is of {kinds[variants]}; "
            "use another output_dir"
        )


def check_identity(path: Path, old: Identity, new: Identity) -> None:
    """Raise a ConfigError that says what differs between a folder's run and this one.

    Fields are compared in the order of `new`: what the user chose stands before what follows from it.
    """
    changed = [field for field in new if old.get(field) != new[field]]
    if not changed:
        return
    first = changed[0]
    also = f" (also {', '.join(changed[1:])})" if changed[1:] else ""
    raise ConfigError(
        f"output_dir '{path}' holds another run: {first} was {old.get(first)!r}, now {new[first]!r}{also}; "
        "use another output_dir"
    )
