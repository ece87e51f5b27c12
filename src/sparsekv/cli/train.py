"""`sparsekv train`: fine-tune a model while KV entries are missing."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

TrainFile = Annotated[Path, typer.Argument(help="A YAML file, for example configs/train/eit_smollm2.yaml.")]
TrainOverrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="On top of the file, for example: steps=50 lora.r=16 lr=1e-4"
    ),
]


def train(config: TrainFile, overrides: TrainOverrides = None) -> None:
    """Train what the config asks for, into output_dir/final. The same command again resumes.

    On several GPUs: torchrun --nproc_per_node=N -m sparsekv.cli.main train CONFIG [KEY=VALUE]...
    """
    _train(config, overrides or [], f"sparsekv train {_shown(config, overrides)}")


def train_alias(
    config: Annotated[
        Path, typer.Option("--config", help="A YAML file, for example configs/train/eit_smollm2.yaml.")
    ],
    overrides: TrainOverrides = None,
) -> None:
    """The same as `sparsekv train CONFIG [KEY=VALUE]...`."""
    _train(config, overrides or [], f"sparsekv-train --config {_shown(config, overrides)}")


def _shown(config: Path, overrides: list[str] | None) -> str:
    return shlex.join([str(config), *(overrides or [])])


def _train(path: Path, overrides: list[str], command: str) -> None:
    from sparsekv.training.config import load_train_config

    config = load_train_config(path, overrides)

    from sparsekv.cli.quiet import quieten

    quieten()
    from sparsekv.training.build import run_training

    first = os.environ.get("RANK", "0") == "0"  # under torchrun, one process speaks for all
    output = Path(config.output_dir).expanduser()
    try:
        # What a run leaves out is told in any case.
        run_training(
            config,
            progress=_say if first and config.progress else _be_silent,
            warn=_say if first else _be_silent,
        )
    except KeyboardInterrupt:
        if first:
            print(_stopped(output, command), file=sys.stderr)
        raise typer.Exit(130) from None
    if first:
        final = output / "final"
        files = ", ".join(sorted(file.name for file in final.iterdir() if file.is_file()))
        typer.echo(f"{final}: {files}")


def _stopped(output: Path, command: str) -> str:
    """What is kept, and how to go on."""
    from sparsekv.training.checkpoints import latest_whole

    checkpoint = latest_whole(output).path
    if checkpoint is None:
        return (
            f"\nstopped before the first checkpoint; nothing is kept in {output}. To start again: {command}"
        )
    return f"\nstopped; {checkpoint} is kept. To go on from there: {command}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _be_silent(line: str) -> None:
    pass
