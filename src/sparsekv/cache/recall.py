"""Reading a layer whose entries lie in two tiers: which passive entries a forward sees, and which come back.

Shape letters: B rows, H kv heads, S = B * H segments, G query heads per kv head, Q queries, D head size, N residents of
the fullest segment, R recalled entries (padded), P pages of a segment.

    page p of segment s      U[q, p] >= q . k for every key k of the page         (from its minima and maxima)
    worth of a page          log sum_q w_q exp(U[q, p] - Z[q]),   Z[q] = log sum over residents exp(q . k)
    worth of an entry        its mean share of the present queries' attention, residents and candidates together

Everything is computed from what the layer and the store hold now, so there is nothing that could go stale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekv.cache.attend import attend_stored, tail_mask
from sparsekv.cache.exchange import Entries, pick, repack
from sparsekv.cache.layer import SparseLayer
from sparsekv.cache.scores import Beside, Block
from sparsekv.cache.tiered_layer import TieredLayer
from sparsekv.cache.tiers import LENT, Tiers, slack
from sparsekv.errors import ConfigError

WINDOW = 64
"""Newest queries of a forward that judge pages and residents; longer forwards are read in blocks of as many."""

MARGIN = 2.0
"""A recalled entry replaces a resident only if its share of the attention is that many times larger: no to and fro."""

LEAST = 0.1
"""And only if it weighs at least so much of what a resident weighs on average: below that nothing is gained."""


@dataclass(frozen=True)
class _Plan:
    """How many entries a forward may move, per segment.

    sizes : residents that are no padding; fill : places free for recalled entries; over : residents too many;
    passive : entries in the passive tier; asked : passive entries to look at.
    """

    sizes: Tensor
    fill: Tensor
    over: Tensor
    passive: list[int]
    asked: list[int]


class TieredReader:
    """The `Reader` of a `TieredLayer`."""

    def __init__(self, tiers: Tiers, index: int) -> None:
        self.tiers, self.index = tiers, index

    def attend(
        self, layer: SparseLayer, query: Tensor, attention_mask: Tensor | None, scaling: float | None
    ) -> Tensor:
        """Attention [B, Q, Hq, D] of queries [B, Hq, Q, D] over the residents and what is recalled; then entries move.

        Raises
        ------
        ConfigError
            If activations are NaN, or the passive tier can't be read or written: then nothing has moved.
        """
        tiered, n_query = _tiered(layer), query.shape[2]
        real = self.tiers.real_columns(layer.get_seq_length(), query.device)
        residents = _Residents(tiered, real)
        plan = self._plan(tiered, residents, n_query)
        tiered.attended_passive = None
        if not any(plan.asked) and not bool(plan.over.any()):
            return attend_stored(layer, query, attention_mask, scaling)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        mask = tail_mask(layer, attention_mask, n_query, query.device)
        weight = None if real is None else real[:, -min(n_query, WINDOW) :]
        newest = _block(layer, query, mask, scale, max(0, n_query - WINDOW), n_query)
        beside = self._candidates(tiered, newest, weight, plan)
        newest.put_beside(beside)
        leaving = hidden = torch.zeros_like(residents.exists)
        coming: Tensor | None = None
        if self.tiers.recall_tokens is None or bool(plan.over.any()):
            leaving, hidden, coming = self._exchange(newest, residents, weight, plan, n_query)
            if beside is not None and coming is not None:
                beside = beside.only(coming)
                newest.put_beside(beside)
            newest.hide(hidden)
        parts = []
        for begin in range(0, n_query - WINDOW, WINDOW):
            block = _block(layer, query, mask, scale, begin, min(begin + WINDOW, n_query - WINDOW))
            block.put_beside(beside)
            block.hide(hidden)
            parts.append(block.output())
        output = torch.cat([*parts, newest.output()], dim=1)
        self._move(tiered, residents, leaving, hidden, beside, coming)
        return output

    def fresh(self) -> TieredReader:
        """A reader of the same tiers; all that it knows is in the layer and the store."""
        return TieredReader(self.tiers, self.index)

    # ---- how much may move --------------------------------------------------------------------------------------

    def _plan(self, layer: TieredLayer, residents: _Residents, n_query: int) -> _Plan:
        tiers, heads = self.tiers, layer.n_kv_heads
        sizes = residents.alive.sum(dim=1).cpu()
        quotas = torch.tensor(layer.quotas())
        calm = quotas - torch.tensor([slack(quota) for quota in quotas.tolist()])
        n_rows = (layer.batch, heads)
        free = (
            (quotas - sizes).view(n_rows).sum(dim=1, keepdim=True)
        )  # of a row: its heads lend to each other
        waiting = tiers.counts(self.index, layer.batch, heads)
        deferred = tiers.leaves_it_to_policy(self.index, n_query, residents.seen, int(quotas.min()))
        full = not deferred and (bool((free < 0).any()) or bool((sizes > quotas + LENT).any()))
        over = (sizes - calm).clamp(min=0) if full else torch.zeros_like(sizes)
        fill = torch.zeros_like(sizes)
        if tiers.recall_tokens is not None:
            asked = waiting.clamp(max=tiers.recall_tokens)
        else:
            if not full and not deferred:
                fill = torch.minimum((calm - sizes).clamp(min=0), waiting)
                fits = fill.view(n_rows).sum(dim=1, keepdim=True) <= free
                fill *= fits.expand(n_rows).flatten()
            asked = torch.minimum(fill + ((sizes - over) // 4).clamp(min=tiers.page_size), waiting)
        return _Plan(sizes, fill, over, waiting.tolist(), asked.tolist())

    # ---- which pages --------------------------------------------------------------------------------------------

    def _candidates(
        self, layer: TieredLayer, block: Block, weight: Tensor | None, plan: _Plan
    ) -> Beside | None:
        """The entries of the best pages of every segment."""
        if not any(plan.asked):
            return None
        tiers, device = self.tiers, block.query.device
        counts, columns = self._pages(layer, block, weight, plan)
        beside = Beside.of(tiers.peek(self.index, counts, columns, device), counts.numel())
        limit = tiers.recall_tokens
        if beside is None or limit is None or beside.keys.shape[1] <= limit:
            return beside
        block.put_beside(beside)  # the last page goes beyond the limit: the weakest entries are left out
        _, share = block.mass(weight)
        if share is None:
            return None
        best = share.masked_fill(~beside.valid, -1).topk(limit, dim=1).indices
        return beside.only(torch.zeros_like(beside.valid).scatter_(1, best, True))

    def _pages(
        self, layer: TieredLayer, block: Block, weight: Tensor | None, plan: _Plan
    ) -> tuple[Tensor, Tensor]:
        """(counts [B, H], columns) of the pages of most worth: whole pages, at least as many entries as asked for."""
        rows, heads, store = layer.batch, layer.n_kv_heads, self.tiers.store
        exact = self.tiers.recall_tokens is not None
        certain = plan.asked if exact else plan.fill.tolist()
        if certain == plan.passive:
            parts = [store.columns(self.index, row, head) for row in range(rows) for head in range(heads)]
            return torch.tensor([len(part) for part in parts]).view(rows, heads), torch.cat(parts)
        total = block.log_total()
        total = total.masked_fill(total == -torch.inf, 0)  # padding queries, which count nothing
        known = store.bounds_layer(self.index, block.query.unflatten(0, (rows, heads)))
        scores = known.scores.flatten(0, 1).to(total.device) * block.scale  # [S, G * Q, P]
        counted = block.weights(weight, total).log()
        worth = (scores - total[..., None] + counted[..., None]).logsumexp(dim=1).cpu()
        order = worth.argsort(dim=1, descending=True)
        sizes = known.sizes.flatten(0, 1).cpu().gather(1, order)
        before = sizes.cumsum(dim=1) - sizes
        enough = before < torch.tensor(plan.asked)[:, None]
        if not exact:  # a page is looked at only if one of its entries may matter
            promising = worth.gather(1, order) > least(plan.sizes).log()
            enough &= promising | (before < plan.fill[:, None])
        chosen = torch.zeros_like(enough).scatter_(1, order, enough)
        columns = known.columns.flatten(0, 1).cpu()  # [S, P, page size]
        wanted = chosen[..., None] & (columns >= 0)
        return wanted.sum(dim=(1, 2)).view(rows, heads), columns[wanted]

    # ---- who comes and who leaves -------------------------------------------------------------------------------

    def _exchange(
        self, block: Block, residents: _Residents, weight: Tensor | None, plan: _Plan, n_query: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(residents that leave [S, N], those of them that this forward does not see, candidates that come [S, R])."""
        share, offered = block.mass(weight)
        if not bool(torch.isfinite(share).all()):
            raise ConfigError(
                f"layer {self.index}: the attention is NaN, so it can't be told which entries matter; the activations "
                f"overflowed {block.query.dtype}, or the input was NaN"
            )
        device = share.device
        over, fill = plan.over.to(device), plan.fill.to(device)
        strength = residents.strength(share, self.tiers)
        weakest, order = strength.sort(dim=1)
        swaps = torch.zeros_like(over)
        coming = None
        if offered is not None and self.tiers.recall_tokens is None and block.entries is not None:
            best, places = offered.masked_fill(~block.entries.valid, -1).sort(dim=1, descending=True)
            # The `over` weakest leave anyway: who comes is held against those who leave for it.
            rival = torch.arange(best.shape[1], device=device) - fill[:, None] + over[:, None]
            inside = rival.clamp(0, weakest.shape[1] - 1)
            rivals = weakest.gather(1, inside).masked_fill(rival >= weakest.shape[1], torch.inf)
            matters = (best > MARGIN * rivals) & (best > least(plan.sizes).to(device))
            comes = (best >= 0) & ((rival < 0) | matters)
            swaps = (comes.sum(dim=1) - fill).clamp(min=0)
            coming = torch.zeros_like(comes).scatter_(1, places, comes)
        rank = torch.arange(strength.shape[1], device=device)
        leaving = torch.zeros_like(residents.exists).scatter_(1, order, rank < (swaps + over)[:, None])
        hidden = torch.zeros_like(leaving).scatter_(1, order, rank < swaps[:, None])
        hidden &= residents.columns < residents.seen - n_query  # a token always sees itself
        return leaving & residents.alive, hidden & residents.alive, coming

    def _move(
        self,
        layer: TieredLayer,
        residents: _Residents,
        leaving: Tensor,
        hidden: Tensor,
        beside: Beside | None,
        coming: Tensor | None,
    ) -> None:
        """Carry out what was decided, and note which passive entries this forward attended to."""
        heads = layer.n_kv_heads
        back = _flat(beside, coming)
        stayed_away = beside if self.tiers.recall_tokens is not None else None
        dropped = residents.columns.masked_fill(~(leaving & ~hidden), -1)
        layer.attended_passive = _columns(stayed_away, dropped)
        if back is None and not bool(leaving.any()):
            return
        gone = pick(layer.store, leaving[residents.exists])
        rows = layer.batch
        stays = residents.alive & ~leaving
        sizes = stays.sum(dim=1)
        if back is not None:
            sizes = sizes + torch.bincount(back.segment, minlength=len(sizes))
        store = repack(layer.store, stays[residents.exists], back, layer.spare_room(sizes.tolist()) + 1)
        self.tiers.swap(self.index, rows, heads, gone, back)
        layer.replace_store(store)


class _Residents:
    """What a layer stores, laid out per segment: `exists`, `alive` (no padding) BoolTensor [S, N], `columns` [S, N]."""

    def __init__(self, layer: TieredLayer, real: Tensor | None) -> None:
        self.layer = layer
        _, column, _ = layer.store.live()
        sizes = torch.tensor(layer.store.counts, device=column.device) + layer.tail
        self.exists = torch.arange(int(sizes.max()), device=column.device) < sizes[:, None]
        self.columns = torch.full(self.exists.shape, -1, dtype=torch.int64, device=column.device)
        self.columns[self.exists] = column
        self.alive = self.exists
        self.first = torch.zeros(len(sizes), dtype=torch.int64, device=column.device)
        self.seen = layer.get_seq_length()
        if real is not None:
            row = torch.arange(len(sizes), device=column.device) // layer.n_kv_heads
            self.alive = self.exists & real[row].gather(1, self.columns.clamp(min=0))
            self.first = real.long().argmax(dim=1)[row]

    def strength(self, share: Tensor, tiers: Tiers) -> Tensor:
        """FloatTensor [S, N]: sinks > recent tokens, the newest first > all others by their share; absent: inf.

        Sinks and recent tokens take at most a quarter of a segment's quota each, so that half can be exchanged.
        """
        quarter = (torch.tensor(self.layer.quotas(), device=share.device) // 4).clamp(min=1)[:, None]
        place = (self.columns + 1) / (self.seen + 1)
        recent = self.columns >= self.seen - quarter.clamp(max=tiers.n_recent)
        strength = torch.where(recent, 2 + place, share)
        sinks = self.columns < self.first[:, None] + quarter.clamp(max=tiers.n_sink)
        strength = torch.where(sinks, 4 - place, strength)
        return strength.masked_fill(~self.alive, torch.inf)


def _tiered(layer: SparseLayer) -> TieredLayer:
    if not isinstance(layer, TieredLayer):
        raise ConfigError("recall needs a layer of a TieredCache")
    return layer


def _block(
    layer: SparseLayer, query: Tensor, mask: Tensor | None, scale: float, begin: int, end: int
) -> Block:
    """The logits of queries `begin` to `end` of a forward."""
    return Block(layer, query[:, :, begin:end], None if mask is None else mask[:, begin:end], scale)


def least(sizes: Tensor) -> Tensor:
    """FloatTensor [S, 1]: the share from which on an entry is worth an exchange, for segments of these sizes."""
    return LEAST / sizes.clamp(min=1)[:, None]


def _flat(beside: Beside | None, chosen: Tensor | None) -> Entries | None:
    """The `chosen` [S, R] of the entries beside; None if there are none."""
    if beside is None or chosen is None:
        return None
    chosen = chosen & beside.valid
    segment, place = chosen.nonzero(as_tuple=True)
    if not len(segment):
        return None
    return Entries(
        segment, beside.columns[segment, place], beside.keys[segment, place], beside.values[segment, place]
    )


def _columns(beside: Beside | None, dropped: Tensor) -> Tensor:
    """LongTensor [S, any]: columns beside, and those of residents that left once they had been attended to; else -1."""
    if beside is None:
        return dropped
    return torch.cat([dropped, beside.columns.masked_fill(~beside.valid, -1)], dim=1)
