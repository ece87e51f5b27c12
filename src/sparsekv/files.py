"""The cache folder, output folders, and files written so that a kill or a full disk leaves the old one or the new one,
never a half.

Imports no torch.
"""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from sparsekv.errors import ConfigError


def cache_home(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Where models and compiled code are kept: `cache_dir`, $SPARSEKV_HOME, $XDG_CACHE_HOME/sparsekv or
    ~/.cache/sparsekv.
    """
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    if home := os.environ.get("SPARSEKV_HOME"):
        return Path(home).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "sparsekv"
    return Path.home() / ".cache" / "sparsekv"


def check_output_dir(path: Path) -> None:
    """Raise unless a run's output folder can be made and written, before anything slow is loaded; leaves no trace.

    Raises
    ------
    ConfigError
        If the path, or what it lies in, is a file, or can't be written. A full disk stays an `OSError`.
    """
    try:
        # A folder of another name tells what permissions don't (/proc), and several processes may try at once.
        with tempfile.TemporaryDirectory(prefix=".check-", dir=existing_part(path)):
            pass
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ConfigError(f"output_dir '{path}' cannot be written: {error.strerror}") from None


def existing_part(path: Path) -> Path:
    """An output folder, or the nearest folder above it that exists.

    Raises
    ------
    ConfigError
        If that is a file.
    OSError
        If the path can't be looked up, for example because a name in it is too long.
    """
    nearest = next(p for p in (path, *path.parents, Path()) if _exists(p))
    if not nearest.is_dir():
        raise ConfigError(f"output_dir '{path}': '{nearest}' is a file; give a folder")
    return nearest


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


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
