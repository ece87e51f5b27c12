"""Soft eviction: entries fade by a sigmoid of their score instead of leaving, so gradients reach the scores.

    weight = sigmoid((score - threshold) / temperature)         annealed by the trainer: temperature from 1 towards 0

Trained soft, served hard: `keep_layer` keeps the entries above the threshold, or the best ones of a budget.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from sparsekv.errors import ConfigError, unknown
from sparsekv.policies.attention_scores import BLOCK_SIZE, attention_over_uniform
from sparsekv.policies.base import LayerContext, LayerPolicy
from sparsekv.policies.blocks import DEFAULT_RECENT, Middle, middle_of
from sparsekv.policies.budget import Budget, Scope
from sparsekv.policies.learned_scores import relevance_of_entries
from sparsekv.policies.sizes import check_size, refuse_budget

On = Literal["attention", "relevance"]
ON: tuple[On, ...] = ("attention", "relevance")

_BISECTIONS = 26
"""Halvings of the range of the scores: as fine as fp32."""


@dataclass(frozen=True)
class SoftThreshold(LayerPolicy):
    """Entries whose score is under a threshold fade: the lower the temperature, the more sharply.

    Parameters
    ----------
    temperature : float > 0
        In units of the score.
    threshold : float, optional
        In units of the score; a budget beside it is an error. None: the one at which the weights sum to the budget, per
        kv head (scope "layer": over the layer's heads), found anew in every call from detached scores.
    on : "attention" or "relevance"
        The score: the log of the attention an entry received, relative to uniform attention (0 = as much as under it),
        or the logit of the layer's relevance predictor (`module.relevance`).
    window : int >= 1, optional
        For "attention": only the newest `window` queries observe. None: all, at the cost of one more attention.
    n_sink : int >= 0
        First entries that always stay.
    n_recent : int >= 0, optional
        Last entries that always stay. Default: 64, at most half of what the sinks leave of the budget.
    block_size : int >= 1
        For "attention": queries per block; memory against speed, the result is the same.
    """

    temperature: float = 1.0
    threshold: float | None = None
    on: On = "attention"
    window: int | None = 64
    n_sink: int = 4
    n_recent: int | None = None
    block_size: int = BLOCK_SIZE
    name = "soft_threshold"
    soft: ClassVar[bool] = True
    ratio_free = False

    def __post_init__(self) -> None:
        if not is_finite(self.temperature) or self.temperature <= 0:
            raise ConfigError(f"{self.name}: temperature must be a number over 0, got {self.temperature!r}")
        if self.threshold is not None and not is_finite(self.threshold):
            raise ConfigError(f"{self.name}: threshold must be a finite number, got {self.threshold!r}")
        if self.on not in ON:
            raise unknown(f"on of {self.name}", self.on, ON)
        check_size(self.name, "n_sink", self.n_sink)
        check_size(self.name, "block_size", self.block_size, 1)
        if self.window is not None:
            check_size(self.name, "window", self.window, 1)
        if self.n_recent is not None:
            check_size(self.name, "n_recent", self.n_recent)

    @property
    def scored(self) -> bool:  # type: ignore[override]
        """True if a budget picks the best entries; False if the threshold decides."""
        return self.threshold is None

    @property
    def whole_context(self) -> bool:  # type: ignore[override]
        """True for "relevance": a token's hidden state is known only while it is read."""
        return self.on == "relevance"

    def weigh_layer(self, ctx: LayerContext, budget: Budget) -> Tensor:
        """Log weights [B, H, T] <= 0: log sigmoid((score - threshold) / temperature), 0 for what always stays.

        Under a ratio of 0 all are 0. Raises ConfigError as `score_layer` does, and for scope "model" (it has no
        threshold of its own).
        """
        middle = self._middle(ctx, budget)
        inner = self._scores(ctx, differentiable=True)[..., middle.start : middle.stop]
        outer = (middle.start, ctx.keys.shape[2] - middle.stop)
        if self.threshold is not None:
            weights = logsigmoid((inner - self.threshold) / self.temperature)
        elif middle.n_dropped == 0:
            weights = torch.zeros_like(inner)
        else:
            weights = logsigmoid((inner - self._threshold_of(inner, middle, budget)) / self.temperature)
        return pad(weights, outer)

    def score_layer(self, ctx: LayerContext, budget: Budget) -> Tensor:
        """Scores [B, H, T], fp32; inf for what always stays.

        Raises
        ------
        ConfigError
            If budget and threshold are both or neither given, if the budget is under what must stay, or if there
            is no relevance to score by.
        """
        middle = self._middle(ctx, budget)
        with torch.no_grad():
            scores = self._scores(ctx, differentiable=False).clone()
        scores[..., : middle.start] = scores[..., middle.stop :] = torch.inf
        return scores

    def keep_layer(self, ctx: LayerContext, budget: Budget) -> Tensor:
        """BoolTensor [B, H, T]: above the threshold, or the budget's best; every head keeps at least one entry."""
        if self.threshold is None:
            return super().keep_layer(ctx, budget)
        scores = self.score_layer(ctx, budget)
        return (scores > self.threshold).scatter(-1, scores.argmax(-1, keepdim=True), True)

    def _middle(self, ctx: LayerContext, budget: Budget) -> Middle:
        total = ctx.keys.shape[2]
        if self.threshold is None:
            return middle_of(self.name, budget, total, self.n_sink, self.n_recent)
        refuse_budget(self.name, budget, f"threshold={self.threshold}")
        start = min(self.n_sink, total)
        recent = DEFAULT_RECENT if self.n_recent is None else self.n_recent
        return Middle(start, max(start, total - recent), 0)

    def _scores(self, ctx: LayerContext, *, differentiable: bool) -> Tensor:
        """FloatTensor [B, H, T], fp32."""
        if self.on == "relevance":
            return relevance_of_entries(ctx, self.name)
        ratio = attention_over_uniform(ctx, self.window, self.block_size, differentiable=differentiable)
        return ratio.clamp_min(torch.finfo(ratio.dtype).tiny).log()

    def _threshold_of(self, inner: Tensor, middle: Middle, budget: Budget) -> Tensor:
        """Thresholds [B, H or 1, 1] under a budget, for scores [B, H, M] of the middle."""
        if budget.scope == "model":
            raise ConfigError(
                f"{self.name}: a budget of scope 'model' needs the scores of every layer; give a threshold instead"
            )
        n_kept = inner.shape[-1] - middle.n_dropped
        return threshold_of_scope(inner, n_kept, budget.scope, self.temperature)


def threshold_of_scope(scores: Tensor, n_kept: int, scope: Scope, temperature: float) -> Tensor:
    """`threshold_for` of each head, or with scope "layer" of each layer's heads together.

    Parameters
    ----------
    scores : FloatTensor [B, H, M]; no gradient flows
    n_kept : per head, on average
    scope : "head" or "layer"

    Returns
    -------
    FloatTensor [B, H or 1, 1]
    """
    batch, heads, size = scores.shape
    shared = heads if scope == "layer" else 1
    pooled = scores.detach().reshape(batch, heads // shared, shared * size)
    return threshold_for(pooled, shared * n_kept, temperature)


def threshold_for(scores: Tensor, n_kept: float, temperature: float) -> Tensor:
    """FloatTensor [..., 1]: the t at which sigmoid((scores - t) / temperature) sums to `n_kept` over [..., M].

    So the expected number kept is the budget's at every temperature; as it goes to 0, t goes to the quantile.

    Parameters
    ----------
    scores : FloatTensor [..., M]
    n_kept : in [0, M - 1]
        0 is approached: weights under 1e-8.
    temperature : float > 0
    """
    low = scores.amin(-1, keepdim=True) - temperature * (math.log(scores.shape[-1]) + 1)
    high = scores.amax(-1, keepdim=True) + temperature * 20
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        too_many = ((scores - middle) / temperature).sigmoid().sum(-1, keepdim=True) > n_kept
        low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
    return (low + high) / 2


def is_finite(value: object) -> bool:
    """True for a finite number that is no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
