"""Which inputs do relevance predictors need? Every combination of their groups, fitted to the same samples.

    python benchmarks/relevance_ablation.py configs/relevance/smollm2_regression.yaml steps=100 held_out=16

Linear predictors of all groups (hidden state, attention statistics, handcrafted features) are fitted by least squares
in one pass, whose sums hold those of any combination: each is solved for exactly, and all are judged on the same
held-out samples, as `sparsekv relevance fit` judges: rank correlation with the most attention that later queries gave
(all entries of the model together, and the mean over layers of that within a head), and the share of the truly top
entries that stay at a ratio. Takes `key=value` like the command; `predictor.features` is set here. With `--save FOLDER`
each combination is also written there as a folder that `adapter:` reads.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from machine import describe

from sparsekv import load_model
from sparsekv.cli.progress import Bar
from sparsekv.cli.quiet import quieten
from sparsekv.relevance import RelevanceConfig, attach_relevance, save_relevance
from sparsekv.relevance.features import GROUPS, extra_groups, n_features
from sparsekv.relevance.predictor import NAME, Served, relevance_modules, serve_as
from sparsekv.training.data_split import split_data
from sparsekv.training.fit import samples_of
from sparsekv.training.fit_config import FitConfig, load_fit_config
from sparsekv.training.fit_least_squares import LeastSquares, Sums
from sparsekv.training.fit_metrics import RATIOS, agreement, mean_agreement
from sparsekv.training.fit_regression import SampleReader, batches
from sparsekv.training.fit_solvers import scores_of
from sparsekv.training.fit_targets import log_targets

Groups = tuple[str, ...]


def every_combination() -> list[Groups]:
    """All choices of one group or more, the smallest first."""
    return [chosen for size in range(1, len(GROUPS) + 1) for chosen in combinations(GROUPS, size)]


def columns_of(groups: Groups) -> list[int]:
    """Which of all features a combination reads."""
    places, start = [], 0
    for group in extra_groups(GROUPS):
        stop = start + n_features((group,))
        if group in groups:
            places += range(start, stop)
        start = stop
    return places


def part_of(sums: Sums, groups: Groups) -> Sums:
    """The sums as they would be, had only these groups been read."""
    columns = columns_of(groups)
    rows = slice(None) if "hidden" in groups else slice(-1, None)  # the bias is the last
    return Sums(
        xx=sums.xx[rows, rows],
        xy=sums.xy[rows],
        xe=sums.xe[:, rows][..., columns],
        ee=sums.ee[:, columns][..., columns],
        ey=sums.ey[:, columns],
    )


def solved(model: Any, sums: dict[int, Sums], groups: Groups, config: FitConfig) -> dict[int, Any]:
    """Predictors by layer that read these groups alone, put on the model too."""
    attach_relevance(model, RelevanceConfig(features=groups), seed=config.seed)
    predictors = {index: getattr(module, NAME) for index, module in relevance_modules(model).items()}
    for index, predictor in predictors.items():
        part_of(sums[index], groups).solve_for(predictor, config.regression.ridge)
    serve_as(model, Served(config.predictor.n_sink, config.predictor.n_recent))
    return predictors


def judged(
    reader: SampleReader, samples: list[Any], predictors: dict[Groups, dict[int, Any]]
) -> Iterator[tuple[Groups, dict[str, Any]]]:
    """(groups, agreement) of every sample and combination, with the predictors of each put on in turn."""
    modules = relevance_modules(reader.model)
    for entries, columns, _ in reader.read_all((sample, 0) for sample in samples):
        targets = log_targets(entries, columns, reader.config.futures.floor)
        for groups, by_layer in predictors.items():
            for index, module in modules.items():
                setattr(module, NAME, by_layer[index])
            wanted = columns_of(groups)
            seen = {
                index: replace(
                    each, extra=each.extra[..., wanted] if wanted and each.extra is not None else None
                )
                for index, each in entries.items()
            }
            with torch.no_grad():
                yield groups, agreement(scores_of(seen, columns), targets)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="of `sparsekv relevance fit`")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--save", type=Path, help="write each combination's predictors below this folder")
    args = parser.parse_args()
    quieten()
    print(describe())
    everything = f"predictor.features=[{', '.join(GROUPS)}]"
    config = load_fit_config(
        args.config, [*args.settings, everything, "predictor.width=0", "regression.solver=least_squares"]
    )
    model, tokenizer = load_model(config.model, dtype=config.dtype, device=config.device)
    model.requires_grad_(False)
    features = RelevanceConfig(features=GROUPS)
    attach_relevance(model, features, seed=config.seed)
    reader = SampleReader(model, tokenizer, config, features)
    data, held_out = split_data(
        config.data, config.judged_data(), config.held_out, config.seed, tokenizer, same_text=True
    )
    solver, began = LeastSquares(model, config), time.perf_counter()
    with Bar(config.progress, "samples") as bar:
        bar.start("fit", config.steps * config.batch_size, 0)
        steps = batches(data, config.batch_size, config.seed)
        for number, batch in zip(range(config.steps), steps, strict=False):
            solver.step(number, reader.read_all(batch))
            bar.advance(config.batch_size)
    fitted = time.perf_counter() - began
    predictors: dict[Groups, dict[int, Any]] = {}
    for groups in every_combination():
        predictors[groups] = solved(model, solver.sums, groups, config)
        if args.save is not None:
            folder = args.save / "+".join(groups)
            folder.mkdir(parents=True, exist_ok=True)
            save_relevance(model, folder)
    found: dict[Groups, list[dict[str, Any]]] = {}
    chosen = list(samples_of(held_out, config.held_out))
    for groups, each in judged(reader, chosen, predictors):
        found.setdefault(groups, []).append(each)
    print(
        f"{config.steps} steps of {config.batch_size} in {fitted:.0f} s; {len(found[GROUPS])} held-out samples"
    )
    print(
        "| groups | rank correlation, model | within a head | "
        + " | ".join(f"top at {r}" for r in RATIOS)
        + " |"
    )
    print("|---|" + "---:|" * (2 + len(RATIOS)))
    for groups, each in found.items():
        mean = mean_agreement(each)
        layers = [value for value in mean["layers"] if value is not None]
        figures = [mean["model"], sum(layers) / len(layers), *mean["kept"].values()]
        print(f"| {', '.join(groups)} | " + " | ".join(f"{figure:.3f}" for figure in figures) + " |")


if __name__ == "__main__":
    main()
