"""What one forward of a whole sequence is to hide, decided before it or inside each of its layers.

    model(**batch, selection=SelectionPlan(...))

Two ways of dropping (`Dropping`):

    prefill    entries of the context vanish for everything after a boundary: what compression after a prefill does
    streaming  an entry leaves once it is `window` tokens back, unless it is kept: what long decoding does

The plan also carries what the forward leaves behind: the chosen entries, and side outputs of observers, keyed by layer.
Recomputation under gradient checkpointing finds the same values and changes nothing; call `begin` before another
forward with the same plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from sparsekv.errors import ConfigError
from sparsekv.masked import Boundary
from sparsekv.policies.base import LayerContext, LayerPolicy, Policy
from sparsekv.policies.budget import Budget
from sparsekv.selection import NEVER, Selection

Dropping = Literal["prefill", "streaming"]


@dataclass(frozen=True)
class Seen:
    """What an observer may look at: one layer's attention call.

    Parameters
    ----------
    module : the attention module
    layer_idx : int
    query : [B, Hq, T, D], RoPE applied
    key : [B, H, T, D], RoPE applied
    evicted_at : IntTensor [B, H or 1, T]
    log_weight : FloatTensor [B, H or 1, T] or None
    scaling : float
    boundaries : (first real column, boundary) per row; None where there is no single one
    """

    module: nn.Module
    layer_idx: int
    query: Tensor
    key: Tensor
    evicted_at: Tensor
    log_weight: Tensor | None
    scaling: float
    boundaries: Sequence[Boundary] | None


class Observer(Protocol):
    """Computes a side output of a layer's attention, for example a sparsity loss. Keeps no state."""

    @property
    def name(self) -> str:
        """The key of its output."""
        ...

    def observe(self, seen: Seen) -> Tensor:
        """A scalar; gradients flow through it unless the observer detaches them."""
        ...


def budget_for(policy: Policy, budget: Budget, n: int) -> Budget:
    """The budget of a context of `n` entries in training: at least what the policy always keeps (`always_kept`).

    When a context is served, a budget under that is an error. In training, samples differ in length and a curriculum
    raises the ratio, so a short context loses what it can, and one no longer than what always stays nothing. A number
    of tokens under it stays an error.
    """
    if budget.compression_ratio is not None and n and budget.n_kept(n) < policy.always_kept:
        return Budget(tokens=policy.always_kept, scope=budget.scope)
    return budget


class SelectionPlan:
    """One forward's evictions: a ready `selection`, or a layer policy that decides inside each layer.

    No dataclass: what shards a model (FSDP) hands copies of those to its layers, and the records would be the copies'.

    Parameters
    ----------
    policy : LayerPolicy, optional
    budget : Budget
        Scope "head" or "layer" (a model-wide budget needs every layer's scores first).
    boundary : int or one per row, optional
        First column that misses what was evicted ("prefill"); the policy sees the columns before it.
    attention_mask : BoolTensor [B, T], optional
        False for padding (left).
    window : int >= 1, optional
        "streaming" instead: an entry that is not kept leaves `window` columns after its own.
    selection : Selection, optional
        Decided before the forward (token policies); then `policy` is not asked.
    seeds : one int per row, optional
        For policies that draw.
    ids, tokenizer : optional
        LongTensor [B, T] and what made them, for policies that look at the text.
    hard : bool
        Soft policies decide as they do when served.
    keep_scores : bool
        Record what a soft policy scored, without gradient, in `scores[layer]`.
    observers : whose side outputs to gather in `collected[name][layer]`

    Attributes
    ----------
    selected : layer -> evicted_at [B, H or 1, T] of the last forward
    soft_kept : layer -> FloatTensor [B], the mean soft weight of each row's context (nan where it has none),
        differentiable (soft policies only)
    scores : layer -> one FloatTensor [H, n] per row with a context of n, with `keep_scores`
    collected : observer's name -> layer -> its output
    """

    def __init__(
        self,
        policy: LayerPolicy | None = None,
        budget: Budget | None = None,
        boundary: int | Sequence[int] | None = None,
        attention_mask: Tensor | None = None,
        window: int | None = None,
        selection: Selection | None = None,
        seeds: Sequence[int] | None = None,
        ids: Tensor | None = None,
        tokenizer: Any = None,
        hard: bool = False,
        keep_scores: bool = False,
        observers: tuple[Observer, ...] = (),
    ) -> None:
        if (policy is None) == (selection is None):
            raise ConfigError("a SelectionPlan takes either a layer policy or a ready selection")
        if policy is not None and (boundary is None) == (window is None):
            raise ConfigError("a SelectionPlan takes either a boundary (prefill) or a window (streaming)")
        self.policy, self.budget = policy, budget or Budget()
        self.boundary, self.attention_mask, self.window = boundary, attention_mask, window
        self.selection, self.seeds = selection, seeds
        self.ids, self.tokenizer = ids, tokenizer
        self.hard, self.keep_scores, self.observers = hard, keep_scores, observers
        self.begin()

    def asking(self, policy: LayerPolicy) -> SelectionPlan:
        """The same plan for another policy, whose scores it keeps."""
        plan = copy(self)
        plan.policy, plan.keep_scores = policy, True
        plan.begin()
        return plan

    @property
    def needs_inputs(self) -> bool:
        """True if hidden states and rotary must reach the attention function."""
        return self.policy is not None

    def decide(
        self, module: nn.Module, layer_idx: int, key: Tensor, value: Tensor, inputs: tuple[Tensor, Any] | None
    ) -> tuple[Tensor, Tensor | None, Sequence[Boundary] | None]:
        """(evicted_at [B, H or 1, T], log_weight or None, boundaries or None) of one layer."""
        if self.selection is not None:
            at, weight = self.selection.layer(layer_idx), self.selection.layer_log_weight(layer_idx)
            self.selected[layer_idx] = at
            return at, weight, self.selection.boundaries
        if inputs is None:
            raise ConfigError("a SelectionPlan needs a model that went through sparsekv.prepare")
        at, weight = self._ask(module, layer_idx, key, value, inputs)
        self.selected[layer_idx] = at
        spans = None if self.window is not None else [self.span(row, key.shape[2]) for row in range(len(key))]
        return at, weight, spans

    def observe(self, seen: Seen) -> None:
        """Gather what the observers make of a layer."""
        for observer in self.observers:
            # Recomputation under checkpointing runs the same operations again, but what counts is the first result:
            # another graph would hold its activations until the plan goes.
            self.collected.setdefault(observer.name, {}).setdefault(seen.layer_idx, observer.observe(seen))

    def begin(self) -> None:
        """Forget the last forward."""
        self.selected: dict[int, Tensor] = {}
        self.soft_kept: dict[int, Tensor] = {}
        self.scores: dict[int, list[Tensor]] = {}
        self.collected: dict[str, dict[int, Tensor]] = {}

    def span(self, row: int, total: int) -> Boundary:
        """Columns [start, end) of a row that the policy sees."""
        end = total
        if self.boundary is not None:
            end = self.boundary if isinstance(self.boundary, int) else int(self.boundary[row])
            end = min(end, total)
        start = 0
        if self.attention_mask is not None:
            start = int((~self.attention_mask[row, :end].bool()).sum())
        return start, end

    def _ask(
        self, module: nn.Module, layer_idx: int, key: Tensor, value: Tensor, inputs: tuple[Tensor, Any]
    ) -> tuple[Tensor, Tensor | None]:
        policy = self.policy
        if policy is None:
            raise ConfigError("this plan has no policy to ask")
        hidden, (cos, sin) = inputs
        total = key.shape[2]
        is_soft = policy.soft and not self.hard
        at = torch.full(key.shape[:3], NEVER, dtype=torch.int32, device=key.device)
        weights, soft, scores = [], [], []
        for row in range(key.shape[0]):
            start, end = self.span(row, total)
            at[row, :, :start] = 0
            spot = min(row, cos.shape[0] - 1)
            ctx = LayerContext(
                module=module,
                layer_idx=layer_idx,
                hidden_states=hidden[row : row + 1, start:end],
                keys=key[row : row + 1, :, start:end],
                values=value[row : row + 1, :, start:end],
                position_embeddings=(cos[spot : spot + 1, start:end], sin[spot : spot + 1, start:end]),
                cache_position=torch.arange(end - start, device=key.device),
                seed=0 if self.seeds is None else int(self.seeds[row]),
                ids=None if self.ids is None else self.ids[row : row + 1, start:end],
                tokenizer=self.tokenizer,
            )
            leaves = self.leaves(start, end, at.device)
            if not is_soft and end - start <= policy.too_short:
                continue
            budget = budget_for(policy, self.budget, end - start)
            if end == start:
                soft.append(torch.full((), torch.nan, device=key.device))
                weights.append(torch.zeros(key.shape[1], total, device=key.device))
            elif is_soft:
                weight = policy.weigh_layer(ctx, budget)[0]
                soft.append(weight.float().exp().mean())
                if self.keep_scores:
                    with torch.no_grad():
                        scores.append(policy.score_layer(ctx, budget)[0])
                weights.append(nn.functional.pad(weight, (start, total - end)))
                at[row, :, start:end] = leaves
            else:
                with torch.no_grad():
                    kept = policy.keep_layer(ctx, budget)[0]
                at[row, :, start:end] = torch.where(kept, at[row, :, start:end], leaves)
        if not is_soft:
            return at, None
        self.soft_kept.setdefault(layer_idx, torch.stack(soft))
        if scores:
            self.scores.setdefault(layer_idx, scores)
        return at, torch.stack(weights)

    def leaves(self, start: int, end: int, device: torch.device) -> Tensor:
        """IntTensor [end - start]: when an entry that is not kept leaves."""
        columns = torch.arange(start, end, dtype=torch.int32, device=device)
        return columns + self.window if self.window is not None else torch.full_like(columns, end)
