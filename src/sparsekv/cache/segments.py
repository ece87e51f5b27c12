"""Keys and values of one layer, in one flat buffer.

Shape letters: B rows, H kv heads, S = B * H segments, D head size, T columns seen, N entries stored.

Entries of each (row, kv head) lie together, as a segment: a prefix of kept entries, whose number may differ per
segment, and a tail of entries appended since, the same number for all.

    buffer   │ row 0 head 0: prefix │ tail ░░│ row 0 head 1: prefix │ tail ░░│ …          ░ = spare room

Neighbouring segments of equal size form a group, which is seen as one dense [g, n, D] tensor without a copy: a uniform
cache is a single group, so the dense case needs no code of its own. Appending writes into the spare room of the tail
and never copies the prefix, except when the room is used up.

Columns (indices of the padded input) of prefix entries are kept; those of the tail are the last `tail` ones.
This module knows nothing of caches, attention, policies or models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparsekv.cache.frozen import is_frozen
from sparsekv.cache.rope import Rotation
from sparsekv.errors import ConfigError

_SPARE_SHARE, _LEAST_SPARE, _MOST_SPARE = 32, 16, 64
"""Spare slots per segment when single tokens are appended: a 32nd of what a segment stores in the mean, from 16 to 64.

So from 512 stored entries on what is allocated stays within 5 % of them; and a token pays for the copying of at most a
16th of what is stored.
"""


@dataclass
class _Guard:
    """Tail slots of one buffer that some snapshot still needs. Shared by all states that lie in that buffer."""

    tail: int = 0


class Group(NamedTuple):  # made for every layer and token: a frozen dataclass takes four times as long
    """Segments [start, stop) of equal size: `keys`, `values` [stop - start, n_prefix + tail, D] are views."""

    start: int
    stop: int
    n_prefix: int
    keys: Tensor
    values: Tensor


@dataclass
class Segments:
    """What a layer stores; a copy of this object (`replace`) shares the buffer and is a snapshot of it.

    Parameters
    ----------
    keys, values : FloatTensor [sum(counts) + S * room, D]
    columns : int32 [sum(counts)]
        Columns of the prefix entries, ascending in a segment.
    counts : S prefix lengths, row-major over (row, kv head)
    tail, room : used tail slots per segment, and tail slots there are
    seen : T
    batch, n_kv_heads : B, H
    moved : BoolTensor [sum(counts)], optional
        Keys that stand re-rotated in the buffer.
    origin : FloatTensor [moved.sum(), D], optional
        Those keys as they were first computed.
    """

    keys: Tensor
    values: Tensor
    columns: Tensor
    counts: tuple[int, ...]
    tail: int
    room: int
    seen: int
    batch: int
    n_kv_heads: int
    moved: Tensor | None = None
    origin: Tensor | None = None
    guard: _Guard = field(default_factory=_Guard)

    @classmethod
    def of(cls, key_states: Tensor, value_states: Tensor) -> Segments:
        """The first entries, [B, H, Q, D]: all of them tail."""
        batch, heads, n, _ = key_states.shape
        keys, values = (_owned(x.reshape(batch * heads * n, -1)) for x in (key_states, value_states))
        none = torch.zeros(0, dtype=torch.int32, device=key_states.device)
        return cls(keys, values, none, (0,) * (batch * heads), n, n, n, batch, heads)

    # ---- reading ------------------------------------------------------------------------------------------------

    @property
    def is_uniform(self) -> bool:
        """Every segment stores the same number of entries."""
        return len(set(self.counts)) <= 1

    @property
    def nbytes(self) -> int:
        """Bytes allocated: keys, values, spare room, columns, counts, and re-rotation's originals."""
        tensors = (self.keys, self.values, self.columns, self.moved, self.origin)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None) + 8 * len(self.counts)

    def groups(self) -> Iterator[Group]:
        """Runs of neighbouring segments of equal size, in order."""
        offset, keys, values = 0, self.keys, self.values
        for first, last, count in _runs(self.counts):
            n, size, used = last - first, count + self.room, count + self.tail
            yield Group(
                first,
                last,
                count,
                _segments(keys, offset, n, size, used),
                _segments(values, offset, n, size, used),
            )
            offset += n * size

    def row(self, index: int) -> tuple[Tensor, Tensor]:
        """Views [H, stored, D] of one row, whatever the others store.

        Raises ConfigError if the counts of its kv heads differ.
        """
        heads = self.n_kv_heads
        first = index * heads
        counts = self.counts[first : first + heads]
        if len(set(counts)) > 1:
            raise ConfigError("the kv heads of this row of the cache store different numbers of entries")
        size, used = counts[0] + self.room, counts[0] + self.tail
        offset = sum(self.counts[:first]) + first * self.room
        keys, values = (_segments(x, offset, heads, size, used) for x in (self.keys, self.values))
        return keys, values

    def columns_of_segments(self) -> list[Tensor]:
        """Columns stored by each segment, ascending: LongTensors, row-major over (row, kv head)."""
        recent = torch.arange(self.seen - self.tail, self.seen, device=self.columns.device)
        return [torch.cat([part.long(), recent]) for part in self.columns.split(self.counts)]

    # ---- growing ------------------------------------------------------------------------------------------------

    def can_append(self, n_new: int) -> bool:
        """Whether so many tokens can be written into this buffer: there is room, no snapshot needs what lies there,
        and it may be written to.
        """
        return self.guard.tail <= self.tail and self.tail + n_new <= self.room and not is_frozen(self.keys)

    def append(self, key_states: Tensor, value_states: Tensor) -> None:
        """Write [B, H, Q, D] behind every segment's tail."""
        n_new = key_states.shape[2]
        if key_states.shape[0] != self.batch:
            raise ConfigError(f"the cache holds {self.batch} rows, the model was given {key_states.shape[0]}")
        if not self.can_append(n_new):
            self._relayout(room=self.tail + (n_new if n_new > 1 else self._spare()))
        # they have another dtype where autocast began or ended meanwhile
        new_keys, new_values = (
            new.to(old.dtype).flatten(0, 1)
            for new, old in ((key_states, self.keys), (value_states, self.values))
        )
        self.tail += n_new
        self.seen += n_new
        if n_new == 1 and len(_runs(self.counts)) > 1:  # one write instead of one per group
            slots = _tails(self.counts, self.room, self.keys.device) + (self.tail - 1)
            self.keys.index_copy_(0, slots, new_keys[:, 0])
            self.values.index_copy_(0, slots, new_values[:, 0])
            return
        for group in self.groups():
            group.keys[:, -n_new:] = new_keys[group.start : group.stop]
            group.values[:, -n_new:] = new_values[group.start : group.stop]

    def _spare(self) -> int:
        stored = sum(self.counts) // max(len(self.counts), 1) + self.tail
        return min(max(_LEAST_SPARE, stored // _SPARE_SHARE), _MOST_SPARE)

    def _relayout(self, room: int) -> None:
        """Move into a fresh buffer with `room` tail slots per segment."""
        total = sum(self.counts) + len(self.counts) * room
        old = (self.keys, self.values)
        source = list(self.groups())
        self.keys, self.values = (x.new_empty(total, x.shape[-1]) for x in old)
        self.room, self.guard = room, _Guard()
        for before, after in zip(source, self.groups(), strict=True):
            after.keys.copy_(before.keys)
            after.values.copy_(before.values)

    def remember(self) -> Segments:
        """A snapshot: no later append writes over the tail that is used now."""
        self.guard.tail = max(self.guard.tail, self.tail)
        return replace(self)

    # ---- taking out ---------------------------------------------------------------------------------------------

    def keep(self, kept: Tensor, rows: Tensor | None, rotation: Rotation | None) -> Segments:
        """New row i takes from old row `rows[i]` (None: from row i) the entries whose column `kept[i]` keeps.

        `kept` is a BoolTensor [new rows, H or 1, T]; with `rotation` kept keys move to consecutive positions.
        """
        heads = self.n_kv_heads
        kept = kept.to(self.keys.device).expand(-1, heads, -1)
        if rows is None and self.tail == self.seen == kept.shape[-1]:
            counts, entry, columns, slots = self._wanted_of_whole(kept)
        else:
            counts, entry, columns, slots = self._wanted(kept, rows)
        keys, values = self.keys.index_select(0, slots), self.values.index_select(0, slots)
        moved, origin = None, None
        if rotation is not None:
            new_row = torch.arange(len(kept), device=keys.device).repeat_interleave(
                counts.view(-1, heads).sum(1)
            )
            keys, moved, origin = self._rerotate(keys, entry, columns, new_row, counts, rotation)
        return Segments(
            keys=keys,
            values=values,
            columns=columns.to(torch.int32),
            counts=tuple(counts.tolist()),
            tail=0,
            room=0,
            seen=self.seen,
            batch=len(kept),
            n_kv_heads=heads,
            moved=moved,
            origin=origin,
        )

    def _wanted_of_whole(self, kept: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `_wanted`, where nothing was taken out yet and rows stay: an entry's place in a segment is its column."""
        per_segment = kept.flatten(0, 1)
        segment, columns = per_segment.nonzero(as_tuple=True)
        return per_segment.sum(dim=1), segment * self.seen + columns, columns, segment * self.room + columns

    def _wanted(self, kept: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The entries that `kept` [new rows, H, T] names, by new segment: how many each has [new rows * H], and of each
        entry its rank in `live`, its column and its slot [N].
        """
        heads = self.n_kv_heads
        segment, column, slot = self.live()
        row, head = segment // heads, segment % heads
        sources = torch.arange(len(kept), device=slot.device) if rows is None else rows.to(slot.device)
        wanted = kept[:, head, column] & (row == sources[:, None])  # [new rows, N]
        new_row, entry = wanted.nonzero(as_tuple=True)
        counts = torch.bincount(new_row * heads + head[entry], minlength=len(kept) * heads)
        return counts, entry, column[entry], slot[entry]

    def live(self) -> tuple[Tensor, Tensor, Tensor]:
        """For every stored entry, in order: segment [N], column [N], slot in the buffer [N]."""
        counts = torch.tensor(self.counts, device=self.keys.device)
        segment, rank = self._ranks(counts)
        starts = (counts + self.room).cumsum(0) - (counts + self.room)
        in_prefix = rank < counts[segment]
        column = self.seen - self.tail + rank - counts[segment]
        column[in_prefix] = self.columns.long()
        return segment, column, starts[segment] + rank

    def _ranks(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        """For every stored entry, in order: its segment [N] and its place in that segment [N]."""
        sizes = counts + self.tail
        segment = torch.repeat_interleave(torch.arange(len(sizes), device=counts.device), sizes)
        rank = torch.arange(len(segment), device=counts.device) - (sizes.cumsum(0) - sizes)[segment]
        return segment, rank

    def _rerotate(
        self, keys: Tensor, entry: Tensor, columns: Tensor, row: Tensor, counts: Tensor, rotation: Rotation
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotate from each key's first position, never from a rotated copy: rounding must not add up."""
        base = keys
        if self.moved is not None and self.origin is not None:
            base = keys.clone()
            n_prefix = torch.tensor(self.counts, device=keys.device)
            owner, rank = self._ranks(n_prefix)
            was_moved = torch.zeros(len(owner), dtype=torch.bool, device=keys.device)
            was_moved[rank < n_prefix[owner]] = self.moved
            index = (was_moved.cumsum(0) - 1)[entry]
            now = was_moved[entry]
            base[now] = self.origin[index[now]]
        ends = counts.cumsum(0)
        segment = torch.repeat_interleave(torch.arange(len(counts), device=keys.device), counts)
        from_end = ends[segment] - torch.arange(len(segment), device=keys.device)  # 1 = newest
        delta = rotation.seen(row) - from_end - rotation.position(row, columns)
        moved = delta != 0
        out = base.clone()
        out[moved] = rotation.rotate(base[moved], delta[moved])
        return out, moved, base[moved]

    @staticmethod
    def joined(parts: Sequence[Segments], seen: int, real: Sequence[Tensor | None]) -> Segments:
        """The rows of all parts; each part's newest column becomes `seen` - 1, and all entries are prefix.

        `real` is each part's BoolTensor [B, T seen]: what it has False for, padding, is left out. None: all is real.
        """
        keys, values, columns, counts = [], [], [], []
        for part, own in zip(parts, real, strict=True):
            if part.moved is not None:
                raise ConfigError("re-rotated keys can't be joined with others")
            segment, column, slot = part.live()
            if own is not None:
                known = nn.functional.pad(own, (0, part.seen - own.shape[1]), value=True).to(column.device)
                stays = known[segment // part.n_kv_heads, column]
                segment, column, slot = segment[stays], column[stays], slot[stays]
            counts += torch.bincount(segment, minlength=len(part.counts)).tolist()
            keys.append(part.keys.index_select(0, slot))
            values.append(part.values.index_select(0, slot))
            columns.append((column + seen - part.seen).to(torch.int32))
        return Segments(
            keys=torch.cat(keys),
            values=torch.cat(values),
            columns=torch.cat(columns),
            counts=tuple(counts),
            tail=0,
            room=0,
            seen=seen,
            batch=sum(part.batch for part in parts),
            n_kv_heads=parts[0].n_kv_heads,
        )

    # ---- rows ---------------------------------------------------------------------------------------------------

    def take_rows(self, rows: Tensor) -> Segments:
        """New row i is old row `rows[i]`, a LongTensor on the buffer's device. Copies."""
        heads = self.n_kv_heads
        segments = (rows[:, None] * heads + torch.arange(heads, device=rows.device)).flatten()
        counts = torch.tensor(self.counts, device=rows.device)

        def pick(sizes: Tensor) -> Tensor:
            starts, wanted = sizes.cumsum(0) - sizes, sizes[segments]
            base = torch.repeat_interleave(starts[segments] - (wanted.cumsum(0) - wanted), wanted)
            return base + torch.arange(int(wanted.sum()), device=rows.device)

        slots, entries = pick(counts + self.room), pick(counts)
        moved, origin = self.moved, self.origin
        if moved is not None and origin is not None:
            origin = origin[(moved.cumsum(0) - 1)[entries][moved[entries]]]
            moved = moved[entries]
        return replace(
            self,
            keys=self.keys.index_select(0, slots),
            values=self.values.index_select(0, slots),
            columns=self.columns[entries],
            counts=tuple(counts[segments].tolist()),
            batch=len(rows),
            moved=moved,
            origin=origin,
            guard=_Guard(),
        )


@lru_cache(maxsize=4096)
def _runs(counts: tuple[int, ...]) -> tuple[tuple[int, int, int], ...]:
    """Runs of equal counts: (first segment, one past the last, count). Asked for every layer and token: remembered."""
    starts = [i for i, count in enumerate(counts) if i == 0 or count != counts[i - 1]]
    return tuple((a, b, counts[a]) for a, b in zip(starts, [*starts[1:], len(counts)], strict=True))


@lru_cache(maxsize=4096)
def _tails(counts: tuple[int, ...], room: int, device: torch.device) -> Tensor:
    """LongTensor [S]: the slot where each segment's tail starts."""
    sizes = torch.tensor(counts, device=device)
    return (sizes + room).cumsum(0) - room


def _segments(flat: Tensor, offset: int, n: int, size: int, used: int) -> Tensor:
    """View [n, used, D] of `n` neighbouring segments of `size` slots that start at slot `offset`."""
    width = flat.shape[-1]
    return flat.as_strided((n, used, width), (size * width, width, 1), flat.storage_offset() + offset * width)


def _owned(flat: Tensor) -> Tensor:
    """A tensor that keeps no larger storage alive (Phi-3's keys and values are slices of one projection)."""
    if flat.untyped_storage().nbytes() > flat.numel() * flat.element_size():
        return flat.clone()
    return flat
