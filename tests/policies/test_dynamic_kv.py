"""DynamicKV against Algorithm 1 of arXiv 2412.14838, written out slowly; the exact total; what is known when."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvpress_reference import layer_contexts, token_ids
from torch import Tensor
from window_reference import eager_weights, pooled_by_hand

from sparsekv.cache.sparse import SparseCache
from sparsekv.errors import ConfigError
from sparsekv.generation import compress
from sparsekv.policies import make_policy
from sparsekv.policies.as_press import PolicyPress
from sparsekv.policies.augment import EvictionAug
from sparsekv.policies.budget import Budget
from sparsekv.policies.choosing import allocate, keep_across
from sparsekv.policies.dynamic_kv import DynamicKV
from sparsekv.probe import Request, prefill

T = 90


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gemma3"])
def test_scores_are_pooled_sums_of_the_windows_attention(tiny_model: Any, family: str) -> None:
    model, ids = tiny_model(family), token_ids(T, rows=2)
    policy = DynamicKV(window=5, kernel_size=3)
    weights = eager_weights(model, ids)
    for ctx in layer_contexts(model, ids)[::2]:
        scores = policy.score_layer(ctx, Budget(0.5))
        assert scores.shape == (2, 2, T)
        for row in range(2):
            for head in range(2):
                of_heads = weights[ctx.layer_idx][row, 2 * head : 2 * head + 2, -5:, : T - 5]
                wanted = pooled_by_hand(of_heads.sum(1).mean(0).tolist(), 3, "mean")
                assert scores[row, head, : T - 5].tolist() == pytest.approx(wanted, abs=2e-6)
        assert bool((scores[..., T - 5 :] > 1e37).all()) and bool((scores[..., T - 5 :].diff() > 0).all())


def algorithm_1(scores: Tensor, n_kept: int, window: int, r_max: float, period: int) -> list[list[set[int]]]:
    """Kept columns per layer and head, one entry at a time."""
    n_layers, heads, n = scores.shape
    window = min(window, n_kept)
    base = n_kept - window
    ranked = [
        [sorted(range(n - window), key=lambda t: (-float(layer[h][t]), t)) for h in range(heads)]
        for layer in scores
    ]
    held: list[int] = []
    for read in range(1, n_layers + 1):
        held.append(min(int(r_max * base), n - window))
        if read % period and read < n_layers:
            continue
        everything = [
            (float(scores[layer][h][t]), layer)
            for layer in range(read) for h in range(heads) for t in range(n - window)
        ]  # fmt: skip
        everything.sort(key=lambda pair: -pair[0])
        counts = [0] * read
        for _, layer in everything[: base * heads * read]:
            counts[layer] += 1
        held = allocate(counts, held, min(base * n_layers, sum(held)))
    return [
        [set(of_head[: held[layer]]) | set(range(n - window, n)) for of_head in ranked[layer]]
        for layer in range(n_layers)
    ]


sizes = {
    "n_layers": st.integers(1, 7),
    "n": st.integers(1, 40),
    "n_kept": st.integers(1, 40),
    "window": st.integers(1, 9),
    "r_max": st.sampled_from([1.0, 1.5, 3.0, 10.0]),
    "period": st.integers(1, 4),
    "seed": st.integers(0, 99),
}


@settings(max_examples=80, deadline=None)
@given(**sizes)
def test_choice_equals_algorithm_1_and_meets_the_total_exactly(
    n_layers: int, n: int, n_kept: int, window: int, r_max: float, period: int, seed: int
) -> None:
    n_kept = min(n_kept, n)
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(n_layers, 1, 1, generator=generator) * 3
    scores = torch.rand(n_layers, 2, n, generator=generator) ** 4 * scale
    policy = DynamicKV(window=window, r_max=r_max, period=period)
    kept = keep_across(policy.across_layers(n_layers, Budget(tokens=n_kept)), scores)
    found = [[set(head.nonzero().flatten().tolist()) for head in layer] for layer in kept]
    assert found == algorithm_1(scores, n_kept, window, r_max, period)
    assert kept.sum((0, 2)).tolist() == [n_layers * n_kept] * 2  # the total, in either head
    assert bool((kept.sum(-1) == kept.sum(-1)[:, :1]).all())  # heads of a layer alike
    assert bool(kept[..., n - min(window, n_kept) :].all())
    most = min(window, n_kept) + int(r_max * (n_kept - min(window, n_kept)))
    assert int(kept.sum(-1).max()) <= max(most, n_kept)


@settings(max_examples=40, deadline=None)
@given(**sizes)
def test_what_left_a_layer_never_comes_back(
    n_layers: int, n: int, n_kept: int, window: int, r_max: float, period: int, seed: int
) -> None:
    scores = torch.rand(n_layers, 2, n, generator=torch.Generator().manual_seed(seed))
    choice = DynamicKV(window=window, r_max=r_max, period=period).across_layers(
        n_layers, Budget(tokens=min(n_kept, n))
    )
    now: dict[int, Tensor] = {}
    for read, layer in enumerate(scores, start=1):
        decided = choice.after_layer(layer)
        update = read == n_layers or read % period == 0
        assert sorted(decided) == (list(range(read)) if update else [read - 1])
        for place, kept in decided.items():
            assert place not in now or bool((now[place] | ~kept).all())
        now |= decided
    assert sorted(now) == list(range(n_layers))


def test_a_layer_that_the_window_looks_at_keeps_more() -> None:
    """Budgets by hand: 3 layers, 1 head, 10 entries, window 2, 4 kept: 6 to give away beside the windows."""
    scores = torch.zeros(3, 1, 10)
    scores[0, 0, :4] = torch.tensor([0.9, 0.8, 0.7, 0.6])
    scores[1, 0, :1] = 0.5
    scores[2, 0, :1] = 0.4
    kept = keep_across(DynamicKV(window=2, period=9).across_layers(3, Budget(tokens=4)), scores)
    # best 2 * 3 of all layers: four of layer 0, one of layer 1, one of layer 2
    assert kept.sum(-1).flatten().tolist() == [6, 3, 3]
    assert kept[0, 0].nonzero().flatten().tolist() == [0, 1, 2, 3, 8, 9]


def test_compress_cuts_early_cuts_again_and_keeps_the_total(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    keep = SparseCache.keep_in_layer

    def watched(self: SparseCache, index: int, kept: Tensor, layer: Any = None) -> None:
        seen.append((index, int(kept.sum())))
        keep(self, index, kept, layer)

    monkeypatch.setattr(SparseCache, "keep_in_layer", watched)
    ids = token_ids(T)
    policy = DynamicKV(window=4, r_max=2, period=2)
    cache = compress(tiny_model("llama", num_hidden_layers=5), ids, policy, 20)
    base = 16
    # layers 0, 2 at once to twice the base; every layer again after the second, fourth and last
    assert [index for index, _ in seen] == [0, 0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3, 4]
    assert seen[0] == (0, 2 * (2 * base + 4)) and seen[3] == (2, 2 * (2 * base + 4))
    counts = cache.stored_counts()[:, 0]
    assert counts.sum(0).tolist() == [5 * 20] * 2 and len(set(counts[:, 0].tolist())) > 1
    assert cache.achieved_compression == [pytest.approx(1 - 20 / T)]


def test_a_layer_that_loses_nothing_yet_is_not_copied(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With r_max 10 and a quarter of the context to keep, no layer is over its maximum before the first update."""
    seen = []
    real = SparseCache.keep_in_layer

    def spy(cache: SparseCache, index: int, kept: Tensor, layer: Any = None) -> None:
        before = int(cache.layers[index].stored().sum())
        real(cache, index, kept, layer)
        seen.append((index, before - int(cache.layers[index].stored().sum())))

    monkeypatch.setattr(SparseCache, "keep_in_layer", spy)
    model = tiny_model("llama", num_hidden_layers=5)
    cache = compress(model, token_ids(T), DynamicKV(window=4, period=4), 0.75)
    assert [index for index, _ in seen][:4] == [0, 1, 2, 3] and all(lost for _, lost in seen[:4])
    assert cache.stored_counts().sum(0).tolist() == [[5 * 22] * 2]


def test_every_way_to_ask_gives_the_same_choice(tiny_model: Any) -> None:
    model, ids = tiny_model("llama", num_hidden_layers=5), token_ids(T)
    policy = DynamicKV(window=4, period=2)
    cache = compress(model, ids, policy, 0.7)
    read = prefill(model, ids, [Request("one", policy, Budget(0.7)), Request("whole", policy, Budget(0.0))])
    assert torch.equal(read.selections["one"].kept_at(T), cache.kept_columns())
    assert not read.selections["whole"].evicts()
    press = PolicyPress(policy, 0.7)
    plain = tiny_model("llama", num_hidden_layers=5)
    with torch.no_grad(), press(plain):
        plain.model(input_ids=ids)
    lost = {layer: 1 - float(cache.kept_columns()[0, layer].float().mean()) for layer in range(5)}
    assert press.achieved_compression == pytest.approx(lost)


@pytest.mark.parametrize(("budget", "n"), [(0.0, T), (10_000, T), (0.9, 1), (1, 3), (5, 6)])
def test_sizes_at_the_edges(tiny_model: Any, budget: float | int, n: int) -> None:
    cache = compress(tiny_model("llama"), token_ids(n), "dynamic_kv", budget)
    whole = budget in (0.0, 10_000) or n == 1
    expected = n if whole else int(budget)
    assert cache.stored_counts().sum(0).tolist() == [[3 * expected] * 2]
    assert cache.intact == whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"chunk": 30}, "method 'dynamic_kv' needs the whole context at once: no chunk"),
        ({"phase": "both"}, "method 'dynamic_kv' needs the whole context at once; use phase='prefill'"),
        ({"budget": Budget(0.5, scope="layer")}, "scope must be head or model, got layer"),
        ({"budget": None}, "dynamic_kv needs a budget"),
    ],
)
def test_refusals(tiny_model: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compress(tiny_model("llama"), token_ids(T), "dynamic_kv", **{"budget": 0.5, **arguments})


def test_bad_parameters_and_training() -> None:
    for parameters, message in (
        ({"r_max": 0.5}, "r_max must be a number >= 1, got 0.5"),
        ({"kernel_size": 4}, "kernel_size must be odd, got 4; use 5"),
        ({"window": 0}, "window must be a whole number >= 1, got 0"),
        ({"period": 0}, "period must be a whole number >= 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_policy("dynamic_kv", **parameters)
    assert make_policy("dynamic_kv", window_size=3) == DynamicKV(window=3)
    with pytest.raises(ConfigError, match="method dynamic_kv needs every layer's scores first"):
        EvictionAug(["dynamic_kv"])
