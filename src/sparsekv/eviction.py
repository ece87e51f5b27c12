"""Deciding and taking out entries of a cache that already holds some: later turns, chunked prefill, decoding.

Token policies are asked again about the STORED entries, in position order; layer policies score the stored keys and
values with the newest hidden states. Padding is taken off before a policy sees a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsekv.cache.layer import SparseLayer
from sparsekv.cache.sparse import SparseCache
from sparsekv.errors import ConfigError
from sparsekv.policies.base import (
    LayerContext,
    LayerPolicy,
    Policy,
    TokenContext,
    TokenPolicy,
    TokenRow,
    keep_top,
)
from sparsekv.policies.budget import Budget
from sparsekv.policies.choosing import AcrossLayers, check_numbers

HIDDEN_TOKENS = 128
"""Newest hidden states that a layer keeps while decoding under a layer policy (observation windows are 64)."""


def stored_budget(budget: Budget, n_seen: int, n_stored: int) -> Budget:
    """The budget for `n_stored` entries that are left of `n_seen`: a ratio counts what was seen."""
    if not budget.given or n_stored == n_seen:
        return budget
    return Budget(tokens=max(1, min(budget.n_kept(n_seen), n_stored)), scope=budget.scope)


class TokenEviction:
    """What a token policy keeps of the entries that layers store; asked once where layers and heads store the same.

    For one reading of a cache, whose rows stay what they are.
    """

    def __init__(self, cache: SparseCache, policy: TokenPolicy, budget: Budget) -> None:
        self.cache, self.policy, self.budget = cache, policy, budget
        self._context: TokenContext | None = None
        # row -> tokens seen, columns [n], what stays of them
        self._asked: dict[int, tuple[int, Tensor, Tensor]] = {}

    def kept(self, index: int, layer: SparseLayer) -> Tensor:
        """BoolTensor [B, H, T seen]: what stays of layer `index`."""
        cache, heads, seen = self.cache, layer.n_kv_heads, layer.get_seq_length()
        device = layer.store.keys.device
        real_seen = cache.real_seen().tolist()
        real_columns = None if cache.real is None else cache.real_columns().to(device)
        kept = torch.zeros(cache.batch, heads, seen, dtype=torch.bool, device=device)
        segments = [torch.arange(seen, device=device)] if layer.intact else layer.columns()
        for row in range(cache.batch):
            if not real_seen[row]:
                continue  # a chunk of padding only
            of_row = segments if layer.intact else segments[row * heads : (row + 1) * heads]
            for head, columns in enumerate(of_row):
                if real_columns is not None:
                    columns = columns[real_columns[row][columns]]
                chosen = self._chosen(row, columns, real_seen[row]).to(device)
                of_layer = chosen[min(index, chosen.shape[0] - 1)]
                if layer.intact:  # all heads at once
                    kept[row][:, columns] = of_layer
                else:
                    kept[row, head, columns] = of_layer[min(head, of_layer.shape[0] - 1)]
        return kept

    def _chosen(self, row: int, columns: Tensor, n_seen: int) -> Tensor:
        """BoolTensor [L or 1, H or 1, n]: the policy's answer for a row whose entries stand at `columns` [n]."""
        asked = self._asked.get(row)
        if asked is not None and asked[0] == n_seen and torch.equal(asked[1], columns.to(asked[1].device)):
            return asked[2]
        cache = self.cache
        if self._context is None:
            # ids are given per row
            blank = torch.zeros(cache.batch, 1, dtype=torch.int64, device=columns.device)
            self._context = TokenContext.of_model(
                cache.config, blank, tokenizer=cache.tokenizer, seeds=cache.seeds
            )
        if cache.ids is None and self.policy.needs_ids:
            raise ConfigError(
                f"method {self.policy.name!r} looks at the text, which this cache was not told of"
            )
        ids = columns if cache.ids is None else cache.ids[row].to(columns.device).long()[columns]
        seed = cache.seeds[row] if cache.seeds else 0
        budget = stored_budget(self.budget, n_seen, len(columns))
        chosen = self.policy.keep_row(TokenRow(ids, self._context, seed), budget)
        self._asked[row] = n_seen, columns, chosen
        return chosen


def row_contexts(
    module: nn.Module,
    index: int,
    cache: SparseCache,
    layer: SparseLayer,
    hidden: Tensor,
    rotary: tuple[Tensor, Tensor],
) -> list[tuple[LayerContext, Tensor]]:
    """(context, columns [H, n]) of every row without padding, right after the layer attended to the newest tokens.

    Raises ConfigError where a layer policy can't see a row's stored entries as one dense tensor.
    """
    cos, sin = rotary
    real = None if cache.real is None else cache.real_columns()
    contexts = []
    seen, whole = layer.get_seq_length(), layer.intact
    every_column = torch.arange(seen, device=hidden.device).expand(layer.n_kv_heads, -1)
    stored_columns = [] if whole else layer.columns()
    for row in range(layer.batch):
        if whole:  # the usual case, once per layer of every prefill
            columns = every_column
        else:
            columns = _columns_of_row(stored_columns[row * layer.n_kv_heads : (row + 1) * layer.n_kv_heads])
        start = 0
        if real is not None:
            inside = real[row].to(columns.device)[columns]
            start = int((~inside[0]).sum())
            if not bool(inside[:, start:].all()):
                raise ConfigError("padding between tokens: layer policies need left padding only")
        spot = min(row, cos.shape[0] - 1)
        n = columns.shape[1] - start
        n_hidden = min(hidden.shape[1], n)
        first = hidden.shape[1] - n_hidden
        stored = columns[:, start:]
        keys, values = layer.row(row)
        ctx = LayerContext(
            module=module,
            layer_idx=index,
            hidden_states=hidden[row : row + 1, first:],
            keys=keys[None, :, start:],
            values=values[None, :, start:],
            position_embeddings=(cos[spot : spot + 1, first:], sin[spot : spot + 1, first:]),
            cache_position=torch.arange(n - n_hidden, n, device=keys.device),
            seed=cache.seeds[row] if cache.seeds else 0,
            ids=_ids_of(cache, row, stored, slice(start, seen) if whole else None),
            tokenizer=cache.tokenizer,
            n_aligned=n_hidden if whole else min(n_hidden, newest_stored(stored, seen)),
        )
        contexts.append((ctx, stored))
    return contexts


def _columns_of_row(per_head: list[Tensor]) -> Tensor:
    """LongTensor [H, n]: the columns that the kv heads of a row store. Raises ConfigError if they differ in number."""
    if len({len(columns) for columns in per_head}) > 1:
        raise ConfigError(
            "this cache stores different numbers of entries per kv head, so its keys can't be scored again; "
            "use a token policy (sink_recent, uniform_middle, ladder, anchors) for later evictions. Where the heads "
            "were equal before crop() took out tokens that not all of them still held: snapshot() and restore()"
        )
    return torch.stack(per_head)


def newest_stored(columns: Tensor, seen: int) -> int:
    """How many of the newest tokens all heads store without a gap, of `columns` [H, n], ascending, of `seen` tokens."""
    n = columns.shape[1]
    unbroken = (columns == torch.arange(seen - n, seen, device=columns.device)).all(0)
    return int(unbroken.flip(0).long().cumprod(0).sum())


def _ids_of(cache: SparseCache, row: int, columns: Tensor, run: slice | None) -> Tensor | None:
    """LongTensor [1, n]: the text of a row's stored entries; None if ids are unknown, or heads differ.

    `run`: the columns [H, n] are these in all heads, which need not be looked at then.
    """
    if cache.ids is None:
        return None
    if run is not None:
        return cache.ids[row : row + 1, run].to(columns.device).long()
    if bool((columns != columns[:1]).any()):
        return None
    return cache.ids[row].to(columns.device).long()[columns[:1]]


def kept_by_layer(
    module: nn.Module,
    index: int,
    cache: SparseCache,
    layer: SparseLayer,
    policy: LayerPolicy,
    budget: Budget,
    hidden: Tensor,
    rotary: tuple[Tensor, Tensor],
) -> Tensor:
    """BoolTensor [B, H, T seen]: what a layer policy keeps of the entries that `layer` stores."""
    kept = torch.zeros(
        layer.batch, layer.n_kv_heads, layer.get_seq_length(), dtype=torch.bool, device=hidden.device
    )
    real_seen = cache.real_seen().tolist()
    for row, (ctx, columns) in enumerate(row_contexts(module, index, cache, layer, hidden, rotary)):
        use = stored_budget(budget, real_seen[row], columns.shape[1])
        if policy.may_keep_all(use, columns.shape[1]):
            kept[row].scatter_(-1, columns, True)
            continue
        if policy.scored and use.given and not policy.spans_layers(use):
            scores = check_numbers(policy.score_layer(ctx, use), policy.name, index)
            chosen = keep_top(scores[:, None], use)[0, 0]
        else:
            chosen = policy.keep_layer(ctx, use)[0]
        kept[row].scatter_(-1, columns, chosen)
    return kept


def kept_in_layer(
    cache: SparseCache,
    module: nn.Module,
    index: int,
    policy: Policy,
    budget: Budget,
    hidden: Tensor,
    rotary: tuple[Tensor, Tensor],
) -> Tensor:
    """BoolTensor [B, H, T seen]: what a policy keeps of one layer. Raises ConfigError for policies that can't."""
    layer = cache.layers[index]
    if not isinstance(layer, SparseLayer):
        raise ConfigError(f"layer {index} has the model's own sliding window and can't be compacted")
    if isinstance(policy, TokenPolicy):
        return TokenEviction(cache, policy, budget).kept(index, layer)
    if isinstance(policy, LayerPolicy):
        return kept_by_layer(module, index, cache, layer, policy, budget, hidden, rotary)
    raise ConfigError(
        f"method {policy.name!r} runs the model itself; it works only right after a whole prefill"
    )


class JointEviction:
    """Evictions of one reading under a policy that chooses over all layers (`LayerPolicy.spans_layers`), row by row.

    Parameters
    ----------
    cache : whole, read for the first time
    policy, budget
    """

    def __init__(self, cache: SparseCache, policy: LayerPolicy, budget: Budget) -> None:
        self.cache, self.policy, self.budget = cache, policy, budget
        self._choices: dict[int, AcrossLayers] = {}

    def after_layer(
        self,
        module: nn.Module,
        index: int,
        layer: SparseLayer,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
    ) -> dict[int, Tensor]:
        """Right after layer `index` has attended: layer -> BoolTensor [B, H, T seen], of the layers to compact now.

        None where no row loses anything, and none that holds everything and is to go on so.
        """
        layers = self.cache.compressible
        shape = (layer.batch, layer.n_kv_heads, layer.get_seq_length())
        kept: dict[int, Tensor] = {}
        whole: list[tuple[int, Tensor]] = []  # rows from which nothing leaves, and their columns
        contexts = row_contexts(module, index, self.cache, layer, hidden, rotary)
        for row, (ctx, columns) in enumerate(contexts):
            if self.policy.may_keep_all(self.budget, columns.shape[1]):
                whole.append((row, columns))
                continue
            choice = self._choices.get(row)
            if choice is None:
                choice = self._choices[row] = self.policy.across_layers(len(layers), self.budget)
            scores = check_numbers(self.policy.score_layer(ctx, self.budget), self.policy.name, index)
            for place, stays in choice.after_layer(scores[0]).items():
                blank = torch.zeros(shape, dtype=torch.bool, device=columns.device)
                kept.setdefault(layers[place], blank)[row].scatter_(-1, columns, stays)
        for mask in kept.values():
            for row, columns in whole:
                mask[row].scatter_(-1, columns, True)
        return {at: mask for at, mask in kept.items() if not (self._is_whole(at) and bool(mask.all()))}

    def _is_whole(self, index: int) -> bool:
        layer = self.cache.layers[index]
        return isinstance(layer, SparseLayer) and layer.intact


def evict_layer(
    cache: SparseCache, module: nn.Module, index: int, layer: SparseLayer, inputs: tuple[Tensor, Any] | None
) -> None:
    """Eviction while decoding, after a layer has attended: see `DecodeEviction`."""
    decode = cache.decode
    if decode is None or inputs is None:
        return
    hidden, rotary = inputs
    if isinstance(decode.policy, LayerPolicy) and decode.rounds is None:
        hidden, rotary = remember_inputs(layer, hidden, rotary)
    decode.since[index] = decode.since.get(index, 0) + inputs[0].shape[1]
    due = decode.since[index] >= decode.every
    if decode.rounds is not None:
        decode.since[index] %= decode.every
        decode.rounds.after_layer(cache, module, index, layer, hidden, rotary, due=due)
        return
    if not due:
        return
    decode.since[index] = 0
    n_stored = layer.stored().amax(dim=1).tolist()
    if decode.budget.given and all(
        n <= decode.budget.n_kept(seen) for n, seen in zip(n_stored, cache.real_seen().tolist(), strict=True)
    ):
        return
    layer.keep(
        kept_in_layer(cache, module, index, decode.policy, decode.budget, hidden, rotary), cache.rotation()
    )


def remember_inputs(
    layer: SparseLayer, hidden: Tensor, rotary: tuple[Tensor, Tensor]
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The newest hidden states of this layer, with their rotary embeddings, for observation windows.

    At most `HIDDEN_TOKENS` tokens: those of this forward after the ones remembered from earlier forwards.
    """
    cos, sin = (x.expand(hidden.shape[0], -1, -1) for x in rotary)
    held = layer.recent_inputs
    if held is not None and len(held) == 3 and held[0].shape[0] == hidden.shape[0]:
        hidden, cos, sin = (
            torch.cat([old, new], dim=1) for old, new in zip(held, (hidden, cos, sin), strict=True)
        )
    hidden, cos, sin = (x[:, -HIDDEN_TOKENS:].clone() for x in (hidden, cos, sin))
    layer.recent_inputs = hidden, cos, sin
    return hidden, (cos, sin)
