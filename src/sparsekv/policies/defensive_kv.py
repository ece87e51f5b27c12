"""DefensiveKV: guard against the worst case that was seen, not against the mean (arXiv 2510.13334, section 4).

Shape letters: B batch, H kv heads, G query heads per kv head, W observing queries, T tokens, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparsekv.errors import ConfigError
from sparsekv.policies.base import LayerContext, LayerPolicy
from sparsekv.policies.budget import Budget, Scope
from sparsekv.policies.choosing import check_numbers, keep_top
from sparsekv.policies.sizes import require_budget
from sparsekv.policies.window_scores import ALWAYS, check_window, pooled, window_attention, with_window

SECURED = ALWAYS / 10
"""Scores from here up are of entries of the first stage."""


def defended(attention: Tensor, kernel_size: int) -> Tensor:
    """Worst-case importance with prior-risk correction, [B, H, n], of weights [B, H, G, W, n] on earlier entries.

    Each query's weights are smoothed over `kernel_size` neighbours, their sum unchanged. Step 1 takes the largest over
    all observing queries and query heads: one that needed an entry counts in full. Step 2 lifts entries that no query
    needed to the mean of the head, because a few observed queries do not prove that they never will be.
    """
    smooth = pooled(attention, kernel_size, "mean")
    tiny = torch.finfo(smooth.dtype).tiny
    smooth = smooth * (attention.sum(-1, keepdim=True) / smooth.sum(-1, keepdim=True).clamp_min(tiny))
    worst = smooth.amax(dim=(2, 3))
    return torch.maximum(worst, worst.mean(dim=-1, keepdim=True))


def projected_value_norms(module: Any, values: Tensor) -> Tensor:
    """L1 norm of what a value adds to the layer's output, fp32 [B, H, T]: the mean over a group's query heads.

    |v W_O|_1 with the columns of W_O that belong to the query head (CriticalKV, arXiv 2502.03805, section 3).
    """
    heads, width = values.shape[1], values.shape[-1]
    weight = module.o_proj.weight.float()  # [hidden, Hq * D]
    per_head = weight.view(weight.shape[0], -1, width)
    groups = per_head.shape[1] // heads
    norms = [
        torch.stack(
            [(values[:, h].float() @ per_head[:, h * groups + g].T).abs().sum(-1) for g in range(groups)]
        ).mean(0)
        for h in range(heads)
    ]
    return torch.stack(norms, dim=1)


@dataclass(frozen=True)
class DefensiveKV(LayerPolicy):
    """The entries that some query needed most, times what they add to the output; one budget per layer.

    Parameters
    ----------
    window : int >= 1
        Newest entries, which observe and always stay.
    kernel_size : int >= 1, odd
        Neighbours over which each query's attention is smoothed.
    first_stage : float in [0, 1]
        Entries that take this share of the window's mean attention (what the window gives to itself counts as taken)
        are kept first, the largest before the others, as far as an equal budget per head goes; then the rest by
        score (CriticalKV's two stages). 0 leaves the first stage out.

    Notes
    -----
    The heads of a layer share its budget (AdaKV), whatever the budget's scope says ("head" or "layer"). Defaults are
    those of the released code.
    """

    window: int = 32
    kernel_size: int = 5
    first_stage: float = 0.9
    name = "defensive_kv"
    ratio_free = False
    scored: ClassVar[bool] = False  # the budget's sharing is the method's own, so it decides itself
    needs_budget: ClassVar[bool] = True
    leaves_unequal: ClassVar[bool] = True
    scopes: ClassVar[tuple[Scope, ...]] = ("head", "layer")

    def __post_init__(self) -> None:
        check_window(self.name, self.window, self.kernel_size)
        number = isinstance(self.first_stage, (int, float)) and not isinstance(self.first_stage, bool)
        if not number or not 0 <= self.first_stage <= 1:
            raise ConfigError(f"{self.name}: first_stage must be in [0, 1], got {self.first_stage!r}")

    def score_layer(self, ctx: LayerContext, budget: Budget) -> Tensor:
        """Defended importance times normalised value norm, fp32 [B, H, T]; the window first, then the first stage."""
        weights = window_attention(ctx, self.window)
        total = weights.shape[-1]
        n = total - min(self.window, total)
        if not n:
            return with_window(weights[..., :0].sum((2, 3)), total)
        norms = projected_value_norms(ctx.module, ctx.values[:, :, :n])
        attention = weights[..., :n]
        tiny = torch.finfo(torch.float32).tiny
        scores = defended(attention, self.kernel_size) * norms / norms.sum(-1, keepdim=True).clamp_min(tiny)
        mean = attention.mean(dim=(2, 3))
        threshold = self.first_stage - weights[..., n:].sum(-1).mean(dim=(1, 2, 3))[:, None, None]
        n_first = budget.n_kept(total) - (total - n) if budget.given else n
        first = _first_stage(mean, threshold, max(0, n_first))
        return with_window(torch.where(first, SECURED * (1 + mean), scores), total - n)

    def keep_layer(self, ctx: LayerContext, budget: Budget) -> Tensor:
        """BoolTensor [B, H, T]: the layer's best entries; heads may keep different numbers."""
        require_budget(self.name, budget)
        self.check_scope(budget)
        scores = check_numbers(self.score_layer(ctx, budget), self.name, ctx.layer_idx)
        return keep_top(scores[:, None], replace(budget, scope="layer"))[:, 0]


@dataclass(frozen=True)
class LayerDefensiveKV(DefensiveKV):
    """DefensiveKV with one budget for the whole model: layers get what their entries' scores claim.

    Parameters, scores and defaults are those of `DefensiveKV`. Layers are compacted when the last has been read.
    """

    name = "layer_defensive_kv"
    scored: ClassVar[bool] = True
    joint: ClassVar[bool] = True
    scopes: ClassVar[tuple[Scope, ...]] = ("head", "model")

    def keep_layer(self, ctx: LayerContext, budget: Budget) -> Tensor:
        """Raises a ConfigError: every layer's scores are needed."""
        return LayerPolicy.keep_layer(self, ctx, budget)


def _first_stage(mean: Tensor, threshold: Tensor, most: int) -> Tensor:
    """BoolTensor [B, H, n]: each head's largest, until their share of its attention reaches `threshold`."""
    share, order = (mean / mean.sum(-1, keepdim=True).clamp_min(torch.finfo(mean.dtype).tiny)).sort(
        dim=-1, descending=True, stable=True
    )
    rank = torch.arange(mean.shape[-1], device=mean.device)
    taken = (share.cumsum(-1) < threshold) & (rank < most)
    return torch.zeros_like(mean, dtype=torch.bool).scatter_(-1, order, taken)
