"""`sparsekv eval`: methods × budgets × benchmarks on one model, and one table."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from sparsekv.cli.arguments import ConfigFile, Overrides


def evaluate(config: ConfigFile, overrides: Overrides = None) -> None:
    """Compare eviction methods: run everything the config asks for and print one table.

    The same command again resumes; added methods, ratios, tasks or rows extend the output folder.
    """
    _evaluate(config, overrides or [], f"sparsekv eval {_shown(config, overrides)}")


def evaluate_alias(
    config: Annotated[
        Path, typer.Option("--config", help="A YAML file, for example configs/eval/demo.yaml.")
    ],
    overrides: Overrides = None,
) -> None:
    """The same as `sparsekv eval CONFIG [KEY=VALUE]...`."""
    _evaluate(config, overrides or [], f"sparsekv-eval --config {_shown(config, overrides)}")


def _shown(config: Path, overrides: list[str] | None) -> str:
    return shlex.join([str(config), *(overrides or [])])


def _evaluate(path: Path, overrides: list[str], command: str) -> None:
    from sparsekv.config import load_eval_config

    config = load_eval_config(path, overrides)

    from sparsekv.cli.quiet import quieten

    quieten()
    from rich.console import Console

    from sparsekv.cli.progress import Bar
    from sparsekv.evaluation.folder import RunFolder
    from sparsekv.evaluation.runner import run_evaluation
    from sparsekv.reporting.report import write_report
    from sparsekv.reporting.summary import summarize
    from sparsekv.reporting.tables import labels_of, notes, to_rich

    with RunFolder(config.output_dir) as folder:
        with Bar(config.progress) as bar:
            outcome = run_evaluation(config, folder, command=command, progress=bar)
        written: list[str] = []
        if outcome.results:
            written = write_report(outcome.results, outcome.run, folder.write)
    if outcome.interrupted:
        n_rows = sum(row["n"] for row in outcome.results)
        print(
            f"\nstopped; {n_rows} rows are kept in {config.output_dir}. To go on: {command}", file=sys.stderr
        )
        raise typer.Exit(130)
    console = Console()
    width = max(console.width, 80) if console.is_terminal else 200
    console = Console(width=width)
    summary = summarize(outcome.results, labels_of(outcome.run))
    console.print(to_rich(summary, width))
    for note in notes(summary):
        console.print(note, style="dim", highlight=False)
    files = ", ".join(["results.jsonl", "predictions.jsonl", "run.json", *written])
    console.print(f"\n{config.output_dir}: {files}", highlight=False, soft_wrap=True)
