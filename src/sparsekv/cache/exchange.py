"""Entries that move between a layer's buffer and somewhere else.

Shape letters: B rows, H kv heads, S = B * H segments, N entries stored, n entries of the fullest segment, D head size.

A layer's buffer is never changed in place here: a new one is made, so snapshots of the old one stay right. Which entry
goes where is worked out in numpy: with a few hundred integers an operation of torch costs several times as much.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sparsekv.cache.entry_request import NONE, Bools, Ints
from sparsekv.cache.segments import Segments


@dataclass(frozen=True)
class Entries:
    """Some entries of one layer, segment by segment.

    Parameters
    ----------
    segment : int64 [N], ascending
        Row-major over (row, kv head).
    columns : int64 [N], in any order within a segment
    keys, values : FloatTensor [N, D]
    """

    segment: Ints
    columns: Ints
    keys: Tensor
    values: Tensor

    def __len__(self) -> int:
        return len(self.segment)


class Residents:
    """What a buffer holds at this moment, entry by entry, in the order of `Segments.live`.

    Parameters
    ----------
    store : Segments, not re-rotated
    real : bool [B, T seen], optional
        False for padding.

    Attributes
    ----------
    sizes, first : int64 [S]
        Entries of each segment, and its first column that is no padding.
    segment, column, slot : int64 [N]
        Of each entry: whose it is, its column, where it lies in the buffer.
    alive : bool [N]
        False for padding.
    """

    def __init__(self, store: Segments, real: Bools | None = None) -> None:
        self.store = store
        counts = np.asarray(store.counts, np.int64)
        self.sizes = counts + store.tail
        n_segments, n = len(counts), int(self.sizes.sum())
        self.segment = np.repeat(np.arange(n_segments), self.sizes)
        rank = np.arange(n) - np.repeat(self.sizes.cumsum() - self.sizes, self.sizes)
        room = counts + store.room
        self.slot = rank + np.repeat(room.cumsum() - room, self.sizes)
        is_prefix = rank < np.repeat(counts, self.sizes)
        self.column = np.empty(n, np.int64)
        self.column[is_prefix] = store.columns.cpu().numpy()
        self.column[~is_prefix] = np.tile(np.arange(store.seen - store.tail, store.seen), n_segments)
        if real is None:
            self.first, self.alive = np.zeros(n_segments, np.int64), np.ones(n, bool)
        else:
            self.first = real.argmax(axis=1).repeat(store.n_kv_heads)
            self.alive = real[self.segment // store.n_kv_heads, self.column]

    @property
    def exists(self) -> Bools:
        """[S, n]: which places of the padded layout hold an entry."""
        return np.arange(int(self.sizes.max())) < self.sizes[:, None]

    def padded(self, of_entries: npt.NDArray[Any], absent: Any) -> npt.NDArray[Any]:
        """[S, n] from one value per entry; `absent` where there is none."""
        there = self.exists
        out = np.full(there.shape, absent, of_entries.dtype)
        out[there] = of_entries
        return out

    def pick(self, wanted: Bools) -> Entries:
        """Copies of the entries that `wanted` [N] names."""
        slots = torch.from_numpy(self.slot[wanted]).to(self.store.keys.device)
        keys, values = (x.index_select(0, slots) for x in (self.store.keys, self.store.values))
        return Entries(self.segment[wanted], self.column[wanted], keys, values)

    def repack(self, stays: Bools, coming: Entries | None = None, room: int = 0) -> Segments:
        """A new buffer with the entries that stay and those that come, sorted by column, all of them prefix.

        Parameters
        ----------
        stays : [N]
        coming : entries that are not stored now
        room : spare tail slots per segment
        """
        store = self.store
        segment, column, source = self.segment[stays], self.column[stays], self.slot[stays]
        if coming is not None:
            segment = np.concatenate([segment, coming.segment])
            column = np.concatenate([column, coming.columns])
            source = np.concatenate([source, np.full(len(coming), NONE)])
        order = np.argsort(segment * max(store.seen, 1) + column, kind="stable")
        segment, column, source = segment[order], column[order], source[order]
        counts = np.bincount(segment, minlength=len(store.counts))
        target = np.arange(len(order)) + room * segment
        device = store.keys.device
        slots = np.zeros(len(order) + room * len(counts), np.int64)  # spare slots get a copy of any entry
        slots[target] = np.maximum(source, 0)
        taken = torch.from_numpy(slots).to(device)
        keys, values = store.keys.index_select(0, taken), store.values.index_select(0, taken)
        if coming is not None:
            new = torch.from_numpy(target[source == NONE]).to(device)
            came = torch.from_numpy(order[source == NONE] - int(stays.sum())).to(coming.keys.device)
            for buffer, given in ((keys, coming.keys), (values, coming.values)):
                buffer.index_copy_(0, new, given.index_select(0, came).to(device, buffer.dtype))
        return Segments(
            keys=keys,
            values=values,
            columns=torch.from_numpy(column.astype(np.int32)).to(device),
            counts=tuple(counts.tolist()),
            tail=0,
            room=room,
            seen=store.seen,
            batch=store.batch,
            n_kv_heads=store.n_kv_heads,
        )


def with_room(store: Segments, room: int) -> Segments:
    """The same entries in a buffer with `room` tail slots per segment, at least as many as are used."""
    total = sum(store.counts) + len(store.counts) * room
    keys, values = (x.new_empty(total, x.shape[-1]) for x in (store.keys, store.values))
    moved = replace(store, keys=keys, values=values, room=room, guard=type(store.guard)())
    for before, after in zip(store.groups(), moved.groups(), strict=True):
        after.keys.copy_(before.keys)
        after.values.copy_(before.values)
    return moved
