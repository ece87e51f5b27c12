"""Arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[Path, typer.Argument(help="A YAML file, for example configs/eval/demo.yaml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="On top of the file, for example: limit=5 methods='[full, snapkv]' benchmarks.0.rows=10",
    ),
]
