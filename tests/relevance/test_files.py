"""relevance.safetensors: round trips, and files that are not what they should be."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sparsekv.errors import ConfigError
from sparsekv.relevance import (
    RELEVANCE_FILE,
    RelevanceConfig,
    attach_relevance,
    has_relevance,
    load_relevance,
    relevance_modules,
    save_relevance,
)
from toy import tiny_model


def gates(model):
    found = {}
    for index, module in relevance_modules(model).items():
        found |= {f"layers.{index}.{k}": v for k, v in module.relevance.state_dict().items()}
    return found


@pytest.fixture
def trained():
    model = attach_relevance(tiny_model("llama"), RelevanceConfig(width=5, bias=1.0), seed=8)
    for value in gates(model).values():
        value.add_(torch.randn_like(value))
    return model


def test_a_round_trip(trained, tmp_path):
    path = save_relevance(trained, tmp_path)
    assert path == tmp_path / RELEVANCE_FILE and sorted(tmp_path.iterdir()) == [path]
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["relevance"]) == {"width": 5, "bias": 1.0, "features": ["hidden"]}
    assert json.loads(metadata["model"])["num_key_value_heads"] == 2
    assert load_file(path).keys() == gates(trained).keys()
    for source in (tmp_path, path):
        fresh = load_relevance(tiny_model("llama"), source)
        assert all(torch.equal(value, gates(fresh)[name]) for name, value in gates(trained).items())


def test_the_folder_is_made(trained, tmp_path):
    folder = tmp_path / "a" / "b"
    assert save_relevance(trained, folder).parent == folder
    assert [path.name for path in folder.iterdir()] == ["relevance.safetensors"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match=r"folder '.*/file/sub' cannot be made"):
        save_relevance(trained, tmp_path / "file" / "sub")


def test_predictors_of_the_same_shape_are_filled_in_place(trained, tmp_path):
    save_relevance(trained, tmp_path)
    model = attach_relevance(tiny_model("llama"), RelevanceConfig(width=5, bias=1.0))
    parameters = [p for m in relevance_modules(model).values() for p in m.relevance.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    load_relevance(model, tmp_path)
    assert torch.equal(parameters[0], gates(trained)["layers.0.hidden.weight"])
    parameters[0].grad = torch.ones_like(parameters[0])
    optimizer.step()
    now = gates(model)["layers.0.hidden.weight"]
    assert torch.equal(now, gates(trained)["layers.0.hidden.weight"] - 1), "the optimizer still has them"
    # of another shape they are replaced
    other = load_relevance(attach_relevance(tiny_model("llama"), RelevanceConfig(width=9)), tmp_path)
    assert torch.equal(gates(other)["layers.2.score.bias"], gates(trained)["layers.2.score.bias"])


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        ("qwen3", {}, "for another model: model_type 'llama', this one has 'qwen3'"),
        ("llama", {"num_hidden_layers": 2}, "num_hidden_layers 3, this one has 2"),
        ("llama", {"num_key_value_heads": 4}, "num_key_value_heads 2, this one has 4"),
        ("llama", {"hidden_size": 32}, "hidden_size 64, this one has 32"),
    ],
)
def test_another_models_predictors_are_refused(family, overrides, message, trained, tmp_path):
    save_relevance(trained, tmp_path)
    model = tiny_model(family, **overrides)
    with pytest.raises(ConfigError, match=message):
        load_relevance(model, tmp_path)
    assert not has_relevance(model)


def test_broken_files_are_told(trained, tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_relevance(tiny_model("llama"), tmp_path)
    path = save_relevance(trained, tmp_path)
    # load_file maps the file, which is overwritten below
    whole, tensors = path.read_bytes(), {name: value.clone() for name, value in load_file(path).items()}
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    for content in (b"", whole[:40], whole[:-8], b"\xff" * 64):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="cannot be read") as caught:
            load_relevance(tiny_model("llama"), tmp_path)
        assert "\n" not in str(caught.value)
    save_file(tensors, path)
    with pytest.raises(ConfigError, match="does not say its model"):
        load_relevance(tiny_model("llama"), tmp_path)
    for broken in ("{", "[]", '{"width": 5, "depth": 3}', '{"width": -5}'):
        save_file(tensors, path, metadata={**metadata, "relevance": broken})
        with pytest.raises(ConfigError):
            load_relevance(tiny_model("llama"), tmp_path)
    missing = {name: value for name, value in tensors.items() if "layers.1.score" not in name}
    save_file(missing, path, metadata=metadata)
    with pytest.raises(ConfigError, match="does not fit layer 1") as caught:
        load_relevance(tiny_model("llama"), tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_of_predictors_alone_is_an_adapter(trained, tmp_path):
    from sparsekv import load_model
    from toy import save_toy_model

    folder = save_toy_model(tmp_path / "model")
    predictors = tmp_path / "predictors"
    predictors.mkdir()
    save_relevance(trained, predictors)
    model, _ = load_model(str(folder), adapter=predictors, dtype="float32")
    assert all(torch.equal(value, gates(trained)[name]) for name, value in gates(model).items())
    assert has_relevance(model) and not has_relevance(load_model(str(folder), dtype="float32")[0])


def test_a_model_of_the_same_shape_is_another_model(trained, tmp_path):
    """Whatever the dtype, an adapter, tokens that were added or a little fine-tuning: these are the same model."""
    save_relevance(trained, tmp_path)
    other = tiny_model("llama", seed=1)
    with pytest.raises(
        ConfigError, match="is for another model: of the same shape, but with other token emb"
    ):
        load_relevance(other, tmp_path)
    assert not has_relevance(other)
    same = tiny_model("llama")
    load_relevance(get_peft_model(same, LoraConfig(target_modules=["q_proj"])), tmp_path)
    longer = tiny_model("llama")
    longer.resize_token_embeddings(longer.config.vocab_size + 9)
    longer.get_input_embeddings().weight.data *= 1 + 0.02 * torch.rand(longer.config.hidden_size)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        load_relevance(longer.to(dtype), tmp_path)


def test_a_file_without_a_sample_of_its_model_is_taken_by_shape(trained, tmp_path):
    path = save_relevance(trained, tmp_path)
    with safe_open(path, framework="pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key != "probe"}
    save_file(load_file(path), path, metadata=metadata)
    assert has_relevance(load_relevance(tiny_model("llama", seed=1), tmp_path))
