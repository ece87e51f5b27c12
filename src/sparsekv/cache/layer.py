"""One layer of a compacted KV cache: tokens seen are not slots stored.

Shape letters: B rows, H kv heads, D head size, T columns seen, Q new tokens.

How entries lie in memory is `Segments`' business. This module knows nothing of attention, policies or models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from sparsekv.cache.rope import Rotation
from sparsekv.cache.segments import Group, Segments
from sparsekv.errors import ConfigError

LAYER_ATTRIBUTE = "_sparsekv_layer"
"""Set on the tensors that `update` returns, so that the attention function finds the layer."""


class Reader(Protocol):
    """How a layer's entries are read, where not all of them are: per-step selection, recall from a second tier."""

    def attend(
        self, layer: SparseLayer, query: Tensor, attention_mask: Tensor | None, scaling: float | None
    ) -> Tensor:
        """Attention [B, Q, Hq, D] of queries [B, Hq, Q, D], the newest Q tokens, which are stored already."""

    def fresh(self) -> Reader:
        """A reader of the same kind for a copy of the layer."""


class SparseLayer(CacheLayerMixin):
    """A growing cache layer from which entries can be taken out, per row and kv head.

    `get_seq_length()` is tokens SEEN (so positions stay right); `stored()` says what is left.
    """

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self._store: Segments | None = None
        self.n_kv_heads = 0
        # hidden states, cos, sin [B, n, ...] of the newest tokens, for layer policies while decoding
        self.recent_inputs: tuple[Tensor, ...] | None = None
        self.reader: Reader | None = None  # None: every entry is read

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
    def store(self) -> Segments:
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
        return self.store.is_uniform

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
        """Bytes allocated: what the segments take, and the inputs that are remembered."""
        if self._store is None:
            return 0
        recent = self.recent_inputs or ()
        return self._store.nbytes + sum(t.numel() * t.element_size() for t in recent)

    def groups(self) -> Iterator[Group]:
        """Runs of neighbouring segments of equal size, in order."""
        return self.store.groups()

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
        return self.store.row(index)

    def columns(self) -> list[Tensor]:
        """Columns stored by each segment, ascending: LongTensors, row-major over (row, kv head)."""
        return self.store.columns_of_segments()

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
        if self._store is None:
            self._store = Segments.of(key_states, value_states)
        else:
            self._store.append(key_states, value_states)
        keys, values = self.dense() if self.is_uniform else (key_states.view_as(key_states), value_states)
        setattr(keys, LAYER_ATTRIBUTE, self)
        return keys, values

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
        self.check_fits(kept)
        self.forget(kept, rotation)

    def forget(self, kept: Tensor, rotation: Rotation | None = None) -> None:
        """As `keep`, where the others are really to be lost: also in a layer that would hand them over."""
        self._store = self.store.keep(kept, None, rotation)

    def check_fits(self, kept: Tensor) -> None:
        """Raise a ConfigError if `kept` [B, H or 1, T] is for other rows or columns than this layer has."""
        if kept.shape[0] != self.batch or kept.shape[-1] != self.get_seq_length():
            raise ConfigError(
                f"kept is for {kept.shape[0]} rows and {kept.shape[-1]} columns; "
                f"the cache has {self.batch} rows and has seen {self.get_seq_length()} columns"
            )

    def fork(self, kept: Tensor, rotation: Rotation | None = None) -> SparseLayer:
        """Compacted copies of a one-row layer: `kept` [C, H or 1, T] gives a layer of C rows."""
        if self.batch != 1:
            raise ConfigError(f"fork needs a cache of one row, this one has {self.batch}")
        twin = SparseLayer()
        twin.dtype, twin.device, twin.is_initialized = self.dtype, self.device, True
        twin.n_kv_heads = self.n_kv_heads
        first = torch.zeros(kept.shape[0], dtype=torch.int64, device=kept.device)
        twin._store = self.store.keep(kept, first, rotation)
        twin.reader = None if self.reader is None else self.reader.fresh()
        return twin

    @classmethod
    def joined(cls, layers: Sequence[SparseLayer], seen: int, real: Sequence[Tensor | None]) -> SparseLayer:
        """The rows of all `layers` as one, as if each had seen `seen` columns, the first of them padding. Copies.

        `real` is each layer's BoolTensor [B, T seen], False for padding; None: it has none.
        """
        twin, first = cls(), layers[0]
        twin.dtype, twin.device, twin.is_initialized = first.dtype, first.device, True
        twin.n_kv_heads = first.n_kv_heads
        twin._store = Segments.joined([layer.store for layer in layers], seen, real)
        return twin

    # ---- rows, snapshots, cropping ------------------------------------------------------------------------------

    def take_rows(self, rows: Tensor) -> None:
        """New row i is old row `rows[i]` (beam search, repeating, dropping finished rows). Copies."""
        if self._store is None:
            return
        rows = rows.to(self._store.keys.device)
        if rows.dtype == torch.bool:
            rows = rows.nonzero().flatten()
        self._store = self._store.take_rows(rows)
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
        self.forget((column < length)[None, None].expand(store.batch, 1, -1))
        self._store = replace(self.store, seen=length)

    def reset(self) -> None:
        """Forget everything."""
        self._store, self.recent_inputs = None, None

    def snapshot(self) -> Any:
        """The present state, by lengths: nothing is copied. Later appends do not disturb it."""
        if self._store is None:
            return None
        return self._store.remember(), self.recent_inputs

    def restore(self, state: Any) -> None:
        """Back to a snapshot of this layer."""
        if state is None:
            self.reset()
            return
        store, self.recent_inputs = state
        self._store = replace(store)

    def offload(self) -> None:
        raise ConfigError("SparseCache does not take part in transformers' layer offloading")
