"""Do the scores put held-out entries in the order of what later queries attended to?

Shape letters: L layers, H kv heads, n entries of a context that may leave.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparsekv.training.fit_losses import top_entries

RATIOS = (0.5, 0.7, 0.8, 0.9)
"""Fractions removed at which the kept sets are compared."""


def ranks(values: Tensor) -> Tensor:
    """fp64 [..., n]: ranks from 1 along the last dimension; equal values share their mean rank."""
    rows = []
    for row in values.reshape(-1, values.shape[-1]):
        _, group, counts = row.unique(sorted=True, return_inverse=True, return_counts=True)
        last = counts.cumsum(0).double()
        rows.append((last - (counts.double() - 1) / 2)[group])
    return torch.stack(rows).view(values.shape)


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation along the last dimension, fp64 in [-1, 1]; nan where either is constant.

    Parameters
    ----------
    a, b : Tensor [..., n], n >= 2
    """
    x, y = ranks(a), ranks(b)
    x, y = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
    return (x * y).sum(-1) / (x.square().sum(-1) * y.square().sum(-1)).sqrt()


def agreement(scores: Tensor, targets: Tensor) -> dict[str, Any]:
    """How well scores of one context agree with its targets, both [L, H, n], n >= 2.

    Returns
    -------
    dict
        layers : list of L floats, rank correlation over a head's entries, mean over heads (those of constant targets or
            scores are left out; nan if all are)
        model : rank correlation over all entries of the model together, which a model-wide budget goes by
        kept : ratio -> share of the truly top entries that the scores' top ones hold, model-wide; chance is 1 - ratio
    """
    whole = rank_correlation(scores.reshape(1, -1), targets.reshape(1, -1))
    kept = {}
    for ratio in RATIOS:
        wanted = top_entries(targets, ratio)
        kept[str(ratio)] = float((top_entries(scores, ratio) & wanted).sum() / wanted.sum())
    return {
        "layers": rank_correlation(scores, targets).nanmean(-1).tolist(),
        "model": float(whole),
        "kept": kept,
    }


def mean_agreement(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean of several contexts' `agreement`."""

    def mean(values: list[float]) -> float | None:
        known = [value for value in values if value == value]  # nan is no value
        return sum(known) / len(known) if known else None

    return {
        "model": mean([each["model"] for each in found]),
        "layers": [mean(list(column)) for column in zip(*(each["layers"] for each in found), strict=True)],
        "kept": {ratio: mean([each["kept"][ratio] for each in found]) for ratio in found[0]["kept"]},
    }


def in_words(report: Mapping[str, Any]) -> str:
    """One line of a held-out report (`fit_report.judge`)."""
    fitted, untrained = report["fitted"], report["untrained"]
    layers = [value for value in fitted["layers"].values() if value is not None]
    spread = f", {min(layers):.2f} to {max(layers):.2f} by layer" if layers else ""
    return (
        f"held-out rank correlation {_two(fitted['model'])} over the whole model{spread} "
        f"(untrained {_two(untrained['model'])}), {report['samples']} samples"
    )


def _two(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"
