"""Training configs: mistakes are one line that names the key; what is accepted means what it says."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sparsekv.config import parse_config
from sparsekv.errors import ConfigError
from sparsekv.training.config import TrainConfig, load_train_config
from sparsekv.training.config_parts import OWN_OBJECTIVES, RelevanceOptions
from sparsekv.training.curricula import AdaptiveCurriculum, LinearCurriculum
from sparsekv.training.eit import EITConfig

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs" / "train").glob("*.yaml"))

BASE: dict[str, Any] = {
    "model": "smollm2",
    "data": {"kind": "text", "seq_len": 256},
    "press": {"name": "block_dropout", "args": {"block_size": 16}},
    "objective": "standard_lm",
    "curriculum": {"name": "linear", "args": {"start_ratio": 0.0, "end_ratio": 0.5, "warmup_steps": 0.5}},
    "steps": 100,
}
NO_PRESS = {"press": None, "relevance": {"enabled": True}}


def config(**changes: Any) -> TrainConfig:
    return parse_config(TrainConfig, BASE | changes)


def test_defaults_and_shorthands() -> None:
    made = config(press="block_dropout")
    assert made.press is not None and (made.press.name, made.press.args) == ("block_dropout", {})
    assert made.objective.name == "standard_lm"
    assert made.make_curriculum() == LinearCurriculum(0.0, 0.5, 0.5)
    assert made.lora is not None
    assert (made.lora.r, made.lora.alpha, made.lora.dropout) == (64, 128, 0)
    assert made.lora.targets == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert config(train_model="full").lora is None
    assert config(adapter="a").lora is None and config(adapter="a").train_model == "lora"
    saved = (
        config().model_dump()
    )  # by an earlier version, with the defaults that an adapter of its own doesn't have
    assert parse_config(TrainConfig, saved | {"adapter": "a"}) == config(adapter="a")
    assert EITConfig("smollm2", settings={"adapter": "a"}).to_train_config().lora is None
    assert config(train_model="frozen", **NO_PRESS).lora is None
    assert config(report_to="none").report_to == []
    assert config(report_to="tensorboard").report_to == ["tensorboard"]
    assert config(method={"name": "snapkv", "budget_scope": "layer"}, press=None).protected == 0
    assert config(**NO_PRESS).protected == 20  # 4 sinks and 16 recent
    assert config(press={"name": "block_dropout", "args": {"protect_start": 3, "recent": 40}}).protected == 43


def test_every_spelling_that_presses_and_anchors_take_is_known() -> None:
    """The config looks for sizes and ratios under the names that those who make the press look for."""
    from sparsekv.policies.training_presses import ALIASES

    for name, ours in ALIASES.items():
        press = {"name": "block_dropout", "args": {name: 0.5 if ours == "compression_ratio" else 7}}
        if ours == "compression_ratio":
            with pytest.raises(ConfigError, match=f"has {name}; the curriculum sets the ratio"):
                config(press=press)
        else:
            assert config(press=press).protected == 7
    for names in ({"sink_size": 8, "recent_size": 16}, {"n_sink": 8, "n_recent": 16}):
        assert config(press=None, method={"name": "dynamic_anchors", "args": names}).protected == 24


def test_soft_thresholds_on_relevance_train_predictors_in_every_step() -> None:
    soft = {"name": "soft_threshold", "args": {"on": "relevance", "threshold": 0.0}}
    changes = {"press": soft, "relevance": {"enabled": True}, "train_model": "frozen"}
    assert config(**changes, press_share=1).press_share == 1
    alone = config(press=soft, curriculum={"name": "fixed", "args": {"ratio": 0.0}})
    assert alone.drops == alone.press and alone.press is not None and alone.press.has_threshold


def test_all_weights_are_trained_in_float32() -> None:
    assert config(train_model="full").weights_dtype == "float32"
    assert config(train_model="full", dtype="float32", bf16=True).bf16
    assert (config().weights_dtype, config(dtype="bfloat16").weights_dtype) == ("auto", "bfloat16")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train_model": "full"},
        {"adapter": "a"},
        {"train_model": "frozen", **NO_PRESS},
        {"dropping": "streaming", "window": 64},
        {"curriculum": {"name": "step", "args": {"milestones": {0: 0.1, 50: 0.4}}}},
        {"curriculum": {"name": "adaptive"}, "held_out": 4, "eval_every": 10},
        {"objective": {"name": "mixed", "weights": {"eit": 1, "reconstruction": 0.5}}},
    ],
)
def test_round_trip_through_json(changes: dict[str, Any]) -> None:
    made = config(**changes)
    again = parse_config(TrainConfig, json.loads(json.dumps(made.model_dump(mode="json"))))
    assert again.make_curriculum().ratio(60, 100) == made.make_curriculum().ratio(60, 100)
    assert again.model_dump(mode="json") == made.model_dump(mode="json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stps": 3}, r"unknown key 'stps' \(did you mean 'steps'\?\)"),
        ({"lora": {"rank": 3}}, "unknown key 'lora.rank'; allowed: r, alpha"),
        ({"relevance": {"enable": True}}, r"unknown key 'enable' in relevance \(did you mean 'enabled'\?\)"),
        ({"objective": None}, "objective"),
        ({"curriculum": {"name": "linaer"}}, "unknown curriculum 'linaer' .did you mean 'linear'"),
        ({"curriculum": {"name": "fixed", "args": {"ratio": 1.0}}}, r"ratio must be in \[0, 1\).*got 1.0"),
        ({"curriculum": {"name": "linear", "args": {"end_ratio": 1.2}}}, "end_ratio must be in"),
        ({"curriculum": {"name": "linear", "args": {"warmup": 3}}}, "unknown argument of curriculum linear"),
        ({"curriculum": {"name": "adaptive"}}, "adaptive decides by held-out perplexity; give eval_every"),
        ({"press": {"name": "block_dropout", "args": {"drop_ratio": 0.3}}}, "curriculum sets the ratio"),
        ({"method": "snapkv"}, "press 'block_dropout' and method 'snapkv' are both given"),
        ({"press": None}, "nothing drops entries"),
        (
            {"press": {"name": "x", "args": {"n_sink": 4, "n_recent": 252}}},
            "256 tokens are no longer than the 256",
        ),
        ({"relevance": {"enabled": True}}, "press_share 0 with both"),
        ({"press_share": 0.5}, "press_share 0.5 without both"),
        ({"press_share": 1.5, "relevance": {"enabled": True}}, "press_share: .*less than or equal to 1"),
        ({"relevance": {"threshold": "top"}}, "relevance.threshold: .*'learned' or 'quantile'"),
        ({"lora": None}, "lora is null, so what is trained"),
        ({"train_model": "full", "lora": {"r": 8}}, "lora is given, but train_model is 'full'"),
        ({"train_model": "frozen"}, "'frozen' trains nothing without relevance"),
        (
            {"train_model": "frozen", "relevance": {"enabled": True}, "press_share": 0.5},
            "'frozen' trains predictors alone, and nothing reaches them in the steps of 'block_dropout'",
        ),
        (
            {"relevance": {"enabled": True}, "press_share": 1},
            "press_share 1 gives every step to 'block_dropout', so predictors would never be trained",
        ),
        ({"adapter": "a", "lora": {"r": 8}}, "lora is given beside adapter 'a', whose rank"),
        ({"adapter": "a", "train_model": "full"}, "adapter 'a' is given, but train_model is 'full'"),
        (
            {"adapter": "a", "train_model": "frozen", **NO_PRESS},
            "adapter 'a' is given, but train_model is 'frozen'",
        ),
        (
            {"train_model": "full", "dtype": "bfloat16"},
            "dtype 'bfloat16' with train_model 'full'.*dtype: float32, and bf16: true",
        ),
        ({"train_model": "full", "dtype": "float16"}, "dtype 'float16' with train_model 'full'"),
        (
            {"press": None, "method": {"name": "snapkv", "budget_scope": "model"}},
            "method.budget_scope: .*'head' or 'layer'.*got 'model'",
        ),
        ({"press": {"name": "soft_threshold", "args": {"scope": "model"}}}, "scope 'model', which needs"),
        (
            {"press": {"name": "soft_threshold", "args": {"threshold": 0.5}}},
            "'soft_threshold' has a threshold of its own, .*name: fixed, args: .ratio: 0.0",
        ),
        ({"train_model": "all"}, "train_model: .*'lora', 'full' or 'frozen'.*got 'all'"),
        ({"lora": {"dropout": 1.0}}, "lora.dropout: .*less than 1, got 1.0"),
        ({"lora": {"targets": []}}, "lora.targets"),
        ({"dropping": "streaming"}, "dropping is 'streaming' and window is None"),
        ({"window": 10}, "dropping is 'prefill' and window is 10"),
        ({"dropping": "streaming", "window": 256}, "window must be less than the sequences' 256 tokens"),
        ({"dropping": "streaming", "window": 9, "boundary": "random"}, "boundary 'random' belongs to"),
        ({"objective": "mixed"}, "objective 'mixed' with no weights"),
        ({"objective": {"name": "eit", "weights": {"eit": 1}}}, "weights belong to objective mixed"),
        ({"objective": {"name": "mixed", "weights": {"eit": 0}}}, "all weights are 0"),
        (
            {"objective": {"name": "eitt", "lambda_kl": 0.5}},
            r"unknown objective 'eitt' \(did you mean 'eit'\?\)",
        ),
        ({"objective": {"name": "mixt", "weights": {"eit": 1}}}, "unknown objective 'mixt'"),
        ({"objective": {"name": "standard_lm", "lambda_kl": 0.5}}, "lambda_kl 0.5 belongs to objective eit"),
        (
            {"objective": {"name": "mixed", "weights": {"eit": 1}, "args": {"span": 9}}},
            "args of objective mixed are .* got span: 9",
        ),
        (
            {"objective": {"name": "mixed", "weights": {"eit": 1}, "args": {"eit": {"weight": 2}}}},
            "args of 'eit' in objective mixed has weight 2; weights: .eit: …. sets it",
        ),
        ({"objective": {"name": "eit", "temperature": 0}}, "objective.temperature: .*greater than 0, got 0"),
        ({"objective": {"name": "eit", "lambda_kl": -1}}, "objective.lambda_kl"),
        ({"seed": 10**20}, "seed: .*less than or equal to 4294967295, got 1"),
        ({"steps": 0}, "steps: .*greater than or equal to 1, got 0"),
        ({"warmup": 100}, "warmup must be less than steps 100"),
        ({"warmup": 2.5}, "warmup must be whole steps"),
        ({"eval_every": 10}, "eval_every 10 needs eval_data or held_out"),
        ({"held_out": 10}, "eval_every is 0"),
        ({"held_out": 5, "eval_data": {}, "eval_every": 1}, "eval_data and held_out 5 are both given"),
        ({"keep_checkpoints": 1}, "keep_checkpoints: .*greater than or equal to 2"),
        ({"lr": float("nan")}, "lr"),
        ({"data": {"kind": "selfsup", "context_tokens": 20}}, "data.context_tokens"),
    ],
)
def test_mistakes_are_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        config(**changes)
    assert "\n" not in str(caught.value)


def test_the_known_objectives_are_the_registered_ones() -> None:
    from sparsekv.training import objectives

    assert set(OWN_OBJECTIVES) == set(objectives.OBJECTIVES.names())


def test_objectives_get_their_arguments() -> None:
    from sparsekv.training.objectives import (
        EITObjective,
        MixedObjective,
        ReconstructionObjective,
        make_objective,
    )

    made = config(objective={"name": "eit", "lambda_kl": 0.5, "temperature": 2.0}).objective
    assert make_objective(made.name, **made.arguments()) == EITObjective(lambda_kl=0.5, temperature=2.0)
    settings = {
        "name": "mixed",
        "lambda_kl": 0.25,
        "weights": {"eit": 1, "reconstruction": 0.5},
        "args": {"reconstruction": {"span": 16}},
    }
    made = config(objective=settings).objective
    mixed = make_objective(made.name, **made.arguments())
    assert isinstance(mixed, MixedObjective)
    assert list(mixed.objectives) == [
        (EITObjective(lambda_kl=0.25), 1.0),
        (ReconstructionObjective(span=16), 0.5),
    ]
    assert config(objective="standard_lm").objective.arguments() == {}


def test_lora_targets_that_match_nothing() -> None:
    made = config(lora={"targets": ["q_proj", "out_proj"]})
    layers = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj", "lm_head"]
    assert made.lora is not None
    with pytest.raises(ConfigError, match=r"'out_proj' matches no linear layer.*did you mean 'o_proj'"):
        made.lora.check_targets(layers)
    made.lora.check_targets([*layers, "model.layers.0.out_proj"])


def test_eit_config_as_in_the_docs() -> None:
    from sparsekv.policies.anchors import AnchorConfig

    made = EITConfig(
        model_name="smollm2",
        anchor=AnchorConfig(
            use_special=True,
            use_punctuation=True,
            use_sink=True,
            use_recent=True,
            sink_size=8,
            recent_size=128,
        ),
        lambda_kl=0.5,
        scheduler_mode="adaptive",
        num_train_samples=1000,
        batch_size=2,
        accumulation=3,
    ).to_train_config()
    assert made.model == "smollm2"
    assert made.steps == 167  # 1000 / 6, rounded up
    assert made.method is not None and made.method.name == "anchors"
    assert (made.method.args["sink_size"], made.method.args["recent_size"]) == (8, 128)
    assert made.method.args["fill"] == "random"
    assert (made.objective.name, made.objective.lambda_kl) == ("eit", 0.5)
    curriculum = made.make_curriculum()
    assert isinstance(curriculum, AdaptiveCurriculum)
    assert (curriculum.start_ratio, curriculum.max_ratio) == (0.1, 0.7)
    assert made.eval_every == 8 and made.held_out == 32
    # the args are those of the registered method
    from sparsekv.policies import make_policy

    assert make_policy("anchors", **made.method.args).config.recent_size == 128  # type: ignore[attr-defined]


def test_eit_config_schedules() -> None:
    linear = EITConfig(
        "smollm2", scheduler_mode="linear", num_train_samples=80, accumulation=1
    ).to_train_config()
    ratios = [linear.make_curriculum().ratio(step, linear.steps) for step in (0, 24, 48, 80)]
    assert ratios == pytest.approx([0.1, 0.4, 0.7, 0.7])
    assert linear.held_out == 0
    fixed = EITConfig("smollm2", scheduler_mode="fixed", min_keep_ratio=0.4).to_train_config()
    assert fixed.make_curriculum().ratio(0, 1) == 0.6
    with pytest.raises(ConfigError, match=r"unknown scheduler_mode 'adaptiv' .did you mean 'adaptive'"):
        EITConfig("smollm2", scheduler_mode="adaptiv").to_train_config()
    with pytest.raises(ConfigError, match=r"keep_ratio must be in \(0, 1\]"):
        EITConfig("smollm2", min_keep_ratio=0.0).to_train_config()
    with pytest.raises(ConfigError, match="num_train_samples must be a whole number >= 1, got 0"):
        EITConfig("smollm2", num_train_samples=0).to_train_config()


def test_the_configs_are_there() -> None:
    assert {path.stem for path in CONFIGS} >= {
        "adaptive_dropout_8b",
        "block_dropout_1b",
        "any_smollm2",
        "block_dropout_8b",
        "block_dropout_smollm2",
        "eit_llama31_8b",
        "eit_qwen3_8b",
        "eit_smollm2",
        "mixed_training_8b",
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_valid_and_says_its_command(path: Path) -> None:
    made = load_train_config(path)
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert header[0].endswith(f"train configs/train/{path.name}")
    assert made.output_dir == f"output/{path.stem}"
    text = "\n".join(header)
    assert "GB" in text and made.model.rpartition("/")[2].lower().startswith(("smollm2", "llama", "qwen3"))
    curriculum = made.make_curriculum()
    assert all(0 <= curriculum.ratio(step, made.steps) < 1 for step in range(made.steps + 1))
    if not curriculum.adaptive:
        assert max(curriculum.ratio(step, made.steps) for step in range(made.steps + 1)) >= 0.4


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_names_things_that_exist(path: Path) -> None:
    from sparsekv.policies import make_policy
    from sparsekv.policies.training_presses import PRESSES
    from sparsekv.training.objectives import make_objective

    made = load_train_config(path)
    if made.press is not None:
        assert PRESSES.get(made.press.name)(**made.press.args)
    if made.method is not None:
        assert make_policy(made.method.name, **made.method.args)
    assert make_objective(made.objective.name, **made.objective.arguments()).name == made.objective.name


SHAPES: dict[str, dict[str, int]] = {
    "smollm2": {"layers": 30, "hidden": 576, "inner": 1536, "heads": 9, "kv": 3, "head": 64, "vocab": 49152, "tied": 1},
    "meta-llama/Llama-3.2-1B-Instruct": {
        "layers": 16, "hidden": 2048, "inner": 8192, "heads": 32, "kv": 8, "head": 64, "vocab": 128256, "tied": 1,
    },
    "meta-llama/Llama-3.1-8B-Instruct": {
        "layers": 32, "hidden": 4096, "inner": 14336, "heads": 32, "kv": 8, "head": 128, "vocab": 128256, "tied": 0,
    },
    "Qwen/Qwen3-8B": {
        "layers": 36, "hidden": 4096, "inner": 12288, "heads": 32, "kv": 8, "head": 128, "vocab": 151936, "tied": 0,
    },
}  # fmt: skip


def counted(shape: dict[str, int], family: str, r: int, targets: list[str]) -> tuple[int, int]:
    """Parameters of a model of this shape and of its LoRA adapter, counted by transformers and PEFT without memory."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    made = AutoConfig.for_model(
        family,
        hidden_size=shape["hidden"],
        intermediate_size=shape["inner"],
        num_hidden_layers=2,
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv"],
        head_dim=shape["head"],
        vocab_size=shape["vocab"],
        tie_word_embeddings=bool(shape["tied"]),
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(made)
        layer = sum(p.numel() for p in model.model.layers[0].parameters())
        rest = sum(p.numel() for p in model.parameters()) - 2 * layer
        peft = get_peft_model(model, LoraConfig(r=r, target_modules=targets))
    lora = sum(p.numel() for name, p in peft.named_parameters() if "lora_" in name) // 2
    return rest + layer * shape["layers"], lora * shape["layers"]


def lora_of(made: TrainConfig) -> tuple[int, list[str]]:
    """Rank and targets of the adapter that a config trains: a fresh one, or the one that it goes on from."""
    if made.lora is not None:
        return made.lora.r, list(made.lora.targets)
    settings = json.loads((ROOT / str(made.adapter) / "adapter_config.json").read_text())
    return settings["r"], settings["target_modules"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_headers_arithmetic_starts_from_the_right_counts(path: Path) -> None:
    made = load_train_config(path)
    family = "qwen3" if "Qwen3" in made.model else "llama"
    rank, targets = lora_of(made)
    parameters, adapter = counted(SHAPES[made.model], family, rank, targets)
    text = path.read_text()
    assert f"{parameters:,} parameters" in text
    assert f"{adapter:,} of LoRA" in text
    assert f"{parameters * 2 / 1e9:.2f} GB" in text  # bf16
    assert f"{adapter * 16 / 1e9:.2f} GB" in text  # fp32 weights, gradients and two moments


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_headers_sums_are_right(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if re.fullmatch(r"#   .* \d+\.\d\d GB", line)]
    sizes = [float(line.split()[-2]) for line in lines]
    assert "together" in lines[-1] and len(sizes) > 4
    assert sizes[-1] == pytest.approx(sum(sizes[:-1]), abs=0.011)
    for line, size in zip(lines, sizes, strict=True):
        shape = re.search(r": ((?:\d+ x )+\d+)(?: bytes)?(, twice)? +\d", line)
        if "mask" in line or "soft attention" in line:
            assert shape is not None, line
            factors = math.prod(int(factor) for factor in shape.group(1).split(" x "))
            layers = re.search(r"(\d+) layers", line)
            total = factors * (2 if shape.group(2) else 1) * (int(layers.group(1)) if layers else 1)
            assert size == pytest.approx(total / 1e9, abs=0.006), line


def test_docs_name_every_key_and_config() -> None:
    text = (ROOT / "docs" / "training.md").read_text()
    for key in [*TrainConfig.model_fields, *RelevanceOptions.model_fields]:
        assert f"`{key}`" in text, key
    for path in CONFIGS:
        assert f"`{path.name}`" in text, path.name


def test_overrides_and_no_torch(tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(json.dumps(BASE))
    made = load_train_config(path, ["steps=7", "lora.r=8", "curriculum.args.end_ratio=0.25"])
    assert made.lora is not None
    assert (made.steps, made.lora.r, made.make_curriculum().ratio(7, 7)) == (7, 8, 0.25)
    with pytest.raises(ConfigError, match=rf"{path}: steps"):
        load_train_config(path, ["steps=none"])
    code = (
        f"from sparsekv.training.config import load_train_config; load_train_config({str(path)!r});"
        "import sys; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
