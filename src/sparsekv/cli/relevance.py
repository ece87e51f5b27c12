"""`sparsekv relevance fit`: fit relevance predictors on a frozen model."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

FitFile = Annotated[
    Path, typer.Argument(help="A YAML file, for example configs/relevance/smollm2_regression.yaml.")
]
FitOverrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="On top of the file, for example: steps=50 data.path='[a.txt, b.txt]' regression.loss=bce",
    ),
]

relevance = typer.Typer(
    no_args_is_help=True, help="Relevance predictors: which KV entries will later queries need?"
)


@relevance.callback()
def _relevance() -> None:
    pass  # so that `fit` stays a command of its own name


@relevance.command("fit")
def fit(config: FitFile, overrides: FitOverrides = None) -> None:
    """Fit predictors on a frozen model, into output_dir/final. The same command again resumes."""
    from sparsekv.training.fit_config import load_fit_config

    checked = load_fit_config(config, overrides or [])

    from sparsekv.cli.quiet import quieten

    quieten()
    from sparsekv.cli.progress import Bar
    from sparsekv.training.fit import run_fit
    from sparsekv.training.fit_metrics import in_words

    def say(line: str) -> None:
        if checked.progress:
            print(line, file=sys.stderr, flush=True)

    try:
        shown = checked.progress and checked.way == "regression"  # Trainer shows a bar of its own
        with Bar(shown, unit="steps") as bar:
            found = run_fit(checked, say=say, progress=bar)
    except KeyboardInterrupt:
        command = f"sparsekv relevance fit {shlex.join([str(config), *(overrides or [])])}"
        print(_stopped(Path(checked.output_dir).expanduser(), checked.way, command), file=sys.stderr)
        raise typer.Exit(130) from None
    files = ", ".join(sorted(file.name for file in found.folder.iterdir() if file.is_file()))
    typer.echo(f"{found.folder}: {files}")
    typer.echo(in_words(found.report))


def _stopped(output: Path, way: str, command: str) -> str:
    """What is kept, and how to go on."""
    from sparsekv.training.checkpoints import latest_whole
    from sparsekv.training.fit_config import TRAINING

    kept = latest_whole(output / TRAINING if way == "end_to_end" else output).path
    if kept is None:
        return (
            f"\nstopped before the first checkpoint; nothing is kept in {output}. To start again: {command}"
        )
    return f"\nstopped; {kept} is kept. To go on from there: {command}"
