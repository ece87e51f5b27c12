"""Learned eviction made differentiable: predictors whose keep-or-evict decision is soft and noisy while they train.

    log weight = log sigmoid((g - threshold + noise * logistic) / T)

is added to the attention logits where an entry would be hidden; T falls from soft to nearly hard. A binary Concrete
distribution without the upper stretch (Maddison et al. 2017, arXiv 1611.00712; Louizos et al. 2018, arXiv 1712.01312).
Two ways to hold the budget:

    learned   the threshold is 0, and a penalty on the mean soft weight pushes it down to the target
    quantile  the threshold is the running quantile of all of the model's g at the target: entries compete for a fixed
              number of places, and no penalty is needed
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from sparsekv.errors import ConfigError, unknown
from sparsekv.policies.base import LayerContext
from sparsekv.policies.budget import Budget
from sparsekv.policies.learned_scores import extra_of
from sparsekv.policies.picks import layer_generator
from sparsekv.policies.sizes import check_size
from sparsekv.policies.soft import threshold_for
from sparsekv.relevance.policy import Relevance
from sparsekv.relevance.predictor import relevance_of

THRESHOLDS = ("learned", "quantile")


@dataclass(frozen=True)
class RelaxedRelevance(Relevance):
    """`relevance` as it trains: soft, with noise. Hard decisions are those of `Relevance`.

    Parameters
    ----------
    temperature : float > 0
        T; the smaller, the harder.
    noise : float >= 0
        Scale of the logistic noise, drawn by the row's seed and the layer: recomputation draws the same.
    """

    soft: ClassVar[bool] = True
    temperature: float = 1.0
    noise: float = 0.5

    def weigh_layer(self, ctx: LayerContext, budget: Budget) -> Tensor:
        """Log weights <= 0, fp32 [B, H, T]; 0 for entries that always stay."""
        g = relevance_of(ctx.module, ctx.hidden_states, extra_of(ctx)) - self.served(ctx).threshold
        if self.noise:
            generator = layer_generator(ctx.seed, ctx.layer_idx)
            u = torch.rand(g.shape, generator=generator).clamp_(1e-6, 1 - 1e-6).to(g.device)
            g = g + self.noise * torch.logit(u)
        weight = nn.functional.logsigmoid(g / self.temperature)
        return weight.masked_fill(self.protected(g.shape[-1], ctx), 0.0)


@dataclass(frozen=True)
class Relaxation:
    """How predictors are trained.

    Parameters
    ----------
    threshold : "learned" or "quantile"
    noise : float >= 0
    temperature_start, temperature_end : float > 0
        Linear over training.
    budget_weight : float >= 0
        Of relu(mean soft weight - target)², with "learned".
    n_sink, n_recent : int >= 0
        Exempt from eviction, in training and when served.
    """

    threshold: Literal["learned", "quantile"] = "learned"
    noise: float = 0.5
    temperature_start: float = 1.0
    temperature_end: float = 0.4
    budget_weight: float = 50.0
    n_sink: int = 4
    n_recent: int = 16

    def __post_init__(self) -> None:
        if self.threshold not in THRESHOLDS:
            raise unknown("relevance threshold", self.threshold, THRESHOLDS)
        for field in ("temperature_start", "temperature_end"):
            if not getattr(self, field) > 0:
                raise ConfigError(f"relevance {field} must be above 0, got {getattr(self, field)!r}")
        for field in ("n_sink", "n_recent"):
            check_size("relevance", field, getattr(self, field))
        for field in ("noise", "budget_weight"):
            if not getattr(self, field) >= 0:
                raise ConfigError(f"relevance {field} must be at least 0, got {getattr(self, field)!r}")

    def policy(
        self, progress: float, ratio: float = 0.0, quantiles: ScoreQuantiles | None = None
    ) -> RelaxedRelevance:
        """The soft policy at `progress` (0 to 1) of training; the ratio moves the threshold with "quantile"."""
        start, end = self.temperature_start, self.temperature_end
        temperature = start + (end - start) * min(max(progress, 0.0), 1.0)
        threshold = 0.0
        if self.threshold == "quantile" and quantiles is not None:
            threshold = quantiles.threshold(ratio, temperature)
        return RelaxedRelevance(
            n_sink=self.n_sink,
            n_recent=self.n_recent,
            threshold=threshold,
            temperature=temperature,
            noise=self.noise,
        )

    def penalty(
        self, soft_kept: Mapping[int, Tensor], ratio: float, shares: Tensor, contexts: Tensor
    ) -> Tensor | None:
        """The budget's loss; None where the threshold holds the budget.

        Every row has the budget to itself, shared by the layers. So how rows are put into batches changes nothing. What
        always stays is part of it, so a context that these entries fill up is asked for no less than them.

        Parameters
        ----------
        soft_kept : layer -> mean soft weights [B], nan for a row without a context
        ratio : fraction to remove
        shares : FloatTensor [B], each row's weight in the step
        contexts : LongTensor [B], entries before the boundary
        """
        if self.threshold == "quantile" or not soft_kept:
            return None
        always = (self.n_sink + self.n_recent) / contexts.clamp_min(1)
        target = always.clamp(min=1 - ratio, max=1.0)
        over = torch.relu(torch.stack(list(soft_kept.values())).mean(0) - target).square()
        return self.budget_weight * (shares * torch.where(over.isnan(), 0.0, over)).sum()

    def without_noise(self) -> Relaxation:
        """The same without noise (for gradient checks)."""
        return replace(self, noise=0.0)


class ScoreQuantiles:
    """Running quantiles of all scores g of a model: which threshold keeps which fraction.

    Parameters
    ----------
    momentum : float in [0, 1)
        Of the exponential average over steps.
    """

    GRID: ClassVar[int] = 101

    def __init__(self, momentum: float = 0.7) -> None:
        self.momentum = momentum
        self._values: list[float] | None = None

    @classmethod
    def of(cls, scores: Sequence[Tensor]) -> Tensor | None:
        """The quantiles [GRID] of some scores: every layer's g, any shape; None if there is no finite one.

        What always stays (infinite) has its place at the top, as in a budget, with the largest finite score.
        """
        every = torch.cat([score.detach().float().flatten() for score in scores])
        finite = every[torch.isfinite(every)]
        if not finite.numel():
            return None
        ordered = every.clamp(max=float(finite.max())).sort().values
        places = torch.linspace(0, ordered.numel() - 1, cls.GRID, device=every.device).round().long()
        return ordered[places]

    def observe(self, quantiles: Tensor) -> None:
        """Hear one step's quantiles [GRID]."""
        now, old = quantiles.tolist(), self._values
        keep = self.momentum
        self._values = (
            now if old is None else [keep * a + (1 - keep) * b for a, b in zip(old, now, strict=True)]
        )

    def threshold(self, ratio: float, temperature: float) -> float:
        """The t at which sigmoid((g - t) / temperature) has the mean 1 - ratio: soft steps keep what they should.

        As the temperature goes to 0 it goes to the quantile below which the fraction `ratio` lies. -inf, which hides
        nothing, for ratio 0 and before anything was observed.
        """
        if self._values is None or ratio <= 0:
            return float("-inf")
        return float(threshold_for(torch.tensor(self._values), (1 - ratio) * self.GRID, temperature))

    def state_dict(self) -> dict[str, Any]:
        """JSON."""
        return {"values": self._values}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._values = None if state["values"] is None else [float(v) for v in state["values"]]


def mean_over_processes(heard: Tensor | None, accelerator: Any) -> Tensor | None:
    """The mean of what processes heard, [GRID]; None if none heard anything. Every process takes part."""
    packed = torch.zeros(ScoreQuantiles.GRID + 1, device=accelerator.device)
    if heard is not None:
        packed[:-1], packed[-1] = heard, 1.0
    packed = accelerator.reduce(packed, "sum")
    return packed[:-1] / packed[-1] if float(packed[-1]) else None
