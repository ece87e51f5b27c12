"""Entries of many heads at once, by their names: what a passive store is asked for.

`Ints` and `Bools` are the arrays of its index, `NONE` in one says that there is nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

from sparsekv.errors import ConfigError

Ints: TypeAlias = npt.NDArray[np.integer]
Bools: TypeAlias = npt.NDArray[np.bool_]

NONE = -1
"""No place, no slot, no column."""

_HIGHEST = 2**31 - 2
"""Columns are 32 bits wide."""


@dataclass(frozen=True)
class EntryRequest:
    """Entries of many heads at once.

    Attributes
    ----------
    counts : int64 [B, H]
    columns : int64 or int32 [N]
    top : the highest column; -1 if there is none
    ascending : columns ascend within each (row, kv head), so none stands twice
    """

    counts: Ints
    columns: Ints
    top: int
    ascending: bool = False

    @classmethod
    def of(cls, counts: Tensor, columns: Tensor) -> EntryRequest:
        """The request of a caller.

        Raises ConfigError if it is none.
        """
        wanted, at = counts.cpu().numpy(), columns.cpu().numpy()
        if wanted.ndim != 2 or at.ndim != 1 or wanted.dtype.kind != "i" or at.dtype.kind != "i":
            raise ConfigError(
                "a request needs counts [rows, kv heads] and columns [entries], both of integers"
            )
        wanted = wanted.astype(np.int64, copy=False)
        at = np.ascontiguousarray(at, dtype=np.int64)
        # heads are few: a list of them is quicker than an array
        sizes = wanted.reshape(-1).tolist()
        ends = list(accumulate(sizes))
        if min(sizes, default=0) < 0 or sum(sizes) != len(at):
            raise ConfigError(
                f"counts of a request add up to {sum(sizes)}, but there are {len(at)} columns; counts may not be "
                "negative"
            )
        rises = at[1:] > at[:-1]
        rises[[end - 1 for end in ends if 0 < end < len(at)]] = True  # from one head to the next
        ascending = bool(rises.all())
        edges = at
        if ascending:  # the usual case: the first and the last of each head say it all
            edges = at[
                [place for end, n in zip(ends, sizes, strict=True) if n for place in (end - n, end - 1)]
            ]
        low, top = int(edges.min(initial=0)), int(edges.max(initial=NONE))
        if low < 0 or top > _HIGHEST:
            raise ConfigError(
                f"columns of a request must lie between 0 and {_HIGHEST}, got {low if low < 0 else top}"
            )
        return cls(wanted, at, top, ascending)

    def copy(self) -> EntryRequest:
        """One that keeps nothing of the caller's memory."""
        return replace(self, counts=self.counts.copy(), columns=self.columns.astype(np.int32))

    @property
    def shape(self) -> tuple[int, int, int]:
        """What it needs of an index: rows, kv heads, columns."""
        rows, heads = self.counts.shape
        return rows, heads, self.top + 1

    def segments(self) -> Iterator[tuple[int, int, int, int]]:
        """(row, kv head, start, end) of the entries of every (row, kv head) that has any."""
        start, heads = 0, self.counts.shape[1]
        for segment, n in enumerate(self.counts.reshape(-1).tolist()):
            if n:
                yield segment // heads, segment % heads, start, start + n
                start += n
