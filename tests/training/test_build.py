"""From a config to its trainer: adapters that training goes on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from sparsekv.config import parse_config
from sparsekv.errors import ConfigError
from sparsekv.relevance import RelevanceConfig, attach_relevance
from sparsekv.relevance.files import save_relevance
from sparsekv.training.build import build_trainer, run_training
from sparsekv.training.checkpoints import seal
from sparsekv.training.config import TrainConfig
from sparsekv.training.output import read_training_config
from toy import save_toy_model, tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy_model(tmp_path_factory.mktemp("models") / "toy", num_hidden_layers=2)


def config(model: Path, output: Path, **changes: Any) -> TrainConfig:
    settings = {
        "model": str(model),
        "dtype": "float32",
        "device": "cpu",
        "output_dir": str(output),
        "data": {"kind": "text", "seq_len": 64},
        "press": {"name": "block_dropout", "args": {"block_size": 4, "n_sink": 1, "n_recent": 3}},
        "objective": "standard_lm",
        "curriculum": {"name": "fixed", "args": {"ratio": 0.5}},
        "steps": 2,
        **changes,
    }
    return parse_config(TrainConfig, settings)


def write_adapter(folder: Path, n_layers: int) -> Path:
    """A LoRA adapter with weights other than 0, for a toy model of so many layers."""
    torch.manual_seed(3)
    options = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"], task_type="CAUSAL_LM")
    options.init_lora_weights = False
    made = get_peft_model(tiny_model("llama", num_hidden_layers=n_layers), options)
    made.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.mark.parametrize(("n_layers", "problem"), [(3, "has weights for"), (1, "lacks weights for")])
def test_an_adapter_of_another_model_is_refused(
    n_layers: int, problem: str, model: Path, tmp_path: Path
) -> None:
    """PEFT would leave out what doesn't fit, or train fresh weights in its place."""
    adapter = write_adapter(tmp_path / "adapter", n_layers)
    with pytest.raises(ConfigError, match=rf"adapter .* does not fit model .*{problem} 2 modules") as caught:
        build_trainer(config(model, tmp_path, adapter=str(adapter)))
    assert "\n" not in str(caught.value)


def test_training_goes_on_from_an_adapter(model: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", 2)
    trainer = build_trainer(config(model, tmp_path, adapter=str(adapter)))
    trained = {name: each for name, each in trainer.model.named_parameters() if each.requires_grad}
    assert len(trained) == 4 and all("q_proj.lora_" in name for name in trained)
    assert all(each.abs().max() > 0 for each in trained.values())
    assert trainer.model.peft_config["default"].r == 3


def test_predictors_alone_are_no_adapter(model: Path, tmp_path: Path) -> None:
    save_relevance(attach_relevance(tiny_model("llama", num_hidden_layers=2)), tmp_path)
    with pytest.raises(ConfigError, match=r"holds relevance predictors alone; relevance: \{start_from: "):
        build_trainer(config(model, tmp_path / "run", adapter=str(tmp_path)))


def test_an_adapters_predictors_are_of_the_shape_that_the_config_says(model: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", 2)
    predictors = RelevanceConfig(width=6)
    save_relevance(attach_relevance(tiny_model("llama", num_hidden_layers=2), predictors), adapter)

    def changes(**relevance: Any) -> dict[str, Any]:
        given = {"enabled": True, "n_sink": 1, "n_recent": 3, **relevance}
        return {"adapter": str(adapter), "press": None, "objective": "eit", "relevance": given}

    trainer = build_trainer(config(model, tmp_path, **changes(width=6)))
    begun = load_file(adapter / "relevance.safetensors")
    assert begun and all(
        torch.equal(layer.self_attn.relevance.state_dict()[name], begun[f"layers.{index}.{name}"])
        for index, layer in enumerate(trainer.model.get_base_model().model.layers)
        for name in layer.self_attn.relevance.state_dict()
    )
    with pytest.raises(ConfigError, match=r"adapter' has predictors of width 6, the config asks for 8"):
        build_trainer(config(model, tmp_path, **changes(width=8)))
    with pytest.raises(ConfigError, match=r"has predictors of features \('hidden',\), the config asks for"):
        build_trainer(config(model, tmp_path, **changes(width=6, features=["hidden", "attention"])))


@pytest.mark.parametrize("method", ["dynamic_kv", "quest", "think", "kvzip"])
def test_a_method_that_can_not_be_trained_under_is_told_before_the_model_is_loaded(
    method: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"method {method} .*; it can't be trained under"):
        build_trainer(config(tmp_path / "no such model", tmp_path, press=None, method=method))


def test_a_finished_run_is_averaged_with_what_it_started_from(model: Path, tmp_path: Path) -> None:
    """The start is the config's, not the checkpoint's; another share takes no step again."""
    start = save_relevance(attach_relevance(tiny_model("llama", num_hidden_layers=2), seed=5), tmp_path)

    def run(share: float) -> dict[str, torch.Tensor]:
        relevance = {
            "enabled": True,
            "threshold": "quantile",
            "lr": 0.5,
            "n_sink": 1,
            "n_recent": 3,
            "start_from": str(tmp_path),
            "start_share": share,
        }
        changes = {"press": None, "objective": "eit", "relevance": relevance, "steps": 6, "save_every": 3}
        final = run_training(config(model, tmp_path / "run", **changes))
        return load_file(final / start.name)

    begun, half = load_file(start), run(0.5)
    trained, quarter = load_file(tmp_path / "run" / "checkpoint-6" / start.name), run(0.25)
    assert max(float((trained[name] - value).abs().max()) for name, value in begun.items()) > 0.1
    for name, value in begun.items():
        assert torch.allclose(half[name], 0.5 * value + 0.5 * trained[name], atol=1e-6)
        assert torch.allclose(quarter[name], 0.25 * value + 0.75 * trained[name], atol=1e-6)
    assert "0.25 of the start's, 0.75 of the trained ones" in (
        tmp_path / "run" / "final" / "README.md"
    ).read_text(encoding="utf-8")


def test_a_run_records_its_dtype_and_does_not_go_on_in_another(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ "auto" means another dtype on another machine: the steps would not be those of the run that was cut off."""
    run = config(model, tmp_path / "run", dtype="auto", save_every=1)
    on_machine(monkeypatch, bf16=False)
    final = run_training(run)
    assert read_training_config(final).dtype == "float32"
    run_training(run)  # the same machine goes on
    on_machine(monkeypatch, bf16=True)
    with pytest.raises(ConfigError, match="is of another config: dtype was 'float32', now 'bfloat16'"):
        run_training(run)
    run_training(config(model, tmp_path / "run", dtype="float32", save_every=1))
    for file in (tmp_path / "run").glob("checkpoint-*/training_config.json"):  # as an older version wrote it
        file.write_text(file.read_text().replace('"dtype": "float32"', '"dtype": "auto"'))
        seal(file.parent)
    run_training(run)


def on_machine(monkeypatch: pytest.MonkeyPatch, *, bf16: bool) -> None:
    """A machine that computes in bf16, or does not."""
    monkeypatch.setattr("sparsekv.models.placement.computes_bf16", lambda device: bf16)


@pytest.mark.parametrize(
    ("data", "judged", "told"),
    [
        ({"kind": "text", "seq_len": 9000}, None, r"data\.seq_len is 9000 tokens, the model allows 8192"),
        ({"kind": "text", "seq_len": 64}, {"kind": "text", "seq_len": 9000}, r"eval_data\.seq_len is 9000"),
        ({"kind": "selfsup", "context_tokens": 9000}, None, r"data\.context_tokens is 9000 tokens"),
        (
            {"mix": [{"kind": "text", "seq_len": 64}, {"kind": "text", "seq_len": 8193}]},
            None,
            r"seq_len is 8193 tokens",
        ),
    ],
)
def test_sequences_that_the_model_can_not_read_are_refused(
    data: dict[str, Any], judged: dict[str, Any] | None, told: str, model: Path, tmp_path: Path
) -> None:
    held_out = {"eval_data": judged, "eval_every": 1} if judged else {}
    with pytest.raises(ConfigError, match=told):
        build_trainer(config(model, tmp_path, data=data, **held_out))
