"""DynamicKV: layers get budgets by where the attention of the observation window falls (arXiv 2412.14838, section 4).

Shape letters: B batch, L layers, H kv heads, G query heads per kv head, T tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsekv.errors import ConfigError
from sparsekv.policies.base import LayerContext, LayerPolicy
from sparsekv.policies.budget import Budget, Scope
from sparsekv.policies.choosing import AcrossLayers, allocate
from sparsekv.policies.sizes import check_size, require_budget
from sparsekv.policies.window_scores import check_window, pooled, window_attention, with_window


@dataclass(frozen=True)
class DynamicKV(LayerPolicy):
    """Layers whose entries get more of the window's attention keep more; the total is the budget's, exactly.

    An entry's score is the attention that the newest `window` queries give it, summed over them and averaged over the
    query heads of its kv head, smoothed. After layer l each layer's share is the number of its entries among the best
    `l * H * base` of all layers read so far; its kv heads keep that share each, by their own scores.

    Parameters
    ----------
    window : int >= 1
        Newest entries, which observe and always stay. A budget of fewer keeps its newest entries in every layer.
    kernel_size : int >= 1, odd
        Neighbours over which scores are smoothed.
    r_max : float >= 1
        A layer keeps at most this multiple of the mean budget (the window not counted).
    period : int >= 1
        Layers between two updates; the last layer is always one.

    Notes
    -----
    What is known when: a layer is cut to `r_max` times the mean as soon as it has been read, and cut again at every
    update, because a later layer may have claimed its entries. What left a layer does not come back, so an update
    gives a layer no more than it still holds, and the rest to the others in proportion. Defaults are those of the
    released code (window 8, kernel 7, r_max 10, period 4).
    """

    window: int = 8
    kernel_size: int = 7
    r_max: float = 10.0
    period: int = 4
    name = "dynamic_kv"
    joint: ClassVar[bool] = True
    scopes: ClassVar[tuple[Scope, ...]] = ("head", "model")

    def __post_init__(self) -> None:
        check_window(self.name, self.window, self.kernel_size)
        check_size(self.name, "period", self.period, 1)
        number = isinstance(self.r_max, (int, float)) and not isinstance(self.r_max, bool)
        if not number or not math.isfinite(self.r_max) or self.r_max < 1:
            raise ConfigError(f"{self.name}: r_max must be a number >= 1, got {self.r_max!r}")

    def score_layer(self, ctx: LayerContext, budget: Budget) -> Tensor:
        """Smoothed attention of the window, fp32 [B, H, T]; entries of the window itself come first."""
        weights = window_attention(ctx, self.window).sum(dim=3).mean(dim=2)
        window = min(self.window, weights.shape[-1])
        return with_window(
            pooled(weights[..., : weights.shape[-1] - window], self.kernel_size, "mean"), window
        )

    def across_layers(self, n_layers: int, budget: Budget) -> AcrossLayers:
        """The progressive choice for one row."""
        require_budget(self.name, budget)
        self.check_scope(budget)
        return ProgressiveBudgets(n_layers, budget, self)


class ProgressiveBudgets(AcrossLayers):
    """DynamicKV's budgets for one row, layer after layer (Algorithm 1)."""

    def __init__(self, n_layers: int, budget: Budget, policy: DynamicKV) -> None:
        self.n_layers, self.budget, self.policy = n_layers, budget, policy
        self.held: list[int] = []
        """Entries that each layer read so far still holds per kv head, the window not counted."""
        self._scores: list[Tensor] = []  # [H, n before the window]
        self._order: list[
            Tensor
        ] = []  # [H, first entries by score]: nested choices need one order, ties included

    def after_layer(self, scores: Tensor) -> dict[int, Tensor]:
        """Cut this layer to its maximum; at an update cut every layer to its share."""
        n = scores.shape[-1]
        n_kept = self.budget.n_kept(n)
        window = min(self.policy.window, n_kept)
        base = n_kept - window
        most = min(int(self.policy.r_max * base), n - window)
        earlier = scores[..., : n - window]
        self._scores.append(earlier)
        self._order.append(earlier.argsort(dim=-1, descending=True, stable=True)[:, :most].clone())
        self.held.append(most)
        n_read = len(self.held)
        if n_read < self.n_layers and n_read % self.policy.period:
            return {n_read - 1: self._kept(n_read - 1, n)}
        self.held = allocate(self._claims(base), self.held, min(base * self.n_layers, sum(self.held)))
        return {place: self._kept(place, n) for place in range(n_read)}

    def _claims(self, base: int) -> list[int]:
        """How many of the best entries of all layers read so far lie in each layer."""
        together = torch.stack(self._scores)
        best = together.flatten().topk(base * len(self._scores) * together.shape[1]).indices
        of_layer = torch.div(best, together[0].numel() or 1, rounding_mode="floor")
        return torch.bincount(of_layer, minlength=len(self._scores)).tolist()

    def _kept(self, place: int, n: int) -> Tensor:
        """BoolTensor [H, n]: a layer's best entries and the window."""
        order = self._order[place][:, : self.held[place]]
        kept = torch.zeros(order.shape[0], n, dtype=torch.bool, device=order.device)
        kept[:, n - min(self.policy.window, self.budget.n_kept(n)) :] = True
        return kept.scatter_(-1, order, True)
