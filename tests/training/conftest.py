"""Fixtures of the tests of fitting (settings: fit_runs.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sparsekv.training.fit_config import FitConfig
from toy import save_toy_model
from training.fit_runs import fit_config, write_text


@pytest.fixture(scope="session")
def fit_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy model of two layers."""
    return save_toy_model(tmp_path_factory.mktemp("models") / "toy", num_hidden_layers=2)


@pytest.fixture(scope="session")
def fit_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What it is fitted on."""
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture
def fit_run(fit_model: Path, fit_text: Path, tmp_path: Path) -> Callable[..., FitConfig]:
    """`fit_run(**changes)`: a small run (see fit_runs.fit_settings)."""
    return lambda **changes: fit_config(fit_model, fit_text, **{"output": tmp_path / "run"} | changes)
