"""ATSKV: learned token relevance under one threshold that adapts to the target and to the memory in use.

    r = sigmoid(g)          a predictor's relevance of each token for each kv head
    keep  iff  r > tau_l    tau_l = beta_l * quantile(all r of the model, q(t)): `relevance.threshold`

A token's relevance can be computed only while it is read. While decoding, between chunks and in later turns it is
therefore remembered (`sparsekv.remembered`), and all layers are cut together after the last.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from sparsekv import architecture
from sparsekv.errors import ConfigError
from sparsekv.policies.base import LayerContext
from sparsekv.policies.budget import Budget, Scope
from sparsekv.policies.choosing import AcrossLayers
from sparsekv.policies.learned_scores import relevance_of_entries
from sparsekv.policies.sizes import describe
from sparsekv.relevance.policy import Relevance
from sparsekv.relevance.predictor import checked_betas, served_by
from sparsekv.relevance.threshold import ByQuantile, ThresholdController, checked_bounds

_RECENT, _SINK = 1e6, 3e7
"""Log relevances of entries that always stay: above all others, sinks first, then the newest.

fp32 tells them apart in contexts of up to 1.5e7 tokens.
"""


@dataclass(frozen=True)
class ATSKV(Relevance):
    """Keep what is more relevant than a threshold shared by the model; heads and layers keep different numbers.

    The budget is the model's, whatever its scope says: "head", the default of budgets, would contradict the method.

    Parameters
    ----------
    n_sink, n_recent, threshold
        As in `relevance`; the threshold decides where neither a budget nor a target is given.
    target : float in [0, 1), optional
        Compression ratio to hold where no budget is given.
    betas : one float > 0 per compressible layer, optional
        Factors on the threshold, above 1: the layer keeps less. Default: the predictors' own (1 where their file does
        not say).
    hysteresis : float in [0, 1)
        While decoding: see `ThresholdController`.
    max_bytes : int >= 1, optional
        Memory that a row's keys and values may take, whatever the budget or target allows; alone it is the limit.
    entry_bytes : int >= 1, optional
        What one entry (key and value) of a head takes; where a cache is made, it is the model's.
    bounds : (low, high) in [0, 1]
        The least and the most of what is stored that may leave in one round, see `ThresholdController`.
    """

    target: float | None = None
    betas: tuple[float, ...] = ()
    hysteresis: float = 0.01
    max_bytes: int | None = None
    entry_bytes: int | None = None
    bounds: tuple[float, float] = (0.0, 1.0)
    name = "atskv"
    whole_context: ClassVar[bool] = False  # scores are remembered
    scopes: ClassVar[tuple[Scope, ...]] = ("head", "model")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "betas", checked_betas(self.betas))  # a YAML list, made hashable
        if self.target is not None:
            Budget(compression_ratio=self.target)
        object.__setattr__(self, "bounds", checked_bounds(self.bounds))
        self._controller(Budget(tokens=1), self.entry_bytes or 1)

    # ---- scores ---------------------------------------------------------------------------------------------------

    def score_layer(self, ctx: LayerContext, budget: Budget) -> Tensor:
        """log(r / beta), fp32 [B, H, T]; higher = keep. Entries that always stay are above all others."""
        n = ctx.keys.shape[2]
        g = relevance_of_entries(ctx, self.name)
        return self.ranked(ctx.module, g, None, n)

    def ranked(self, module: nn.Module, g: Tensor, place: Tensor | None, n_seen: int) -> Tensor:
        """log(r / beta) of g [..., n], with what always stays on top.

        Parameters
        ----------
        module : the layer's attention module
        place : LongTensor [n], optional
            Which of the `n_seen` tokens each entry is, padding not counted. None: entry i is token i.
        """
        served = self._over(served_by(module))
        ranks = logsigmoid(g.float())
        log_beta = self._log_beta(module)
        if log_beta:
            ranks = ranks - log_beta
        sizes = served.n_sink, served.n_recent
        if place is None:
            return torch.maximum(ranks, _always_of_all(n_seen, *sizes, g.device))
        return torch.maximum(ranks, _always(place, n_seen, *sizes))

    def _log_beta(self, module: nn.Module) -> float:
        betas = self.betas or served_by(module).betas
        if not betas:
            return 0.0
        layers = architecture.compressible_layers(module.config)
        if len(betas) != len(layers):
            raise ConfigError(f"{self.name}: betas are for {len(betas)} layers, the model has {len(layers)}")
        layer_idx = int(module.layer_idx)  # type: ignore[arg-type]
        return math.log(betas[layers.index(layer_idx)])

    # ---- choices --------------------------------------------------------------------------------------------------

    def own_budget(self, budget: Budget) -> Budget:
        """The budget that holds, of the whole model: the one given, else the target; neither: the threshold decides."""
        if not budget.given and self.target is not None:
            return Budget(compression_ratio=self.target, scope="model")
        return replace(budget, scope="model")

    def spans_layers(self, budget: Budget) -> bool:
        """True under a budget, a target or max_bytes; the predictors' own threshold needs no other layer."""
        return self.own_budget(budget).given or self.max_bytes is not None

    def may_keep_all(self, budget: Budget, n: int) -> bool:
        """As any policy; under max_bytes that can't be told by a budget."""
        return super().may_keep_all(budget, n) and (n == 0 or self.max_bytes is None)

    def for_model(self, model: Any) -> ATSKV:
        """With the bytes of its entries, where these count."""
        if self.max_bytes is None or self.entry_bytes is not None:
            return self
        dtype = getattr(model, "dtype", None)
        if not isinstance(dtype, torch.dtype):
            raise ConfigError(
                f"{self.name}: max_bytes needs the model itself, whose dtype says what an entry takes"
            )
        return replace(self, entry_bytes=2 * architecture.head_dim(model) * dtype.itemsize)

    def needs_whole_context(self, budget: Budget) -> bool:
        """False: scores are remembered."""
        return False

    def evicts_once(self, budget: Budget) -> bool:
        """False, for the same reason."""
        return False

    def controller(self, budget: Budget) -> ThresholdController:
        """A fresh controller for scores of `ranked`, in which the betas are already; for where `spans_layers`."""
        return self._controller(self.own_budget(budget), self.entry_bytes)

    def _controller(self, budget: Budget, entry_bytes: int | None) -> ThresholdController:
        return ThresholdController(
            budget,
            max_bytes=self.max_bytes,
            entry_bytes=entry_bytes,
            bounds=self.bounds,
            hysteresis=self.hysteresis,
        )

    def across_layers(self, n_layers: int, budget: Budget) -> AcrossLayers:
        """One row's choice by the model's quantile; see `AcrossLayers`.

        Raises
        ------
        ConfigError
            If a number of tokens is under what must stay.
        """
        self.check_room(self.own_budget(budget))
        return ByQuantile(n_layers, self.controller(budget))

    def keep_layer(self, ctx: LayerContext, budget: Budget) -> Tensor:
        """BoolTensor [B, H, T] by the threshold alone; every head keeps at least one entry."""
        if self.spans_layers(budget):
            return super().keep_layer(ctx, replace(budget, scope="model"))  # raises: it takes all layers
        return self.above_threshold(ctx.module, self.score_layer(ctx, budget))

    def above_threshold(self, module: nn.Module, ranks: Tensor) -> Tensor:
        """BoolTensor: which `ranked` scores [..., n] the predictors' own threshold keeps."""
        threshold = logsigmoid(torch.tensor(self._over(served_by(module)).threshold, device=ranks.device))
        return (ranks > threshold).scatter(-1, ranks.argmax(-1, keepdim=True), True)

    def check_room(self, budget: Budget) -> None:
        """Raise a ConfigError if a number of tokens is under sinks and recent entries that were asked for.

        Where they are the predictors' own, a small budget takes sinks first, then the newest.
        """
        wanted = (self.n_sink or 0) + (self.n_recent or 0)
        if budget.tokens is not None and budget.tokens < wanted:
            raise ConfigError(
                f"{self.name}: {describe(budget)} is under n_sink={self.n_sink or 0} + n_recent={self.n_recent or 0}; "
                "raise the budget or lower n_sink or n_recent"
            )


def _always(place: Tensor, n_seen: int, n_sink: int, n_recent: int) -> Tensor:
    """FloatTensor [n]: the log relevance of entries that always stay, by `place` [n]; -inf for the others."""
    at = place.float()
    recent = torch.where(place >= n_seen - n_recent, _RECENT + at, -torch.inf)
    return torch.where(place < n_sink, _SINK - 4 * at, recent)


@lru_cache(maxsize=32)
def _always_of_all(n: int, n_sink: int, n_recent: int, device: torch.device) -> Tensor:
    """`_always` of all of `n` tokens: the same in every layer of a prefill. Not to be written to."""
    with torch.inference_mode(False):  # an inference tensor would be of no use to a later training step
        return _always(torch.arange(n, device=device), n, n_sink, n_recent)
