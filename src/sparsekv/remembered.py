"""Eviction by scores that are remembered: while decoding, between chunks, in later turns.

Shape letters: B rows, H kv heads, T columns seen, Q new tokens, n stored entries of one head, K numbers.

A token's relevance is computed while it is read, from its hidden state. What must be known later is noted per column,
whether the entry is stored or not: it lies in `SparseLayer.recent_inputs` as a single tensor [B, T, H, K], which
cropping, reordering and snapshots of a layer follow.

    number 0        the hidden state's part of g
    numbers 1..6    sums of attention statistics, where the predictor takes them

In a forward after which a row would store too much, every layer's scores are made of these right after it has attended
(features are computed anew: attention goes on, the end moves); after the last layer the controller cuts all together.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsekv import architecture
from sparsekv.cache.layer import SparseLayer
from sparsekv.cache.sparse import SparseCache
from sparsekv.errors import ConfigError
from sparsekv.eviction import newest_stored
from sparsekv.policies.attention_scores import observing_queries, weights_of_queries
from sparsekv.policies.budget import Budget
from sparsekv.policies.learned_scores import finite_scores, predictor_of
from sparsekv.relevance.atskv import ATSKV
from sparsekv.relevance.features import (
    WINDOW,
    AttentionStatistics,
    HandcraftedFeatures,
    extra_groups,
    no_text,
    of_group,
    side_by_side,
)


class Rounds:
    """Evictions of one cache under `atskv`, forward after forward.

    Parameters
    ----------
    policy, budget : what to keep
    every : int >= 1, optional
        While decoding: a round makes room for the tokens to come, at most so many. None (reading): every forward ends
        at the limit.

    Attributes
    ----------
    controller : ThresholdController, or None where the predictors' own threshold decides
    """

    def __init__(self, policy: ATSKV, budget: Budget, every: int | None = None) -> None:
        self.policy, self.every = policy, every
        self.controller = policy.controller(budget) if policy.spans_layers(budget) else None
        policy.check_room(policy.own_budget(budget))
        self._due: list[int] = []
        # of this forward: row -> layer -> kv head -> log r of what is stored, or what the threshold keeps of it
        self._found: dict[int, dict[int, list[Tensor]]] = {}

    def reset(self) -> None:
        """Forget what earlier rounds decided."""
        if self.controller is not None:
            self.controller.rows = {}

    def after_layer(
        self,
        cache: SparseCache,
        module: nn.Module,
        index: int,
        layer: SparseLayer,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        *,
        evict: bool = True,
        due: bool = True,
    ) -> None:
        """Note the newest tokens of layer `index`, which has just attended; after the last layer, cut all.

        `evict=False`: note only. `due`: whether it is time to apply the predictors' own threshold.
        """
        note_layer(cache, module, index, layer, hidden, rotary)
        if not evict:
            return
        if index == cache.compressible[0]:
            self._due = self._rows_due(cache, cache.real_seen().tolist(), due)
            self._found = {}
        if not self._due:
            return
        columns, seen = columns_of(cache, layer), cache.real_seen().tolist()
        for row in self._due:
            ranks = _ranks(cache, module, index, layer, row, self.policy, seen[row], columns[row])
            if self.controller is None:
                ranks = [self.policy.above_threshold(module, each) for each in ranks]
            self._found.setdefault(row, {})[index] = ranks
        if index == cache.compressible[-1]:
            self._cut(cache, seen)

    def _rows_due(self, cache: SparseCache, all_seen: list[int], due: bool) -> list[int]:
        """The rows that this forward brings over their limit; under the threshold alone all of them, if `due`."""
        if self.controller is None:
            return [row for row, seen in enumerate(all_seen) if due and seen]
        found, heads = [], architecture.num_kv_heads(cache.config)
        n_segments = heads * len(cache.compressible)
        for row, seen in enumerate(all_seen):
            in_use = 0
            for _, layer in cache.sparse_layers():
                coming = cache.seen - layer.get_seq_length()  # later layers have not read these tokens yet
                pads = cache.seen - seen if layer.intact else 0  # the first eviction takes padding out
                in_use += heads * (layer.tail + coming - pads)
                if layer.batch:
                    in_use += sum(layer.store.counts[row * heads : (row + 1) * heads])
            if self.controller.is_due(in_use, seen, n_segments):
                found.append(row)
        return found

    def _cut(self, cache: SparseCache, seen: list[int]) -> None:
        columns = {index: columns_of(cache, layer) for index, layer in cache.sparse_layers()}
        kept = {index: _mask(of_layer, cache.seen) for index, of_layer in columns.items()}
        changed = False
        for row, of_row in self._found.items():
            chosen: list[list[Tensor]] | None = list(of_row.values())
            if self.controller is not None:
                chosen = self.controller.cut(list(of_row.values()), seen[row], row=row, every=self.every)
            if chosen is None:
                continue
            changed = True
            for index, heads in zip(of_row, chosen, strict=True):
                for head, (at, stays) in enumerate(zip(columns[index][row], heads, strict=True)):
                    kept[index][row, head, at] = stays
        self._found = {}
        if changed:
            for index, mask in kept.items():
                cache.keep_in_layer(index, mask)


# ---- noting ---------------------------------------------------------------------------------------------------


def note_layer(
    cache: SparseCache,
    module: nn.Module,
    index: int,
    layer: SparseLayer,
    hidden: Tensor,
    rotary: tuple[Tensor, Tensor],
) -> None:
    """Note what will be needed of the newest Q tokens, right after layer `index` has attended to them.

    Raises
    ------
    ConfigError
        If earlier tokens were not noted, or the layer has no predictor.
    """
    predictor = predictor_of(module)
    with_attention = "attention" in predictor.config.features
    seen, n_new = layer.get_seq_length(), hidden.shape[1]
    part = predictor.hidden_part(hidden)[..., None]  # [B, Q, H, 1]
    new = nn.functional.pad(part, (0, AttentionStatistics.N_SUMS)) if with_attention else part
    held = _notes(layer, seen - n_new, new.shape[2:])
    notes = new if held is None else torch.cat([held, new], dim=1)
    if with_attention:
        _observe(cache, module, layer, notes, hidden, rotary)
    layer.recent_inputs = (notes,)


def _notes(layer: SparseLayer, n_seen: int, shape: torch.Size) -> Tensor | None:
    """The notes of the `n_seen` tokens that a layer saw before; None if there were none."""
    held = layer.recent_inputs
    if held is None and n_seen == 0:
        return None
    if held is None or len(held) != 1 or held[0].shape[1] != n_seen or held[0].shape[2:] != shape:
        raise ConfigError(
            "method 'atskv' scores a token from its hidden state, which is known only while it is read, and earlier "
            "tokens of this cache were read without it: read them with phase='both', or start with a new cache"
        )
    return held[0]


def _observe(
    cache: SparseCache,
    module: nn.Module,
    layer: SparseLayer,
    notes: Tensor,
    hidden: Tensor,
    rotary: tuple[Tensor, Tensor],
) -> None:
    """Add what the newest queries (at most WINDOW) look at to the sums in `notes`, which is fresh memory.

    Of a head that has lost some of these tokens already (to a second tier, in this very forward), only those newer than
    the newest that it lost observe; the last one does always, as it sees all that is stored.
    """
    cos, sin = (x.expand(hidden.shape[0], -1, -1) for x in rotary)
    seen, n_new = notes.shape[1], hidden.shape[1]
    for row, columns in enumerate(columns_of(cache, layer)):
        n_query = min(WINDOW, n_new, int(cache.real_columns()[row, seen - n_new :].sum()))
        if not n_query:
            continue
        query = observing_queries(
            module,
            hidden[row : row + 1, -n_query:],
            (cos[row : row + 1, -n_query:], sin[row : row + 1, -n_query:]),
        )
        keys, _ = entries_of(cache, layer, row)
        for heads in _alike(columns):
            at = columns[heads[0]]
            n = len(at)
            if not n:
                continue
            n_here = min(n_query, max(1, newest_stored(at[None], seen)))
            group = query.shape[1] // len(columns)
            looked = query[:, heads[0] * group : (heads[-1] + 1) * group, n_query - n_here :]
            stacked = torch.stack([keys[head] for head in heads])[None]
            weights = weights_of_queries(looked, stacked, torch.arange(n - n_here, n, device=at.device))
            stats = AttentionStatistics(notes[row, at][:, heads, 1:].transpose(0, 1)[None])
            stats.update(of_group(weights))
            notes[row, at[:, None], torch.tensor(heads, device=at.device), 1:] = stats.sums[0].transpose(0, 1)


# ---- scores ---------------------------------------------------------------------------------------------------


def _ranks(
    cache: SparseCache,
    module: nn.Module,
    index: int,
    layer: SparseLayer,
    row: int,
    policy: ATSKV,
    n_seen: int,
    columns: list[Tensor],
) -> list[Tensor]:
    """log(r / beta) [n] of one row's stored entries in one layer, head by head."""
    predictor = predictor_of(module)
    (notes,) = layer.recent_inputs or (torch.empty(0),)
    pads = cache.seen - n_seen
    found: list[Tensor] = [torch.empty(0)] * len(columns)
    for heads in _alike(columns):
        at = columns[heads[0]]
        noted = notes[row, at][:, heads].transpose(0, 1)  # [H', n, K]
        g = noted[..., 0]
        if predictor.extra is not None:
            parts = []
            groups = extra_groups(predictor.config.features)
            if "attention" in groups:
                parts.append(AttentionStatistics(noted[None, ..., 1:]).features())
            if "handcrafted" in groups:
                if cache.ids is None or cache.tokenizer is None:
                    raise no_text()
                ids = cache.ids[row : row + 1, pads : cache.seen]
                keys, values = (
                    torch.stack([each[head] for head in heads])[None]
                    for each in entries_of(cache, layer, row)
                )
                parts.append(HandcraftedFeatures()(keys, values, ids, cache.tokenizer, at - pads))
            only = heads[0] if len(heads) < len(columns) else None
            g = g + predictor.extra(side_by_side(parts), only)[0]
        finite_scores(g, policy.name, index)
        ranks = policy.ranked(module, g, at - pads, n_seen)
        for head, each in zip(heads, ranks, strict=True):
            found[head] = each
    return found


def _alike(columns: list[Tensor]) -> list[list[int]]:
    """The heads together, if all store the same columns (then one computation serves them); else one by one."""
    same = all(torch.equal(columns[0], other) for other in columns[1:])
    return [list(range(len(columns)))] if same else [[head] for head in range(len(columns))]


def columns_of(cache: SparseCache, layer: SparseLayer) -> list[list[Tensor]]:
    """Row -> kv head -> LongTensor [n]: the columns that are stored, ascending, without padding."""
    heads = layer.n_kv_heads
    flat = layer.columns()
    rows = [flat[row * heads : (row + 1) * heads] for row in range(layer.batch)]
    if cache.real is None:
        return rows
    real = cache.real_columns()
    return [[at[real[row].to(at.device)[at]] for at in of_row] for row, of_row in enumerate(rows)]


def entries_of(cache: SparseCache, layer: SparseLayer, row: int) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values [n, D] of one row, head by head, in the order of `columns_of`."""
    first, last = row * layer.n_kv_heads, (row + 1) * layer.n_kv_heads
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for group in layer.groups():
        inside = slice(max(first - group.start, 0), max(last - group.start, 0))
        keys += list(group.keys[inside])
        values += list(group.values[inside])
    if cache.real is not None:
        real = cache.real_columns()[row]
        is_real = [real.to(at.device)[at] for at in layer.columns()[first:last]]
        keys, values = ([each[i] for each, i in zip(pair, is_real, strict=True)] for pair in (keys, values))
    return keys, values


def _mask(columns: list[list[Tensor]], n_seen: int) -> Tensor:
    """BoolTensor [B, H, T] of the columns of `columns_of`."""
    found = torch.zeros(len(columns), len(columns[0]), n_seen, dtype=torch.bool, device=columns[0][0].device)
    for row, heads in enumerate(columns):
        for head, at in enumerate(heads):
            found[row, head, at] = True
    return found
