"""Reading a layer whose entries lie in two tiers: which passive entries a forward sees, and which come back.

Shape letters: B rows, H kv heads, S = B * H segments, G query heads per kv head, Q queries, D head size, n residents of
the fullest segment, R recalled entries (padded), P pages of a segment.

    page p of segment s      U[q, p] >= q . k for every key k of the page         (from its minima and maxima)
    worth of a page          log sum_q w_q exp(U[q, p] - Z[q]),   Z[q] = log sum over residents exp(q . k)
    worth of an entry        its mean share of the present queries' attention, residents and candidates together

Everything is computed from what the layer and the store hold now, so there is nothing that could go stale. Logits are
tensors where the model is; what is decided by them (a few numbers per entry) is worked out in numpy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sparsekv.cache.attend import attend_stored, tail_mask
from sparsekv.cache.entry_request import NONE, Bools, Ints
from sparsekv.cache.exchange import Entries, Residents
from sparsekv.cache.layer import SparseLayer
from sparsekv.cache.scores import Beside, Block
from sparsekv.cache.tiered_layer import TieredLayer
from sparsekv.cache.tiers import LENT, Tiers, slack
from sparsekv.errors import ConfigError

Floats = npt.NDArray[np.floating[Any]]

WINDOW = 64
"""Newest queries of a forward that judge pages and residents; longer forwards are read in blocks of as many."""

MARGIN = 2.0
"""A recalled entry replaces a resident only if its share of the attention is that many times larger: no to and fro."""

LEAST = 0.1
"""And only if it weighs at least so much of what a resident weighs on average: below that nothing is gained."""


EVERY = 4
"""While tokens come one by one, a layer looks at its passive tier at every so many of them; layers take turns."""

EAGER = 8
"""Tokens right after a forward of several (a question), at each of which every layer looks: an answer begins."""


OFTEN = 4
"""Looks in which a passive entry mattered, until it moves in where recalled entries are seen beside the residents."""


@dataclass(frozen=True)
class _Places:
    """Places free for recalled entries: of each segment [S], and of each row's heads together [B]."""

    of_segment: Ints
    of_row: Ints

    def fill(self, wanted: Ints) -> Ints:
        """[S]: how many of the `wanted` entries [S] find a place; none of a row where they don't all fit."""
        fill = np.minimum(self.of_segment, wanted)
        rows = (len(self.of_row), -1)
        fits = fill.reshape(rows).sum(axis=1) <= self.of_row
        return np.asarray(fill * fits.repeat(len(fill) // max(len(fits), 1)))


@dataclass(frozen=True)
class _Plan:
    """How many entries a forward may move, int64 [S] each.

    quotas : residents that there may be; places : those free for recalled entries; fill : how many of these are to be
    used; over : residents too many; passive : entries in the passive tier; asked : passive entries to look at (0
    everywhere: none are). least [S, 1] : the share from which on an exchange is worth it; looks : whether this forward
    counts as a look.
    """

    quotas: Ints
    places: _Places
    fill: Ints
    over: Ints
    passive: Ints
    asked: Ints
    least: Floats
    looks: bool


@dataclass(frozen=True)
class _Moves:
    """Residents [S, n] that leave, those of them that this forward does not see, and candidates [S, R] that come."""

    residents: Residents
    leaving: Bools
    hidden: Bools
    coming: Bools | None


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
        real = self.tiers.real_columns(layer.get_seq_length())
        plan = self._plan(tiered, real, n_query)
        tiered.attended_passive = None
        if plan is None:
            return attend_stored(layer, query, attention_mask, scaling)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        mask = tail_mask(layer, attention_mask, n_query, query.device)

        def block(begin: int, end: int, weight: Tensor | None = None) -> Block:
            part = None if mask is None else mask[:, begin:end]
            return Block(layer, query[:, :, begin:end], part, scale, weight)

        first = max(0, n_query - WINDOW)
        newest = block(first, n_query, None if real is None else torch.from_numpy(real[:, first - n_query :]))
        newest.put_beside(self._candidates(tiered, newest, plan))
        self._check_finite(newest)
        offered, matters, moves = None, None, None
        if self.tiers.recall_tokens is None:
            offered = self._offered(newest)
        elif newest.entries is not None and plan.looks:
            offered, matters, fill = self._offered_often(tiered, newest, newest.entries, plan)
            plan = replace(plan, fill=fill)
        if plan.over.any() or (offered is not None and (plan.fill.any() or (offered > plan.least).any())):
            residents = Residents(tiered.store, real)
            moves = self._exchange(newest, residents, offered, plan, n_query)
            newest.hide(moves.hidden)
        coming = None
        if newest.entries is not None and moves is not None and moves.coming is not None:
            coming = newest.entries.only(moves.coming)
        if self.tiers.recall_tokens is None and newest.entries is not None:
            newest.put_beside(coming)
        parts = []
        for begin in range(0, first, WINDOW):
            older = block(begin, min(begin + WINDOW, first))
            older.put_beside(newest.entries)
            if moves is not None:
                older.hide(moves.hidden)
            parts.append(older.output())
        parts.append(newest.output())
        self._carry_out(tiered, moves, coming, newest.entries, matters)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def fresh(self) -> TieredReader:
        """A reader of the same tiers; all that it knows is in the layer and the store."""
        return TieredReader(self.tiers, self.index)

    def _check_finite(self, block: Block) -> None:
        if not bool((block.log_total() < torch.inf).all()):  # -inf is right: a padding query sees nothing
            raise ConfigError(
                f"layer {self.index}: the attention is NaN, so it can't be told which entries matter; the activations "
                f"overflowed {block.dtype}, or the input was NaN"
            )

    # ---- how much may move --------------------------------------------------------------------------------------

    def _plan(self, layer: TieredLayer, real: Bools | None, n_query: int) -> _Plan | None:
        """None: nothing may move and nothing is looked at, as at most steps of a layer."""
        tiers, store, quotas = self.tiers, layer.store, np.array(layer.quotas())
        sizes = np.array(store.counts) + store.tail
        if real is not None:  # padding takes no place: it is gone with the next new buffer
            residents = Residents(store, real)
            sizes = np.bincount(residents.segment, residents.alive, minlength=len(sizes)).astype(np.int64)
        rows = (layer.batch, layer.n_kv_heads)
        # The heads of a row lend places to each other. A row does what it would do alone, whatever the others do.
        free = (quotas - sizes).reshape(rows).sum(axis=1)
        full_rows = (free < 0) | (sizes > quotas + LENT).reshape(rows).any(axis=1)
        spare = quotas - slack(quotas) - sizes
        limit, looks = tiers.recall_tokens, self._looks(layer, n_query)
        # nobody has to leave, and there is no place to fill
        settled = not full_rows.any() and (spare <= 0).all()
        if (limit == 0 and not full_rows.any()) or (limit is None and settled and not looks):
            return None
        deferred = np.zeros(len(sizes), bool)
        if not settled:
            real_seen = np.full(rows[0], store.seen) if real is None else real.sum(axis=1)
            least_quotas = quotas.reshape(rows).min(axis=1)
            deferred |= tiers.leaves_it_to_policy(self.index, n_query, real_seen, least_quotas).repeat(
                rows[1]
            )
        full = full_rows.repeat(rows[1]) & ~deferred
        over = np.where(full, (-spare).clip(min=0), 0)
        waiting = tiers.counts(self.index, *rows).numpy()
        places = _Places(np.where(full | deferred, 0, spare.clip(min=0)), free)
        fill = places.fill(waiting) if limit is None else np.zeros_like(sizes)
        least = LEAST / sizes.clip(min=1)[:, None]
        if limit is not None:
            asked = waiting.clip(max=limit)
        else:
            filling = (fill > 0).reshape(rows).any(axis=1).repeat(rows[1])
            # As many as there are residents: their best could all come.
            asked = np.where(
                full | filling | looks,
                np.minimum(fill + (sizes - over).clip(min=tiers.page_size), waiting),
                0,
            )
        if not (asked.any() or over.any()):
            return None
        return _Plan(quotas, places, fill, over, waiting, asked, least, looks)

    def _looks(self, layer: TieredLayer, n_query: int) -> bool:
        """Whether this forward looks for passive entries that matter, though nothing else makes a new buffer."""
        since = layer.get_seq_length() - layer.asked_at
        return n_query > 1 or since <= EAGER or (since + self.index) % EVERY == 0

    # ---- which pages --------------------------------------------------------------------------------------------

    def _candidates(self, layer: TieredLayer, block: Block, plan: _Plan) -> Beside | None:
        """The entries of the best pages of every segment."""
        if not plan.asked.any():
            return None
        chosen = self._pages(layer, block, plan)
        if not bool(chosen.any()):
            return None
        beside = Beside.of(self.tiers.store.peek_pages(self.index, chosen), block.query.device)
        limit = self.tiers.recall_tokens
        if beside is None or limit is None or beside.keys.shape[1] <= limit:
            return beside
        block.put_beside(beside)  # the last page goes beyond the limit: the weakest entries are left out
        share = _numbers(block.shares_beside())
        order = _order(np.where(beside.valid, -share, np.inf))
        return beside.only(_marked(order, np.arange(order.shape[1]) < limit))

    def _pages(self, layer: TieredLayer, block: Block, plan: _Plan) -> Tensor:
        """BoolTensor [B, H, P]: the pages of most worth, with at least as many entries as asked for."""
        rows, store = (layer.batch, layer.n_kv_heads), self.tiers.store
        exact = self.tiers.recall_tokens is not None
        if np.array_equal(plan.asked if exact else plan.fill, plan.passive):
            return store.all_pages(self.index, *rows)
        known = store.bounds_layer(self.index, block.query.unflatten(0, rows))
        worth = _numbers(block.log_worth(known.scores.flatten(0, 1)))
        order = _order(-worth)
        sizes = known.sizes.numpy().take(order)
        before = sizes.cumsum(axis=1) - sizes
        enough = before < plan.asked[:, None]
        if not exact:  # a page is looked at only if one of its entries may matter
            promising = worth.take(order) > np.log(plan.least)
            enough &= promising | (before < plan.fill[:, None])
        return torch.from_numpy(_marked(order, enough & (sizes > 0))).unflatten(0, rows)

    # ---- who comes and who leaves -------------------------------------------------------------------------------

    def _offered(self, block: Block) -> Floats | None:
        """[S, R]: the shares of candidates that may become residents, -1 where there is none; None if none may."""
        if block.entries is None:
            return None
        return np.where(block.entries.valid, _numbers(block.shares_beside()), -1)

    def _offered_often(
        self, layer: TieredLayer, block: Block, beside: Beside, plan: _Plan
    ) -> tuple[Floats, Bools, Ints]:
        """Where recalled entries are seen beside the residents: as `_offered`, of those that are recalled often; which
        of all matter now [S, R]; and how many free places are filled [S].

        Heads of a row that are equal fill equally many, and stay equal: where one has fewer that are recalled often,
        its best others come, too.
        """
        share = np.where(beside.valid, _numbers(block.shares_beside()), -1)
        matters = share > plan.least
        segment, place = np.nonzero(matters)
        often = np.zeros_like(matters)
        often[segment, place] = layer.recalls_of(segment, beside.columns[segment, place]) >= OFTEN - 1
        n_often, rows = often.sum(axis=1), (layer.batch, layer.n_kv_heads)
        of_row = plan.quotas.reshape(rows)
        equal = (of_row == of_row[:, :1]).all(axis=1).repeat(rows[1])
        possible = plan.places.fill(beside.valid.sum(axis=1)).reshape(rows).min(axis=1)
        together = np.minimum(possible, n_often.reshape(rows).max(axis=1)).repeat(rows[1])
        fill = np.where(equal, together, plan.places.fill(n_often))
        others = _order(np.where(often, np.inf, -share))
        wanted = np.arange(share.shape[1]) < (fill - n_often).clip(min=0)[:, None]
        offered = np.where(often | _marked(others, wanted), share, -1)
        return offered, matters, fill

    def _exchange(
        self, block: Block, residents: Residents, offered: Floats | None, plan: _Plan, n_query: int
    ) -> _Moves:
        """Who leaves because there are too many or for whom, and who comes."""
        strength = self._strength(residents, _numbers(block.shares()), plan.quotas, n_query)
        order = _order(strength)
        swaps, coming = np.zeros_like(plan.over), None
        if offered is not None:
            weakest, best_first = strength.take(order), _order(-offered)
            best = offered.take(best_first)
            # The `over` weakest leave anyway: who comes is held against those who leave for it.
            rival = np.arange(best.shape[1]) - plan.fill[:, None] + plan.over[:, None]
            weakest = np.pad(
                weakest, ((0, 0), (0, 1)), constant_values=np.inf
            )  # nobody leaves for the last ones
            inside = rival.clip(0, weakest.shape[1] - 1)
            rivals = np.take_along_axis(weakest, inside, axis=1)
            matters = (best > MARGIN * rivals) & (best > plan.least)
            comes = (best >= 0) & ((rival < 0) | matters)
            swaps = (comes.sum(axis=1) - plan.fill).clip(min=0)
            coming = _marked(best_first, comes)
        rank, alive = np.arange(strength.shape[1]), strength < np.inf
        leaving = _marked(order, rank < (swaps + plan.over)[:, None])
        replaced = swaps if self.tiers.recall_tokens is None else np.zeros_like(swaps)
        hidden = _marked(order, rank < replaced[:, None])
        hidden &= residents.padded(
            residents.column < residents.store.seen - n_query, False
        )  # who asks sees itself
        return _Moves(residents, leaving & alive, hidden & alive, coming)

    def _strength(self, residents: Residents, share: Floats, quotas: Ints, n_query: int) -> Floats:
        """[S, n]: sinks > recent tokens, the newest first > all others by their share; absent and padding: inf.

        Sinks and recent tokens take at most a quarter of a segment's quota each, so that half can be exchanged. But
        what a policy is about to observe with takes what it needs: it pairs its newest queries with the last entries.
        """
        seen, quarter = residents.store.seen, (quotas // 4).clip(min=1)[:, None]
        column = residents.padded(residents.column, NONE)
        place = (column + 1) / (seen + 1)
        n_recent = quarter.clip(max=self.tiers.n_recent).clip(min=self.tiers.observed(n_query))
        recent = column >= seen - n_recent
        strength = np.where(recent, 2 + place, share)
        sinks = column < residents.first[:, None] + quarter.clip(max=self.tiers.n_sink)
        strength = np.where(sinks, 4 - place, strength)
        return np.where(residents.padded(residents.alive, False), strength, np.inf)

    def _carry_out(
        self,
        layer: TieredLayer,
        moves: _Moves | None,
        coming: Beside | None,
        beside: Beside | None,
        matters: Bools | None,
    ) -> None:
        """Move what was decided; then note which entries that are passive now this forward attended to, and count those
        that mattered.
        """
        if moves is not None:
            self._move(layer, moves, None if coming is None else coming.entries())
        if beside is None:
            return
        passive = beside.valid if coming is None else beside.valid & ~coming.valid
        segment, place = np.nonzero(passive)
        layer.note_attended(segment, beside.columns[segment, place])
        if matters is not None:
            segment, place = np.nonzero(passive & matters)
            layer.count_recalls(segment, beside.columns[segment, place])

    def _move(self, layer: TieredLayer, moves: _Moves, back: Entries | None) -> None:
        residents = moves.residents
        there = residents.exists
        leaving, hidden = moves.leaving[there], moves.hidden[there]
        if back is None and not leaving.any():
            return
        stays = residents.alive & ~leaving
        sizes = np.bincount(residents.segment[stays], minlength=len(residents.sizes))
        if back is not None:
            sizes = sizes + np.bincount(back.segment, minlength=len(sizes))
        store = residents.repack(stays, back, layer.spare_room(sizes.tolist()) + 1)
        self.tiers.swap(self.index, layer.batch, layer.n_kv_heads, residents.pick(leaving), back)
        layer.replace_store(store)
        if back is not None:
            layer.forget_recalls(back.segment, back.columns)
        lost = leaving & ~hidden
        layer.note_attended(residents.segment[lost], residents.column[lost])


def _tiered(layer: SparseLayer) -> TieredLayer:
    if not isinstance(layer, TieredLayer):
        raise ConfigError("recall needs a layer of a TieredCache")
    return layer


def _order(values: npt.NDArray[Any]) -> Ints:
    """Where each row's values lie in the flattened [S, n], the least first."""
    n_rows, n = values.shape
    return values.argsort(axis=1) + np.arange(n_rows)[:, None] * n


def _marked(order: Ints, wanted: Bools) -> Bools:
    """[S, n]: True at those places of an `_order` that are `wanted` ([S, n] or [n])."""
    out = np.zeros(order.shape, bool)
    out.reshape(-1)[order[np.broadcast_to(wanted, order.shape)]] = True
    return out


def _numbers(x: Tensor | None) -> Floats:
    """A tensor's numbers, on the CPU."""
    return np.zeros((0, 0)) if x is None else x.detach().cpu().numpy()
