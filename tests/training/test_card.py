"""The model card: front matter that the Hub reads, and no number that was not measured."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from sparsekv.config import parse_config
from sparsekv.training.card import license_of, model_card
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
