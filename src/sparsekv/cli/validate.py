"""`sparsekv validate`: everything that can be wrong with a config, without loading weights."""

from __future__ import annotations

from pathlib import Path

import typer

from sparsekv.cli.arguments import ConfigFile, Overrides


def validate(config: ConfigFile, overrides: Overrides = None) -> None:
    """Check a config: keys, methods, tasks, files, ratios, budgets and context lengths."""
    from sparsekv.config import load_eval_config

    checked = load_eval_config(config, overrides or [])

    from sparsekv.cli.quiet import quieten

    quieten()
    from sparsekv.evaluation.folder import check_usable, read_run
    from sparsekv.evaluation.plan import make_plan

    output = Path(checked.output_dir).expanduser()
    check_usable(output)
    read_run(output)
    plan = make_plan(checked)
    n_examples = sum(len(prompts) for prompts in plan.prompts.values())
    typer.echo(
        f"{config}: ok. {len(plan.settings)} settings × {len(plan.prompts)} tasks = {len(plan.cells)} cells; "
        f"{n_examples} examples, {plan.n_rows} rows"
    )
    for task, prompts in plan.prompts.items():
        tokens = [prompt.context_tokens for prompt in prompts]
        typer.echo(f"  {task}: {len(prompts)} rows, contexts of {min(tokens)} to {max(tokens)} tokens")
