"""The model card: front matter that the Hub reads, and no number that was not measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparsekv.config import parse_config
from sparsekv.training.card import license_of, model_card, write_card
from sparsekv.training.config import TrainConfig
from sparsekv.training.output import public_settings

CONFIG = {
    "model": "smollm2",
    "data": {"kind": "selfsup"},
    "relevance": {"enabled": True, "lr": 0.02},
    "objective": {"name": "eit", "lambda_kl": 0.5},
    "curriculum": {"name": "linear", "args": {"start_ratio": 0.1, "end_ratio": 0.7}},
    "lora": {"r": 32, "alpha": 64},
    "steps": 200,
}
ROWS = [
    {"step": 10, "loss": 3.0, "ppl": 9.5, "learning_rate": 1e-4},
    {"step": 20, "loss": 2.3456789, "kl": None, "note": "text"},
]


def card(train_model: str = "lora", **changes: Any) -> str:
    plain = {} if train_model == "lora" else {"lora": None, "train_model": train_model}
    settings = public_settings(parse_config(TrainConfig, CONFIG | plain))
    return model_card(settings, ROWS, **({"license_id": "apache-2.0", "relevance": True} | changes))


def front_matter(text: str) -> dict[str, Any]:
    assert text.startswith("---\n")
    loaded = yaml.safe_load(text[4:].partition("\n---\n")[0])
    assert isinstance(loaded, dict)
    return loaded


def test_front_matter() -> None:
    front = front_matter(card())
    assert front["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (front["license"], front["library_name"], front["base_model_relation"]) == (
        "apache-2.0",
        "peft",
        "adapter",
    )
    assert {"lora", "learned-eviction", "kv-cache"} <= set(front["tags"])
    full = front_matter(card("full", license_id=None))
    assert (full["library_name"], full["base_model_relation"]) == ("transformers", "finetune")
    assert "license" not in full and "lora" not in full["tags"]
    assert "learned-eviction" in full["tags"]
    frozen = front_matter(card("frozen"))
    assert frozen["library_name"] == "transformers" and "base_model_relation" not in frozen


def test_only_measured_numbers() -> None:
    text = card()
    measured = text.partition("## Measured while training")[2].partition("## Use")[0]
    rows = re.findall(r"\| (.*?) \| (.*?) \| (\d+) \|", measured)
    assert rows == [("loss", "2.346", "20"), ("ppl", "9.5", "10")]
    assert "r 32, alpha 64, on q_proj, k_proj, v_proj, o_proj" in text
    assert "linear(start_ratio=0.1, end_ratio=0.7)" in text
    assert "cross-entropy + 0.5 · KL at temperature 1" in text
    assert "| entries dropped by | learned relevance |" in text
    settings = public_settings(parse_config(TrainConfig, CONFIG))
    empty = model_card(settings, [], license_id=None, relevance=False)
    assert "Nothing was logged." in empty and "2.346" not in empty


@pytest.mark.parametrize(
    ("objective", "text"),
    [
        (
            {
                "name": "eit",
                "lambda_kl": 1.0,
                "args": {"lambda_ce": 0.2, "lambda_context": 3.0, "context_tokens": 192},
            },
            "0.2 · cross-entropy + 1 · KL at temperature 1 + 3 · KL on 192 tokens of the context",
        ),
        ({"name": "eit", "args": {"lambda_ce": 0}}, "1 · KL at temperature 1"),
        ("standard_lm", "cross-entropy"),
        (
            {"name": "sparse_lm", "sparsity_weight": 0.05, "args": {"sparsity_kind": "l1"}},
            "cross-entropy + 0.05 · sparsity of attention (l1)",
        ),
        (
            {
                "name": "mixed",
                "weights": {"eit": 0.7, "reconstruction": 0.5},
                "args": {"eit": {"lambda_ce": 0.2}, "reconstruction": {"span": 12, "cue": 4}},
            },
            "0.7 · (0.2 · cross-entropy + 1 · KL at temperature 1) + "
            "0.5 · (cross-entropy + 1 · cross-entropy of 8 repeated tokens)",
        ),
    ],
)
def test_every_term_is_there_with_its_weight(objective: Any, text: str) -> None:
    settings = public_settings(parse_config(TrainConfig, CONFIG | {"objective": objective}))
    made = model_card(settings, ROWS, license_id=None, relevance=True)
    assert f"| objective | {text} |" in made


def test_what_is_said_of_an_adapter_that_training_went_on_from_is_its_own(tmp_path: Path) -> None:
    settings = public_settings(parse_config(TrainConfig, CONFIG | {"lora": None, "adapter": "/some/first"}))
    found = {"peft_type": "LORA", "r": 4, "lora_alpha": 12, "target_modules": ["v_proj", "q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(found))
    write_card(tmp_path, settings, ROWS, base="smollm2")
    made = (tmp_path / "README.md").read_text()
    assert "| LoRA | r 4, alpha 12, on q_proj, v_proj |" in made
    assert "| went on from | adapter first |" in made


def test_how_to_use_it_follows_from_what_was_trained() -> None:
    hub = "HuggingFaceTB/SmolLM2-135M-Instruct"
    merge = f"sparsekv merge trained --model {hub} --output merged"
    adapter = card()
    assert f'load_model("{hub}", adapter="trained")' in adapter and merge in adapter
    assert "load_relevance(" not in adapter
    frozen = card("frozen")
    assert (
        f'load_model("{hub}")' in frozen and 'load_relevance(model, "trained")' in frozen and merge in frozen
    )
    assert "Relevance predictors for" in frozen
    for relevance in (True, False):  # load_model attaches what lies beside the weights
        whole = card("full", relevance=relevance)
        assert 'load_model("trained")' in whole and "load_relevance(" not in whole
        assert "Fine-tuned from" in whole and "sparsekv merge" not in whole
        assert ("method `relevance`" in whole) == relevance


def test_license_of(tmp_path: Path) -> None:
    assert license_of("smollm2") == "apache-2.0"
    assert license_of("HuggingFaceTB/SmolLM2-135M-Instruct") == "apache-2.0"
    assert license_of("nobody/nothing-of-that-name") is None
    assert license_of(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("---\nlicense: llama3.1\ntags: [a]\n---\n# Model\n")
    assert license_of(str(tmp_path)) == "llama3.1"
    (tmp_path / "README.md").write_text("---\nlicense: [broken\n---\n")
    assert license_of(str(tmp_path)) is None
