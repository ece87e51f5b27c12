"""Settings of small fits on a toy model, which the tests of fitting share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sparsekv.config import parse_config
from sparsekv.training.fit_config import FitConfig

LINE = (
    "The quick fox {i} jumps over {j} lazy dogs. Then it sleeps, and dreams of hens; there were {k} of them. "
)


def write_text(path: Path) -> Path:
    """40 documents of about 100 bytes, so of as many toy tokens."""
    lines = [{"text": LINE.format(i=i, j=i * i, k=7 * i + 3)} for i in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def fit_settings(toy: Path, text: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """A run of 20 steps of two samples of 64 tokens."""
    settings = {
        "model": str(toy),
        "dtype": "float32",
        "device": "cpu",
        "seed": 3,
        "output_dir": str(output),
        "data": {"kind": "text", "path": str(text), "seq_len": 64, "min_tokens": 16},
        "held_out": 6,
        "predictor": {"n_sink": 1, "n_recent": 3},
        "futures": {"kinds": ["continuation", "reconstruction"], "chunk_tokens": 32},
        "steps": 20,
        "batch_size": 2,
        "save_every": 8,
        "log_every": 4,
        "progress": False,
    }
    return settings | changes


def fit_config(toy: Path, text: Path, output: Path, **changes: Any) -> FitConfig:
    """The same, validated."""
    return parse_config(FitConfig, fit_settings(toy, text, output, **changes))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of a folder's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
