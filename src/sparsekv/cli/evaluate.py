"""`sparsekv eval`: methods × budgets × benchmarks on one model, and one table."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from sparsekv.cli.arguments import ConfigFile, Overrides

if TYPE_CHECKING:
    from rich.console import Console

    from sparsekv.config import EvalConfig


def evaluate(config: ConfigFile, overrides: Overrides = None) -> None:
    """Compare eviction methods: run everything the config asks for and print one table.

    With variants (a model, and the same model with an adapter) they run one after the other and are compared. The same
    command again resumes; added methods, ratios, tasks or rows extend the output folder.
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
    if config.variants:
        _evaluate_variants(config, command)
    else:
        _evaluate_model(config, command)


def _evaluate_model(config: EvalConfig, command: str) -> None:
    from sparsekv.cli.progress import Bar
    from sparsekv.evaluation.folder import RunFolder
    from sparsekv.evaluation.runner import run_evaluation
    from sparsekv.reporting.by_context import by_context, context_grid
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
        _stop(sum(row["n"] for row in outcome.results), config, command)
    console, width = _console()
    summary = summarize(outcome.results, labels_of(outcome.run))
    console.print(to_rich(summary, width))
    lengths = by_context(outcome.results, labels_of(outcome.run))
    if lengths is not None:
        console.print(context_grid(lengths).rich(width))
    for note in notes(summary):
        _tell(console, note, style="dim", soft_wrap=False)
    files = ", ".join(["results.jsonl", "predictions.jsonl", "run.json", *written])
    _tell(console, f"\n{config.output_dir}: {files}")


def _evaluate_variants(config: EvalConfig, command: str) -> None:
    from sparsekv.cli.progress import Bar
    from sparsekv.evaluation.folder import RunFolder
    from sparsekv.evaluation.runner import Outcome
    from sparsekv.evaluation.variants import COMPARISONS, run_variants
    from sparsekv.reporting.comparisons import PAGE, grids, notes, variants_page
    from sparsekv.reporting.report import write_report

    def report(name: str, outcome: Outcome, folder: RunFolder) -> None:
        if outcome.results:
            write_report(outcome.results, outcome.run, folder.write)

    with RunFolder(config.output_dir) as folder:
        with Bar(config.progress) as bar:
            outcome = run_variants(config, folder, command=command, progress=bar, finished=report)
        if not outcome.interrupted:
            runs = {name: found.run for name, found in outcome.outcomes.items()}
            results = {name: found.results for name, found in outcome.outcomes.items()}
            folder.write(PAGE, variants_page(outcome.comparisons, runs, results, outcome.run["finished"]))
    if outcome.interrupted:
        _stop(sum(row["n"] for one in outcome.outcomes.values() for row in one.results), config, command)
    console, width = _console()
    for grid in grids(outcome.comparisons):
        console.print(grid.rich(width))
    for note in notes(outcome.comparisons):
        _tell(console, note, style="dim", soft_wrap=False)
    folders = ", ".join(f"{name}/" for name in outcome.outcomes)
    _tell(console, f"\n{config.output_dir}: {PAGE}, {COMPARISONS}, run.json, {folders}")


def _stop(n_rows: int, config: EvalConfig, command: str) -> NoReturn:
    print(f"\nstopped; {n_rows} rows are kept in {config.output_dir}. To go on: {command}", file=sys.stderr)
    raise typer.Exit(130)


def _tell(console: Console, text: str, *, style: str | None = None, soft_wrap: bool = True) -> None:
    """Print a text as it is: rich would take "[low, high]" for a style."""
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=soft_wrap)


def _console() -> tuple[Console, int]:
    """Where tables go, and how many characters wide it is."""
    from rich.console import Console

    console = Console()
    width = max(console.width, 80) if console.is_terminal else 200
    return Console(width=width), width
