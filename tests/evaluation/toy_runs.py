"""Runs of the evaluation in tests, and what they wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsekv.config import EvalConfig, parse_config
from sparsekv.evaluation.folder import RunFolder
from sparsekv.evaluation.runner import Outcome, Silent, run_evaluation

Settings = Callable[..., dict[str, Any]]


def run(settings: dict[str, Any], progress: Any = None) -> Outcome:
    config = parse_config(EvalConfig, settings)
    with RunFolder(config.output_dir) as folder:
        return run_evaluation(config, folder, command="test", progress=progress)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def predictions(settings: dict[str, Any]) -> list[dict[str, Any]]:
    return lines(Path(settings["output_dir"]) / "predictions.jsonl")


def by_key(rows: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    found = {(row["cell_id"], row["example_id"]): row for row in rows}
    assert len(found) == len(rows), "a row is repeated"
    return found


class Counting(Silent):
    """Counts rows and can stop the run."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.rows, self.stop_after, self.starts = 0, stop_after, []

    def start(self, what: str, total: int, done: int) -> None:
        self.starts.append((what, total, done))

    def advance(self, rows: int) -> None:
        self.rows += rows
        if self.stop_after is not None and self.rows >= self.stop_after:
            raise KeyboardInterrupt
