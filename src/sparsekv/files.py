"""Output folders, and files written so that a kill or a full disk leaves the old one or the new one, never a half.

Imports no torch.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from sparsekv.errors import ConfigError


def make_output_dir(path: Path) -> None:
    """Make a run's output folder, and its parents, before anything slow is loaded.

    Raises
    ------
    ConfigError
        If the path, or what it lies in, is a file, or can't be made or written. A full disk stays an `OSError`.
    """
    try:
        check_no_file(path)
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ConfigError(f"output_dir '{path}' cannot be written: {error.strerror}") from None


def check_no_file(path: Path) -> None:
    """Raise a ConfigError if an output folder, or what it lies in, is a file."""
    nearest = next((p for p in (path, *path.parents) if p.exists()), None)
    if nearest is not None and not nearest.is_dir():
        raise ConfigError(f"output_dir '{path}': '{nearest}' is a file; give a folder")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a temporary sibling and rename it: a reader sees the old file or the new one, never a half."""
    data = content.encode("utf-8", errors="backslashreplace") if isinstance(content, str) else content
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as stream:
            write_all(stream.fileno(), data)
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Have the system write down which files a folder has: a new name lasts through a loss of power only then."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: bytes) -> None:
    """Write every byte: `os.write` may take fewer."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
