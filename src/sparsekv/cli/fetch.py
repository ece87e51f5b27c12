"""`sparsekv fetch-model`: download an embedded model once."""

from __future__ import annotations

from typing import Annotated

import typer


def fetch(
    name: Annotated[str, typer.Argument(help="A name of `sparsekv ls models`, for example smollm2.")],
) -> None:
    """Fetch an embedded model, check it, convert it, and print its folder (the last line)."""
    from sparsekv.models import fetch_model

    typer.echo(str(fetch_model(name)))
