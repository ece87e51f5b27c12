"""Held-out samples judge the predictors: in which order do they put entries, and from where is one kept?"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sparsekv.errors import ConfigError
from sparsekv.relevance.predictor import (
    NAME,
    RelevanceConfig,
    Served,
    attach_relevance,
    relevance_modules,
    serve_as,
)
from sparsekv.training.fit_config import FitConfig
from sparsekv.training.fit_metrics import agreement, mean_agreement
from sparsekv.training.fit_regression import Progress, SampleReader
from sparsekv.training.fit_solvers import scores_of
from sparsekv.training.fit_targets import log_targets


@torch.no_grad()
def judge(
    reader: SampleReader, samples: Iterable[Any], *, progress: Progress | None = None
) -> dict[str, Any]:
    """The held-out report: rank correlations with what later queries attended to, fitted and untrained.

    Parameters
    ----------
    reader : of the fitted model
    samples : held-out samples, never fitted on

    Returns
    -------
    dict, JSON
        samples : how many were judged
        fitted, untrained : {"model", "layers": {index: float}, "kept": {ratio: float}}, see `fit_metrics.agreement`;
            untrained are fresh predictors of the same shape
        quantiles : ratio in percent -> the score below which that part of the entries that may leave lies

    Raises
    ------
    ConfigError
        If no held-out sample can be judged.
    """
    config, model = reader.config, reader.model
    chosen = list(samples)
    if progress is not None:
        progress.start("held out", len(chosen), 0)
    found: dict[str, list[dict[str, Any]]] = {"fitted": [], "untrained": []}
    scores: list[Tensor] = []
    layers: list[int] = []
    with untrained(model, reader.features, config.seed) as use:
        for sample in chosen:
            read = reader.read(sample)
            if read is not None:
                entries, columns, _ = read
                layers = list(entries)
                targets = log_targets(entries, columns, config.futures.floor)
                for name, fresh in (("untrained", True), ("fitted", False)):
                    use(fresh)
                    g = scores_of(entries, columns)
                    found[name].append(agreement(g, targets))
                scores.append(g.flatten().cpu())
            if progress is not None:
                progress.advance(1)
    if not scores:
        raise ConfigError(
            f"held_out: none of {len(chosen)} samples has a context longer than the sink and recent tokens"
        )
    report: dict[str, Any] = {"samples": len(scores), "futures": list(config.futures.kinds)}
    for name, each in found.items():
        mean = mean_agreement(each)
        by_layer = dict(zip(map(str, layers), mean["layers"], strict=True))
        report[name] = {**mean, "layers": by_layer}
    report["quantiles"] = quantiles(scores)
    return report


def quantiles(scores: list[Tensor]) -> dict[str, float]:
    """Percent -> quantile of all scores together, for every whole percent."""
    ordered = torch.cat(scores).sort().values
    places = torch.linspace(0, len(ordered) - 1, 101).round().long()
    return {str(percent): float(value) for percent, value in enumerate(ordered[places])}


def at_percent(known: dict[str, float], percent: float) -> float:
    """The quantile at any percent in [0, 100], between those of `quantiles`."""
    below = min(int(percent), 99)
    low, high = known[str(below)], known[str(below + 1)]
    return low + (percent - below) * (high - low)


def center(model: Any, config: FitConfig, report: dict[str, Any]) -> None:
    """Shift all scores alike so that g = 0 at the config's serve_ratio, and say so to whoever serves them.

    The order of entries stays. r = sigmoid(g) is one half then where an entry just stays without a budget.
    """
    threshold = at_percent(report["quantiles"], 100 * config.predictor.serve_ratio)
    with torch.no_grad():
        for module in relevance_modules(model).values():
            predictor: Any = getattr(module, NAME)
            predictor.score.bias -= threshold
    report["quantiles"] = {ratio: value - threshold for ratio, value in report["quantiles"].items()}
    serve_as(model, Served(config.predictor.n_sink, config.predictor.n_recent, 0.0))


@contextmanager
def untrained(model: Any, config: RelevanceConfig, seed: int) -> Any:
    """Yields `use(fresh: bool)`, which puts fresh predictors on the model, or its own again; at the end they are on."""
    own = {index: getattr(module, NAME) for index, module in relevance_modules(model).items()}
    attach_relevance(model, config, seed=seed)
    fresh = {index: getattr(module, NAME) for index, module in relevance_modules(model).items()}

    def use(wants_fresh: bool) -> None:
        for index, module in relevance_modules(model).items():
            setattr(module, NAME, (fresh if wants_fresh else own)[index])

    try:
        use(False)
        yield use
    finally:
        use(False)
