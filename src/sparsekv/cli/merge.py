"""`sparsekv merge`: a trained adapter and its base as one plain Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def merge(
    trained: Annotated[
        Path,
        typer.Argument(
            help="Folder of an adapter, of predictors or of a whole model, or a training run's output folder (its "
            "final/ is taken)."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; new or empty.")],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="The base of an adapter or of predictors; by default the one that the folder names.",
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="auto (that of the base's files), float32, bfloat16 or float16.")
    ] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Allow code from the base's repository to run.")
    ] = False,
) -> None:
    """Write base and adapter as one folder that any engine serves, relevance.safetensors beside it."""
    from sparsekv.cli.quiet import quieten

    quieten()
    from sparsekv.models.merge import merge_adapter

    typer.echo(
        str(merge_adapter(trained, output, model=model, dtype=dtype, trust_remote_code=trust_remote_code))
    )
