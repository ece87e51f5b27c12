"""A cache layer whose entries lie in two tiers: resident in the buffer, or in the passive store.

Shape letters: B rows, H kv heads, S = B * H segments, T columns seen, N entries stored, D head size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsekv.cache.entry_request import Bools, Ints
from sparsekv.cache.exchange import Residents, with_room
from sparsekv.cache.layer import Reader, SparseLayer
from sparsekv.cache.rope import Rotation
from sparsekv.cache.segments import Segments
from sparsekv.cache.tiers import LENT, Tiers
from sparsekv.errors import ConfigError

_GROWTH = 64
"""Spare slots per segment for single tokens, where the quota leaves so many."""

_MOST_RECALLS = 100
"""Counted no further: less than what int8 holds."""

NO_ROTATION = (
    "re-rotated keys can't be kept in two tiers: a recalled key has the position that it was computed with; "
    "use a SparseCache, or a method that does not re-rotate"
)


class TieredLayer(SparseLayer):
    """A layer of a `TieredCache`: what is taken out of it goes to the passive store.

    Parameters
    ----------
    index : number of the layer in the model
    tiers : what all layers share
    """

    def __init__(self, index: int, tiers: Tiers) -> None:
        super().__init__()
        self.index, self.tiers = index, tiers
        self.recall: Reader | None = None
        self.share: Tensor | None = None
        """FloatTensor [S]: each segment's part of the active size, 1 on average over a row (or, where rows have sizes
        of their own, the row's part of the largest); None: 1 everywhere."""
        self.attended_passive: Ints | None = None
        """int64 [2, any]: segments and columns that the last forward attended to and that are passive now."""
        self.asked_at = 0
        """Tokens seen when the last forward of several tokens ended; a hint to `TieredReader`, not in sessions."""
        self.recalls: Ints | None = None
        """int8 [S, any]: in how many looks each column's entry mattered since it became passive (`TieredReader`, where
        recalled entries are seen beside the residents); never changed in place. None: none did. Not in sessions."""
        self._quotas: tuple[Tensor | None, int, list[int]] | None = None  # of that share and active size

    @property
    def reader(self) -> Reader | None:
        """The recalling reader; None where everything is resident and may stay, so that stock attention runs."""
        if self.intact and (self.tiers.held or self._store is None or self.tail <= min(self.quotas())):
            return None
        return self.recall

    @reader.setter
    def reader(self, value: Reader | None) -> None:
        if value is not None:
            raise ConfigError(
                "a TieredCache chooses by itself what each step reads; a method that does so too needs a SparseCache"
            )

    # ---- the active size ----------------------------------------------------------------------------------------

    def quotas(self) -> list[int]:
        """Entries that each segment may hold, at least one."""
        store = self.store
        active = self.tiers.active.tokens_for(
            rows=store.batch,
            layers=self.tiers.n_layers,
            heads=store.n_kv_heads,
            width=store.keys.shape[-1],
            item=store.keys.element_size(),
        )
        n, known = len(store.counts), self._quotas
        if known is None or known[0] is not self.share or known[1] != active or len(known[2]) != n:
            shared = None if self.share is None else (self.share * active + 1e-6).long().clamp(min=1).tolist()
            known = self._quotas = (self.share, active, shared or [active] * n)
        return known[2]

    def spare_room(self, sizes: list[int]) -> int:
        """Tail slots that a new buffer of segments with `sizes` entries may have beyond them, within the quotas."""
        if self.tiers.held:
            return 0
        heads, quotas = self.n_kv_heads, self.quotas()
        lent = min(quota + LENT - size for quota, size in zip(quotas, sizes, strict=True))
        rows = range(0, len(sizes), heads)
        free = min(sum(quotas[row : row + heads]) - sum(sizes[row : row + heads]) for row in rows)
        return max(0, min(_GROWTH, lent, free // heads))

    def update(
        self, key_states: Tensor, value_states: Tensor, cache_kwargs: dict[str, Any] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Append [B, H, Q, D]; the buffer grows by no more than the active size and these tokens need."""
        n_new, store = key_states.shape[2], self._store
        self.attended_passive = None
        if n_new > 1:
            self.asked_at = self.get_seq_length() + n_new
        if store is not None and not store.can_append(n_new):
            used = [count + store.tail + n_new for count in store.counts]
            self._store = with_room(store, store.tail + n_new + self.spare_room(used))
        return super().update(key_states, value_states, cache_kwargs)

    def replace_store(self, store: Segments) -> None:
        """Entries moved between the tiers: the layer holds `store` now."""
        self._store = store

    # ---- taking out ---------------------------------------------------------------------------------------------

    def keep(self, kept: Tensor, rotation: Rotation | None = None) -> None:
        """Compact to the entries whose column is kept; the others go to the passive tier (padding is lost).

        `kept` is a BoolTensor [B, H or 1, T seen].

        Raises
        ------
        ConfigError
            If `kept` is for another number of rows or columns, keys would be re-rotated, or the passive tier can't
            take the entries: then nothing has moved.
        """
        if rotation is not None:
            raise ConfigError(NO_ROTATION)
        self.check_fits(kept)
        self.to_passive(~self._stored_mask(kept), attended=not self.tiers.held)
        self.forget(kept)
        if not self.tiers.held:
            self.cut(self.tiers.n_sink, attended=True)

    def to_passive(self, leaving: Bools, *, attended: bool) -> None:
        """Copy the stored entries `leaving` [N], in the order of `Segments.live`, but for padding.

        `attended`: note that the last forward attended to them. (Not while a context is read: they are too many.)
        """
        store = self.store
        residents = Residents(store, self.tiers.real_columns(store.seen))
        gone = residents.pick(leaving & residents.alive)
        self.tiers.swap(self.index, store.batch, store.n_kv_heads, gone)
        if attended and len(gone):
            self.note_attended(gone.segment, gone.columns)

    def note_attended(self, segment: Ints, columns: Ints) -> None:
        """Add entries to `attended_passive`."""
        new = np.stack([segment, columns])
        noted = self.attended_passive
        self.attended_passive = new if noted is None else np.concatenate([noted, new], axis=1)

    def recalls_of(self, segment: Ints, columns: Ints) -> Ints:
        """`recalls` of some entries [N]."""
        found = np.zeros(len(columns), np.int8)
        if self.recalls is not None:
            known = columns < self.recalls.shape[1]
            found[known] = self.recalls[segment[known], columns[known]]
        return found

    def count_recalls(self, segment: Ints, columns: Ints) -> None:
        """Add one to `recalls` of passive entries, each given once."""
        if not len(columns):
            return
        known = self._recalls_of_all()
        known[segment, columns] = np.minimum(known[segment, columns] + 1, _MOST_RECALLS)
        self.recalls = known

    def put_recalls(self, recalls: Ints, first: int, shift: int) -> None:
        """Take over another layer's `recalls` for the segments from `first` on, columns moved by `shift`."""
        known, (n, width) = self._recalls_of_all(), recalls.shape
        known[first : first + n, shift : shift + width] = recalls
        self.recalls = known

    def _recalls_of_all(self) -> Ints:
        """A copy of `recalls` for all segments and columns there are."""
        known = np.zeros((len(self.store.counts), self.store.seen), np.int8)
        if self.recalls is not None:
            known[:, : self.recalls.shape[1]] = self.recalls
        return known

    def forget_recalls(self, segment: Ints, columns: Ints) -> None:
        """Entries became resident: if they leave again, they start anew."""
        if self.recalls is not None:
            counted = columns < self.recalls.shape[1]
            self.recalls = self.recalls.copy()
            self.recalls[segment[counted], columns[counted]] = 0

    def _stored_mask(self, kept: Tensor) -> Bools:
        """[N]: `kept` by column, read for every stored entry."""
        heads, residents = self.n_kv_heads, Residents(self.store)
        by_column = kept.expand(-1, heads, -1).flatten(0, 1).cpu().numpy()
        return np.asarray(by_column[residents.segment, residents.column])

    def cut(self, n_sink: int, *, attended: bool = False) -> None:
        """Bring every segment within its quota: the oldest entries but the first `n_sink` leave.

        For the moment after a context was read, when no query can say what matters. `attended` as in `to_passive`.
        """
        store = self.store
        residents = Residents(store, self.tiers.real_columns(store.seen))
        segment, alive = residents.segment, residents.alive
        sizes = np.bincount(segment[alive], minlength=len(store.counts))
        quotas = np.array(self.quotas())
        if (sizes <= quotas).all():
            return
        before = alive.cumsum() - alive  # living entries before this one, in all segments
        rank = before - (sizes.cumsum() - sizes)[segment]
        sinks = quotas.clip(max=n_sink)[segment]
        stays = alive & ((rank < sinks) | (rank >= (sizes - quotas)[segment] + sinks))
        self.to_passive(~stays, attended=attended)
        self._store = residents.repack(stays)

    def fork(self, kept: Tensor, rotation: Rotation | None = None) -> SparseLayer:
        """Refused: `TieredCache.fork` copies both tiers."""
        raise ConfigError("fork the TieredCache, not one of its layers")

    # ---- rows, snapshots, cropping ------------------------------------------------------------------------------

    def take_rows(self, rows: Tensor) -> None:
        """New row i is old row `rows[i]`, of the residents; the cache does the same with the passive tier."""
        if self._store is None:
            return
        rows = rows.nonzero().flatten() if rows.dtype == torch.bool else rows
        super().take_rows(rows)
        self.attended_passive = None
        if self.share is not None:
            self.share = self.share.view(-1, self.n_kv_heads)[rows.cpu()].flatten()
        if self.recalls is not None:
            heads = np.arange(self.n_kv_heads)
            segments = rows.cpu().numpy()[:, None] * self.n_kv_heads + heads
            self.recalls = self.recalls[segments.reshape(-1)]

    def crop(self, max_length: int) -> None:
        """Forget the newest tokens, down to `max_length` tokens seen (negative: that many fewer), in both tiers."""
        if self._store is None:
            return
        length = max(self.store.seen + max_length if max_length < 0 else max_length, 0)
        super().crop(length)
        self.tiers.store.crop(length)
        self.attended_passive = None
        if self.recalls is not None:
            self.recalls = self.recalls[:, :length]
        self.asked_at = min(self.asked_at, length)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.share = self.attended_passive = self.recalls = None
        self.asked_at = 0

    def snapshot(self) -> Any:
        """The present state of the residents."""
        return super().snapshot(), self.share, self.asked_at, self.recalls

    def restore(self, state: Any) -> None:
        """Back to a snapshot."""
        inner, self.share, self.asked_at, self.recalls = state
        super().restore(inner)
        self.attended_passive = None
