"""One prefill for many requests must choose what a prefill per request chooses."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from sample_policies import Ends, Ragged, Scatter, SmallKeys
from sparsekv.attention import prepare
from sparsekv.errors import ConfigError
from sparsekv.generation import compress
from sparsekv.policies import make_policy
from sparsekv.policies.base import LayerContext, LayerPolicy
from sparsekv.policies.budget import Budget
from sparsekv.probe import Request, after_each_layer, prefill
from toy import GEMMA_WINDOW, tiny_model, toy_tokenizer

T = 96
NAMES = (
    "sink_recent",
    "random",
    "ladder",
    "anchors",
    "knorm",
    "tova",
    "snapkv",
    "expected_attention",
    "h2o",
    "pyramidkv",
)


def some_ids(total: int = T) -> torch.Tensor:
    return torch.randint(3, 250, (1, total), generator=torch.Generator().manual_seed(3))


@dataclass
class Counting(LayerPolicy):
    """Scores by key norm, and remembers the ratio and layer of every call."""

    name: str = "counting"
    ratio_free: bool = True
    calls: list[tuple[int, float | None]] = field(default_factory=list)

    def score_layer(self, ctx: LayerContext, budget: Budget) -> torch.Tensor:
        self.calls.append((ctx.layer_idx, budget.compression_ratio))
        return -ctx.keys.norm(dim=-1)


def test_every_request_gets_what_compress_would_keep():
    model, tokenizer, ids = prepare(tiny_model("llama")), toy_tokenizer(), some_ids()
    policies = {name: make_policy(name) for name in NAMES} | {
        p.name: p for p in (Ends(), Scatter(), Ragged())
    }
    budgets = [Budget(0.3), Budget(0.9), Budget(tokens=20), Budget(0.0)]
    requests = [Request((n, b), p, b) for n, p in policies.items() for b in budgets]
    for scope in ("layer", "model"):
        for name in ("knorm", "tova", "snapkv"):
            budget = Budget(0.6, scope=scope)
            requests.append(Request((name, budget), policies[name], budget))
    read = prefill(model, ids, requests, tokenizer=tokenizer, seed=5)
    assert set(read.selections) == set(read.select_s) == {r.key for r in requests}
    for request in requests:
        cache = compress(model, ids, request.policy, request.budget, tokenizer=tokenizer, seeds=(5,))
        kept = read.selections[request.key].evicted_at > T
        assert torch.equal(kept.expand(1, 3, 2, -1), cache.kept_columns()), request.key
        fork = read.cache.fork([read.selections[request.key]])
        assert torch.equal(fork.stored_counts(), cache.stored_counts())
        for index in range(3):
            ours = torch.cat([g.keys.flatten(0, 1) for g in fork.layers[index].groups()])
            theirs = torch.cat([g.keys.flatten(0, 1) for g in cache.layers[index].groups()])
            assert torch.equal(ours, theirs)
    assert read.cache.intact and read.cache.seen == T, "the shared cache stays whole"


def test_layers_with_a_window_are_left_alone():
    model, ids = prepare(tiny_model("gemma3")), some_ids()
    requests = [Request(s, SmallKeys(), Budget(0.5, scope=s)) for s in ("head", "layer", "model")]
    read = prefill(model, ids, requests)
    for request in requests:
        kept = read.selections[request.key].evicted_at > T
        assert bool(kept[:, 1].all())
        assert int(kept[:, [0, 2]].sum()) == 2 * 2 * T // 2
        fork = read.cache.fork([read.selections[request.key]] * 2)
        assert fork.layers[1].keys.shape == (2, 2, GEMMA_WINDOW - 1, 16)
        assert fork.achieved_compression == [0.5, 0.5]


def test_one_scoring_serves_all_ratios_only_if_it_does_not_depend_on_them():
    model, ids = prepare(tiny_model("llama")), some_ids()
    shared, own = Counting(), Counting(ratio_free=False)
    ratios = (0.2, 0.5, 0.8)
    requests = [Request((p.ratio_free, r), p, Budget(r)) for p in (shared, own) for r in ratios]
    read = prefill(model, ids, [*requests, Request("whole", shared, Budget(0.0))])
    assert shared.calls == [(layer, 0.2) for layer in range(3)]
    assert own.calls == [(layer, r) for layer in range(3) for r in ratios]
    for ratio in ratios:
        kept = [read.selections[(free, ratio)].evicted_at > T for free in (True, False)]
        assert torch.equal(*kept)
        assert kept[0].sum(dim=-1).unique().tolist() == [Budget(ratio).n_kept(T)]


def test_seconds_are_counted_per_request_and_not_in_the_prefill(monkeypatch):
    """A clock that scoring alone moves: 10 s per call. A shared scoring is counted for each that uses it."""
    now = [0.0]
    monkeypatch.setattr("sparsekv.probe.time.perf_counter", lambda: now[0])

    class Slow(Counting):
        def score_layer(self, ctx: LayerContext, budget: Budget) -> torch.Tensor:
            now[0] += 10
            return super().score_layer(ctx, budget)

    model, ids = prepare(tiny_model("llama")), some_ids()
    slow = Slow()
    requests = [Request(r, slow, Budget(r)) for r in (0.2, 0.5)]
    requests += [Request("ends", Ends(), Budget(0.5)), Request("whole", slow, Budget(0.0))]
    read = prefill(model, ids, requests)
    assert read.select_s == {0.2: 30.0, 0.5: 30.0, "ends": 0.0, "whole": 0.0}
    assert read.prefill_s == 0.0


def test_selections_of_all_kinds_lie_together():
    model, ids = prepare(tiny_model("llama")), some_ids()
    requests = [Request("a", Ends(), Budget(0.5)), Request("b", SmallKeys(), Budget(0.5))]
    read = prefill(model, ids, requests)
    assert {s.evicted_at.device.type for s in read.selections.values()} == {"cpu"}
    joint = read.cache.fork([read.selections["a"], read.selections["b"]])
    for row, name in enumerate("ab"):
        kept = (read.selections[name].evicted_at > T).expand(1, 3, 2, -1)
        assert torch.equal(joint.kept_columns()[row : row + 1], kept)


def test_a_policy_that_runs_the_model_chooses_beside_the_prefill():
    """KVzip reads the context again by itself; what it chooses is cut out of the shared prefill's cache."""
    model, tokenizer, ids = prepare(tiny_model("llama")), toy_tokenizer(), some_ids()
    policy = make_policy("kvzip")
    requests = [Request(r, policy, Budget(r)) for r in (0.0, 0.4, 0.8)] + [
        Request("k", make_policy("knorm"), Budget(0.4))
    ]
    read = prefill(model, ids, requests, tokenizer=tokenizer)
    for ratio in (0.0, 0.4, 0.8):
        alone = compress(model, ids, policy, ratio, tokenizer=tokenizer)
        forked = read.cache.fork([read.selections[ratio]])
        assert torch.equal(forked.kept_columns(), alone.kept_columns())
        assert alone.achieved_compression[0] == pytest.approx(ratio, abs=0.02)
        for (_, found), (_, wanted) in zip(forked.sparse_layers(), alone.sparse_layers(), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(found.columns(), wanted.columns(), strict=True))
            torch.testing.assert_close(found.store.keys, wanted.store.keys)
    assert not torch.equal(read.selections[0.4].evicted_at, read.selections["k"].evicted_at)
    assert read.select_s[0.4] > 0


def test_what_needs_a_prefill_of_its_own_is_refused():
    for name in ("sliding_window", "think"):
        with pytest.raises(ConfigError, match=f"'{name}' needs a prefill of its own"):
            Request(name, make_policy(name), Budget(0.5))
    model = prepare(tiny_model("llama"))
    with pytest.raises(ConfigError, match="a batch of 2"):
        prefill(model, some_ids().expand(2, -1), [])


def test_hooks_are_removed_even_after_an_error():
    model = prepare(tiny_model("llama"))
    before = [list(module._forward_hooks) for module in model.modules()]
    with pytest.raises(ZeroDivisionError), after_each_layer(model, lambda *_: None):
        assert [list(module._forward_hooks) for module in model.modules()] != before
        raise ZeroDivisionError
    assert [list(module._forward_hooks) for module in model.modules()] == before
