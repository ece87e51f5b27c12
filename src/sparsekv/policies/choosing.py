"""Choosing entries by their scores under a budget: in each layer, or over all layers of a row together.

Shape letters: B batch, L layers, H kv heads, T tokens. Knows nothing of policies, models or caches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from sparsekv.errors import ConfigError
from sparsekv.policies.budget import Budget


def keep_top(scores: Tensor, budget: Budget) -> Tensor:
    """The best-scored entries under a budget.

    Parameters
    ----------
    scores : FloatTensor [B, L, H, T]
        Higher = keep.
    budget : Budget
        Scope "head": the same count in every kv head, by `topk` exactly as kvpress picks it. "layer" / "model":
        the same total, the count per head free; every head keeps its best entry.

    Returns
    -------
    BoolTensor [B, L, H, T]
    """
    b, n_layers, h, t = scores.shape
    n_kept = budget.n_kept(t)
    kept = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    if budget.scope == "head":
        return kept.scatter_(-1, scores.topk(n_kept, dim=-1).indices, True)
    scores = scores.float().clone()
    best = scores.argmax(dim=-1, keepdim=True)
    scores.scatter_(-1, best, torch.inf)  # no head is emptied: an empty softmax is undefined
    if budget.scope == "layer":
        flat = scores.reshape(b, n_layers, h * t)
        return (
            kept.view(b, n_layers, h * t)
            .scatter_(-1, flat.topk(n_kept * h).indices, True)
            .view(b, n_layers, h, t)
        )
    flat = scores.reshape(b, -1)
    index = flat.topk(n_kept * h * n_layers).indices
    return kept.view(b, -1).scatter_(-1, index, True).view(b, n_layers, h, t)


def check_numbers(x: Tensor, method: str, layer_idx: int, what: str = "scores") -> Tensor:
    """What decides (scores, or the keys they are made of), if nothing of it is NaN: that would sort anywhere.

    Raises
    ------
    ConfigError
        It names the method and the layer.
    """
    if bool(x.isnan().any()):
        raise ConfigError(
            f"method '{method}': {what} in layer {layer_idx} are NaN, so its activations are broken (half precision "
            "may overflow: try float32)"
        )
    return x


class AcrossLayers(ABC):
    """One row's choice over all compressible layers, made while they are read, from the first to the last.

    When a layer has been read, its scores and those of the layers before it are known; later ones are not. A choice
    may be made in several steps: what `after_layer` returns is taken out at once, and an earlier layer may be returned
    again, with fewer entries (what left does not come back). With the last layer every layer has been returned.
    """

    @abstractmethod
    def after_layer(self, scores: Tensor) -> dict[int, Tensor]:
        """Take the next layer's scores [H, T] (higher = keep).

        Returns
        -------
        place among the compressible layers, from 0 -> BoolTensor [H, T]
            The layers to compact now, and what stays of them.
        """


class TopOfAllLayers(AcrossLayers):
    """The best entries of the whole model, one total for all layers and heads; known after the last layer only.

    Parameters
    ----------
    n_layers : int >= 1
    budget : Budget of scope "model"
    """

    def __init__(self, n_layers: int, budget: Budget) -> None:
        self.n_layers, self.budget = n_layers, budget
        self._scores: list[Tensor] = []

    def after_layer(self, scores: Tensor) -> dict[int, Tensor]:
        """Nothing before the last layer, then every layer."""
        self._scores.append(scores)
        if len(self._scores) < self.n_layers:
            return {}
        return dict(enumerate(keep_top(torch.stack(self._scores)[None], self.budget)[0]))


def keep_across(choice: AcrossLayers, scores: Tensor) -> Tensor:
    """BoolTensor [L, H, T]: what a fresh `choice` leaves of a row whose scores [L, H, T] are all known."""
    kept = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    for layer in scores:
        for place, stays in choice.after_layer(layer).items():
            kept[place] = stays
    return kept


def allocate(weights: Sequence[float], caps: Sequence[int], total: int) -> list[int]:
    """Whole numbers that add up to `total`, in proportion to `weights`, none above its cap.

    What a cap cuts off goes to the others, again in proportion; the fractions that are left are rounded by largest
    remainder, the first of equals first. Without any weight the shares are equal.

    Parameters
    ----------
    weights : >= 0
    caps : whole numbers >= 0, as many
    total : int in [0, sum(caps)]

    Raises
    ------
    ConfigError
        If the caps leave no room for the total.
    """
    if not 0 <= total <= sum(caps):
        raise ConfigError(f"a total of {total} does not fit under caps that add up to {sum(caps)}")
    share = [0.0] * len(caps)
    open_ones, left = set(range(len(caps))), float(total)
    while open_ones:
        of_all = sum(weights[i] for i in open_ones)
        part = {i: left * (weights[i] / of_all if of_all > 0 else 1 / len(open_ones)) for i in open_ones}
        full = {i for i in open_ones if part[i] >= caps[i]}
        for i in full or open_ones:
            share[i] = min(part[i], float(caps[i]))
            left -= share[i]
        open_ones = open_ones - full if full else set()
    counts = [min(int(value), cap) for value, cap in zip(share, caps, strict=True)]
    by_remainder = sorted(range(len(caps)), key=lambda i: (counts[i] - share[i], i))
    while sum(counts) < total:
        for i in by_remainder:
            if counts[i] < caps[i] and sum(counts) < total:
                counts[i] += 1
    return counts
