"""A cache layer whose entries lie in two tiers: resident in the buffer, or in the passive store.

Shape letters: B rows, H kv heads, S = B * H segments, T columns seen, N entries stored, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsekv.cache.exchange import Entries, pick, repack, with_room
from sparsekv.cache.layer import Reader, SparseLayer
from sparsekv.cache.rope import Rotation
from sparsekv.cache.segments import Segments
from sparsekv.cache.tiers import LENT, Tiers
from sparsekv.errors import ConfigError

_GROWTH = 64
"""Spare slots per segment for single tokens, where the quota leaves so many."""

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
        """FloatTensor [S]: each segment's part of the active size, 1 on average; None: 1 everywhere."""
        self.attended_passive: Tensor | None = None
        """LongTensor [S, any]: columns that the last forward attended to and that are passive now, or -1."""

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
        if self.share is None:
            return [active] * len(store.counts)
        return (self.share * active + 1e-6).long().clamp(min=1).tolist()

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
        if store is not None and (store.tail + n_new > store.room or store.tail < store.guard.tail):
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

    def to_passive(self, leaving: Tensor, *, attended: bool) -> None:
        """Copy the stored entries `leaving` (BoolTensor [N], in the order of `Segments.live`), but for padding.

        `attended`: note that the last forward attended to them. (Not while a context is read: they are too many.)
        """
        store = self.store
        real = self.tiers.real_columns(store.seen, store.keys.device)
        if real is not None:
            segment, column, _ = store.live()
            leaving = leaving & real[segment // store.n_kv_heads, column]
        gone = pick(store, leaving)
        self.tiers.swap(self.index, store.batch, store.n_kv_heads, gone)
        if attended and len(gone):
            self._note_attended(gone)

    def _note_attended(self, gone: Entries) -> None:
        """Add entries, in the order of their segments, to `attended_passive`."""
        sizes = torch.bincount(gone.segment, minlength=len(self.store.counts))
        there = torch.arange(int(sizes.max()), device=sizes.device) < sizes[:, None]
        columns = torch.full(there.shape, -1, dtype=torch.int64, device=sizes.device)
        columns[there] = gone.columns.long()
        noted = self.attended_passive
        self.attended_passive = columns if noted is None else torch.cat([noted, columns], dim=1)

    def _stored_mask(self, kept: Tensor) -> Tensor:
        """BoolTensor [N]: `kept` by column, read for every stored entry."""
        heads = self.n_kv_heads
        segment, column, slot = self.store.live()
        return kept.to(slot.device).expand(-1, heads, -1)[segment // heads, segment % heads, column]

    def cut(self, n_sink: int, *, attended: bool = False) -> None:
        """Bring every segment within its quota: the oldest entries but the first `n_sink` leave.

        For the moment after a context was read, when no query can say what matters. `attended` as in `to_passive`.
        """
        store = self.store
        segment, column, _ = store.live()
        real = self.tiers.real_columns(store.seen, column.device)
        alive = torch.ones_like(column, dtype=torch.bool)
        if real is not None:
            alive = real[segment // store.n_kv_heads, column]
        sizes = torch.bincount(segment[alive], minlength=len(store.counts))
        quotas = torch.tensor(self.quotas(), device=column.device)
        if bool((sizes <= quotas).all()):
            return
        before = alive.cumsum(0) - alive.long()  # living entries before this one, in all segments
        rank = before - (sizes.cumsum(0) - sizes)[segment]
        sinks = quotas.clamp(max=n_sink)[segment]
        stays = alive & ((rank < sinks) | (rank >= (sizes - quotas)[segment] + sinks))
        self.to_passive(~stays, attended=attended)
        self._store = repack(store, stays)

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

    def crop(self, max_length: int) -> None:
        """Forget the newest tokens, down to `max_length` tokens seen (negative: that many fewer), in both tiers."""
        if self._store is None:
            return
        length = max(self.store.seen + max_length if max_length < 0 else max_length, 0)
        super().crop(length)
        self.tiers.store.crop(length)
        self.attended_passive = None

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.share = self.attended_passive = None

    def snapshot(self) -> Any:
        """The present state of the residents."""
        return super().snapshot(), self.share

    def restore(self, state: Any) -> None:
        """Back to a snapshot."""
        inner, self.share = state
        super().restore(inner)
        self.attended_passive = None
