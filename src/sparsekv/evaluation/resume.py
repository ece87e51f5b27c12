"""May a run go on in a folder that holds rows already? Asked before weights are loaded, by eval and validate alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsekv.config import EvalConfig
from sparsekv.errors import ConfigError
from sparsekv.evaluation.cells import Task
from sparsekv.evaluation.folder import check_identity, check_kind
from sparsekv.evaluation.identity import known_identity
from sparsekv.evaluation.plan import Plan
from sparsekv.evaluation.prompts import Prompt
from sparsekv.evaluation.records import PredictionRow


def check_resumable(
    path: Path,
    before: Mapping[str, Any],
    predictions: Sequence[PredictionRow],
    plan: Plan,
    config: EvalConfig,
) -> None:
    """Raise a ConfigError that says what differs between a folder's run and this one.

    Parameters
    ----------
    path : the folder, for messages
    before : the content of its run.json, {} in a new folder
    predictions : its rows
    """
    if not before:
        return
    check_kind(path, before, variants=False)
    check_identity(path, before["identity"], known_identity(config))
    lead = f"output_dir '{path}' holds another run:"
    for task, prompts in plan.prompts.items():
        metric, then = prompts[0].example.metric, before.get("metrics", {}).get(str(task))
        if then not in (None, metric):
            raise ConfigError(f"{lead} metric of {task} was {then!r}, now {metric!r}; use another output_dir")
    old = {row["example_id"]: row for row in predictions}
    for task, prompts in plan.prompts.items():
        for prompt in prompts:
            row = old.get(prompt.example.example_id)
            difference = None if row is None else _difference(task, prompt, row, before, config)
            if difference is not None:
                raise ConfigError(f"{lead} {difference}; use another output_dir")


def _difference(
    task: Task, prompt: Prompt, row: PredictionRow, before: Mapping[str, Any], config: EvalConfig
) -> str | None:
    """What of an example changed since `row` answered it, in words; settings before what follows from them."""
    name = prompt.example.example_id
    if not prompt.is_scored_text:
        if "max_new_tokens" not in row:
            told = _benchmark_limit(task.benchmark, before, config)
            if told is not None:
                return told
        elif row["max_new_tokens"] != prompt.max_new_tokens:
            return f"max_new_tokens of {name} was {row['max_new_tokens']}, now {prompt.max_new_tokens}"
    sha, references = row["prompt_sha"], list(prompt.example.references)
    if sha == prompt.sha and row["references"] == references:
        return None
    for key in ("model", "truncate"):
        then, now = before.get("config", {}).get(key), getattr(config, key)
        if key in before.get("config", {}) and then != now:
            return f"{key} was {then!r}, now {now!r}"
    if sha != prompt.sha:
        shown = f"prompt of {name} has sha {prompt.sha[:12]}, had {sha[:12]}"
    else:
        shown = f"references of {name} were {row['references']!r}, now {references!r}"
    return f"the {shown}: the data of {task} changed"


def _benchmark_limit(benchmark: str, before: Mapping[str, Any], config: EvalConfig) -> str | None:
    """Rows from before each row named its limit: the limits that the config asked for then and asks for now."""
    was = [spec for spec in before.get("config", {}).get("benchmarks", []) if spec["name"] == benchmark]
    now = [spec for spec in config.benchmarks if spec.name == benchmark]
    for then, spec in zip(was, now, strict=False):
        if then.get("max_new_tokens") != spec.max_new_tokens:
            return (
                f"max_new_tokens of benchmark {benchmark} was {then.get('max_new_tokens')}, "
                f"now {spec.max_new_tokens}"
            )
    return None
