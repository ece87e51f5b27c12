"""How far scores are from what later queries attended to. Shape letters: L layers, H kv heads, n entries of a context.

Scores and targets are those of one context, of all layers and heads together: the budget is shared by the whole model,
so a score must compare across them. The logarithm of attention does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sparsekv.training.fit_config import RegressionOptions

FitLoss = Callable[[Tensor, Tensor, int], Tensor]
"""(scores [L, H, n], log targets [L, H, n], seed of what is drawn) -> a scalar"""


def make_loss(options: RegressionOptions) -> FitLoss:
    """The loss of a config."""
    if options.loss == "mse":
        return lambda scores, targets, seed: (scores - targets).square().mean()
    if options.loss == "bce":
        return lambda scores, targets, seed: membership_loss(scores, targets, options.top_ratio)
    return lambda scores, targets, seed: pair_loss(scores, targets, options.pairs, seed)


def top_entries(values: Tensor, ratio: float) -> Tensor:
    """BoolTensor of `values`' shape: the max(1, int(N * (1 - ratio))) largest of all N; ties by place."""
    n_top = max(1, int(values.numel() * (1 - ratio)))
    found = torch.zeros(values.numel(), dtype=torch.bool, device=values.device)
    order = values.flatten().sort(descending=True, stable=True).indices
    found[order[:n_top]] = True
    return found.view(values.shape)


def membership_loss(scores: Tensor, targets: Tensor, ratio: float) -> Tensor:
    """Cross-entropy of "is this entry among the top 1 - ratio of the whole model?", with the score as its logit."""
    wanted = top_entries(targets, ratio).to(scores.dtype)
    return nn.functional.binary_cross_entropy_with_logits(scores, wanted)


def pair_loss(scores: Tensor, targets: Tensor, n_pairs: int, seed: int) -> Tensor:
    """Mean of log(1 + exp(-(g_i - g_j))) over drawn pairs with target i above target j (Burges et al. 2005, RankNet).

    Pairs with equal targets count as 0.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(scores.numel(), (2, n_pairs), generator=generator).to(scores.device)
    g, y = scores.flatten()[drawn], targets.flatten()[drawn]
    order = (y[0] - y[1]).sign()
    return (nn.functional.softplus(-(g[0] - g[1]) * order) * order.abs()).mean()
