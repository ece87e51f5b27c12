"""Every kvpress method: its policy keeps what kvpress itself leaves in its cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import kvpress
import numpy as np
import pytest
import torch
from kvpress import (
    AdaKVPress,
    BlockPress,
    CapPress,
    ChunkKVPress,
    ChunkPress,
    CompactorPress,
    ComposedPress,
    CriticalAdaKVPress,
    CriticalKVPress,
    CURPress,
    DMSPress,
    EntropyGatedChunkKVPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    KVComposePress,
    KVgradPress,
    KVzipPress,
    LagKVPress,
    LeverageScorePress,
    LUKVPress,
    NonCausalAttnPress,
    PerLayerCompressionPress,
    PyramidKVPress,
    RandomPress,
    ScorerPress,
    SimLayerKVPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)
from kvpress_reference import kvpress_kept, layer_contexts, token_ids
from torch import Tensor

from sparsekv.errors import ConfigError
from sparsekv.policies import make_policy
from sparsekv.policies.base import LayerContext, LayerPolicy, ModelPolicy, keep_top
from sparsekv.policies.budget import Budget
from sparsekv.policies.press_copies import draws, nested
from sparsekv.policies.presses import from_press

RATIOS = (0.3, 0.5, 0.9)
LENGTH = 150


def expected() -> ExpectedAttentionPress:
    return ExpectedAttentionPress(use_vnorm=False)


# method -> (policy arguments, the press as kvpress's registry or documentation builds it)
IN_LAYER: dict[str, tuple[dict[str, Any], Callable[[], Any]]] = {
    "snapkv": ({}, SnapKVPress),
    "tova": ({}, TOVAPress),
    "streaming_llm": ({"n_sink": 3}, lambda: StreamingLLMPress(n_sink=3)),
    "knorm": ({}, KnormPress),
    "keydiff": ({}, KeyDiffPress),
    "expected_attention_plain": ({}, ExpectedAttentionPress),
    "lagkv": ({"lag_size": 16}, lambda: LagKVPress(lag_size=16)),
    "cur": ({}, CURPress),
    "cap": ({}, CapPress),
    "leverage": ({}, LeverageScorePress),
    "non_causal_attn": ({"chunk_size": 32}, lambda: NonCausalAttnPress(chunk_size=32)),
    "compactor": ({}, CompactorPress),
    "random_press": ({}, RandomPress),
    "pyramidkv": ({"window_size": 8, "beta": 3}, lambda: PyramidKVPress(window_size=8, beta=3)),
    "critical_snapkv": ({}, lambda: CriticalKVPress(SnapKVPress())),
    "critical_expected_attention": ({}, lambda: CriticalKVPress(expected())),
    "critical(expected_attention)": ({}, lambda: CriticalKVPress(expected())),
    "block_keydiff": ({"block_size": 32}, lambda: BlockPress(KeyDiffPress(), block_size=32)),
    "block(keydiff)": ({}, lambda: BlockPress(KeyDiffPress())),
    "chunk(snapkv)": (
        {"chunk_length": 80, "window_size": 8},
        lambda: ChunkPress(SnapKVPress(window_size=8), chunk_length=80),
    ),
    "chunkkv": ({}, lambda: ChunkKVPress(SnapKVPress(), chunk_length=20)),
    "chunkkv(tova)": ({"chunk_length": 7}, lambda: ChunkKVPress(TOVAPress(), chunk_length=7)),
    "entropy_gated_chunkkv(snapkv)": ({}, lambda: EntropyGatedChunkKVPress(SnapKVPress())),
    "composed(knorm, streaming_llm)": ({}, lambda: ComposedPress([KnormPress(), StreamingLLMPress()])),
    "adakv_snapkv": ({}, lambda: AdaKVPress(SnapKVPress())),
    "adakv_compactor": ({}, lambda: AdaKVPress(CompactorPress())),
    "adakv(knorm)": ({"alpha_safeguard": 0.0}, lambda: AdaKVPress(KnormPress(), alpha_safeguard=0.0)),
    "expected_attention": ({}, lambda: AdaKVPress(ExpectedAttentionPress(epsilon=1e-2))),
    "critical_adakv_snapkv": ({}, lambda: CriticalAdaKVPress(SnapKVPress())),
    "critical_adakv_expected_attention": ({}, lambda: CriticalAdaKVPress(expected())),
}

IN_MODEL: dict[str, tuple[dict[str, Any], Callable[[], Any]]] = {
    "kvzip": ({"chunk_size": 64}, lambda: KVzipPress(chunk_size=64)),
    "kvzip_plus": ({}, lambda: KVzipPress(kvzip_plus_normalization=True)),
    "kvgrad": ({"layerwise": True}, lambda: KVgradPress(layerwise=True)),
    "kvcompose": ({}, KVComposePress),
    "kvcompose_unstructured": ({}, lambda: KVComposePress(structured=False)),
}


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def family(request: pytest.FixtureRequest) -> Any:
    import toy

    model = toy.tiny_model(request.param)
    input_ids = token_ids(LENGTH)
    return model, input_ids, layer_contexts(model, input_ids)


def set_ratio(press: Any, ratio: float) -> Any:
    for part in getattr(press, "presses", [press]):
        part.compression_ratio = ratio
    return press


def seeded(press: Any) -> Any:
    """Seed torch before each layer's draw, as the policies do (kvpress draws from the running generator)."""
    for part in nested(press):
        if draws(part) and isinstance(part, ScorerPress) and not isinstance(part, CompactorPress):
            original = part.score

            def score(module: Any, *args: Any, original: Any = original, **kwargs: Any) -> Tensor:
                torch.manual_seed(module.layer_idx)
                return original(module, *args, **kwargs)

            part.score = score
    return press


def kept_by(policy: Any, contexts: list[LayerContext], budget: Budget) -> Tensor:
    return torch.stack([policy.keep_layer(ctx, budget)[0] for ctx in contexts])


@pytest.mark.parametrize("name", IN_LAYER)
def test_keeps_what_kvpress_keeps(family: Any, name: str) -> None:
    model, input_ids, contexts = family
    args, build = IN_LAYER[name]
    policy = make_policy(name, **args)
    assert isinstance(policy, LayerPolicy)
    for ratio in RATIOS:
        theirs = kvpress_kept(model, seeded(set_ratio(build(), ratio)), input_ids)
        ours = kept_by(policy, contexts, Budget(ratio))
        assert torch.equal(ours, theirs), f"{name} at {ratio}"
        assert not ours.all()
    assert policy.keep_layer(contexts[0], Budget(0.0)).all()


@pytest.mark.parametrize("name", IN_MODEL)
def test_model_running_presses_keep_what_kvpress_keeps(family: Any, name: str, toy_model_dir: Path) -> None:
    from transformers import AutoTokenizer

    model, input_ids, _ = family
    args, build = IN_MODEL[name]
    policy = make_policy(name, **args)
    assert isinstance(policy, ModelPolicy) and policy.route == "masked" and policy.own_prefill
    tokenizer = AutoTokenizer.from_pretrained(toy_model_dir)
    before = model.config.name_or_path
    model.config.name_or_path = str(toy_model_dir)  # for kvpress, which loads the tokenizer from there
    try:
        theirs = {ratio: kvpress_kept(model, set_ratio(build(), ratio), input_ids) for ratio in RATIOS}
    finally:
        model.config.name_or_path = before
    for ratio in RATIOS:
        ours = policy.keep_model(model, input_ids, Budget(ratio), tokenizer)
        assert torch.equal(ours[0], theirs[ratio]), f"{name} at {ratio}"
        assert all(layer.self_attn.masked_key_indices is None for layer in model.model.layers)
    assert model.config._attn_implementation == "sdpa"
    assert policy.keep_model(model, input_ids, Budget(0.0), tokenizer).all()


def test_kvzip_budget_in_tokens_and_its_tokenizer(family: Any, toy_tokenizer: Any) -> None:
    model, input_ids, _ = family
    kept = make_policy("kvzip").keep_model(model, input_ids, Budget(tokens=37), toy_tokenizer)
    n_heads = kept.shape[1] * kept.shape[2]
    assert int(kept.sum()) == 37 * n_heads
    composed = make_policy("kvcompose_unstructured").keep_model(model, input_ids, Budget(tokens=37), None)
    assert int(composed.sum()) == 37 * n_heads
    import kvpress.presses.kvzip_press as module
    from transformers import AutoTokenizer

    assert module.AutoTokenizer is AutoTokenizer
    with pytest.raises(ConfigError, match="kvzip needs the model's tokenizer"):
        make_policy("kvzip").keep_model(model, input_ids, Budget(0.5), None)


def test_model_running_presses_refuse_sliding_windows(tiny_model: Any, toy_tokenizer: Any) -> None:
    """Their budget would count the windowed layers, which keep their own entries."""
    for name in ("kvzip", "kvcompose"):
        with pytest.raises(ConfigError, match=f"method {name} spreads its budget over all layers"):
            make_policy(name).keep_model(tiny_model("gemma3"), token_ids(60), Budget(0.5), toy_tokenizer)


# ---- presses with sizes of their own -------------------------------------------------------------


def test_threshold_and_per_layer_and_lazy_layers(family: Any) -> None:
    model, input_ids, contexts = family
    median = -float(contexts[1].keys.norm(dim=-1).median())
    cases = {
        "dms(knorm)": (
            {"threshold": median, "sliding_window_size": 20},
            DMSPress(KnormPress(), threshold=median, sliding_window_size=20),
        ),
        "per_layer_compression(tova)": (
            {"compression_ratios": [0.2, 0.5, 0.9]},
            PerLayerCompressionPress(TOVAPress(), [0.2, 0.5, 0.9]),
        ),
        "simlayerkv": (
            {"lazy_threshold": 0.25, "n_recent": 40},
            SimLayerKVPress(lazy_threshold=0.25, n_recent=40),
        ),
    }
    for name, (args, press) in cases.items():
        theirs = kvpress_kept(model, press, input_ids)
        policy = make_policy(name, **args)
        assert torch.equal(kept_by(policy, contexts, Budget()), theirs), name
        assert not theirs.all(), name
        with pytest.raises(ConfigError, match="takes no compression ratio or budget; its argument"):
            policy.keep_layer(contexts[0], Budget(0.5))
    with pytest.raises(ConfigError, match="needs its argument threshold"):
        make_policy("dms(knorm)").keep_layer(contexts[0], Budget())


def test_lukv_with_a_given_curve(family: Any) -> None:
    model, input_ids, contexts = family
    curve = np.random.default_rng(0).uniform(0.1, 0.9, size=(99, 3, 2)).astype(np.float32)

    def build() -> LUKVPress:
        press = LUKVPress(ExpectedAttentionPress(epsilon=2e-2))
        press._budget_curves = curve
        return press

    policy = from_press(build())
    assert policy.route == "masked"
    theirs = kvpress_kept(model, set_ratio(build(), 0.5), input_ids)
    assert torch.equal(kept_by(policy, contexts, Budget(0.5)), theirs)


# ---- budgets, batches, copies --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["snapkv", "streaming_llm", "compactor", "adakv_snapkv", "chunk(knorm)"])
@pytest.mark.parametrize("tokens", [1, 49, 149, 500])
def test_budget_in_tokens_is_exact(family: Any, name: str, tokens: int) -> None:
    ctx = family[2][1]
    kept = make_policy(name).keep_layer(ctx, Budget(tokens=tokens))
    assert int(kept.sum()) == min(tokens, LENGTH) * kept.shape[1]


@pytest.mark.parametrize(
    "name", ["chunkkv", "compactor", "critical_adakv_snapkv", "entropy_gated_chunkkv(snapkv)"]
)
def test_a_row_keeps_in_a_batch_what_it_keeps_alone(family: Any, name: str) -> None:
    """kvpress itself decides for row 0, or mixes the rows."""
    model = family[0]
    batch = token_ids(LENGTH, rows=3)
    contexts = layer_contexts(model, batch)
    policy = make_policy(name)
    for layer, ctx in enumerate(contexts):
        together = policy.keep_layer(ctx, Budget(0.5))
        for row in range(3):
            alone = layer_contexts(model, batch[row : row + 1])[layer]
            assert torch.equal(policy.keep_layer(alone, Budget(0.5))[0], together[row])


def test_one_scoring_serves_all_ratios_where_the_policy_says_so(family: Any) -> None:
    ctx = family[2][0]
    free = [
        "snapkv",
        "tova",
        "knorm",
        "keydiff",
        "expected_attention_plain",
        "lagkv",
        "cur",
        "cap",
        "leverage",
    ]
    for name in free:
        policy = make_policy(name)
        assert policy.ratio_free
        assert torch.equal(policy.score_layer(ctx, Budget(0.1)), policy.score_layer(ctx, Budget(0.9)))
    for name in ("streaming_llm", "critical_snapkv", "compactor"):
        policy = make_policy(name)
        assert not policy.ratio_free
        assert not torch.equal(policy.score_layer(ctx, Budget(0.1)), policy.score_layer(ctx, Budget(0.9)))
    assert make_policy("compactor", blending=0.2).ratio_free


def test_scopes_layer_and_model(family: Any) -> None:
    contexts = family[2]
    scores = torch.stack([make_policy("knorm").score_layer(ctx, Budget(0.5)) for ctx in contexts], dim=1)
    kept = keep_top(scores, Budget(0.5, scope="model"))
    assert int(kept.sum()) == 75 * scores.shape[1] * scores.shape[2]
    per_layer = make_policy("knorm").keep_layer(contexts[0], Budget(0.5, scope="layer"))
    assert int(per_layer.sum()) == 150 and per_layer[0, 0].sum() != per_layer[0, 1].sum()
    with pytest.raises(ConfigError, match="decides layer by layer; budget scope 'model'"):
        make_policy("adakv_snapkv").keep_layer(contexts[0], Budget(0.5, scope="model"))


def test_a_policy_never_changes_its_press_nor_the_module(family: Any) -> None:
    ctx = family[2][0]
    module = ctx.module
    module._modules.pop("rotary_emb", None)
    for press in (
        AdaKVPress(ExpectedAttentionPress()),
        CompactorPress(),
        SimLayerKVPress(lazy_threshold=0.1, n_recent=9),
        ComposedPress([KnormPress(), CriticalKVPress(TOVAPress())]),
    ):
        before = repr(press), [dict(vars(part)) for part in nested(press)]
        budget = Budget() if isinstance(press, SimLayerKVPress) else Budget(0.5)
        keys = ctx.keys.clone()
        from_press(press).keep_layer(ctx, budget)
        assert (repr(press), [dict(vars(part)) for part in nested(press)]) == before
        assert torch.equal(ctx.keys, keys)
        assert "rotary_emb" not in module._modules and getattr(module, "masked_key_indices", None) is None


def test_drawing_presses_are_reproducible_and_leave_the_generator_alone(family: Any) -> None:
    ctx = family[2][0]
    state = torch.random.get_rng_state()
    first = make_policy("random_press", seed=3).keep_layer(ctx, Budget(0.5))
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(7)
    assert torch.equal(make_policy("random_press", seed=3).keep_layer(ctx, Budget(0.5)), first)
    assert not torch.equal(make_policy("random_press", seed=4).keep_layer(ctx, Budget(0.5)), first)


def test_key_rerotation_is_the_inner_policy_plus_a_flag(family: Any) -> None:
    ctx = family[2][0]
    policy = make_policy("key_rerotation(snapkv)", window_size=16)
    assert policy.rerotate and policy.route == "scores" and not make_policy("snapkv").rerotate
    plain = make_policy("snapkv", window_size=16).keep_layer(ctx, Budget(0.5))
    assert torch.equal(policy.keep_layer(ctx, Budget(0.5)), plain)


def test_h2o_works_inside_wrappers_without_eager(family: Any) -> None:
    ctx = family[2][0]
    scores = make_policy("h2o").score_layer(ctx, Budget())
    per_layer = make_policy("adakv(h2o)", alpha_safeguard=0.0).keep_layer(ctx, Budget(0.5))
    top = scores[0].flatten().topk(150).indices
    assert set(per_layer[0].flatten().nonzero().flatten().tolist()) == set(top.tolist())
    same = from_press(AdaKVPress(kvpress.ObservedAttentionPress(), alpha_safeguard=0.0))
    assert torch.equal(same.keep_layer(ctx, Budget(0.5)), per_layer)


def test_configs_without_head_dim(tiny_model: Any) -> None:
    """Real Qwen2 and Phi-3 configs have no head_dim, which kvpress's CriticalKV reads."""
    model = tiny_model("qwen2")
    ctx = layer_contexts(model, token_ids(LENGTH))[0]
    wanted = make_policy("critical_snapkv").keep_layer(ctx, Budget(0.5))
    del model.config.head_dim
    assert torch.equal(make_policy("critical_snapkv").keep_layer(ctx, Budget(0.5)), wanted)
    assert not hasattr(model.config, "head_dim")


def test_gemma_layers_get_the_rotary_embedding_of_their_type(tiny_model: Any) -> None:
    """kvpress's expected attention fails on Gemma-3, whose rotary embedding asks for the layer's type."""
    rope = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    model = tiny_model("gemma3", rope_parameters=rope)
    ctx = layer_contexts(model, token_ids(LENGTH))[0]
    kept = make_policy("expected_attention_plain").keep_layer(ctx, Budget(0.5))
    frequencies = model.model.rotary_emb

    class AsOne(torch.nn.Module):
        def forward(self, x: Tensor, position_ids: Tensor) -> Any:
            return frequencies(x, position_ids, "full_attention")

    ctx.module.rotary_emb = AsOne()
    scores = ExpectedAttentionPress().score(
        ctx.module, ctx.hidden_states, ctx.keys, ctx.values, None, ctx.hook_kwargs()
    )
    wanted = torch.zeros_like(kept).scatter_(-1, scores.topk(75).indices, True)
    assert torch.equal(kept, wanted)
