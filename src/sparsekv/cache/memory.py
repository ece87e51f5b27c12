"""The passive tier in CPU memory; pinned, and copied asynchronously, where entries come from a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sparsekv.cache.entry_log import Chunk, EntryLog
from sparsekv.cache.entry_request import Ints
from sparsekv.cache.pages import PAGE_SIZE
from sparsekv.cache.passive import PassiveStore

_CHUNK_ROWS = 1 << 16
_SMALLEST = 64


class MemoryLog(EntryLog):
    """An `EntryLog` of tensors; chunks as large as the put that needs them, or an eighth of what there is."""

    moves_on_take = True  # moving entries in memory can't fail

    def __init__(self, run: int) -> None:
        super().__init__(_CHUNK_ROWS, run)
        self._pinned = False
        self._copying: torch.cuda.Event | None = None

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(2 * c.keys.numel() * c.keys.element_size() for c in self.chunks.values())

    def _new_chunk(self, n: int, like: Tensor) -> Chunk:
        self._pinned = self._pinned or like.is_cuda
        rows = min(self.chunk_rows, max(n, self.n_used // 8, _SMALLEST))
        return Chunk(self._empty(rows, like), self._empty(rows, like))

    def _empty(self, n: int, like: Tensor) -> Tensor:
        with torch.inference_mode(False):  # a chunk may be written to later, outside of that mode
            return torch.empty(n, like.shape[-1], dtype=like.dtype, pin_memory=self._pinned)

    def _write(self, chunk: Chunk, keys: Tensor, values: Tensor) -> None:
        rows = slice(chunk.used, chunk.used + len(keys))
        chunk.keys[rows].copy_(keys, non_blocking=True)
        chunk.values[rows].copy_(values, non_blocking=True)
        if keys.is_cuda:
            self._copying = torch.cuda.Event()
            self._copying.record(torch.cuda.current_stream(keys.device))

    def _before_read(self, chunk: Chunk, rows: Ints) -> None:
        """Wait for copies from the GPU that are under way."""
        if self._copying is not None:
            self._copying.synchronize()
            self._copying = None

    def _dropped(self, chunk: Chunk) -> None:
        """Its memory goes with the last reference to it."""


class MemoryStore(PassiveStore):
    """A passive store in CPU memory.

    Where the entries come from a GPU, its memory is pinned and copies are asynchronous: `put` returns before the bytes
    have arrived, and a read waits for them.
    """

    def __init__(self, page_size: int = PAGE_SIZE) -> None:
        super().__init__(page_size)
        self._memory: dict[int, MemoryLog] = {}

    def _log(self, layer: int) -> EntryLog:
        if layer not in self._memory:
            self._memory[layer] = MemoryLog(self.page_size)
        return self._memory[layer]

    def _sharing(self, log: EntryLog) -> Iterator[int]:
        return (layer for layer, one in self._memory.items() if one is log)

    def _logs(self) -> Iterator[EntryLog]:
        return iter(self._memory.values())

    @property
    def memory_bytes(self) -> int:
        """Bytes allocated: entries, index and page summaries."""
        return super().memory_bytes + sum(log.nbytes for log in self._memory.values())

    def close(self) -> None:
        """Free everything."""
        super().close()
        self._memory = {}
