"""RocketKV: evict coarsely once, then let each decoding step choose among what is left (arXiv 2502.14051).

And its ablation without the eviction, by pages as Quest chooses them (arXiv 2406.10774).

Shape letters: B batch, H kv heads, G query heads per kv head, T tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsekv.policies.base import LayerContext, LayerPolicy, PositionPolicy, TokenRow
from sparsekv.policies.budget import Budget, Scope
from sparsekv.policies.choosing import check_numbers
from sparsekv.policies.sizes import check_size, require_budget
from sparsekv.policies.step_rules import HybridRule, QuestRule, StepRule
from sparsekv.policies.window_scores import check_window, pooled, window_attention, with_window

SMALLEST_KERNEL, LARGEST_KERNEL = 7, 63
_TOKENS_PER_NEIGHBOUR = 32


def first_stage_exponent(compression: float) -> float:
    """a: of a compression by c the eviction takes c ** a, the steps c ** (1 - a) (RocketKV, section 3.5).

    a = min(0.2 + 0.06 log2 c, 0.8): the more is asked, the larger the share of the eviction.
    """
    return min(0.2 + 0.06 * math.log2(max(1.0, compression)), 0.8)


def adaptive_kernel(n: int) -> int:
    """Pooling width for a context of `n` tokens: n / 32 as an odd number, between 7 and 63."""
    return min(LARGEST_KERNEL, max(SMALLEST_KERNEL, n // _TOKENS_PER_NEIGHBOUR // 2 * 2 + 1))


@dataclass(frozen=True)
class RocketKV(LayerPolicy):
    """Keep more than the budget, by the window's attention; read less than that in each decoding step.

    The budget is what a step may move: 1 / c of reading the whole context, c = 1 / (1 - compression_ratio) or
    T / tokens. Stage one evicts all but T / c ** a entries of every kv head (`first_stage_exponent`): their scores are
    the attention of the newest `window` queries, summed over them and over the query heads of the kv head, the maximum
    over `kernel_size` neighbours. Stage two is `HybridRule`: a step reads the rest's best entries.

    So memory falls less than `compression_ratio` says: achieved_compression is 1 - c ** -a, and attended_fraction is
    the part of the stored entries that a step reads.

    Parameters
    ----------
    window : int >= 1
        Newest entries, which observe and always stay.
    kernel_size : int >= 1, odd, optional
        Default: `adaptive_kernel` of the context's length.

    Notes
    -----
    Several queries at once (a question) read everything stored. The paper's first version lets the pooling width
    follow the input's length; the rule here is our own, between SnapKV's 7 and the 63 of the released code.
    """

    window: int = 32
    kernel_size: int | None = None
    name = "rocket_kv"
    scored: ClassVar[bool] = False  # how many stay is not the budget's count
    needs_budget: ClassVar[bool] = True
    by_step: ClassVar[bool] = True
    whole_context: ClassVar[bool] = True
    scopes: ClassVar[tuple[Scope, ...]] = ("head",)

    def __post_init__(self) -> None:
        check_window(self.name, self.window, self.kernel_size)

    def n_stored(self, n: int, budget: Budget) -> int:
        """Entries per kv head that stage one keeps of a context of `n`; at least the budget."""
        require_budget(self.name, budget)
        self.check_scope(budget)
        tokens = budget.n_kept(n)
        compression = n / tokens
        return max(tokens, int(n / compression ** first_stage_exponent(compression)))

    def score_layer(self, ctx: LayerContext, budget: Budget) -> Tensor:
        """Pooled attention of the window, fp32 [B, H, T]; entries of the window itself come first."""
        weights = window_attention(ctx, self.window).sum(dim=(2, 3))
        total = weights.shape[-1]
        window = min(self.window, total)
        kernel = self.kernel_size or adaptive_kernel(total)
        return with_window(pooled(weights[..., : total - window], kernel, "max"), window)

    def keep_layer(self, ctx: LayerContext, budget: Budget) -> Tensor:
        """BoolTensor [B, H, T]; the same number in every head, of equals the earlier entry."""
        scores = check_numbers(self.score_layer(ctx, budget), self.name, ctx.layer_idx)
        n_kept = self.n_stored(scores.shape[-1], budget)
        best = scores.argsort(dim=-1, descending=True, stable=True)[..., :n_kept]
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)

    def step_rule(self, budget: Budget, place: int) -> StepRule | None:
        """Stage two; None where the budget removes nothing."""
        require_budget(self.name, budget)
        if budget.tokens is not None:
            return HybridRule(tokens=budget.tokens)
        compression = 1 / (1 - (budget.compression_ratio or 0.0))
        if compression == 1:
            return None
        return HybridRule(compression=compression ** (1 - first_stage_exponent(compression)))


@dataclass(frozen=True)
class Quest(PositionPolicy):
    """Everything stays; each decoding step reads the pages that may hold the largest logits (`QuestRule`).

    The budget is what a step reads: nothing is evicted, so achieved_compression is 0 and attended_fraction follows the
    budget. As an ablation of RocketKV: no permanent eviction, and only the sequence is reduced.

    Parameters
    ----------
    page_size : int >= 1
        Neighbouring slots per page.
    n_full_layers : int >= 0
        First compressible layers that read everything (the paper spares two, which are not sparse).
    """

    page_size: int = 16
    n_full_layers: int = 2
    name = "quest"
    by_step: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_size(self.name, "page_size", self.page_size, 1)
        check_size(self.name, "n_full_layers", self.n_full_layers)

    def keep_row(self, row: TokenRow, budget: Budget) -> Tensor:
        """BoolTensor [1, 1, n] of True."""
        require_budget(self.name, budget)
        return torch.ones(1, 1, row.n, dtype=torch.bool, device=row.ids.device)

    def step_rule(self, budget: Budget, place: int) -> StepRule | None:
        """Pages by their bounds, after the first layers; None where the budget removes nothing."""
        require_budget(self.name, budget)
        if place < self.n_full_layers or budget.compression_ratio == 0:
            return None
        return QuestRule(Budget(budget.compression_ratio, budget.tokens), self.page_size)
