"""Who computed a result."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sparsekv
from sparsekv.cache import kernel
from sparsekv.config import EvalConfig, parse_config
from sparsekv.evaluation import identity as module
from sparsekv.evaluation.identity import commit, identity, machine, versions, weights_fingerprint
from sparsekv.models import public_name


def test_a_fingerprint_tells_weights_apart(tiny_model: Callable[..., Any]) -> None:
    import torch

    one = weights_fingerprint(tiny_model("llama", seed=0))
    assert one == weights_fingerprint(tiny_model("llama", seed=0)) and len(one) == 16
    assert one != weights_fingerprint(tiny_model("llama", seed=1))
    assert one != weights_fingerprint(tiny_model("mistral", seed=0))  # the same shapes
    changed = tiny_model("llama", seed=0)
    with torch.no_grad():
        changed.model.layers[2].mlp.down_proj.weight.mul_(1.5)
    assert one != weights_fingerprint(changed)


def test_models_are_named_as_others_know_them(tmp_path: Path) -> None:
    assert public_name("smollm2") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert public_name("org/name") == "org/name"
    (tmp_path / "mine").mkdir()
    assert public_name(str(tmp_path / "mine")) == "mine"


def test_identity_holds_what_the_user_chose(
    toy_eval: Callable[..., Any], tiny_model: Callable[..., Any]
) -> None:
    config = parse_config(EvalConfig, toy_eval(seed=4, query_aware=True, max_new_tokens=9))
    made = identity(config, tiny_model("llama"))
    weights = made.pop("weights")
    assert weights == weights_fingerprint(tiny_model("llama"))
    assert made == {
        "model": "toy-llama",
        "adapter": None,
        "dtype": "float32",
        "device": "cpu",
        "seed": 4,
        "query_aware": True,
        "max_new_tokens": 9,
        "chunk": None,
    }


def test_the_commit_is_that_of_the_clone_or_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = Path(sparsekv.__file__).parent
    head = subprocess.run(
        ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    found = commit()
    if found is not None:
        assert found.removesuffix("+changed") == head.stdout.strip()
    monkeypatch.setattr(module.sparsekv, "__file__", str(tmp_path / "__init__.py"))
    assert commit() is None
    # A copy inside a clone that does not track it: as in a virtual environment.
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "__init__.py").touch()
    assert commit() is None


def test_versions_and_machine() -> None:
    assert versions()["sparsekv"] == sparsekv.__version__ and versions()["kvpress"].startswith("0.5")
    found = machine()
    assert found["cores"] >= 1 and found["memory_bytes"] > 2**28 and isinstance(found["gpus"], list)
    assert found["compiled_attention"] == kernel.is_on()
