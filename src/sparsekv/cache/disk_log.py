"""Passive entries in memory-mapped safetensors files, whose every byte is checked before it is used.

Shape letters: N entries, D head size, R rows of a file.

A file holds `keys` and `values` [R, D], is as large as it will ever be from the start (a hole until it is written), and
is filled from the front. Rows are summed up in blocks of `BLOCK_ROWS` with xxHash's XXH3, keys and values apart; the
sums are of what was put, not of what a file was found to hold. A block is checked when it is first read, and again
whenever the file's time stamps say that it was written to. Time stamps are coarse, so a file that has just been written
to is not believed: what a store returns was summed up after any change that anyone could have made to it.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor

from sparsekv.cache.entry_log import Chunk, EntryLog
from sparsekv.cache.entry_request import Ints
from sparsekv.errors import ConfigError

_BLOCK_SHIFT = 8
BLOCK_ROWS = 1 << _BLOCK_SHIFT
"""Entries that share a checksum."""

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""As safetensors names them."""

_HEADER = 4096  # bytes; tensors start at a page of memory
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_COARSE_NS = 50_000_000
"""Two changes may share a time stamp if they are no further apart than this: a file system's clock ticks."""


def failed(path: Path, error: OSError, doing: str) -> ConfigError:
    """The error for a file or folder that the system refuses."""
    if error.errno in _FULL:
        return ConfigError(
            f"passive folder '{path.parent}' is full: '{path.name}' cannot be {doing} ({error.strerror}); free some "
            "room"
        )
    return ConfigError(f"passive file '{path}' cannot be {doing}: {error.strerror or error}")


class FileChunk(Chunk):
    """One file of entries.

    Parameters
    ----------
    path : Path
    capacity : int
        R, a multiple of BLOCK_ROWS.
    dtype, width : of the entries (D = `width`)
    create : bool
        Make the file; otherwise it must be there, as it was made.

    Raises
    ------
    ConfigError
        If it can't be made, is missing, has another size, or another header.
    """

    def __init__(self, path: Path, capacity: int, dtype: torch.dtype, width: int, *, create: bool) -> None:
        self.path = path
        self.row_bytes = width * dtype.itemsize
        self.size = _HEADER + 2 * capacity * self.row_bytes
        header = _header(capacity, dtype, width)
        flags = os.O_RDWR | (os.O_CREAT | os.O_EXCL if create else 0) | getattr(os, "O_CLOEXEC", 0)
        try:
            self.descriptor = os.open(path, flags, 0o644)
        except FileNotFoundError:
            raise self._damaged("is missing") from None
        except OSError as error:
            raise failed(path, error, "made" if create else "opened") from error
        # A store that is dropped without `close` must not keep its files open.
        self._close = weakref.finalize(self, os.close, self.descriptor)
        self._close.atexit = False
        try:
            if create:
                os.ftruncate(self.descriptor, self.size)
                _pwrite(self.descriptor, header, 0)
            self._check_size(os.fstat(self.descriptor))
            if os.pread(self.descriptor, _HEADER, 0) != header:
                raise self._damaged("has a header that was not written by this store")
            mapped = mmap.mmap(self.descriptor, self.size)
        except OSError as error:
            self.discard(remove=create)
            raise failed(path, error, "made" if create else "read") from error
        except ConfigError:
            self._close()
            raise
        parts = torch.frombuffer(mapped, dtype=dtype, count=2 * capacity * width, offset=_HEADER)
        keys, values = parts.view(2, capacity, width)
        super().__init__(keys, values)
        self.sums = np.zeros((capacity // BLOCK_ROWS, 2), np.uint64)
        self._checked = np.zeros(len(self.sums), np.int64)  # rows of each block that were found to be right
        self._known: tuple[int, ...] | None = None  # the file's state that `_checked` is about
        self._running: tuple[xxhash.xxh3_64, xxhash.xxh3_64] | None = (
            None  # of the block that is being filled
        )
        self.unsynced = create

    # ---- writing ----------------------------------------------------------------------------------------------------

    def write(self, keys: Tensor, values: Tensor) -> None:
        """Write [n, D] behind what is used."""
        self.look()
        start = _HEADER + self.used * self.row_bytes
        try:
            _pwrite(self.descriptor, _bytes(keys), start)
            _pwrite(self.descriptor, _bytes(values), start + self.capacity * self.row_bytes)
        except OSError as error:
            raise failed(self.path, error, "written") from error
        self.unsynced = True
        self._known = None

    def count(self, keys: Tensor, values: Tensor) -> None:
        """Count what was written as used, and sum it up from memory."""
        start = 0
        while start < len(keys):
            inside = self.used % BLOCK_ROWS
            n = min(BLOCK_ROWS - inside, len(keys) - start)
            if inside == 0:
                self._running = (xxhash.xxh3_64(), xxhash.xxh3_64())
            sums = self._running or self._resumed()
            for one, part in zip(sums, (keys, values), strict=True):
                one.update(_bytes(part[start : start + n]))
            self._running = sums
            for side, one in enumerate(sums):
                self.sums[self.used // BLOCK_ROWS, side] = one.intdigest()
            self.used += n
            start += n

    def _resumed(self) -> tuple[xxhash.xxh3_64, xxhash.xxh3_64]:
        """Running sums of the block that is being filled, in a file that was opened again."""
        block = self.used // BLOCK_ROWS
        self.check(np.array([block * BLOCK_ROWS]))
        rows = slice(block * BLOCK_ROWS, self.used)
        return xxhash.xxh3_64(_bytes(self.keys[rows])), xxhash.xxh3_64(_bytes(self.values[rows]))

    def sync(self) -> None:
        """Have the system write everything down."""
        if self.unsynced:
            os.fsync(self.descriptor)
            self.unsynced = False

    # ---- reading ----------------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Notice if the file was written to, cut or removed.

        Raises ConfigError if it is gone or has another size: its mapping must not be read then.
        """
        try:
            found = os.stat(self.path)
        except OSError:
            raise self._damaged("is missing") from None
        self._check_size(found)
        now = _state(found)
        if now != self._known:
            self._checked[:] = 0
            recent = time.time_ns() - max(found.st_mtime_ns, found.st_ctime_ns) < _COARSE_NS
            self._known = None if recent else now

    def check(self, rows: Ints) -> None:
        """Sum up the blocks of rows that were not found to be right yet.

        Raises ConfigError if one isn't what was put there.
        """
        self.look()
        last = -(-self.used // BLOCK_ROWS)
        there = np.minimum(self.used - np.arange(last) * BLOCK_ROWS, BLOCK_ROWS)
        open_blocks = self._checked[:last] < there
        if not open_blocks.any():
            return
        touched = np.zeros(last, bool)
        touched[rows >> _BLOCK_SHIFT] = True
        for block in np.flatnonzero(touched & open_blocks).tolist():
            first, end = block * BLOCK_ROWS, block * BLOCK_ROWS + int(there[block])
            for part, right in zip((self.keys, self.values), self.sums[block], strict=True):
                if xxhash.xxh3_64_intdigest(_bytes(part[first:end])) != int(right):
                    raise self._damaged(
                        f"is damaged: entries {first} to {end - 1} do not match their checksum"
                    )
            self._checked[block] = there[block]

    def discard(self, *, remove: bool) -> None:
        """Close the file; its mapping goes with the last tensor on it."""
        self._close()
        if remove:
            self.path.unlink(missing_ok=True)

    def _check_size(self, found: os.stat_result) -> None:
        if found.st_size != self.size:
            raise self._damaged(f"has {found.st_size} bytes instead of {self.size}: it was cut or added to")

    def _damaged(self, what: str) -> ConfigError:
        return ConfigError(
            f"passive file '{self.path}' {what}; restore the folder from a copy, or remove it and start again"
        )


class DiskLog(EntryLog):
    """An `EntryLog` of files in one folder.

    Parameters
    ----------
    folder : Path
    file_bytes : int
        No file is larger.
    dtype, width : of the entries
    run : entries per page
    retire : called with the path of a file that is no longer needed
    """

    def __init__(
        self,
        folder: Path,
        file_bytes: int,
        dtype: torch.dtype,
        width: int,
        run: int,
        retire: Callable[[FileChunk], None],
    ) -> None:
        rows = max(1, (file_bytes - _HEADER) // (2 * width * dtype.itemsize))
        super().__init__(max(BLOCK_ROWS, 1 << (rows.bit_length() - 1)), run)
        self.folder, self.dtype, self.width = folder, dtype, width
        self.retire = retire
        self.serial = 0

    def files(self) -> dict[int, FileChunk]:
        """Files by chunk number."""
        return {number: chunk for number, chunk in self.chunks.items() if isinstance(chunk, FileChunk)}

    def reopen(self, number: int, name: str, used: int, sums: Ints) -> None:
        """Take up a file that was written before, of which `used` rows count."""
        chunk = FileChunk(self.folder / name, self.chunk_rows, self.dtype, self.width, create=False)
        chunk.used = used
        chunk.sums[: len(sums)] = sums
        self.chunks[number] = chunk
        if used < chunk.capacity:
            self._current = chunk

    def append(self, keys: Tensor, values: Tensor) -> Ints:
        """As `EntryLog.append`; entries come from any device."""
        return super().append(keys.cpu().contiguous(), values.cpu().contiguous())

    def _new_chunk(self, n: int, like: Tensor) -> Chunk:
        self.serial += 1
        path = self.folder / f"entries-{self.serial:08d}.safetensors"
        return FileChunk(path, self.chunk_rows, self.dtype, self.width, create=True)

    def _write(self, chunk: Chunk, keys: Tensor, values: Tensor) -> None:
        if isinstance(chunk, FileChunk):
            chunk.write(keys, values)

    def _written(self, chunk: Chunk, keys: Tensor, values: Tensor) -> None:
        if isinstance(chunk, FileChunk):
            chunk.count(keys, values)

    def _before_read(self, chunk: Chunk, rows: Ints) -> None:
        if isinstance(chunk, FileChunk):
            chunk.check(rows)

    def _dropped(self, chunk: Chunk) -> None:
        if isinstance(chunk, FileChunk):
            self.retire(chunk)


def _header(capacity: int, dtype: torch.dtype, width: int) -> bytes:
    """A safetensors header of _HEADER bytes, padded with spaces as the format allows."""
    size = capacity * width * dtype.itemsize
    tensors = {
        name: {"dtype": DTYPES[dtype], "shape": [capacity, width], "data_offsets": [i * size, (i + 1) * size]}
        for i, name in enumerate(("keys", "values"))
    }
    text = json.dumps({"__metadata__": {"format": "pt"}, **tensors}).encode().ljust(_HEADER - 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(entries: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, without a copy."""
    return entries.view(torch.uint8).numpy().reshape(-1).data


def _pwrite(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write every byte: `os.pwrite` may take fewer."""
    view = memoryview(data)
    while view:
        n = os.pwrite(descriptor, view, offset)
        view, offset = view[n:], offset + n


def _state(found: os.stat_result) -> tuple[int, ...]:
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
