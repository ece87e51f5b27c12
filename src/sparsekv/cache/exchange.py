"""Entries that move between a layer's buffer and somewhere else.

Shape letters: S segments (rows * kv heads), N entries, D head size.

A layer's buffer is never changed in place here: a new one is made, so snapshots of the old one stay right.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsekv.cache.segments import Segments


@dataclass(frozen=True)
class Entries:
    """Some entries of one layer, of any segments, in any order.

    Parameters
    ----------
    segment : LongTensor [N]
        Row-major over (row, kv head).
    columns : LongTensor [N]
    keys, values : FloatTensor [N, D]
    """

    segment: Tensor
    columns: Tensor
    keys: Tensor
    values: Tensor

    def __len__(self) -> int:
        return int(self.segment.shape[0])


def pick(store: Segments, wanted: Tensor) -> Entries:
    """Copies of the stored entries that `wanted` (BoolTensor [N], in the order of `Segments.live`) names."""
    segment, column, slot = store.live()
    slots = slot[wanted]
    return Entries(
        segment[wanted],
        column[wanted],
        store.keys.index_select(0, slots),
        store.values.index_select(0, slots),
    )


def repack(store: Segments, stays: Tensor, coming: Entries | None = None, room: int = 0) -> Segments:
    """A new buffer with the entries that stay and those that come, sorted by column, all of them prefix.

    Parameters
    ----------
    store : Segments, not re-rotated
    stays : BoolTensor [N], in the order of `Segments.live`
    coming : entries that are not stored now
    room : spare tail slots per segment
    """
    segment, column, slot = store.live()
    slots = slot[stays]
    n_stay = len(slots)
    segment, column = segment[stays], column[stays]
    if coming is not None:
        segment = torch.cat([segment, coming.segment.to(segment.device)])
        column = torch.cat([column, coming.columns.to(column.device)])
    order = (segment * max(store.seen, 1) + column).argsort()
    counts = torch.bincount(segment, minlength=len(store.counts))
    starts = (counts + room).cumsum(0) - (counts + room)
    rank = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[segment[order]]
    target = torch.empty_like(order)
    target[order] = starts[segment[order]] + rank
    total = len(order) + room * len(store.counts)
    buffers = []
    for name in ("keys", "values"):
        old: Tensor = getattr(store, name)
        new = old.new_empty(total, old.shape[-1])
        new.index_copy_(0, target[:n_stay], old.index_select(0, slots))
        if coming is not None:
            new.index_copy_(0, target[n_stay:], getattr(coming, name).to(old.device, old.dtype))
        buffers.append(new)
    return Segments(
        keys=buffers[0],
        values=buffers[1],
        columns=column[order].to(torch.int32),
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
