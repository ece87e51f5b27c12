"""Our policies inside kvpress: its own pipeline, its wrappers, its hooks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import kvpress
import pytest
import torch
from kvpress import (
    AdaKVPress,
    ComposedPress,
    KnormPress,
    ObservedAttentionPress,
    SnapKVPress,
    StreamingLLMPress,
    ThinKPress,
)
from kvpress_reference import kvpress_kept, token_ids
from torch import Tensor
from transformers import DynamicCache, pipeline

import sparsekv
from sparsekv.errors import ConfigError
from sparsekv.policies import make_policy
from sparsekv.policies.as_press import (
    AnchorPress,
    FullPress,
    H2OPress,
    LadderPress,
    PolicyPress,
    RandomPositionsPress,
    SinkRecentPress,
    SlidingWindowPress,
    UniformMiddlePress,
)
from sparsekv.policies.base import TokenContext, TokenPolicy, TokenRow
from sparsekv.policies.budget import Budget
from sparsekv.policies.presses import from_press

CONTEXT = "The cat sat. It slept, and then: it woke! «Où?» asked nobody; 7 mice (all grey) ran off... End."
QUESTION = "Where did the cat sleep?"


@pytest.fixture(scope="module")
def model() -> Any:
    import toy

    return toy.tiny_model("llama")


@pytest.fixture
def pipe(model: Any, toy_tokenizer: Any) -> Any:
    return pipeline("kv-press-text-generation", model=model, tokenizer=toy_tokenizer)


def context_and_question(tokenizer: Any) -> tuple[Tensor, Tensor]:
    """The ids that kvpress's pipeline makes of CONTEXT and QUESTION."""
    mark = "#" * (len(CONTEXT) + 10)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": CONTEXT + mark}], add_generation_prompt=True, tokenize=False
    )
    before, after = text.split(mark)
    encode = tokenizer.encode
    return (
        encode(before, return_tensors="pt", add_special_tokens=False),
        encode(QUESTION + after, return_tensors="pt", add_special_tokens=False),
    )


def masked_answer(model: Any, tokenizer: Any, kept: Tensor, n_new: int) -> str:
    """Greedy answer of the uncompressed model that may look only at `kept` [L, H, T] of the context."""
    context, question = context_and_question(tokenizer)
    n_context = context.shape[1]
    ids, handles = torch.cat([context, question], dim=1), []
    for layer, module in enumerate(layer.self_attn for layer in model.model.layers):

        def hide(module: Any, args: Any, kwargs: Any, layer: int = layer) -> Any:
            total = kwargs["hidden_states"].shape[1]
            mask = torch.ones(total, total, dtype=torch.bool).tril().repeat(kept.shape[1], 1, 1)
            mask[:, n_context:, :n_context] = kept[layer][:, None, :]
            per_query_head = mask.repeat_interleave(module.num_key_value_groups, dim=0)
            return args, kwargs | {"attention_mask": per_query_head[None]}

        handles.append(module.register_forward_pre_hook(hide, with_kwargs=True))
    try:
        with torch.no_grad():
            for _ in range(n_new):
                logits = model(input_ids=ids, use_cache=False).logits[0, -1]
                ids = torch.cat([ids, logits.argmax().view(1, 1)], dim=1)
    finally:
        for handle in handles:
            handle.remove()
    return str(tokenizer.decode(ids[0, n_context + question.shape[1] :], skip_special_tokens=True))


def selected(name: str, tokenizer: Any, budget: Budget, input_ids: Tensor, **args: Any) -> Tensor:
    """BoolTensor [L or 1, H or 1, T] straight from the policy, for a model of 3 layers and 2 kv heads."""
    ones = torch.ones_like(input_ids, dtype=torch.bool)
    context = TokenContext(input_ids, ones, 3, 2, tokenizer=tokenizer, seeds=(0,))
    return make_policy(name, **args).select(context, budget).kept_at(input_ids.shape[1])[0]


NAMED = [
    (SinkRecentPress, "sink_recent", {"n_sink": 3}, 0.5),
    (UniformMiddlePress, "uniform_middle", {"n_sink": 2, "block_size": 8}, 0.6),
    (LadderPress, "ladder", {"n_sink": 2}, 0.5),
    (RandomPositionsPress, "random", {"n_sink": 1}, 0.7),
    (SlidingWindowPress, "sliding_window", {}, 0.5),
    (FullPress, "full", {}, None),
    (AnchorPress, "anchors", {"sink_size": 2, "recent_size": 8}, 0.4),
    (AnchorPress, "anchors", {"sink_size": 2, "recent_size": 8}, None),
]


@pytest.mark.parametrize(("cls", "name", "args", "ratio"), NAMED)
def test_named_presses_in_kvpress_pipeline(
    model: Any, pipe: Any, toy_tokenizer: Any, cls: Any, name: str, args: dict[str, Any], ratio: float | None
) -> None:
    tokenizer = toy_tokenizer if cls is AnchorPress else None
    press = cls(ratio, tokenizer=tokenizer, **args)
    assert isinstance(press, kvpress.BasePress)
    cache = DynamicCache()
    answer = pipe(CONTEXT, question=QUESTION, press=press, cache=cache, max_new_tokens=6)["answer"]
    context, _ = context_and_question(toy_tokenizer)
    kept = selected(name, toy_tokenizer, Budget(ratio), context, **args)
    kept = kept.expand(3, 2, -1)
    counts = [int(layer[0].sum()) for layer in kept]
    assert [layer.get_seq_length() for layer in cache.layers] == counts
    if ratio is not None:
        assert counts == [max(1, int(context.shape[1] * (1 - ratio)))] * 3
    assert press.compression_ratio == pytest.approx(
        1 - counts[0] / context.shape[1] if ratio is None else ratio
    )
    assert answer == masked_answer(model, toy_tokenizer, kept, 6)
    plain = pipe(CONTEXT, question=QUESTION, max_new_tokens=6)["answer"]
    assert (answer == plain) == (name == "full")  # so that the comparison above could fail


def test_sink_recent_is_streaming_llm(model: Any, pipe: Any) -> None:
    input_ids = token_ids(90)
    for ratio in (0.3, 0.5, 0.9):
        ours = kvpress_kept(model, SinkRecentPress(ratio, n_sink=4), input_ids)
        theirs = kvpress_kept(model, StreamingLLMPress(ratio, n_sink=4), input_ids)
        assert torch.equal(ours, theirs)
    answers = [
        pipe(CONTEXT, questions=[QUESTION, "Who ran?"], press=press, max_new_tokens=8)["answers"]
        for press in (SinkRecentPress(0.6, n_sink=4), StreamingLLMPress(0.6, n_sink=4))
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("name", ["snapkv", "tova", "knorm", "keydiff"])
def test_policy_press_of_a_kvpress_method_is_that_method(model: Any, pipe: Any, name: str) -> None:
    press = PolicyPress(make_policy(name, **({"window_size": 16} if name == "snapkv" else {})), 0.5)
    theirs = {"snapkv": SnapKVPress(0.5, window_size=16), "tova": kvpress.TOVAPress(0.5)}
    other = theirs.get(name) or {"knorm": KnormPress, "keydiff": kvpress.KeyDiffPress}[name](0.5)
    input_ids = token_ids(90)
    assert torch.equal(kvpress_kept(model, press, input_ids), kvpress_kept(model, other, input_ids))
    ours, plain = (
        pipe(CONTEXT, question=QUESTION, press=p, max_new_tokens=6)["answer"] for p in (press, other)
    )
    assert ours == plain


@pytest.mark.parametrize("name", ["adakv(knorm)", "kvzip", "pyramidkv"])
def test_different_counts_per_head_or_layer_are_hidden(
    tiny_model: Any, toy_tokenizer: Any, name: str
) -> None:
    """Lengths stay, entries are masked, and a question of several tokens never sees its own future.

    kvpress hides a key by one that all queries of a question reject: it exists if they are fewer than the
    head size.
    """
    model = tiny_model("llama", head_dim=128)
    pipe = pipeline("kv-press-text-generation", model=model, tokenizer=toy_tokenizer)
    args = {"window_size": 8, "beta": 2} if name == "pyramidkv" else {}
    press = PolicyPress(make_policy(name, **args), 0.6, tokenizer=toy_tokenizer)
    context, _ = context_and_question(toy_tokenizer)
    kept = kvpress_kept(model, press, context)
    counts = kept.sum(-1)
    assert len(set(counts.flatten().tolist())) > 1
    cache = DynamicCache()
    answer = pipe(CONTEXT, question=QUESTION, press=press, cache=cache, max_new_tokens=6)["answer"]
    assert [layer.get_seq_length() for layer in cache.layers] == [context.shape[1]] * 3
    assert answer == masked_answer(model, toy_tokenizer, kept, 6)
    assert answer != pipe(CONTEXT, question=QUESTION, max_new_tokens=6)["answer"]
    assert press.achieved_compression[1] == pytest.approx(1 - float(kept[1].float().mean()))


def test_budgets_over_the_whole_model(model: Any) -> None:
    input_ids = token_ids(80)
    kept = kvpress_kept(model, PolicyPress(make_policy("knorm"), 0.5, scope="model"), input_ids)
    assert int(kept.sum()) == 40 * 6 and len(set(kept.sum((1, 2)).tolist())) > 1
    per_layer = kvpress_kept(model, PolicyPress(make_policy("knorm"), 0.5, scope="layer"), input_ids)
    assert per_layer.sum((1, 2)).tolist() == [80, 80, 80] and per_layer[0, 0].sum() != per_layer[0, 1].sum()


def lengths(model: Any, press: Any, input_ids: Tensor) -> list[int]:
    cache = DynamicCache()
    with torch.no_grad(), press(model):
        model.model(input_ids=input_ids, past_key_values=cache)
    return [layer.get_seq_length() for layer in cache.layers]


@dataclass(frozen=True)
class Stairs(TokenPolicy):
    """Layer l keeps the first 10 * (l + 1) entries."""

    name = "stairs"

    def keep_row(self, row: TokenRow, budget: Budget) -> Tensor:
        steps = 10 * torch.arange(1, row.context.n_layers + 1)[:, None, None]
        return torch.arange(row.n) < steps


def test_layers_of_different_lengths_are_hidden_not_cut(model: Any) -> None:
    """kvpress makes one mask, of the first layer's length: a shorter one would show a question its future."""
    press = PolicyPress(Stairs())
    assert lengths(model, press, token_ids(60)) == [60, 60, 60]
    assert kvpress_kept(model, press, token_ids(60)).sum(-1).tolist() == [[10, 10], [20, 20], [30, 30]]
    assert press.achieved_compression == pytest.approx({0: 5 / 6, 1: 4 / 6, 2: 3 / 6})


def test_sliding_window_layers_are_left_alone() -> None:
    import toy

    gemma = toy.tiny_model("gemma3")
    assert lengths(gemma, SinkRecentPress(0.5, n_sink=4), token_ids(60)) == [60, 60, 60]
    kept = kvpress_kept(gemma, SinkRecentPress(0.5, n_sink=4), token_ids(60))
    assert kept[1].all()
    for layer in (0, 2):
        assert kept[layer, 0].nonzero().flatten().tolist() == [*range(4), *range(34, 60)]


def test_h2o_press_is_observed_attention_without_eager(tiny_model: Any) -> None:
    input_ids = token_ids(90)
    eager = tiny_model("llama")
    eager.set_attn_implementation("eager")
    sdpa = tiny_model("llama")
    for ratio in (0.3, 0.5, 0.9):
        theirs = kvpress_kept(eager, ObservedAttentionPress(ratio), input_ids)
        assert torch.equal(kvpress_kept(sdpa, H2OPress(ratio, block_size=32), input_ids), theirs)
    inside = AdaKVPress(H2OPress(0.5))
    assert int(kvpress_kept(sdpa, inside, input_ids)[0].sum()) == 2 * 45


def test_inside_kvpress_wrappers(model: Any, toy_tokenizer: Any) -> None:
    input_ids = token_ids(90)
    composed = ComposedPress([SinkRecentPress(0.5, n_sink=4), KnormPress(0.5)])
    kept = kvpress_kept(model, composed, input_ids)
    assert kept.sum(-1).unique().tolist() == [22]
    assert not kept[..., 4:49].any()
    assert composed.compression_ratio == 0.75
    with_ids = ComposedPress([AnchorPress(0.5, tokenizer=toy_tokenizer), ThinKPress()])
    with (
        pytest.raises(ConfigError, match=r"reads the token ids: use it alone"),
        with_ids(model),
        torch.no_grad(),
    ):
        model.model(input_ids=input_ids, past_key_values=DynamicCache())


def test_ratio_is_settable_and_hooks_are_taken_back(model: Any) -> None:
    press = SinkRecentPress(n_sink=4)
    press.compression_ratio = 0.9
    input_ids = token_ids(90)
    assert kvpress_kept(model, press, input_ids).sum(-1).unique().tolist() == [
        9 - 1
    ]  # int(90 * (1 - 0.9)) is 8
    press.compression_ratio = 0.5
    assert kvpress_kept(model, press, input_ids).sum(-1).unique().tolist() == [45]
    assert not model.model._forward_pre_hooks
    assert all(not layer.self_attn._forward_hooks for layer in model.model.layers)
    assert press._ids is None and press._cache is None


def test_own_sizes_and_tokens(model: Any) -> None:
    input_ids = token_ids(90)
    own = SinkRecentPress(n_sink=2, n_recent=10)
    assert kvpress_kept(model, own, input_ids).sum(-1).unique().tolist() == [12]
    assert own.compression_ratio == pytest.approx(1 - 12 / 90)
    assert kvpress_kept(model, SinkRecentPress(tokens=33), input_ids).sum(-1).unique().tolist() == [33]


def test_anchor_press_loads_the_tokenizer_of_the_model(toy_model_dir: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(toy_model_dir)
    tokenizer = AutoTokenizer.from_pretrained(toy_model_dir)
    ids = tokenizer.encode(CONTEXT, return_tensors="pt", add_special_tokens=False)
    args = {"sink_size": 1, "recent_size": 2}
    kept = kvpress_kept(model, AnchorPress(**args), ids)
    assert torch.equal(kept[0, 0], selected("anchors", tokenizer, Budget(), ids, **args)[0, 0])
    letters = [tokenizer.decode([i]) for i in ids[0][kept[0, 0]]]
    assert letters.count(".") == 5 and ":" in letters and "!" in letters  # the final full stop is also recent


def test_refusals(model: Any) -> None:
    with pytest.raises(ConfigError, match=r"compression_ratio must be in \[0, 1\)"):
        SinkRecentPress(1.5)
    with pytest.raises(
        ConfigError, match=r"unknown argument of sink_recent 'n_sinks' \(did you mean 'n_sink'\?\)"
    ):
        SinkRecentPress(0.5, n_sinks=3)
    with pytest.raises(ConfigError, match=r"merging_knorm is a kvpress press already"):
        PolicyPress(make_policy("merging_knorm"), 0.5)
    with pytest.raises(ConfigError, match=r"re-rotates keys"):
        PolicyPress(make_policy("key_rerotation(knorm)"), 0.5)
    both = SinkRecentPress(0.5, n_recent=9)
    with pytest.raises(ConfigError, match="are both given"):
        kvpress_kept(model, both, token_ids(40))
    anchor = AnchorPress(0.5)
    with pytest.raises(ConfigError, match="anchors needs a tokenizer: give tokenizer="), anchor(model):
        pass


def test_exports_and_the_way_back() -> None:
    assert sparsekv.SinkRecentPress is SinkRecentPress and sparsekv.PolicyPress is PolicyPress
    policy = make_policy("sink_recent", n_sink=7)
    assert from_press(PolicyPress(policy, 0.5)) is policy
    assert SinkRecentPress(0.5) != SinkRecentPress(0.5)  # identity, like any object with state
    assert "compression_ratio=0.5" in repr(SinkRecentPress(0.5))
