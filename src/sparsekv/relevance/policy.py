"""The learned policy: keep the entries that the model's own predictors call relevant."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparsekv.policies.base import LayerContext, LayerPolicy
from sparsekv.policies.budget import Budget
from sparsekv.policies.learned_scores import relevance_of_entries
from sparsekv.relevance.predictor import Served, reads_text, served_by


@dataclass(frozen=True)
class Relevance(LayerPolicy):
    """Keep what the relevance predictors score highest; served as it was trained.

    A budget keeps the exact top entries: per head, per layer or of the whole model (scope "model", which the predictors
    are trained for: heads then keep different numbers). Without a budget their own threshold decides: g > threshold.

    Parameters
    ----------
    n_sink, n_recent : int >= 0, optional
        First and last entries that always stay; they count in a budget. Default: what the model's predictors were
        trained with (`Served`; 4 and 16 where their file does not say).
    threshold : float, optional
        In logits; 0 is a relevance of one half. Default: the predictors' own (0 where their file does not say).
    """

    n_sink: int | None = None
    n_recent: int | None = None
    threshold: float | None = None
    name = "relevance"
    own_sizes: ClassVar[bool] = True
    whole_context: ClassVar[bool] = True  # a token's hidden state is known only while it is read

    def __post_init__(self) -> None:
        self._over(Served())  # so that a wrong size is told now

    def needs_tokenizer(self, model: Any) -> bool:
        """True if the model's predictors read the text."""
        return reads_text(model)

    def score_layer(self, ctx: LayerContext, budget: Budget) -> Tensor:
        """g, fp32 [B, H, T]; +inf for entries that always stay. Higher = keep."""
        n = ctx.keys.shape[2]
        return relevance_of_entries(ctx, self.name).masked_fill(self.protected(n, ctx), torch.inf)

    def keep_layer(self, ctx: LayerContext, budget: Budget) -> Tensor:
        """BoolTensor [B, H, T]; every head keeps at least one entry."""
        if budget.given:
            return super().keep_layer(ctx, budget)
        scores = self.score_layer(ctx, budget)
        return (scores > self.served(ctx).threshold).scatter(-1, scores.argmax(-1, keepdim=True), True)

    def protected(self, n: int, ctx: LayerContext) -> Tensor:
        """BoolTensor [n]: sinks and recent entries."""
        column = torch.arange(n, device=ctx.hidden_states.device)
        served = self.served(ctx)
        return (column < served.n_sink) | (column >= n - served.n_recent)

    def served(self, ctx: LayerContext) -> Served:
        """What holds in a layer: this policy's parameters, and its predictor's where they are None."""
        return self._over(served_by(ctx.module))

    def _over(self, default: Served) -> Served:
        given = {field: getattr(self, field) for field in ("n_sink", "n_recent", "threshold")}
        return replace(default, **{field: value for field, value in given.items() if value is not None})
