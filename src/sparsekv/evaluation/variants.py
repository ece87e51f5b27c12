"""Several variants of a model on the same rows: one after the other, each in its own sub-folder, then compared.

output_dir/
  base/  eit/  ...     a run each, as `run_evaluation` leaves it
  comparisons.jsonl    every setting beside the baseline, with intervals
  run.json             the config and the sessions of the whole
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sparsekv.config import CompareConfig, EvalConfig
from sparsekv.errors import ConfigError
from sparsekv.evaluation.cells import Cell, Task
from sparsekv.evaluation.comparisons import Line, TaskScores, baseline_line, compare
from sparsekv.evaluation.folder import RunFolder, check_kind, check_usable
from sparsekv.evaluation.identity import commit, known_identity, machine, versions
from sparsekv.evaluation.plan import Plan, make_plan
from sparsekv.evaluation.records import SCHEMA_VERSION, ComparisonRow
from sparsekv.evaluation.resume import check_resumable
from sparsekv.evaluation.runner import Outcome, Progress, Silent, now, run_evaluation

COMPARISONS = "comparisons.jsonl"

Finished = Callable[[str, Outcome, RunFolder], None]
"""Told of every variant that has run (or was stopped), while its folder is still held."""


@dataclass(frozen=True)
class Variant:
    """One of the models, checked: its name, its own config (with its sub-folder), what it will run."""

    name: str
    config: EvalConfig
    plan: Plan


@dataclass(frozen=True)
class VariantsOutcome:
    """What a run of several variants left.

    Parameters
    ----------
    outcomes : variant -> what its own run left; without the variants that a Ctrl-C came before
    comparisons : the rows of comparisons.jsonl; empty if interrupted
    run : the content of run.json
    interrupted : stopped by Ctrl-C; what was done is kept
    """

    outcomes: dict[str, Outcome]
    comparisons: list[ComparisonRow]
    run: dict[str, Any]
    interrupted: bool


def plan_variants(config: EvalConfig) -> list[Variant]:
    """Everything that can be checked of all variants before weights are loaded.

    Raises
    ------
    ConfigError
        As `make_plan`, with the variant's name; variants whose tokenizers make different prompts of the same rows; a
        baseline that is not there.
    """
    found: list[Variant] = []
    for variant in config.variants:
        own = config.of_variant(variant)
        same_model = next((v.plan.prompts for v in found if v.config.model == own.model), None)
        try:
            found.append(Variant(variant.name, own, make_plan(own, same_model)))
        except ConfigError as error:
            raise ConfigError(f"variant '{variant.name}': {error}") from None
        _check_same_prompts(found[0], found[-1])
    baseline_line({v.name: v.plan.settings for v in found}, config.compare or CompareConfig())
    return found


def _check_same_prompts(first: Variant, other: Variant) -> None:
    for task, prompts in first.plan.prompts.items():
        for ours, theirs in zip(prompts, other.plan.prompts[task], strict=True):
            if ours.sha != theirs.sha:
                raise ConfigError(
                    f"variants '{first.name}' and '{other.name}' read {ours.example.example_id} as different tokens; "
                    "variants must share a tokenizer and its chat template"
                )


def check_variants_resumable(folder: RunFolder, variants: list[Variant]) -> None:
    """Raise a ConfigError if the folder, or the sub-folder of a variant, holds another run."""
    check_usable(folder.path)
    check_kind(folder.path, folder.read_run(), variants=True)
    for variant in variants:
        inner = RunFolder(variant.config.output_dir)
        check_usable(inner.path)
        rows: Any = inner.predictions.read(repair=False)
        check_resumable(inner.path, inner.read_run(), rows, variant.plan, variant.config)


def run_variants(
    config: EvalConfig,
    folder: RunFolder,
    *,
    command: str | None = None,
    progress: Progress | None = None,
    finished: Finished | None = None,
) -> VariantsOutcome:
    """Answer everything that the variants' sub-folders do not hold yet, one model after the other, and compare.

    Parameters
    ----------
    config : with variants
    folder : RunFolder
        That of `config.output_dir`, entered.
    command : str, optional
        The command line, for run.json.
    progress : Progress, optional
        Its passes are called after the variant.
    finished : optional
        Called with (name, outcome, its folder) as soon as a variant has run.

    Raises
    ------
    ConfigError
        For anything wrong with the config, the data or a folder, of all variants before the first one starts.
    """
    variants = plan_variants(config)
    check_variants_resumable(folder, variants)
    before = folder.read_run().get("sessions", [])
    session = {"started": now(), "finished": None, "command": command, "commit": commit()}

    def write_run() -> dict[str, Any]:
        run = {
            "schema_version": SCHEMA_VERSION,
            "identity": {"variants": {v.name: known_identity(v.config) for v in variants}},
            **session,
            "versions": versions(),
            "machine": machine(),
            "config": config.model_dump(mode="json"),
            "sessions": [*before, session],
        }
        folder.write_run(run)
        return run

    write_run()
    outcomes: dict[str, Outcome] = {}
    tables: dict[str, dict[Task, TaskScores]] = {}
    for number, variant in enumerate(variants, 1):
        told = Named(progress or Silent(), f"{variant.name} ({number} of {len(variants)})")
        with RunFolder(variant.config.output_dir) as inner:
            outcome = run_evaluation(variant.config, inner, command=command, progress=told, plan=variant.plan)
            if finished is not None:
                finished(variant.name, outcome, inner)
            outcomes[variant.name] = outcome
            if outcome.interrupted:
                return VariantsOutcome(outcomes, [], write_run(), True)
            tables[variant.name] = scores_of(variant.plan, inner)
        release_memory()
    rows = compare_variants(config, variants, tables)
    folder.write(COMPARISONS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    session["finished"] = now()
    return VariantsOutcome(outcomes, rows, write_run(), False)


def scores_of(plan: Plan, folder: RunFolder) -> dict[Task, TaskScores]:
    """The scores [rows, settings] of all that a plan asks for, from a folder that holds them."""
    known = {(row["cell_id"], row["example_id"]): row for row in folder.predictions.read(repair=False)}
    found = {}
    for task, prompts in plan.prompts.items():
        cells = [Cell(task, setting).cell_id for setting in plan.settings]
        rows = [[known[cell, prompt.example.example_id] for cell in cells] for prompt in prompts]
        found[task] = TaskScores(
            metric=prompts[0].example.metric,
            scores=np.array([[row["score"] for row in line] for line in rows], dtype=np.float64),
            achieved=np.array([[row["achieved_compression"] for row in line] for line in rows]).mean(axis=0),
        )
    return found


def compare_variants(
    config: EvalConfig, variants: list[Variant], tables: Mapping[str, Mapping[Task, TaskScores]]
) -> list[ComparisonRow]:
    """The comparisons of all settings of all variants; `tables`: variant -> task -> scores of its settings."""
    chosen = config.compare or CompareConfig()
    lines = [Line(v.name, setting) for v in variants for setting in v.plan.settings]
    baseline = baseline_line({v.name: v.plan.settings for v in variants}, chosen)
    tasks = {
        task: TaskScores(
            metric=table.metric,
            scores=np.concatenate([tables[v.name][task].scores for v in variants], axis=1),
            achieved=np.concatenate([tables[v.name][task].achieved for v in variants]),
        )
        for task, table in tables[variants[0].name].items()
    }
    return compare(lines, baseline, tasks, chosen, config.seed)


def release_memory() -> None:
    """Free whatever cycle still holds the last variant's model, before the next one is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Named:
    """Progress whose passes are called after a variant."""

    def __init__(self, progress: Progress, name: str) -> None:
        self._progress, self._name = progress, name

    def start(self, what: str, total: int, done: int) -> None:
        """A pass of the variant begins."""
        self._progress.start(f"{self._name}: {what}", total, done)

    def task(self, name: str) -> None:
        """The task that is worked on now."""
        self._progress.task(name)

    def advance(self, rows: int) -> None:
        """So many more rows are done."""
        self._progress.advance(rows)
