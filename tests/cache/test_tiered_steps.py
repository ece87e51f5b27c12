"""Single steps of a full two-tier cache: who leaves for whom, how often a layer is copied, what a step attended to."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from oracle import stepped_logits
from sample_policies import Ends, Ragged
from sparsekv.attention import prepare
from sparsekv.cache.exchange import Entries
from sparsekv.cache.layer import SparseLayer
from sparsekv.cache.recall import EAGER, EVERY, MARGIN, TieredReader
from sparsekv.cache.scores import Block
from sparsekv.cache.tiered import TieredCache
from sparsekv.cache.tiers import LENT, Tiers
from sparsekv.errors import ConfigError
from sparsekv.eviction import newest_stored
from sparsekv.generation import compress
from sparsekv.policies import make_policy
from toy import tiny_model

T, N = 160, 64


def some_ids() -> torch.Tensor:
    return torch.randint(3, 250, (1, T + N), generator=torch.Generator().manual_seed(9))


def test_what_comes_weighs_twice_what_leaves_for_it_also_in_a_full_tier(monkeypatch):
    model, found = prepare(tiny_model("llama")), []
    real = TieredReader._exchange

    def watched(self, block, residents, offered, plan, n_query):
        moves = real(self, block, residents, offered, plan, n_query)
        if not plan.asked.any():
            return moves
        share = torch.cat([block.shares(), block.shares_beside()], dim=1).sum(dim=1)
        assert torch.allclose(share, torch.ones_like(share), atol=1e-5)
        strength = self._strength(residents, block.shares().numpy(), plan.quotas, n_query)
        for s, coming in enumerate(moves.coming):
            if coming.any() and plan.over[s]:
                gone = np.sort(strength[s][moves.leaving[s]])
                best = np.sort(offered[s][coming])[::-1]
                assert len(gone) == len(best) + plan.over[s]
                found.append(bool((best > MARGIN * gone[plan.over[s] :]).all()))
        return moves

    cache = compress(model, some_ids()[:, :T], Ends(), 64, cache=TieredCache(model, 64))
    monkeypatch.setattr(TieredReader, "_exchange", watched)
    stepped_logits(model, cache, some_ids(), None, [1] * N)
    assert len(found) > 20 and all(found)


def test_a_small_head_does_not_have_its_layer_copied_at_every_token():
    model = prepare(tiny_model("llama"))
    cache = compress(model, some_ids()[:, :T], Ragged(), 64, cache=TieredCache(model, 64, recall_tokens=0))
    assert min(min(layer.quotas()) for _, layer in cache.tiered_layers()) <= 12, (
        "a small head, and large ones"
    )
    copies = 0
    real = cache.tiers.store.put_layer

    def counted(*arguments):
        nonlocal copies
        copies += 1
        return real(*arguments)

    cache.tiers.store.put_layer = counted
    for step in range(N):
        stepped_logits(model, cache, some_ids()[:, : T + step + 1], None, [1])
        for _, layer in cache.tiered_layers():
            sizes, quotas = layer.stored().flatten(), torch.tensor(layer.quotas())
            assert int(sizes.sum()) <= int(quotas.sum()) + len(sizes), "one step's tokens beyond the size"
            assert bool((sizes <= quotas + LENT + 1).all())
    assert copies <= 3 * N / 6


def test_an_eviction_by_a_policy_does_not_hide_what_the_step_attended_to():
    """Each step of a cache that recalls nothing attends to all that was resident before it, and to itself."""
    model = prepare(tiny_model("llama"))
    made = TieredCache(model, 32, recall_tokens=0)
    cache = compress(model, some_ids()[:, :T], "sink_recent", 24, cache=made, phase="both", every=4)
    evicted = 0
    for step in range(12):
        before = cache.stored_counts()
        stepped_logits(model, cache, some_ids()[:, : T + step + 1], None, [1])
        attended, _ = cache.last_step()
        assert torch.equal(attended.attended.sum(dim=-1).transpose(0, 1), before + 1)
        evicted += int((cache.stored_counts() < before).all())
    assert evicted == 3
    assert cache.attended_fraction == pytest.approx(28 / (T + 12))


@pytest.mark.parametrize("held_back", [True, False])
def test_what_a_press_observes_with_does_not_leave_for_recalled_entries(held_back, monkeypatch):
    """SnapKV pairs its newest queries with the last entries: were they others, it would score wrongly in silence."""
    if not held_back:  # the negative control
        monkeypatch.setattr(Tiers, "observed", lambda self, n_query: 0)
    model, window = prepare(tiny_model("llama")), 16
    policy = make_policy("snapkv", window_size=window, kernel_size=3)
    made = TieredCache(model, 48, n_recent=0)
    cache = compress(model, some_ids()[:, :T], policy, 32, cache=made, phase="both", every=12)
    gaps = moved = 0
    for step in range(N):
        before = cache.passive_columns()
        stepped_logits(model, cache, some_ids()[:, : T + step + 1], None, [1])
        back = before & ~cache.passive_columns()[..., : before.shape[-1]]
        moved += int(back.any())
        for _, layer in cache.tiered_layers():
            gaps += newest_stored(torch.stack(layer.columns()), T + step + 1) < window
    assert moved > N // 8
    assert (gaps == 0) == held_back


def test_layers_look_in_turns_once_an_answer_has_begun(monkeypatch):
    """Every layer right after a question, then each at every fourth token, and where a new buffer is made anyway."""
    model, looks, full = prepare(tiny_model("llama")), set(), set()
    real = TieredReader._plan

    def watched(self, layer, padding, n_query):
        plan = real(self, layer, padding, n_query)
        at = (layer.get_seq_length(), self.index)
        looks.update([at] if plan is not None and plan.asked.any() else [])
        full.update([at] if plan is not None and plan.over.any() else [])
        return plan

    cache = compress(model, some_ids()[:, :T], Ends(), 64, cache=TieredCache(model, 64))
    stepped_logits(model, cache, some_ids()[:, : T + 3], None, [3])
    monkeypatch.setattr(TieredReader, "_plan", watched)
    stepped_logits(model, cache, some_ids(), None, [1] * (N - 3))
    layers = [index for index, _ in cache.tiered_layers()]
    eager = {(T + 3 + n, index) for n in range(1, EAGER + 1) for index in layers}
    turns = {(seen, i) for seen in range(T + 4, T + N + 1) for i in layers if (seen - T - 3 + i) % EVERY == 0}
    assert looks == eager | turns | full
    assert full and len(turns - eager - full) > N // EVERY


def test_sixteen_bit_products_are_not_rounded():
    layer = SparseLayer()
    draw = torch.Generator().manual_seed(0)
    keys, query = ((6 * torch.randn(1, 1, n, 64, generator=draw)).to(torch.bfloat16) for n in (200, 1))
    layer.update(keys, keys)
    (logits,) = Block(layer, query, None, 0.125).resident
    exact = 0.125 * (query.double() @ keys.double().transpose(2, 3))[0]
    assert float(exact.abs().max()) > 50
    assert float((logits - exact).abs().max()) < 1e-3


def test_an_exchange_that_fails_doubles_nothing_and_reads_nothing(monkeypatch):
    model = prepare(tiny_model("llama"))
    cache = compress(model, some_ids()[:, :T], Ends(), 64, cache=TieredCache(model, 64))
    store = cache.tiers.store

    def damaged(*arguments, **options):
        raise ConfigError("a block is damaged")

    monkeypatch.setattr(store._log(0), "read", damaged)
    passive, key = store.columns(0, 0, 0), torch.ones(3, 16)

    def entries(columns: torch.Tensor) -> Entries:
        return Entries(np.zeros(3, np.int64), columns.numpy(), key, key)

    gone = cache.layers[0].columns()[0][:3]
    with pytest.raises(ConfigError, match="has no column"):
        cache.tiers.swap(0, 1, 2, entries(gone), entries(torch.tensor([T + 1, T + 2, T + 3])))
    assert torch.equal(store.columns(0, 0, 0), passive), "what had been put is out again"
    cache.tiers.swap(0, 1, 2, entries(gone), entries(passive[:3]))
    assert torch.equal(store.columns(0, 0, 0), torch.cat([passive[3:], gone.long()]))
