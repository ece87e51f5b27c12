"""Fixtures shared by all tests. The models are random and tiny (tests/toy.py), so nothing is downloaded."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # `from toy import ...` in whatever import mode pytest runs

import toy


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Several test processes share few cores; tiny matrices gain nothing from more threads."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def tiny_model() -> Callable[..., Any]:
    """`tiny_model(family, seed=0, **config_overrides)`: a fresh random fp32 model (see toy.tiny_model)."""
    return toy.tiny_model


@pytest.fixture(scope="session")
def toy_tokenizer() -> Any:
    """A byte-level tokenizer with a chat template."""
    return toy.toy_tokenizer()


@pytest.fixture(scope="session")
def toy_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local Hugging Face folder with a tiny random Llama and its tokenizer. Read only."""
    return toy.save_toy_model(tmp_path_factory.mktemp("models") / "toy-llama")
