"""A two-tier cache in a model: with everything recalled it is the full cache, and generate, turns and beams work."""

from __future__ import annotations

import pytest
import torch

from oracle import masked_logits, stepped_logits
from sample_policies import Ends, Ragged, Scatter, SmallKeys
from sparsekv.attention import prepare
from sparsekv.cache.sparse import SparseCache
from sparsekv.cache.tiered import TieredCache
from sparsekv.cache.tiers import all_finite
from sparsekv.errors import ConfigError
from sparsekv.factory import make_cache
from sparsekv.generation import compress
from sparsekv.policies import make_policy
from toy import tiny_model

T, Q, N = 60, 9, 12
TOLERANCE = 1e-4
ALL = 10_000


def some_ids(rows: int = 1, total: int = T + Q + N, seed: int = 3) -> torch.Tensor:
    return torch.randint(3, 250, (rows, total), generator=torch.Generator().manual_seed(seed))


def padded(*pads: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = some_ids(len(pads))
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
    return ids, mask


def once(cache: TieredCache, mask: torch.Tensor | None = None) -> None:
    """Every real column of every layer and head is in exactly one tier."""
    held = cache.kept_columns().int() + cache.passive_columns().int()
    real = (
        torch.ones(cache.batch, cache.seen, dtype=torch.int32)
        if mask is None
        else mask[:, : cache.seen].int()
    )
    for index in cache.compressible:
        assert torch.equal(held[:, index], real[:, None].expand_as(held[:, index]))


@pytest.mark.parametrize("policy", [Ends(), Ragged(), SmallKeys()], ids=lambda policy: policy.name)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_with_everything_recalled_the_logits_are_the_full_cache_s(family, policy):
    model = prepare(tiny_model(family))
    ids = some_ids()
    cache = compress(model, ids[:, :T], policy, 0.8, cache=TieredCache(model, 12, recall_tokens=ALL))
    logits = stepped_logits(model, cache, ids, None, [Q] + [1] * N)
    assert (logits - masked_logits(model, ids, None, None, Q + N)).abs().max() <= TOLERANCE
    assert float(cache.stored_counts().float().mean()) <= 12 and int(cache.passive_counts().min()) > 0
    assert cache.attended_fraction == 1.0
    once(cache)


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_one_kv_head_for_all_queries_and_one_for_each(kv_heads):
    model = prepare(tiny_model("llama", num_key_value_heads=kv_heads))
    ids = some_ids()
    cache = compress(model, ids[:, :T], Scatter(), 0.8, cache=TieredCache(model, 12, recall_tokens=ALL))
    logits = stepped_logits(model, cache, ids, None, [Q] + [1] * N)
    assert (logits - masked_logits(model, ids, None, None, Q + N)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("policy", [Ends(), Ragged()], ids=lambda policy: policy.name)
def test_with_everything_recalled_a_padded_batch_is_the_full_cache_s(policy):
    model = prepare(tiny_model("llama"))
    ids, mask = padded(0, 9, 31)
    cache = TieredCache(model, 8, recall_tokens=ALL)
    compress(model, ids[:, :T], policy, 0.8, cache=cache, attention_mask=mask[:, :T])
    logits = stepped_logits(model, cache, ids, mask, [Q] + [1] * N)
    assert (logits - masked_logits(model, ids, mask, None, Q + N)).abs().max() <= TOLERANCE
    once(cache, mask)


def test_without_recall_the_logits_are_not_the_full_cache_s_but_those_of_what_is_active():
    """The negative control: the same cache reading none of its second tier is the compacted cache."""
    model = prepare(tiny_model("llama"))
    ids = some_ids()
    full = masked_logits(model, ids, None, None, Q + N)
    cache = compress(model, ids[:, :T], Ragged(), 0.8, cache=TieredCache(model, 1000, recall_tokens=0))
    lone = compress(model, ids[:, :T], Ragged(), 0.8)
    logits = stepped_logits(model, cache, ids, None, [Q] + [1] * N)
    assert (logits - stepped_logits(model, lone, ids, None, [Q] + [1] * N)).abs().max() <= TOLERANCE
    assert (logits - full).abs().max() > 1
    assert cache.attended_fraction == pytest.approx(
        float(cache.stored_counts().sum() / (cache.stored_counts().sum() + cache.passive_counts().sum()))
    )


def test_one_entry_that_is_not_recalled_is_noticed():
    model = prepare(tiny_model("llama"))
    ids = some_ids()
    cache = compress(model, ids[:, :T], Ends(), 0.8, cache=TieredCache(model, 12, recall_tokens=ALL))
    cache.tiers.store.take(1, 0, 1, torch.tensor([30]))
    logits = stepped_logits(model, cache, ids, None, [Q])
    assert (logits - masked_logits(model, ids[:, : T + Q], None, None, Q)).abs().max() > 10 * TOLERANCE


@pytest.mark.parametrize("recall", [None, 7, ALL])
def test_chunks_and_turns(recall):
    """Two turns, read in chunks, with questions between: exact where everything is recalled."""
    model = prepare(tiny_model("llama"))
    ids = some_ids(total=T + Q + T + Q + N)
    cache = TieredCache(model, 20, recall_tokens=recall)
    compress(model, ids[:, :T], Ends(), 12, cache=cache, chunk=25)
    stepped_logits(model, cache, ids, None, [Q, 1, 1])
    compress(model, ids[:, : T + Q + T], Ends(), 14, cache=cache, chunk=17)
    assert cache.stored_counts().unique().tolist() == [14]
    once(cache)
    logits = stepped_logits(model, cache, ids, None, [Q] + [1] * N)
    assert int(cache.stored_counts().max()) <= 20
    once(cache)
    difference = float((logits - masked_logits(model, ids, None, None, Q + N)).abs().max())
    assert difference <= TOLERANCE if recall == ALL else difference > 0.1


def test_a_question_longer_than_the_window_of_queries_that_judge():
    model = prepare(tiny_model("llama"))
    ids = some_ids(total=T + 150)
    cache = compress(model, ids[:, :T], Ragged(), 0.8, cache=TieredCache(model, 12, recall_tokens=ALL))
    logits = stepped_logits(model, cache, ids, None, [150])
    assert (logits - masked_logits(model, ids, None, None, 150)).abs().max() <= TOLERANCE
    assert float(cache.stored_counts().float().mean()) <= 12
    once(cache)


def test_a_prompt_that_generate_reads_itself_is_brought_within_the_active_size():
    model = prepare(tiny_model("llama"))
    ids = some_ids()
    cache = TieredCache(model.config, 16, recall_tokens=ALL)
    out = model.generate(ids, past_key_values=cache, max_new_tokens=20, do_sample=False)
    assert torch.equal(out, model.generate(ids, max_new_tokens=20, do_sample=False))
    assert int(cache.stored_counts().max()) <= 16
    once(cache)


def test_greedy_sampling_and_beams_of_a_cache_that_recalls_everything_are_the_model_s_own():
    model = prepare(tiny_model("llama"))
    ids = some_ids(total=T + Q)
    for options in (
        {"do_sample": False},
        {"do_sample": True, "num_return_sequences": 2},
        {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    ):
        cache = compress(model, ids[:, :T], Ends(), 0.7, cache=TieredCache(model, 24, recall_tokens=ALL))
        outputs = []
        for past in (cache, None):
            torch.manual_seed(5)
            outputs.append(model.generate(ids, past_key_values=past, max_new_tokens=15, **options))
        assert torch.equal(outputs[0], outputs[1]), options
        assert int(cache.stored_counts().max()) <= 24
        once(cache)


@pytest.mark.parametrize("recall", [None, 8])
def test_the_policy_and_the_second_tier_work_together_while_decoding(recall):
    model = prepare(tiny_model("llama"))
    ids = some_ids(total=T + Q)
    cache = TieredCache(model, 32, recall_tokens=recall)
    compress(model, ids[:, :T], make_policy("snapkv", window_size=8), 20, cache=cache, phase="both", every=8)
    model.generate(ids, past_key_values=cache, max_new_tokens=40, do_sample=False)
    assert int(cache.stored_counts().max()) <= 32
    once(cache)


def test_heads_that_a_policy_left_unequal_stay_unequal_and_within_the_total():
    model = prepare(tiny_model("llama"))
    ids = some_ids(total=T + Q + 40)
    cache = compress(model, ids[:, :T], Ragged(), 0.6, cache=TieredCache(model, 16))
    after = cache.stored_counts()
    assert float(after.float().mean()) <= 16 and len(after.unique()) > 2
    assert int(after[0, 0, 0]) == 1, "the head that kept one entry is not given more by the cut"
    stepped_logits(model, cache, ids, None, [Q] + [1] * 40)
    counts = cache.stored_counts()
    assert float(counts.float().mean()) <= 16 and len(counts.unique()) > 2
    once(cache)


def test_bytes_say_how_many_tokens_and_beams_share_them():
    model = prepare(tiny_model("llama"))
    ids = some_ids(total=T + Q)
    a_token = 3 * 2 * (2 * 16 * 4 + 4)  # layers, kv heads, a key and a value in fp32, a column
    cache = TieredCache(model, f"{24 * a_token}B")
    compress(model, ids[:, :T], Ends(), 0.5, cache=cache)
    assert cache.stored_counts().unique().tolist() == [24]
    model.generate(ids, past_key_values=cache, max_new_tokens=6, num_beams=3, do_sample=False)
    assert int(cache.stored_counts().max()) <= 8
    once(cache)
    small = TieredCache(model, "1KiB")
    with pytest.raises(ConfigError, match=r"active=1024 bytes holds not one token.* need 1584 bytes a token"):
        model.generate(some_ids(2, 5), past_key_values=small, max_new_tokens=2)


def test_allocated_bytes_follow_what_is_active_and_the_passive_tier_is_told_apart():
    model = prepare(tiny_model("llama"))
    ids = some_ids(total=T + Q + 60)
    cache = compress(model, ids[:, :T], Ends(), 16, cache=TieredCache(model, 24))
    entry = 2 * 16 * 4
    for _ in range(60):
        stepped_logits(model, cache, ids, None, [1])
        allocated = sum(layer.store.keys.numel() * 8 for _, layer in cache.tiered_layers())
        assert allocated <= 6 * 25 * entry
    assert cache.passive_nbytes >= int(cache.passive_counts().sum()) * entry
    assert cache.nbytes == cache.active_nbytes + cache.passive_nbytes
    assert cache.active_nbytes < cache.full_nbytes / 3


@pytest.mark.parametrize("active", [1, 2, 1000])
def test_the_smallest_active_tier_and_one_larger_than_the_context(active):
    model = prepare(tiny_model("llama"))
    ids = some_ids(total=T + Q)
    cache = compress(model, ids[:, :T], make_policy("full"), cache=TieredCache(model, active))
    assert cache.stored_counts().unique().tolist() == [min(active, T)]
    logits = stepped_logits(model, cache, ids, None, [Q])
    once(cache)
    if active == 1000:
        assert cache.intact
        assert torch.equal(
            logits, stepped_logits(model, compress(model, ids[:, :T], Ends(), 0.0), ids, None, [Q])
        )


def test_one_token_and_a_ratio_of_zero():
    model = prepare(tiny_model("llama"))
    ids = some_ids(total=8)
    cache = compress(model, ids[:, :1], Ends(), 0.0, cache=TieredCache(model, 4, recall_tokens=ALL))
    assert (
        stepped_logits(model, cache, ids, None, [1] * 7) - masked_logits(model, ids, None, None, 7)
    ).abs().max() < 1e-4
    assert int(cache.stored_counts().max()) <= 4


def test_snapshots_cover_both_tiers():
    model = prepare(tiny_model("llama"))
    ids = some_ids()
    cache = compress(model, ids[:, :T], Ends(), 0.8, cache=TieredCache(model, 16))
    before = cache.snapshot()
    first = stepped_logits(model, cache, ids, None, [Q] + [1] * N)
    cache.restore(before)
    once(cache)
    assert torch.equal(first, stepped_logits(model, cache, ids, None, [Q] + [1] * N))
    cache.crop(T + 2)
    once(cache)
    cache.reset()
    assert cache.seen == 0 and cache.tiers.store.n_entries == 0


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_forks_evict_each_for_themselves_and_leave_the_first_alone(family):
    model = prepare(tiny_model(family))
    ids = some_ids()
    cache = compress(model, ids[:, :T], Ends(), 0.5, cache=TieredCache(model, 1000, recall_tokens=ALL))
    whole = cache.selection()
    fewer = compress(model, ids[:, :T], Ends(), 0.8).selection()
    twin = cache.fork([whole, fewer])
    assert twin.stored_counts()[:, 0].unique().tolist() == [30]
    assert twin.stored_counts()[:, 1].unique().tolist() == [11]
    once(twin)
    once(cache)
    logits = stepped_logits(model, twin, ids.expand(2, -1), None, [Q] + [1] * N)
    assert (logits - masked_logits(model, ids, None, None, Q + N)).abs().max() <= TOLERANCE
    assert cache.seen == T


@pytest.mark.parametrize("recall", [None, ALL])
def test_the_passive_tier_on_disk_answers_as_that_in_memory(tmp_path, recall):
    model = prepare(tiny_model("qwen3"))
    ids = some_ids()
    logits = []
    for passive in ("cpu", f"disk:{tmp_path / 'tier'}"):
        cache = compress(
            model, ids[:, :T], Ragged(), 0.8, cache=TieredCache(model, 12, passive, recall_tokens=recall)
        )
        logits.append(stepped_logits(model, cache, ids, None, [Q] + [1] * N))
        once(cache)
    assert torch.equal(*logits)
    with pytest.raises(ConfigError, match="in use"):
        TieredCache(model, 12, f"disk:{tmp_path / 'tier'}")
    cache.close()
    TieredCache(model, 12, f"disk:{tmp_path / 'tier'}").close()


def test_what_is_refused():
    model = prepare(tiny_model("llama"))
    ids = some_ids()
    for wrong in (0, -3, True, 1.5, "0MiB", "many", "12 parsecs", ""):
        with pytest.raises(ConfigError, match="active must be"):
            TieredCache(model, wrong)
    with pytest.raises(ConfigError, match=r"unknown passive tier 'gpu'.*disk:<folder>"):
        TieredCache(model, 8, "gpu")
    with pytest.raises(ConfigError, match="recall_tokens must be"):
        TieredCache(model, 8, recall_tokens=-1)
    with pytest.raises(ConfigError, match="re-rotated keys"):
        compress(model, ids, Ends(), 0.5, cache=TieredCache(model, 8), rerotate=True)
    with pytest.raises(ConfigError, match="needs a SparseCache"):
        TieredCache(model, 8).layers[0].reader = object()
    plain = tiny_model("llama")
    with pytest.raises(ConfigError, match=r"prepare\(model\)"):
        plain.generate(ids, past_key_values=TieredCache(plain, 8), max_new_tokens=2)
    cache = compress(model, ids[:, :T], Ends(), 0.5, cache=TieredCache(model, 8))
    with pytest.raises(ConfigError, match="entries of a model with weights"):
        compress(prepare(tiny_model("llama", seed=1)), ids, Ends(), 0.5, cache=cache)
    with pytest.raises(ConfigError, match="static and quantized"):
        compress(model, ids, Ends(), 0.5, cache=object())
    assert isinstance(cache, SparseCache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, 5, 3000])
def test_one_number_that_is_none_is_found_anywhere(dtype, n):
    entries = torch.randn(n, 64).to(dtype)
    entries[0, 0], entries[-1, -1] = torch.finfo(dtype).max, torch.finfo(dtype).min
    assert all_finite(entries)
    for place in (1, n * 64 // 2, n * 64 - 2):
        for number in (torch.nan, torch.inf, -torch.inf):
            spoiled = entries.clone()
            spoiled.view(-1)[place] = number
            assert not all_finite(spoiled)


def test_numbers_that_are_none_are_not_handed_over():
    model = prepare(tiny_model("llama"))
    ids = some_ids()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = torch.nan
    cache = TieredCache(model, 12)
    with pytest.raises(ConfigError, match="layer 1 computed keys or values that are NaN"):
        compress(model, ids[:, :T], Ends(), 0.8, cache=cache)
    assert cache.tiers.counts(1, 1, 2).tolist() == [0, 0]


@pytest.mark.parametrize("active", [17, 24, 32])
def test_a_padded_row_is_evicted_from_as_alone(active):
    """Also where the reader leaves it to a policy that is about to evict: by the row's own tokens and sizes."""
    model, n_pads, n_read = prepare(tiny_model("llama")), 20, 62
    draw = torch.Generator().manual_seed(5)
    ids = torch.stack([3 + torch.randperm(250, generator=draw)[: n_read + 30] for _ in range(2)])  # no ties
    mask = torch.ones_like(ids)
    mask[0, :n_pads] = 0

    def made(start: int, rows: int) -> TieredCache:
        cache = TieredCache(model, active, recall_tokens=0)
        given, seen = ids[:rows, start:n_read], mask[:rows, start:n_read]
        return compress(model, given, "knorm", 0.6, attention_mask=seen, phase="both", every=1, cache=cache)

    both, alone = made(0, 2), made(n_pads, 1)
    with torch.no_grad():
        for at in range(n_read, n_read + 30):
            padded = model(ids[:, [at]], past_key_values=both, attention_mask=mask[:, : at + 1]).logits[0]
            own = model(ids[:1, [at]], past_key_values=alone).logits[0]
            assert (padded - own).abs().max() <= 1e-4
    assert torch.equal(both.kept_columns()[0, ..., n_pads:], alone.kept_columns()[0])


@pytest.mark.parametrize("recall", [2, 6, 16, 0])
@pytest.mark.parametrize(("method", "every"), [("knorm", 2), ("knorm", 3), ("random", 3), ("knorm", 1)])
def test_entries_that_left_since_the_last_look_may_come_back(method, every, recall):
    """Where places are free, a candidate may be newer than all that was ever counted."""
    model = prepare(tiny_model("llama"))
    for seed in range(4):
        ids = torch.randint(3, 250, (1, 90), generator=torch.Generator().manual_seed(seed))
        cache = make_cache(method, model, 20, active=40, passive="cpu", recall_tokens=recall, every=every)
        with torch.no_grad():
            model(ids[:, :40], past_key_values=cache)
            for at in range(40, 90):
                model(ids[:, [at]], past_key_values=cache)
                assert cache.stored_counts()[:, 0].float().std(dim=-1).max() == 0, "equal heads stay equal"
        assert (cache.stored_counts() + cache.passive_counts() == 90).all()
