"""The learned policy: keep the entries that the model's own predictors call relevant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsekv.errors import ConfigError
from sparsekv.policies.base import LayerContext, LayerPolicy
from sparsekv.policies.budget import Budget
from sparsekv.policies.sizes import check_size
from sparsekv.relevance.predictor import relevance_of


@dataclass(frozen=True)
class Relevance(LayerPolicy):
    """Keep what the relevance predictors score highest; served as it was trained.

    A budget keeps the exact top entries: per head, per layer or of the whole model (scope "model", which the predictors
    are trained for: heads then keep different numbers). Without a budget their own threshold decides: g > threshold.

    Parameters
    ----------
    n_sink, n_recent : int >= 0
        First and last entries that always stay; they count in a budget.
    threshold : float
        In logits; 0 is a relevance of one half.
    """

    n_sink: int = 4
    n_recent: int = 16
    threshold: float = 0.0
    name = "relevance"
    own_sizes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_size(self.name, "n_sink", self.n_sink)
        check_size(self.name, "n_recent", self.n_recent)

    def score_layer(self, ctx: LayerContext, budget: Budget) -> Tensor:
        """g, fp32 [B, H, T]; +inf for entries that always stay. Higher = keep."""
        n = ctx.keys.shape[2]
        if ctx.hidden_states.shape[1] != n:
            raise ConfigError(
                "method 'relevance' scores a token from its hidden state, which is known only while it is read: "
                "it compresses a whole context once (no chunk, phase='prefill', first turn)"
            )
        return relevance_of(ctx.module, ctx.hidden_states).masked_fill(self.protected(n, ctx), torch.inf)

    def keep_layer(self, ctx: LayerContext, budget: Budget) -> Tensor:
        """BoolTensor [B, H, T]."""
        if budget.given:
            return super().keep_layer(ctx, budget)
        return self.score_layer(ctx, budget) > self.threshold

    def protected(self, n: int, ctx: LayerContext) -> Tensor:
        """BoolTensor [n]: sinks and recent entries."""
        column = torch.arange(n, device=ctx.hidden_states.device)
        return (column < self.n_sink) | (column >= n - self.n_recent)
