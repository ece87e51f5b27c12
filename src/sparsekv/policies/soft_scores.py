"""Another method's own scores, made soft: what it would evict fades, and the model can learn to score it otherwise.

    weight = sigmoid((z - threshold) / temperature),   z = scores (logs of positive ones) over their deviation

A key's norm, the attention of the last queries or the similarity of keys are functions of the model's weights. Trained
under these weights, a model moves what it will need to where such a method looks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from sparsekv.errors import ConfigError
from sparsekv.policies.base import LayerContext, LayerPolicy, Policy
from sparsekv.policies.budget import Budget
from sparsekv.policies.soft import is_finite, threshold_of_scope

_AS_INNER = (
    "rerotate",
    "by_step",
    "scored",
    "own_sizes",
    "ratio_free",
    "needs_budget",
    "scopes",
    "joint",
    "whole_context",
    "positive_scores",
    "too_short",
)
"""What a method says of itself; softness changes none of it."""


@dataclass(frozen=True)
class SoftScores(LayerPolicy):
    """A scoring method whose decision is soft while a model trains; hard, it is that method.

    Parameters
    ----------
    inner : LayerPolicy
        One that has a budget pick its best scores, and that can give them with a gradient (`scores_with_gradient`).
    temperature : float > 0
        In standard deviations of the scores of a head.

    Raises
    ------
    ConfigError
        If `inner` has no scores, or the temperature is not above 0.
    """

    inner: LayerPolicy
    temperature: float = 1.0
    soft: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in _AS_INNER:
            object.__setattr__(self, name, getattr(self.inner, name))
        if not _has_gradient(self.inner):
            raise ConfigError(f"method {self.inner.name} has no scores with a gradient, so it can't be soft")
        if not is_finite(self.temperature) or self.temperature <= 0:
            raise ConfigError(f"soft scores: temperature must be a number over 0, got {self.temperature!r}")

    @property
    def name(self) -> str:  # type: ignore[override]
        """The inner method's."""
        return self.inner.name

    @property
    def always_kept(self) -> int:
        """As the inner method."""
        return self.inner.always_kept

    @property
    def reads_text(self) -> bool:
        """As the inner method."""
        return self.inner.reads_text

    def weigh_layer(self, ctx: LayerContext, budget: Budget) -> Tensor:
        """Log weights [B, H, T] <= 0; the weights of each head (scope "layer": of a layer) sum to its budget.

        All 0 for a context that is too short for the method.
        """
        inner: Any = self.inner
        total = ctx.keys.shape[2]
        if budget.n_kept(total) >= total or total <= self.too_short:
            return torch.zeros(ctx.keys.shape[:3], dtype=torch.float32, device=ctx.keys.device)
        if budget.scope == "model":
            raise ConfigError(f"method {self.name}: soft scores take a budget of scope 'head' or 'layer'")
        scores: Tensor = inner.scores_with_gradient(ctx, budget).float()
        if self.positive_scores:  # the method's word: one score that underflows must not change the scale
            scores = scores.clamp_min(torch.finfo(scores.dtype).tiny).log()
        z = scores / scores.detach().std(-1, keepdim=True).clamp_min(1e-6)
        threshold = threshold_of_scope(z, budget.n_kept(total), budget.scope, self.temperature)
        return logsigmoid((z - threshold) / self.temperature)

    def score_layer(self, ctx: LayerContext, budget: Budget) -> Tensor:
        """The inner method's scores."""
        return self.inner.score_layer(ctx, budget)

    def keep_layer(self, ctx: LayerContext, budget: Budget) -> Tensor:
        """What the inner method keeps."""
        return self.inner.keep_layer(ctx, budget)


def as_soft(policy: Policy, temperature: float) -> Policy:
    """`SoftScores` of a method that has scores with a gradient; any other as it is."""
    if isinstance(policy, LayerPolicy) and _has_gradient(policy):
        return SoftScores(policy, temperature)
    return policy


def _has_gradient(policy: LayerPolicy) -> bool:
    return callable(getattr(policy, "scores_with_gradient", None))
