"""Fixtures shared by all tests. The models are random and tiny (tests/toy.py), so nothing is downloaded."""

from __future__ import annotations

import json
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


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four rows in two tasks "a" and "b" in kvpress's schema, contexts of about 200 toy tokens. Read only."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    animals = ("fox", "owl", "hen", "yak")
    rows = [
        {
            "context": f"{i}: the quick {animal} jumps over the lazy dog near tower {i * 37}. " * 4,
            "question": f"Who jumps over the dog of tower {i * 37}?",
            "answer_prefix": " It is the",
            "answer": animal,
            "max_new_tokens": 6,
            "task": "ab"[i // 2],
        }
        for i, animal in enumerate(animals)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def toy_eval(toy_model_dir: Path, toy_data: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`toy_eval(**changes)`: the settings of a small evaluation on the toy model, as a config file holds them."""

    def settings(**changes: Any) -> dict[str, Any]:
        base = {
            "model": str(toy_model_dir),
            "dtype": "float32",
            "device": "cpu",
            "benchmarks": [{"name": "local", "path": str(toy_data)}],
            "methods": ["full", "sink_recent", "knorm"],
            "compression_ratios": [0.5, 0.75],
            "output_dir": str(tmp_path / "out"),
            "progress": False,
        }
        return base | changes

    return settings
