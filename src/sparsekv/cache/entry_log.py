"""Where keys and values of passive entries lie: chunks of rows that are written once, and read in any order.

Shape letters: N entries, D head size.

Entries are appended and never overwritten; a slot (chunk number x `chunk_rows` + row) names one for good. What is no
longer used is given back by chunk: a chunk without live entries is dropped, and one that is mostly dead is emptied
first, by appending its live entries again. So memory and files share one way to write, read and reclaim.
Knows nothing of layers, columns or pages.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from sparsekv.cache.entry_request import NONE, Ints
from sparsekv.errors import ConfigError

_SLACK = 1024
"""Dead entries that nothing is done about."""

_MOST_SLOTS = 2**31 - 1
"""Slots are 32 bits wide."""


class Chunk:
    """Keys and values [capacity, D] in one place; the first `used` rows are written."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self.used = 0

    @property
    def capacity(self) -> int:
        return self.keys.shape[0]


class EntryLog(ABC):
    """Appends, reads and reclaims entries.

    Parameters
    ----------
    chunk_rows : int, a power of two
        Most entries of one chunk.
    run : int >= 1
        Entries that are often read together (a page): neighbours of this number are copied as one.
    """

    moves_on_take = False
    """Live entries may be moved to reclaim room when others are taken: only where that can't fail."""

    def __init__(self, chunk_rows: int, run: int) -> None:
        self.shift = chunk_rows.bit_length() - 1
        self.run = run
        self.chunks: dict[int, Chunk] = {}
        self._current: Chunk | None = None
        self._held = 0  # entries that only snapshots hold, as of the last `collect`
        self._left = 0  # entries of the store when whole chunks were last looked for

    @property
    def chunk_rows(self) -> int:
        return 1 << self.shift

    @property
    def n_used(self) -> int:
        """Entries written, dead ones included."""
        return sum(chunk.used for chunk in self.chunks.values())

    # ---- what memory and files do differently ---------------------------------------------------------------------

    @abstractmethod
    def _new_chunk(self, n: int, like: Tensor) -> Chunk:
        """An empty chunk for at least one, better `n` entries of `like`'s dtype and width."""

    @abstractmethod
    def _write(self, chunk: Chunk, keys: Tensor, values: Tensor) -> None:
        """Write [n, D] behind what is used, without counting it as used."""

    def _written(self, chunk: Chunk, keys: Tensor, values: Tensor) -> None:
        """All pieces of a put are written: count this one as used."""
        chunk.used += len(keys)

    @abstractmethod
    def _before_read(self, chunk: Chunk, rows: Ints) -> None:
        """Called before rows of a chunk are read; raises a ConfigError if they can't be trusted."""

    @abstractmethod
    def _dropped(self, chunk: Chunk) -> None:
        """A chunk is no longer needed."""

    def _empty(self, n: int, like: Tensor) -> Tensor:
        """Room for `n` entries that are read."""
        return torch.empty(n, like.shape[-1], dtype=like.dtype)

    # ---- writing and reading ----------------------------------------------------------------------------------------

    def append(self, keys: Tensor, values: Tensor) -> Ints:
        """Write [N, D] and return the slots, int32 [N]. After an error nothing was written."""
        slots: list[Ints] = []
        pieces: list[tuple[Chunk, int, int]] = []
        fresh: dict[int, Chunk] = {}
        chunk, number = self._current, self._number_of(self._current)
        start = 0
        try:
            while start < len(keys):
                if chunk is None or chunk.used == chunk.capacity:
                    number = next(
                        i for i in range(len(self.chunks) + len(fresh) + 1) if not self._taken(i, fresh)
                    )
                    if (number + 1) << self.shift > _MOST_SLOTS:
                        raise ConfigError(f"the passive store is full: it holds {self.n_used} entries")
                    chunk = fresh[number] = self._new_chunk(len(keys) - start, keys)
                n = min(len(keys) - start, chunk.capacity - chunk.used)
                self._write(chunk, keys[start : start + n], values[start : start + n])
                first = (number << self.shift) + chunk.used
                slots.append(np.arange(first, first + n, dtype=np.int32))
                pieces.append((chunk, start, start + n))
                start += n
                if start < len(keys):
                    chunk = None
        except BaseException:
            for made in fresh.values():
                self._dropped(made)
            raise
        self.chunks.update(fresh)
        for piece, first, last in pieces:
            self._written(piece, keys[first:last], values[first:last])
        self._current = chunk
        self._left = max(self._left, self.n_used)
        return slots[0] if len(slots) == 1 else np.concatenate(slots)

    def _number_of(self, chunk: Chunk | None) -> int:
        return next((number for number, one in self.chunks.items() if one is chunk), NONE)

    def _taken(self, number: int, fresh: dict[int, Chunk]) -> bool:
        return number in self.chunks or number in fresh

    def read(self, slots: Ints, *, values: bool = True) -> tuple[Tensor, Tensor]:
        """Keys and values [N, D] of slots int32 [N], copied; without `values` only keys (then given twice)."""
        like = next(iter(self.chunks.values())).keys
        keys = self._empty(len(slots), like)
        outputs = (keys, self._empty(len(slots), like)) if values else (keys,)
        for number, first, last in self._stretches(slots):
            if number == NONE:  # chunks in turn: read them one by one, then put everything back in order
                order = np.argsort(slots >> self.shift, kind="stable")
                back = torch.from_numpy(np.argsort(order, kind="stable"))
                keys, found = self.read(slots[order], values=values)
                return keys.index_select(0, back), found.index_select(0, back)
            chunk, rows = self.chunks[number], slots[first:last] - (number << self.shift)
            self._before_read(chunk, rows)
            plan = _Gather(rows, self.run, chunk.capacity)
            for source, out in zip((chunk.keys, chunk.values), outputs, strict=False):
                plan.copy(source, out[first:last])
        return outputs[0], outputs[-1]

    def _stretches(self, slots: Ints) -> list[tuple[int, int, int]]:
        """(chunk number, first, last) of slots that lie in one chunk; one with number NONE if there are too many."""
        if not len(slots):
            return []
        number = int(slots.min()) >> self.shift
        if number == int(slots.max()) >> self.shift:
            return [(number, 0, len(slots))]
        numbers = slots >> self.shift
        edges = [0, *(np.flatnonzero(numbers[1:] != numbers[:-1]) + 1).tolist(), len(slots)]
        if len(edges) > max(8, len(slots) // 64) and bool((numbers[1:] < numbers[:-1]).any()):
            return [(NONE, 0, len(slots))]
        return [(int(numbers[a]), a, b) for a, b in pairwise(edges)]

    # ---- giving back ------------------------------------------------------------------------------------------------

    def crowded(self, n_live: int, *, moving: bool) -> bool:
        """More entries are dead than live, so that it is worth a look.

        `n_live` are those of the store; what only snapshots hold was counted by the last `collect`. Without `moving`
        only whole chunks can go: it is worth a look whenever half of what was left is gone.
        """
        if not moving:
            if n_live > self._left // 2:
                return False
            self._left = n_live
        return self.n_used > 2 * (n_live + self._held) + _SLACK

    def drop_dead(self, live: Ints) -> None:
        """Drop chunks without any of the `live` slots."""
        needed = np.bincount(live >> self.shift, minlength=1)
        for number in [n for n in self.chunks if n >= len(needed) or not needed[n]]:
            chunk = self.chunks.pop(number)
            if chunk is self._current:
                self._current = None
            self._dropped(chunk)

    def collect(self, live: Ints, n_live: int) -> Ints | None:
        """Empty and drop mostly dead chunks. Returns table [slots]: new slot, or NONE where it didn't move.

        `live` are the slots in use, in any order, repeated or not; `n_live` of them are the store's, the others a
        snapshot's. Callers `remap` their slots by the table.
        """
        self.drop_dead(live)
        if not self.chunks:
            return None
        n_slots = (max(self.chunks, default=-1) + 1) << self.shift
        is_live = np.zeros(n_slots, bool)
        is_live[live] = True
        unique = np.flatnonzero(is_live).astype(np.int32)
        counts = np.bincount(unique >> self.shift)
        is_poor = np.zeros(len(counts), bool)
        for number, chunk in self.chunks.items():
            is_poor[number] = 2 * counts[number] <= chunk.used
        self._held = max(0, len(unique) - n_live)
        moving = unique[is_poor[unique >> self.shift]]
        if not len(moving):
            return None
        if self._current is not None and is_poor[self._number_of(self._current)]:
            self._current = None
        new = self.append(*self.read(moving))
        table = np.full(n_slots, NONE, np.int32)
        table[moving] = new
        stay = unique[table[unique] == NONE]
        self.drop_dead(np.concatenate([stay, new]))
        return table

    def forget_held(self) -> None:
        """A snapshot is gone: look again."""
        self._held = 0


_NO_BREAKS = np.zeros(0, np.int64)


class _Gather:
    """How rows of a chunk are best copied: as slices, as pages, or one by one."""

    def __init__(self, rows: Ints, run: int, capacity: int) -> None:
        self.run = run
        self.slices: list[tuple[int, int]] | None = None
        self.index: Tensor | None = None
        apart = rows[1:] - rows[:-1] != 1
        breaks = np.flatnonzero(apart) + 1 if apart.any() else _NO_BREAKS
        if len(breaks) <= len(rows) // 256:
            ends = [*breaks.tolist(), len(rows)]
            self.slices = [(int(rows[a]), b - a) for a, b in zip([0, *breaks.tolist()], ends, strict=True)]
        elif run > 1 and len(rows) % run == 0 and capacity >= run and not (breaks % run).any():
            self.index = torch.from_numpy(np.ascontiguousarray(rows[::run]))
        else:
            self.run = 1
            self.index = torch.from_numpy(np.ascontiguousarray(rows))

    def copy(self, source: Tensor, out: Tensor) -> None:
        """Copy the rows of `source` [capacity, D] into `out` [n, D]."""
        if self.slices is not None:
            start = 0
            for first, n in self.slices:
                out[start : start + n] = source[first : first + n]
                start += n
            return
        width = source.shape[1]
        if self.run > 1:
            # Overlapping view: its row i is the run of entries that starts at row i.
            shape = (source.shape[0] - self.run + 1, self.run * width)
            source, out = source.as_strided(shape, (width, 1)), out.view(-1, self.run * width)
        torch.index_select(source, 0, self.index, out=out)  # type: ignore[arg-type]
