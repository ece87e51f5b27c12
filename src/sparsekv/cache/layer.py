"""One layer of a compacted KV cache: tokens seen are not slots stored.

Shape letters: B rows, H kv heads, S = B * H segments, D head size, T columns seen.

Entries of each (row, kv head) lie together in one flat buffer, as a segment: a prefix of kept entries, whose number
may differ per segment, and a tail of entries appended since, the same number for all.

    buffer   │ row 0 head 0: prefix │ tail ░░│ row 0 head 1: prefix │ tail ░░│ …          ░ = spare room

Neighbouring segments of equal size form a group, which is seen as one dense [g, n, D] tensor without a copy: a uniform
cache is a single group, so the dense case needs no code of its own. Appending writes into the spare room of the tail
and never copies the prefix, except when the room is used up.

Columns (indices of the padded input) of prefix entries are kept; those of the tail are the last `tail` ones.
This module knows nothing of attention, policies or models.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from sparsekv.cache.rope import Rotation
from sparsekv.errors import ConfigError

LAYER_ATTRIBUTE = "_sparsekv_layer"
"""Set on the tensors that `update` returns, so that the attention function finds the layer."""

_GROWTH = (
    64  # spare slots per segment when single tokens are appended: one copy of the prefix every 64 tokens
)


@dataclass
class _Guard:
    """Tail slots of one buffer that some snapshot still needs. Shared by all states that lie in that buffer."""

    tail: int = 0


@dataclass
class _Store:
    """What a snapshot shares. `counts[s]` prefix entries, `room` tail slots of which `tail` are used."""

    keys: Tensor  # [sum(counts) + S * room, D]
    values: Tensor
    columns: Tensor  # int32 [sum(counts)], columns of the prefix entries, ascending in a segment
    counts: tuple[int, ...]
    tail: int
    room: int
    seen: int
    batch: int
    moved: Tensor | None = None  # bool [sum(counts)]: keys that stand re-rotated in the buffer
    origin: Tensor | None = None  # [moved.sum(), D]: those keys as they were first computed
    guard: _Guard = field(default_factory=_Guard)


@dataclass(frozen=True)
class Group:
    """Segments [start, stop) of equal size: `keys`, `values` [stop - start, n_prefix + tail, D] are views."""

    start: int
    stop: int
    n_prefix: int
    keys: Tensor
    values: Tensor


class SparseLayer(CacheLayerMixin):
    """A growing cache layer from which entries can be taken out, per row and kv head.

    `get_seq_length()` is tokens SEEN (so positions stay right); `stored()` says what is left.
    """

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self._store: _Store | None = None
        self.n_kv_heads = 0
        # hidden states, cos, sin [B, n, ...] of the newest tokens, for layer policies while decoding
        self.recent_inputs: tuple[Tensor, ...] | None = None

    # transformers reads these on some paths; they exist only while the layer is dense
    @property
    def keys(self) -> Tensor | None:
        """Dense view [B, H, stored, D], or None if the layer is empty or ragged."""
        return self.dense()[0] if self._store is not None and self.is_uniform else None

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._refuse_assignment(value)

    @property
    def values(self) -> Tensor | None:
        """Dense view [B, H, stored, D], or None if the layer is empty or ragged."""
        return self.dense()[1] if self._store is not None and self.is_uniform else None

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._refuse_assignment(value)

    @staticmethod
    def _refuse_assignment(value: Tensor | None) -> None:
        if value is not None:
            raise ConfigError(
                "a SparseCache layer's keys and values can't be assigned (a kvpress press would do that); "
                "use compress(model, ids, policy) or SparseCache.apply(selection)"
            )

    # ---- state ------------------------------------------------------------------------------------------------

    @property
    def store(self) -> _Store:
        if self._store is None:
            raise ConfigError("the cache layer is empty: run the model on the context first")
        return self._store

    @property
    def batch(self) -> int:
        """Rows B."""
        return self.store.batch if self._store else 0

    @property
    def tail(self) -> int:
        """Entries appended since the last compaction, per segment."""
        return self.store.tail if self._store else 0

    @property
    def intact(self) -> bool:
        """Nothing was ever taken out: slots are columns, and the stock attention applies bitwise."""
        return self._store is None or self._store.tail == self._store.seen

    @property
    def is_uniform(self) -> bool:
        """Every segment stores the same number of entries."""
        return len(set(self.store.counts)) <= 1

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self._store.seen if self._store else 0

    def get_mask_sizes(self, cache_position: Tensor) -> tuple[int, int]:
        """(width, offset) of the mask for the next forward: the widest segment, right-aligned to what was seen."""
        n_query = int(cache_position.shape[0])
        if self._store is None:
            return n_query, 0
        stored = max(self.store.counts) + self.store.tail
        return stored + n_query, self.store.seen - stored

    def get_max_cache_shape(self) -> int:
        """No fixed maximum."""
        return -1

    def stored(self) -> Tensor:
        """IntTensor [B, H]: entries stored."""
        store = self.store
        return torch.tensor(store.counts, dtype=torch.int64).view(store.batch, self.n_kv_heads) + store.tail

    @property
    def nbytes(self) -> int:
        """Bytes allocated: keys, values, spare room, columns, counts, and re-rotation's originals."""
        if self._store is None:
            return 0
        store = self._store
        tensors = [
            store.keys,
            store.values,
            store.columns,
            store.moved,
            store.origin,
            *(self.recent_inputs or ()),
        ]
        return sum(t.numel() * t.element_size() for t in tensors if t is not None) + 8 * len(store.counts)

    def groups(self) -> Iterator[Group]:
        """Runs of neighbouring segments of equal size, in order."""
        store, offset = self.store, 0
        for first, last, count in _runs(store.counts):
            n, size, used = last - first, count + store.room, count + store.tail
            keys = _segments(store.keys, offset, n, size)[:, :used]
            values = _segments(store.values, offset, n, size)[:, :used]
            yield Group(first, last, count, keys, values)
            offset += n * size

    def dense(self) -> tuple[Tensor, Tensor]:
        """Views [B, H, stored, D] of a uniform layer.

        Raises ConfigError if the counts differ.
        """
        if not self.is_uniform:
            raise ConfigError("the rows or kv heads of this cache layer store different numbers of entries")
        (group,) = self.groups()
        shape = (self.batch, self.n_kv_heads)
        return group.keys.unflatten(0, shape), group.values.unflatten(0, shape)

    def row(self, index: int) -> tuple[Tensor, Tensor]:
        """Views [H, stored, D] of one row, whatever the others store.

        Raises ConfigError if the counts of its kv heads differ.
        """
        store, heads = self.store, self.n_kv_heads
        first = index * heads
        counts = store.counts[first : first + heads]
        if len(set(counts)) > 1:
            raise ConfigError("the kv heads of this row of the cache store different numbers of entries")
        size, used = counts[0] + store.room, counts[0] + store.tail
        offset = sum(store.counts[:first]) + first * store.room
        keys, values = (_segments(x, offset, heads, size)[:, :used] for x in (store.keys, store.values))
        return keys, values

    def columns(self) -> list[Tensor]:
        """Columns stored by each segment, ascending: LongTensors, row-major over (row, kv head)."""
        store = self.store
        recent = torch.arange(store.seen - store.tail, store.seen, device=store.columns.device)
        return [torch.cat([part.long(), recent]) for part in store.columns.split(store.counts)]

    # ---- growing ----------------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.n_kv_heads = key_states.shape[1]
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, cache_kwargs: dict[str, Any] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Append [B, H, Q, D]. Returns all entries as dense views, or only the new ones if the layer is ragged.

        Either way the tensors carry this layer, from which the "sparsekv" attention reads.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        batch, heads, n_new, _ = key_states.shape
        if self._store is None:
            flat_keys, flat_values = (
                _owned(x.reshape(batch * heads * n_new, -1)) for x in (key_states, value_states)
            )
            none = torch.zeros(0, dtype=torch.int32, device=key_states.device)
            self._store = _Store(
                flat_keys, flat_values, none, (0,) * (batch * heads), n_new, n_new, n_new, batch
            )
        else:
            self._append(key_states, value_states)
        keys, values = self.dense() if self.is_uniform else (key_states.view_as(key_states), value_states)
        setattr(keys, LAYER_ATTRIBUTE, self)
        return keys, values

    def _append(self, key_states: Tensor, value_states: Tensor) -> None:
        store, n_new = self.store, key_states.shape[2]
        if key_states.shape[0] != store.batch:
            raise ConfigError(
                f"the cache holds {store.batch} rows, the model was given {key_states.shape[0]}"
            )
        if store.tail + n_new > store.room or store.tail < store.guard.tail:
            spare = n_new if n_new > 1 else _GROWTH
            self._relayout(room=store.tail + spare)
        new_keys, new_values = key_states.flatten(0, 1), value_states.flatten(0, 1)
        store.tail += n_new
        store.seen += n_new
        for group in self.groups():
            group.keys[:, -n_new:] = new_keys[group.start : group.stop]
            group.values[:, -n_new:] = new_values[group.start : group.stop]

    def _relayout(self, room: int) -> None:
        """Move into a fresh buffer with `room` tail slots per segment."""
        store = self.store
        counts = torch.tensor(store.counts)
        total = int(counts.sum()) + len(store.counts) * room
        old = (store.keys, store.values)
        source = list(self.groups())
        store.keys, store.values = (x.new_empty(total, x.shape[-1]) for x in old)
        store.room, store.guard = room, _Guard()
        for before, after in zip(source, self.groups(), strict=True):
            after.keys.copy_(before.keys)
            after.values.copy_(before.values)

    # ---- taking out ---------------------------------------------------------------------------------------------

    def keep(self, kept: Tensor, rotation: Rotation | None = None) -> None:
        """Compact to the entries whose column is kept; their memory is freed.

        Parameters
        ----------
        kept : BoolTensor [B, H or 1, T seen]
            True where the entry of that column stays. Columns taken out before are ignored.
        rotation : Rotation, optional
            Re-rotate the kept keys to consecutive positions.

        Raises
        ------
        ConfigError
            If `kept` is for another number of rows or columns.
        """
        if kept.shape[0] != self.batch or kept.shape[-1] != self.get_seq_length():
            raise ConfigError(
                f"kept is for {kept.shape[0]} rows and {kept.shape[-1]} columns; "
                f"the cache has {self.batch} rows and has seen {self.get_seq_length()} columns"
            )
        rows = torch.arange(self.batch, device=kept.device)
        self._rebuild(kept, rows, rotation)

    def fork(self, kept: Tensor, rotation: Rotation | None = None) -> SparseLayer:
        """Compacted copies of a one-row layer: `kept` [C, H or 1, T] gives a layer of C rows."""
        if self.batch != 1:
            raise ConfigError(f"fork needs a cache of one row, this one has {self.batch}")
        twin = SparseLayer()
        twin.dtype, twin.device, twin.is_initialized = self.dtype, self.device, True
        twin.n_kv_heads = self.n_kv_heads
        twin._store = replace(self.store)
        twin._rebuild(kept, torch.zeros(kept.shape[0], dtype=torch.int64, device=kept.device), rotation)
        return twin

    def _live(self) -> tuple[Tensor, Tensor, Tensor]:
        """For every stored entry, in order: segment [N], column [N], slot in the buffer [N]."""
        store = self.store
        device = store.keys.device
        counts = torch.tensor(store.counts, device=device)
        sizes = counts + store.tail
        segment = torch.repeat_interleave(torch.arange(len(store.counts), device=device), sizes)
        rank = torch.arange(int(sizes.sum()), device=device) - (sizes.cumsum(0) - sizes)[segment]
        starts = (counts + store.room).cumsum(0) - (counts + store.room)
        in_prefix = rank < counts[segment]
        column = store.seen - store.tail + rank - counts[segment]
        column[in_prefix] = store.columns.long()
        return segment, column, starts[segment] + rank

    def _rebuild(self, kept: Tensor, rows: Tensor, rotation: Rotation | None) -> None:
        """New row i takes from old row `rows[i]` the entries whose column `kept[i]` keeps."""
        store, heads = self.store, self.n_kv_heads
        segment, column, slot = self._live()
        kept = kept.to(slot.device).expand(-1, heads, -1)
        row, head = segment // heads, segment % heads
        wanted = kept[:, head, column] & (row == rows.to(slot.device)[:, None])  # [new rows, N]
        new_row, entry = wanted.nonzero(as_tuple=True)
        n_rows = kept.shape[0]
        counts = torch.bincount(new_row * heads + head[entry], minlength=n_rows * heads)
        slots = slot[entry]
        keys, values = store.keys.index_select(0, slots), store.values.index_select(0, slots)
        columns = column[entry]
        moved, origin = None, None
        if rotation is not None:
            keys, moved, origin = self._rerotate(keys, entry, columns, new_row, counts, rotation)
        self._store = _Store(
            keys=keys,
            values=values,
            columns=columns.to(torch.int32),
            counts=tuple(counts.tolist()),
            tail=0,
            room=0,
            seen=store.seen,
            batch=n_rows,
            moved=moved,
            origin=origin,
        )

    def _rerotate(
        self, keys: Tensor, entry: Tensor, columns: Tensor, row: Tensor, counts: Tensor, rotation: Rotation
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotate from each key's first position, never from a rotated copy: rounding must not add up."""
        store = self.store
        base = keys
        if store.moved is not None and store.origin is not None:
            base = keys.clone()
            n_prefix = torch.tensor(store.counts, device=keys.device)
            sizes = n_prefix + store.tail
            owner = torch.repeat_interleave(torch.arange(len(sizes), device=keys.device), sizes)
            rank = torch.arange(len(owner), device=keys.device) - (sizes.cumsum(0) - sizes)[owner]
            was_moved = torch.zeros(len(owner), dtype=torch.bool, device=keys.device)
            was_moved[rank < n_prefix[owner]] = store.moved
            index = (was_moved.cumsum(0) - 1)[entry]
            now = was_moved[entry]
            base[now] = store.origin[index[now]]
        ends = counts.cumsum(0)
        segment = torch.repeat_interleave(torch.arange(len(counts), device=keys.device), counts)
        from_end = ends[segment] - torch.arange(len(segment), device=keys.device)  # 1 = newest
        delta = rotation.seen(row) - from_end - rotation.position(row, columns)
        moved = delta != 0
        out = base.clone()
        out[moved] = rotation.rotate(base[moved], delta[moved])
        return out, moved, base[moved]

    # ---- rows, snapshots, cropping ------------------------------------------------------------------------------

    def take_rows(self, rows: Tensor) -> None:
        """New row i is old row `rows[i]` (beam search, repeating, dropping finished rows). Copies."""
        if self._store is None:
            return
        store, heads = self.store, self.n_kv_heads
        rows = rows.to(store.keys.device)
        if rows.dtype == torch.bool:
            rows = rows.nonzero().flatten()
        segments = (rows[:, None] * heads + torch.arange(heads, device=rows.device)).flatten()
        counts = torch.tensor(store.counts, device=rows.device)

        def pick(sizes: Tensor) -> Tensor:
            starts, wanted = sizes.cumsum(0) - sizes, sizes[segments]
            base = torch.repeat_interleave(starts[segments] - (wanted.cumsum(0) - wanted), wanted)
            return base + torch.arange(int(wanted.sum()), device=rows.device)

        slots, entries = pick(counts + store.room), pick(counts)
        moved, origin = store.moved, store.origin
        if moved is not None and origin is not None:
            origin = origin[(moved.cumsum(0) - 1)[entries][moved[entries]]]
            moved = moved[entries]
        self._store = replace(
            store,
            keys=store.keys.index_select(0, slots),
            values=store.values.index_select(0, slots),
            columns=store.columns[entries],
            counts=tuple(counts[segments].tolist()),
            batch=len(rows),
            moved=moved,
            origin=origin,
            guard=_Guard(),
        )
        if self.recent_inputs is not None:
            self.recent_inputs = tuple(x[rows.to(x.device)] for x in self.recent_inputs)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search."""
        self.take_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, in place."""
        self.take_rows(torch.arange(self.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows stay."""
        self.take_rows(torch.as_tensor(indices))

    def crop(self, max_length: int) -> None:
        """Forget the newest tokens, down to `max_length` tokens seen (negative: that many fewer).

        Entries that were taken out before do not come back.
        """
        if self._store is None:
            return
        store = self.store
        length = store.seen + max_length if max_length < 0 else max_length
        dropped = store.seen - max(length, 0)
        if dropped <= 0:
            return
        if self.recent_inputs is not None:
            left = self.recent_inputs[0].shape[1] - dropped
            self.recent_inputs = tuple(x[:, :left] for x in self.recent_inputs) if left > 0 else None
        if dropped <= store.tail:
            # The buffer stays: only its used part shrinks. Its guard keeps a snapshot that needs the rest intact.
            self._store = replace(store, tail=store.tail - dropped, seen=store.seen - dropped)
            return
        column = torch.arange(store.seen, device=store.keys.device)
        moved_before = store.moved is not None
        if moved_before:
            raise ConfigError(
                "a re-rotated cache can't be cropped into its compacted part; use snapshot and restore"
            )
        self.keep((column < length)[None, None].expand(store.batch, 1, -1))
        self._store = replace(self.store, seen=length)

    def reset(self) -> None:
        """Forget everything."""
        self._store, self.recent_inputs = None, None

    def snapshot(self) -> Any:
        """The present state, by lengths: nothing is copied. Later appends do not disturb it."""
        if self._store is None:
            return None
        self._store.guard.tail = max(self._store.guard.tail, self._store.tail)
        return replace(self._store), self.recent_inputs

    def restore(self, state: Any) -> None:
        """Back to a snapshot of this layer."""
        if state is None:
            self.reset()
            return
        store, self.recent_inputs = state
        self._store = replace(store)

    def offload(self) -> None:
        raise ConfigError("SparseCache does not take part in transformers' layer offloading")


@lru_cache(maxsize=4096)
def _runs(counts: tuple[int, ...]) -> tuple[tuple[int, int, int], ...]:
    """Runs of equal counts: (first segment, one past the last, count). Asked for every layer and token: remembered."""
    starts = [i for i, count in enumerate(counts) if i == 0 or count != counts[i - 1]]
    return tuple((a, b, counts[a]) for a, b in zip(starts, [*starts[1:], len(counts)], strict=True))


def _segments(flat: Tensor, offset: int, n: int, size: int) -> Tensor:
    """View [n, size, D] of `n` neighbouring segments that start at slot `offset`."""
    return flat.narrow(0, offset, n * size).view(n, size, flat.shape[-1])


def _owned(flat: Tensor) -> Tensor:
    """A tensor that keeps no larger storage alive (Phi-3's keys and values are slices of one projection)."""
    if flat.untyped_storage().nbytes() > flat.numel() * flat.element_size():
        return flat.clone()
    return flat
