"""Merging: the plain folder computes what base and adapter compute together, and says nothing of where it was made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsekv.errors import ConfigError
from sparsekv.models import load_model
from sparsekv.models.merge import merge_adapter
from sparsekv.relevance import attach_relevance, has_relevance, load_relevance, save_relevance

IDS = torch.arange(3, 43)[None]


@pytest.fixture
def adapter(toy_model_dir: Path, tmp_path: Path) -> Path:
    """A LoRA adapter of the toy model whose product is not zero, and predictors, as `final/` holds them."""
    from peft import LoraConfig, get_peft_model

    model, tokenizer = load_model(str(toy_model_dir), dtype="float32", device="cpu")
    attach_relevance(model, seed=3)
    final = tmp_path / "run" / "final"
    final.mkdir(parents=True)
    save_relevance(model, final)
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.2 * torch.sin(torch.arange(parameter.numel())).reshape(parameter.shape))
    peft.save_pretrained(final)
    tokenizer.save_pretrained(final)
    return final


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def test_merged_equals_base_and_adapter(adapter: Path, toy_model_dir: Path, tmp_path: Path) -> None:
    base, _ = load_model(str(toy_model_dir), dtype="float32", device="cpu")
    together, _ = load_model(
        str(toy_model_dir), adapter=adapter, dtype="float32", device="cpu", merge_adapter=False
    )
    # a run's output folder stands for its final/; the base is the one that the adapter names
    folder = merge_adapter(adapter.parent, tmp_path / "merged")
    merged, tokenizer = load_model(str(folder), dtype="float32", device="cpu")
    assert (logits(merged) - logits(together)).abs().max() < 1e-4
    assert (logits(merged) - logits(base)).abs().max() > 0.1
    assert (
        tokenizer("Hi there").input_ids == [75, 108, 223, 119, 107, 104, 117, 104]
        or tokenizer.decode(tokenizer("Hi there").input_ids) == "Hi there"
    )
    assert load_relevance(merged, folder) is merged and has_relevance(merged)
    assert (folder / "relevance.safetensors").read_bytes() == (adapter / "relevance.safetensors").read_bytes()


def test_a_plain_folder_without_paths(adapter: Path, toy_model_dir: Path, tmp_path: Path) -> None:
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = merge_adapter(adapter, tmp_path / "new" / "merged", model=str(toy_model_dir))
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert not names & {"adapter_config.json", "adapter_model.safetensors"}
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert not [key for key in file.keys() if "relevance" in key or "lora" in key]  # noqa: SIM118
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"  # the base's
    for path in folder.iterdir():
        for text in (str(tmp_path), str(toy_model_dir.parent), toy_model_dir.name):
            assert text.encode() not in path.read_bytes(), path.name
    assert [path.name for path in folder.parent.iterdir()] == ["merged"]  # nothing temporary is left
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).chat_template
    assert model.num_parameters() == AutoModelForCausalLM.from_pretrained(toy_model_dir).num_parameters()


def test_predictors_alone_and_whole_models(adapter: Path, toy_model_dir: Path, tmp_path: Path) -> None:
    frozen = tmp_path / "frozen"
    frozen.mkdir()
    (frozen / "relevance.safetensors").write_bytes((adapter / "relevance.safetensors").read_bytes())
    with pytest.raises(ConfigError, match="does not name its base model"):
        merge_adapter(frozen, tmp_path / "a")
    (frozen / "training_config.json").write_text(json.dumps({"model": str(toy_model_dir)}))
    folder = merge_adapter(frozen, tmp_path / "a")
    base, _ = load_model(str(toy_model_dir), dtype="float32", device="cpu")
    plain, _ = load_model(str(folder), dtype="float32", device="cpu")
    assert torch.equal(logits(plain), logits(base))
    assert (folder / "relevance.safetensors").is_file()
    # as the card of a frozen run says: with its base
    named = merge_adapter(frozen, tmp_path / "named", model=str(toy_model_dir))
    assert (named / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert (named / "relevance.safetensors").read_bytes() == (folder / "relevance.safetensors").read_bytes()
    (frozen / "relevance.safetensors").write_bytes(b"cut")
    with pytest.raises(ConfigError, match="cannot be read"):
        merge_adapter(frozen, tmp_path / "broken")
    assert not (tmp_path / "broken").exists()
    again = merge_adapter(folder, tmp_path / "b", dtype="bfloat16")
    assert json.loads((again / "config.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(ConfigError, match="is a whole model"):
        merge_adapter(folder, tmp_path / "c", model=str(toy_model_dir))


def test_predictors_of_an_embedded_model_find_it_by_its_public_id(
    adapter: Path, toy_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frozen run's training_config.json names the Hub id, which need not be in the Hub's cache."""
    from sparsekv.models import merge

    (adapter / "adapter_config.json").unlink()
    hub = "HuggingFaceTB/SmolLM2-135M-Instruct"
    (adapter / "training_config.json").write_text(json.dumps({"model": hub}))
    asked: list[str] = []

    def load(name: str, **options: Any) -> Any:
        asked.append(name)
        return load_model(str(toy_model_dir), **options)

    monkeypatch.setattr(merge, "load_model", load)
    monkeypatch.setattr(merge, "cached_folder", lambda name: None)
    merge_adapter(adapter, tmp_path / "a", dtype="float32")
    monkeypatch.setattr(merge, "cached_folder", lambda name: toy_model_dir)
    merge_adapter(adapter, tmp_path / "b", dtype="float32")
    assert asked == ["smollm2", hub]


def test_refusals(
    adapter: Path, toy_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = tmp_path / "used"
    used.mkdir()
    (used / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty"):
        merge_adapter(adapter, used)
    assert [path.name for path in used.iterdir()] == ["notes.txt"]
    with pytest.raises(ConfigError, match="is a file"):
        merge_adapter(adapter, used / "notes.txt")
    with pytest.raises(ConfigError, match="lies in the trained folder"):
        merge_adapter(adapter, adapter / "merged")
    with pytest.raises(ConfigError, match="does not exist"):
        merge_adapter(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(ConfigError, match="nothing to merge"):
        merge_adapter(used, tmp_path / "out")
    with pytest.raises(ConfigError, match="unknown model 'no-such-base'"):
        merge_adapter(adapter, tmp_path / "out", model="no-such-base")
    # a save that fails leaves nothing behind, not even an empty folder's place taken
    empty = tmp_path / "empty"
    empty.mkdir()
    from transformers import PreTrainedTokenizerFast

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        merge_adapter(adapter, empty)
    assert list(empty.iterdir()) == [] and not list(tmp_path.glob(".empty.partial-*"))
