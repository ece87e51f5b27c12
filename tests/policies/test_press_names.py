"""kvpress methods by name and from instances: classification, the table, arguments, refusals, downloads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import kvpress
import numpy as np
import pytest
import torch
from kvpress import (
    AdaKVPress,
    DMSPress,
    ScorerPress,
    SnapKVPress,
)
from kvpress_reference import kvpress_kept, layer_contexts, token_ids
from test_presses import IN_LAYER, IN_MODEL, LENGTH, kept_by, set_ratio

from sparsekv.errors import ConfigError
from sparsekv.policies import make_policy, press_table
from sparsekv.policies.base import LayerPolicy, ModelPolicy, NativePolicy
from sparsekv.policies.budget import Budget
from sparsekv.policies.presses import KVPRESS_METHODS, from_press, make_press_policy


@pytest.fixture(scope="module")
def family() -> Any:
    import toy

    model = toy.tiny_model("llama")
    input_ids = token_ids(LENGTH)
    return model, input_ids, layer_contexts(model, input_ids)


# ---- classification ------------------------------------------------------------------------------


class FirstHalf(kvpress.BasePress):
    """A user's press that takes out rows by itself."""

    def compress(
        self, module: Any, hidden_states: Any, keys: Any, values: Any, attentions: Any, kwargs: Any
    ) -> Any:
        n = keys.shape[2] // 2
        return keys[:, :, :n], values[:, :, :n]

    compression_ratio = 0.5


class Scaled(FirstHalf):
    """A user's press that changes what it keeps, in place."""

    def compress(
        self, module: Any, hidden_states: Any, keys: Any, values: Any, attentions: Any, kwargs: Any
    ) -> Any:
        return keys.mul_(2.0), values


def test_a_users_press_is_recovered_by_its_rows(family: Any) -> None:
    ctx = family[2][0]
    kept = from_press(FirstHalf()).keep_layer(ctx, Budget())
    assert kept[..., :75].all() and not kept[..., 75:].any()


def test_a_press_that_changes_entries_is_refused(family: Any) -> None:
    ctx = family[2][0]
    keys = ctx.keys.clone()
    with pytest.raises(ConfigError, match=r"Scaled changes cache entries .* route='native'"):
        from_press(Scaled()).keep_layer(ctx, Budget())
    assert torch.equal(ctx.keys, keys)
    native = from_press(Scaled(), route="native")
    assert isinstance(native, NativePolicy) and isinstance(native.press(Budget()), Scaled)


def test_own_ratio_and_budget_exclude_each_other(family: Any) -> None:
    ctx = family[2][0]
    policy = from_press(SnapKVPress(compression_ratio=0.5))
    assert torch.equal(policy.keep_layer(ctx, Budget()), make_policy("snapkv").keep_layer(ctx, Budget(0.5)))
    with pytest.raises(ConfigError, match=r"compression_ratio=0.5 of the press and a budget are both given"):
        policy.keep_layer(ctx, Budget(0.3))
    with pytest.raises(ConfigError, match=r"snapkv needs a budget|neither compression_ratio nor tokens"):
        make_policy("snapkv").keep_layer(ctx, Budget())


def test_native_presses_come_out_with_their_budget() -> None:
    merging = make_policy("merging_knorm", merge_fraction=0.5)
    assert isinstance(merging, NativePolicy) and not merging.decoding
    press = merging.press(Budget(0.25))
    assert press.press.compression_ratio == 0.25 and press.merge_fraction == 0.5
    assert merging.press(Budget(0.75)) is not press and press.compression_ratio == 0.25
    think = make_policy("snap_think", key_channel_compression_ratio=0.4, window_size=8).press(Budget(0.5))
    assert [type(part).__name__ for part in think.presses] == ["SnapKVPress", "ThinKPress"]
    assert think.presses[0].compression_ratio == 0.5 and think.presses[1].key_channel_compression_ratio == 0.4
    decoding = make_policy("decoding_adakv_snapkv", compression_interval=16)
    assert decoding.decoding and decoding.press(Budget(tokens=64)).target_size == 64
    assert decoding.press(Budget()).compression_interval == 16
    both = make_policy("prefill_decoding(snapkv, decoding_knorm)", target_size=32).press(Budget(0.5))
    assert both.prefilling_press.compression_ratio == 0.5 and both.decoding_press.target_size == 32
    ratio = make_policy("compression_ratio_decoding(knorm)").press(Budget(0.7))
    assert ratio.target_compression_ratio == 0.7
    default = make_policy("compression_ratio_decoding(knorm)").press(Budget())
    assert default.target_compression_ratio == 0.5


@pytest.mark.parametrize(
    ("name", "budget", "message"),
    [
        ("think", Budget(), "needs its argument key_channel_compression_ratio"),
        ("snap_think", Budget(0.5), "needs its argument key_channel_compression_ratio"),
        ("decoding_knorm", Budget(0.5), "give budget tokens, not a ratio"),
        ("merging_knorm", Budget(tokens=5), "takes a compression ratio, not a number of tokens"),
        ("merging_knorm", Budget(), "needs a budget"),
        ("finch", Budget(0.5), "needs a delimiter token"),
    ],
)
def test_native_refusals(name: str, budget: Budget, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_policy(name).press(budget)


# ---- the table -----------------------------------------------------------------------------------

REGISTRY = [
    "adakv_snapkv",
    "block_keydiff",
    "chunkkv",
    "critical_adakv_expected_attention",
    "critical_adakv_snapkv",
    "critical_expected_attention",
    "critical_snapkv",
    "cur",
    "duo_attention",
    "duo_attention_on_the_fly",
    "expected_attention",
    "fastkvzip",
    "finch",
    "keydiff",
    "kvcompose",
    "kvcompose_unstructured",
    "kvzip",
    "kvzip_plus",
    "kvzap_linear",
    "kvzap_mlp",
    "kvzap_mlp_head",
    "kvzap_mlp_layer",
    "lagkv",
    "lukv",
    "knorm",
    "observed_attention",
    "pyramidkv",
    "qfilter",
    "random",
    "RestoreKV",
    "RestoreKV_plus",
    "snap_think",
    "snapkv",
    "streaming_llm",
    "think",
    "tova",
    "compactor",
    "adakv_compactor",
    "no_press",
    "cam_streaming_llm",
    "cam_knorm",
    "cam_adakv_snapkv",
    "cam_tova",
    "decoding_knorm",
    "decoding_streaming_llm",
    "decoding_tova",
    "decoding_qfilter",
    "decoding_adakv_expected_attention_e2",
    "decoding_adakv_snapkv",
    "decoding_keydiff",
    "merging_knorm",
    "merging_snapkv",
    "merging_expected_attention",
    "merging_kvzap_mlp",
]
"""The names in kvpress's evaluation/evaluate_registry.py."""


@pytest.mark.parametrize("name", REGISTRY)
def test_every_registry_name_makes_a_policy_of_the_route_in_the_table(name: str) -> None:
    policy = make_policy(name)
    if name in press_table.OURS:
        assert policy.name == press_table.OURS[name]
    else:
        assert policy.name == name
        assert policy.route == KVPRESS_METHODS[name].route


def test_the_table_has_every_exported_class() -> None:
    exported = {n for n in kvpress.__all__ if n.endswith("Press")} | {"CapPress"}
    assert {row.cls for row in press_table.CLASSES} == exported - {"BasePress", "ScorerPress"}
    for row in press_table.CLASSES:
        cls = getattr(kvpress, row.cls)
        assert row.scorer == issubclass(cls, ScorerPress), row.cls
        if not row.inner:
            assert make_policy(row.cls).route == row.route


def test_every_row_not_compared_with_kvpress_is_native_or_downloads() -> None:
    """So that no method of the first two routes that works offline goes untested."""
    compared = set(IN_LAYER) | set(IN_MODEL) | {"simlayerkv", "h2o"}
    for name, info in KVPRESS_METHODS.items():
        if name not in compared and info.route != "native":
            assert press_table.needs_hub(press_table.METHODS[name]), name


def test_the_table_needs_neither_torch_nor_kvpress() -> None:
    code = "import sys, sparsekv.policies.presses as p; assert 'snapkv' in p.KVPRESS_METHODS; "
    code += "print(sorted({'torch', 'kvpress', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        (
            "snapkv",
            {"window": 3},
            r"unknown argument of method snapkv 'window' \(did you mean 'window_size'\?\)",
        ),
        ("adakv(snapkv)", {"window_sise": 3}, r"did you mean 'window_size'.*alpha_safeguard"),
        ("snapkv", {"compression_ratio": 0.5}, "give it as the budget"),
        ("adakv(snapvk)", {}, r"unknown method inside adakv\(...\) 'snapvk' \(did you mean 'snapkv'\?\)"),
        ("adakw(snapkv)", {}, r"unknown wrapper 'adakw' \(did you mean 'adakv'\?\)"),
        ("snapkv(knorm)", {}, "unknown wrapper 'snapkv'"),
        ("adakv(snapkv", {}, "brackets do not match"),
        ("adakv(chunkkv)", {}, "AdaKVPress requires a ScorerPress"),
        ("adakv(snapkv)", {"alpha_safeguard": 2.0}, r"alpha_safeguard should be in \[0, 1\]"),
        ("composed(adakv(snapkv), think)", {}, "ComposedPress cannot contains AdaKVPress"),
        ("prefill_decoding(snapkv)", {}, r"takes 2 inner method\(s\), got 1"),
        ("snapkv", {"window_size": "a"}, "method snapkv: window_size must be a whole number >= 0, got 'a'"),
        ("adakv(snapkv)", {"window_size": -3}, "window_size must be a whole number >= 0, got -3"),
        ("cam_tova", {"target_size": 2.5}, "target_size must be a whole number >= 0, got 2.5"),
        ("adakv_snapkv", {"alpha_safeguard": "0.2"}, "alpha_safeguard must be a number, got '0.2'"),
        ("lagkv", {"cross_scoring": "no"}, "cross_scoring must be true or false, got 'no'"),
        ("kvcompose", {"agg_task": 3}, "agg_task must be a text, got 3"),
        ("compactor", {"blending": "x"}, "blending must be a number, got 'x'"),
        ("cur", {"leverage_type": "kv_mean"}, "unknown leverage_type of method cur 'kv_mean'"),
        ("snapkv", {"seed": 0.5}, "seed must be a whole number"),
    ],
)
def test_mistakes_are_one_line(name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make_policy(name, **args)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("finch", {"chunk_length": None}),  # kvpress's own default, annotated int
        ("snapkv", {"window_size": np.int64(32)}),
    ],
)
def test_arguments_that_kvpress_takes_are_taken(name: str, args: dict[str, Any]) -> None:
    make_policy(name, **args)


def test_wrapper_names_alone() -> None:
    with pytest.raises(ConfigError, match=r"adakv wraps another: write adakv\(snapkv\)"):
        make_press_policy("adakv")


def test_kvpress_refusals_are_config_errors(tiny_model: Any) -> None:
    ctx = layer_contexts(tiny_model("llama"), token_ids(40))[0]
    for name in ("snapkv", "adakv_snapkv", "chunkkv"):
        told = f"the context has 40 tokens, method {name} needs more than its window_size of 64; give another"
        with pytest.raises(ConfigError, match=told):
            make_policy(name).keep_layer(ctx, Budget(0.5))


@pytest.mark.parametrize(
    ("name", "args", "told"),
    [
        ("snapkv", {"kernel_size": 4, "window_size": 8}, "method snapkv with window_size=8, kernel_size=4: "),
        ("adakv(snapkv)", {"window_size": 8, "kernel_size": 0}, "with window_size=8, kernel_size=0: "),
        ("chunkkv(knorm)", {"chunk_length": 0}, r"method chunkkv\(knorm\) with chunk_length=0: "),
        ("streaming_llm", {"n_sink": 99}, "method streaming_llm needs more than 99"),
        ("lagkv", {"lag_size": 0}, "method lagkv with lag_size=0: "),
    ],
)
def test_arguments_that_a_press_fails_on_are_named(
    tiny_model: Any, name: str, args: dict[str, Any], told: str
) -> None:
    ctx = layer_contexts(tiny_model("llama"), token_ids(40))[0]
    with pytest.raises(ConfigError, match=told) as caught:
        make_policy(name, **args).keep_layer(ctx, Budget(0.5))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        KeyError("a bug"),
    ],
)
def test_errors_of_the_machine_are_not_blamed_on_a_press(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def score(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(kvpress.KnormPress, "score", score)
    ctx = layer_contexts(tiny_model("llama"), token_ids(40))[0]
    with pytest.raises(type(error)) as caught:
        make_policy("knorm").keep_layer(ctx, Budget(0.5))
    assert caught.value is error


# ---- downloads -----------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("requests.get", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("no network")))


@pytest.mark.parametrize(
    "name", [n for n, spec in press_table.METHODS.items() if press_table.needs_hub(spec)]
)
def test_downloading_presses_fail_offline_in_one_clear_line(
    name: str, offline: None, tiny_model: Any, toy_tokenizer: Any
) -> None:
    model, input_ids = tiny_model("llama"), token_ids(100)
    model.config.name_or_path = "someone/model"
    own_size = (
        {"threshold": -1.0} if name.startswith(("kvzap_linear", "kvzap_mlp")) and "_" not in name[6:] else {}
    )
    own_size |= {"threshold": -1.0} if name in ("kvzap_linear", "kvzap_mlp") else {}
    policy = make_policy(name, **own_size)
    budget = Budget() if own_size or name.startswith(("duo", "decoding")) else Budget(0.5)
    with pytest.raises(
        ConfigError, match=f"method {name} needs .* for 'someone/model', which could not"
    ) as caught:
        if isinstance(policy, LayerPolicy):
            policy.keep_layer(layer_contexts(model, input_ids)[0], budget)
        elif isinstance(policy, ModelPolicy):
            policy.keep_model(model, input_ids, budget, toy_tokenizer)
        else:
            assert isinstance(policy, NativePolicy)
            with policy.press(budget)(model):
                pass
    assert "\n" not in str(caught.value)


def test_what_would_be_downloaded_is_used_from_a_folder(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hub ids are also paths: with the files in place, qfilter and kvzap keep what kvpress keeps."""
    from kvpress.presses.kvzap_press import KVzapConfig, KVzapModel
    from kvpress.presses.qfilter_press import QFilters

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    QFilters(3, 2, 16).save_pretrained("nthngdy/toy-model_qfilt")
    KVzapModel(KVzapConfig(input_dim=64, output_dim=2, n_modules=3)).save_pretrained(
        "nvidia/KVzap-linear-toy-model"
    )
    model, input_ids = tiny_model("llama"), token_ids(LENGTH)
    model.config.name_or_path = "somewhere/toy-model"
    contexts = layer_contexts(model, input_ids)
    zap = kvpress.KVzapPress(model_type="linear")
    for name, args, press in (
        ("qfilter", {}, kvpress.QFilterPress()),
        ("kvzap_mlp_layer", {"model_type": "linear"}, AdaKVPress(zap)),
    ):
        theirs = kvpress_kept(model, set_ratio(press, 0.5), input_ids)
        assert torch.equal(kept_by(make_policy(name, **args), contexts, Budget(0.5)), theirs)
    theirs = kvpress_kept(model, DMSPress(kvpress.KVzapPress(model_type="linear"), threshold=0.0), input_ids)
    assert torch.equal(kept_by(make_policy("kvzap_linear", threshold=0.0), contexts, Budget()), theirs)
    assert not theirs.all()


def test_the_docs_table_is_the_static_table() -> None:
    text = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
    rows = [
        line.split(" | ") for line in text.splitlines() if line.startswith("| `") and line.count(" | ") == 6
    ]
    told = {cells[0].strip("| `"): (cells[1], cells[3], cells[4], cells[5]) for cells in rows}
    for name, info in KVPRESS_METHODS.items():
        assert told[name] == (info.route, info.idea.split(" (inner:")[0], info.cost, info.when), name
    assert len(told) == len(KVPRESS_METHODS)
