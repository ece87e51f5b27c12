"""Training presses: each really evicts in kvpress, carries policy and ratio, and takes the prototypes' names."""

from __future__ import annotations

from typing import Any

import kvpress
import pytest
import torch
from kvpress_reference import kvpress_kept, token_ids
from transformers import DynamicCache

import sparsekv
from sparsekv.errors import ConfigError
from sparsekv.policies import make_policy
from sparsekv.policies.adaptive_blocks import AdaptiveBlockDropout
from sparsekv.policies.as_press import PolicyPress
from sparsekv.policies.augment import EvictionAug
from sparsekv.policies.base import TokenContext
from sparsekv.policies.blocks import BlockDropout, VariableBlockDropout
from sparsekv.policies.budget import Budget
from sparsekv.policies.presses import from_press
from sparsekv.policies.sentences import SentenceDropout
from sparsekv.policies.soft import SoftThreshold
from sparsekv.policies.training_presses import (
    PRESSES,
    AdaptiveBlockDropoutPress,
    BlockDropoutPress,
    EvictionAugPress,
    SentenceDropoutPress,
    SoftThresholdPress,
    SparseRegPress,
    Sparsity,
    VariableBlockDropoutPress,
)
from toy import toy_tokenizer

N = 150
TOKENIZER = toy_tokenizer()


@pytest.fixture(scope="module")
def model() -> Any:
    import toy

    return toy.tiny_model("llama")


PRESS_ARGS: dict[str, dict[str, Any]] = {
    "block_dropout": {"block_size": 8},
    "adaptive_block_dropout": {"block_size": 8, "window": 16},
    "variable_block_dropout": {"min_block": 3, "max_block": 9},
    "sentence_dropout": {"tokenizer": TOKENIZER},
    "soft_threshold": {"temperature": 0.5},
    "eviction_aug": {"presses": ["knorm", "h2o", "sink_recent"]},
}


def test_the_registry_names_every_press() -> None:
    assert PRESSES.names() == [*PRESS_ARGS, "sparse_reg"]
    for name in PRESSES:
        cls = PRESSES.get(name)
        assert issubclass(cls, kvpress.BasePress) and getattr(sparsekv, cls.__name__) is cls


@pytest.mark.parametrize("name", PRESS_ARGS)
def test_each_press_evicts_in_kvpress(model: Any, name: str) -> None:
    press = PRESSES.get(name)(**PRESS_ARGS[name])
    assert press.compression_ratio == 0 and press.budget() == Budget(0.0)
    input_ids = token_ids(N)
    assert kvpress_kept(model, press, input_ids).all()
    seen = []
    for ratio in (0.3, 0.5, 0.8):
        press.compression_ratio = ratio
        cache = DynamicCache()
        with torch.no_grad(), press(model):
            model.model(input_ids=input_ids, past_key_values=cache)
        total = int(N * (1 - ratio))
        assert [layer.keys.shape[2] for layer in cache.layers] == [total] * 3
        assert press.achieved_compression == pytest.approx(dict.fromkeys(range(3), 1 - total / N))
        assert press.compression_ratio == ratio and press.budget() == Budget(ratio)
        kept = kvpress_kept(model, press, input_ids)
        assert (kept.sum(-1) == total).all()
        assert kept[..., :4].all() or name == "eviction_aug"
        seen.append(kept)
    assert not torch.equal(seen[0], seen[1])
    assert not model.model._forward_pre_hooks


@pytest.mark.parametrize("cls", [BlockDropoutPress, VariableBlockDropoutPress, SentenceDropoutPress])
def test_kvpress_keeps_what_the_policy_selects(model: Any, cls: Any) -> None:
    press = cls(compression_ratio=0.5, n_sink=2, recent=9, seed=3, share="head", tokenizer=TOKENIZER)
    ids = token_ids(N)
    context = TokenContext(ids, torch.ones_like(ids).bool(), 3, 2, tokenizer=TOKENIZER)
    chosen = press.policy.select(context, press.budget()).kept_at(N)[0]
    assert torch.equal(kvpress_kept(model, press, ids), chosen) and chosen.shape == (3, 2, N)
    assert len({tuple(head.tolist()) for head in chosen.view(6, N)}) > 1
    assert chosen[..., :2].all() and chosen[..., -9:].all()


def test_the_issue_s_own_line() -> None:
    press = sparsekv.BlockDropoutPress(block_size=64, drop_ratio=0.3, protect_start=4, protect_recent=64)
    assert press.policy == BlockDropout(64, 4, 64) and press.compression_ratio == 0.3
    assert BlockDropoutPress(64, 0.3, 4, recent=64).policy == press.policy
    assert BlockDropoutPress(keep_ratio=0.9).compression_ratio == 0.1  # 1 - 0.9 is 0.09999999999999998
    assert BlockDropoutPress().policy == BlockDropout() == make_policy("block_dropout")


def test_parameters_reach_the_policy() -> None:
    assert VariableBlockDropoutPress(3, 9, 0.2, n_sink=1, seed=5).policy == VariableBlockDropout(
        3, 9, 1, seed=5
    )
    assert SentenceDropoutPress(0.2, max_tokens=50, share="layer").policy == SentenceDropout(
        max_tokens=50, share="layer"
    )
    adaptive = AdaptiveBlockDropoutPress(32, 0.2, temperature=0.3, sink_weight=0.0, n_recent=7)
    assert adaptive.policy == AdaptiveBlockDropout(32, 0.3, 0.0, n_recent=7)
    soft = SoftThresholdPress(0.5, compression_ratio=0.4, on="relevance")
    assert soft.policy == SoftThreshold(0.5, None, "relevance") and soft.budget() == Budget(0.4)
    assert BlockDropoutPress(tokens=40).budget() == Budget(tokens=40)
    assert SoftThresholdPress(compression_ratio=0.5, scope="layer").budget() == Budget(0.5, scope="layer")


def test_soft_thresholds_are_annealed_and_served_hard(model: Any) -> None:
    press = SoftThresholdPress(1.0, threshold=0.2, n_sink=2, recent=4)
    assert press.budget() == Budget() and press.temperature == 1.0
    press.temperature = 0.25
    assert press.policy == SoftThreshold(0.25, 0.2, n_sink=2, n_recent=4)
    kept = kvpress_kept(model, press, token_ids(60))
    assert kept[..., :2].all() and kept[..., -4:].all() and 0.05 < float(kept.float().mean()) < 0.95
    assert 0 < press.compression_ratio < 1
    with pytest.raises(ConfigError, match="temperature must be a number over 0"):
        press.temperature = 0
    with pytest.raises(ConfigError, match=r"threshold=0.2 and compression_ratio=0.5 are both given"):
        SoftThresholdPress(1.0, 0.2, 0.5)


def test_a_threshold_takes_no_ratio_from_a_curriculum() -> None:
    press = SoftThresholdPress(threshold=0.2)
    with pytest.raises(ConfigError, match=r"threshold=0.2 and compression_ratio=0.3 are both given"):
        press.compression_ratio = 0.3
    press.compression_ratio = None
    assert press.own_sized and press.budget() == Budget()
    ratio = SoftThresholdPress(compression_ratio=0.2)
    ratio.compression_ratio = 0.3
    assert not ratio.own_sized and ratio.budget() == Budget(0.3)
    assert not BlockDropoutPress().own_sized


def test_a_model_wide_budget(model: Any) -> None:
    press = SoftThresholdPress(compression_ratio=0.5, scope="model", n_sink=1, recent=2)
    kept = kvpress_kept(model, press, token_ids(60))
    assert int(kept.sum()) == 6 * 30 and len(set(kept.sum((1, 2)).tolist())) > 1


# ---- augmentation ----


def test_draws_are_equally_likely_and_fixed_by_the_seed() -> None:
    aug = EvictionAug(("knorm", make_policy("sink_recent"), kvpress.TOVAPress()))
    assert [p.name for p in aug.policies] == ["knorm", "sink_recent", "TOVAPress"]
    drawn = [aug.draw(step).name for step in range(600)]
    assert drawn == [aug.draw(step).name for step in range(600)]
    assert all(abs(drawn.count(p.name) - 200) < 58 for p in aug.policies)  # 5 sigma
    assert drawn[:50] != [EvictionAug(aug.policies, seed=1).draw(step).name for step in range(50)]
    assert {p.name for p in EvictionAug().policies} == {"snapkv", "h2o", "knorm", "tova"}
    assert EvictionAug(("anchors",)).reads_text and not aug.reads_text


def test_every_context_gets_what_was_drawn_for_it(model: Any) -> None:
    press = EvictionAugPress([kvpress.KnormPress(), "sink_recent"], 0.5, seed=2)
    ids, names = token_ids(80), []
    for step in range(6):
        kept = kvpress_kept(model, press, ids)
        assert press.drawn is press.policy.draw(step)
        names.append(press.drawn.name)
        alone = PolicyPress(press.drawn, 0.5)
        assert torch.equal(kept, kvpress_kept(model, alone, ids))
    assert set(names) == {"KnormPress", "sink_recent"}
    with pytest.raises(ConfigError, match="use it alone, not inside another press"):
        kvpress_kept(model, kvpress.ComposedPress([press]), ids)


@pytest.mark.parametrize(
    ("policies", "message"),
    [
        ([], "policies must be a list of at least one method"),
        ("snapkv", "policies must be a list of at least one method, got 'snapkv'"),
        (["snapvk"], r"unknown method 'snapvk' \(did you mean 'snapkv'\?\)"),
        (["kvzip"], "method kvzip needs a prefill of its own"),
        (["think"], "method think needs a prefill of its own"),
        (["sliding_window"], "method sliding_window needs a prefill of its own"),
        ([kvpress.KnormPress(0.4)], r"KnormPress has a compression_ratio of its own \(0.4\)"),
        ([3], "from_press takes a kvpress press, got int"),
    ],
)
def test_methods_that_a_training_step_cannot_use(policies: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EvictionAugPress(policies)


# ---- sparsity ----


def test_sparse_reg_evicts_nothing_and_says_what_to_add(model: Any) -> None:
    press = SparseRegPress("l1", weight=0.2)
    assert press.sparsity == Sparsity("l1", 0.2) and press.policy == make_policy("full")
    press.compression_ratio = 0.7
    assert kvpress_kept(model, press, token_ids(40)).all()
    with pytest.raises(ConfigError, match=r"unknown sparsity kind 'L1' \(did you mean 'l1'\?\)"):
        SparseRegPress("L1")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="sparsity weight must be a number >= 0, got -1"):
        SparseRegPress(weight=-1)
    assert SparseRegPress(keep_ratio=0.7).compression_ratio == pytest.approx(0.3)
    with pytest.raises(ConfigError, match="unknown argument of SparseRegPress 'n_sink'"):
        SparseRegPress(n_sink=4)


# ---- mistakes ----


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: BlockDropoutPress(compression_ratio=0.5, drop_ratio=0.5),
            "BlockDropoutPress: compression_ratio and drop_ratio are both given, and mean the same; give one",
        ),
        (
            lambda: BlockDropoutPress(drop_ratio=0.5, keep_ratio=0.5),
            "drop_ratio and keep_ratio are both given",
        ),
        (lambda: BlockDropoutPress(n_sink=4, protect_start=4), "n_sink and protect_start are both given"),
        (
            lambda: SentenceDropoutPress(recent=4, protect_recent=4),
            "recent and protect_recent are both given",
        ),
        (lambda: EvictionAugPress(drop_ratio=0.2, compression_ratio=0.3), "are both given"),
        (lambda: BlockDropoutPress(drop_ratio=1.2), r"compression_ratio must be in \[0, 1\)"),
        (lambda: BlockDropoutPress(keep_ratio=0), r"keep_ratio must be in \(0, 1\], got 0"),
        (lambda: BlockDropoutPress(0), "block_size must be a whole number >= 1, got 0"),
        (lambda: BlockDropoutPress(temprature=2), "unknown argument of BlockDropoutPress 'temprature'"),
        (
            lambda: AdaptiveBlockDropoutPress(temprature=2),
            r"unknown argument of AdaptiveBlockDropoutPress 'temprature' \(did you mean 'temperature'\?\)",
        ),
        (lambda: EvictionAugPress(preses=[]), r"'preses' \(did you mean 'presses'\?\)"),
        (
            lambda: PRESSES.get("blok_dropout"),
            r"unknown press 'blok_dropout' \(did you mean 'block_dropout'\?\)",
        ),
        (lambda: BlockDropoutPress(tokens=3, compression_ratio=0.5), "are both given"),
    ],
)
def test_mistakes(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        make()
    assert "\n" not in str(raised.value)


def test_a_context_shorter_than_what_must_stay(model: Any) -> None:
    press = BlockDropoutPress(64, 0.5, recent=64)
    with pytest.raises(ConfigError, match=r"a budget of 50 entries .* is under n_sink=4 \+ n_recent=64"):
        kvpress_kept(model, press, token_ids(100))
    press.compression_ratio = 0.0
    assert kvpress_kept(model, press, token_ids(30)).all()
    assert int(kvpress_kept(model, BlockDropoutPress(8, 0.5), token_ids(30))[0, 0].sum()) == 15


def test_the_way_back() -> None:
    press = BlockDropoutPress(8, 0.5)
    assert from_press(press) is press.policy
