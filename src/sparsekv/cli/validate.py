"""`sparsekv validate`: everything that can be wrong with a config, without loading weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import typer

from sparsekv.cli.arguments import ConfigFile, Overrides

if TYPE_CHECKING:
    from sparsekv.config import EvalConfig
    from sparsekv.evaluation.plan import Plan
    from sparsekv.evaluation.records import PredictionRow


def validate(config: ConfigFile, overrides: Overrides = None) -> None:
    """Check a config: keys, methods, tasks, files, ratios, budgets, context lengths, and the output folder's run."""
    from sparsekv.config import load_eval_config

    checked = load_eval_config(config, overrides or [])

    from sparsekv.cli.quiet import quieten

    quieten()
    if checked.variants:
        _validate_variants(checked, config)
    else:
        _validate_model(checked, config)


def _validate_model(checked: EvalConfig, config: Path) -> None:
    from sparsekv.evaluation.folder import RunFolder, check_usable
    from sparsekv.evaluation.plan import make_plan
    from sparsekv.evaluation.resume import check_resumable

    folder = RunFolder(checked.output_dir)  # not entered: nothing is written, and a run may go on meanwhile
    check_usable(folder.path)
    before = folder.read_run()
    plan = make_plan(checked)
    answered = cast("list[PredictionRow]", folder.predictions.read(repair=False))
    check_resumable(folder.path, before, answered, plan, checked)
    typer.echo(f"{config}: ok. {_size(plan)}")
    _tell_tasks(plan)


def _validate_variants(checked: EvalConfig, config: Path) -> None:
    from sparsekv.evaluation.folder import RunFolder
    from sparsekv.evaluation.variants import check_variants_resumable, plan_variants

    variants = plan_variants(checked)
    check_variants_resumable(RunFolder(checked.output_dir), variants)
    typer.echo(f"{config}: ok. {len(variants)} variants, {sum(v.plan.n_rows for v in variants)} rows")
    for variant in variants:
        typer.echo(f"  {variant.name}: {_size(variant.plan)}")
    _tell_tasks(variants[0].plan)


def _size(plan: Plan) -> str:
    n_examples = sum(len(prompts) for prompts in plan.prompts.values())
    return (
        f"{len(plan.settings)} settings × {len(plan.prompts)} tasks = {len(plan.cells)} cells; "
        f"{n_examples} examples, {plan.n_rows} rows"
    )


def _tell_tasks(plan: Plan) -> None:
    for task, prompts in plan.prompts.items():
        tokens = [prompt.context_tokens for prompt in prompts]
        typer.echo(f"  {task}: {len(prompts)} rows, contexts of {min(tokens)} to {max(tokens)} tokens")
