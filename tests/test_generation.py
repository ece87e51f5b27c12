"""Plain `model.generate` from a compacted cache, in every way people call it."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

from oracle import masked_logits, positions, stepped_logits
from sample_policies import Ends, Ragged, Scatter, SmallKeys
from sparsekv import PolicyPress
from sparsekv.attention import prepare
from sparsekv.errors import ConfigError
from sparsekv.generation import as_budget, compress, greedy_decode
from sparsekv.policies import make_policy
from sparsekv.policies.budget import Budget
from sparsekv.probe import Request, prefill
from sparsekv.selection import NEVER, Selection
from toy import FAMILIES, tiny_model, toy_tokenizer

T, Q = 40, 7


def some_ids(rows: int = 1, total: int = T + Q, seed: int = 3) -> torch.Tensor:
    return torch.randint(3, 250, (rows, total), generator=torch.Generator().manual_seed(seed))


def greedy_by_masked_forward(model, ids, selection, n_new, mask=None):
    """The reference: grow the sequence one argmax at a time, with whole masked forwards."""
    for _ in range(n_new):
        total = ids.shape[1]
        logits = masked_logits(model, ids, mask, selection.extend(total), 1)
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        if mask is not None:
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    return ids


@pytest.mark.parametrize("policy", [Ends(), Ragged()], ids=lambda p: p.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_is_the_masked_greedy_continuation(family, policy):
    model = prepare(tiny_model(family))
    ids = some_ids()
    cache = compress(model, ids[:, :T], policy, 0.5)
    selection = cache.selection()
    out = model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False)
    assert torch.equal(out, greedy_by_masked_forward(model, ids, selection, 6))
    assert cache.seen == T + Q + 5


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_padded_batch_generates_what_its_rows_generate_alone(family):
    model = prepare(tiny_model(family))
    ids = some_ids(3)
    mask = torch.ones_like(ids)
    mask[1, :5], mask[2, :19] = 0, 0
    cache = compress(model, ids[:, :T], Scatter(), 0.5, attention_mask=mask[:, :T], seeds=(0, 1, 2))
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=6, do_sample=False)
    for row, pad in enumerate((0, 5, 19)):
        alone = compress(model, ids[row : row + 1, pad:T], Scatter(), 0.5, seeds=(row,))
        own = model.generate(
            ids[row : row + 1, pad:], past_key_values=alone, max_new_tokens=6, do_sample=False
        )
        assert torch.equal(out[row : row + 1, pad:], own)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("policy", [Ends(), Ragged()], ids=lambda p: p.name)
def test_beam_search_scores_are_those_of_its_sequences(policy, family):
    """Beam search reorders the cache; the score it reports must be the masked model's own for that sequence."""
    model = prepare(tiny_model(family))
    ids = some_ids()
    cache = compress(model, ids[:, :T], policy, 0.5)
    selection = cache.selection()
    out = model.generate(
        ids, past_key_values=cache, max_new_tokens=6, num_beams=4, num_return_sequences=3, do_sample=False,
        return_dict_in_generate=True, output_scores=True, length_penalty=0.0,
    )  # fmt: skip
    assert out.sequences.shape == (3, T + Q + 6)
    assert len({tuple(row) for row in out.sequences.tolist()}) == 3
    for row, score in zip(out.sequences, out.sequences_scores, strict=True):
        total = len(row)
        logits = masked_logits(model, row[None], None, selection.extend(total), 7)[:, :-1]
        chosen = logits.log_softmax(-1).gather(-1, row[None, -6:, None])[..., 0].sum()
        assert float(chosen) == pytest.approx(float(score), abs=1e-4)
    greedy = compress(model, ids[:, :T], policy, 0.5)
    plain = model.generate(ids, past_key_values=greedy, max_new_tokens=6, do_sample=False)
    logits = masked_logits(model, plain, None, selection.extend(plain.shape[1]), 7)[:, :-1]
    own = logits.log_softmax(-1).gather(-1, plain[:, -6:, None])[..., 0].sum()
    assert float(out.sequences_scores[0]) >= float(own) - 1e-4


def test_sampling_several_sequences_is_repeatable_and_distinct():
    model = prepare(tiny_model("llama"))
    ids = some_ids()
    runs = []
    for _ in range(2):
        cache = compress(model, ids[:, :T], Ragged(), 0.5)
        torch.manual_seed(5)
        runs.append(
            model.generate(
                ids, past_key_values=cache, max_new_tokens=6, do_sample=True, num_return_sequences=3, top_k=0
            )
        )
    assert torch.equal(*runs)
    assert len({tuple(row) for row in runs[0].tolist()}) == 3


def test_several_questions_on_one_context_do_not_disturb_each_other():
    model = prepare(tiny_model("gemma3"))
    context = some_ids(total=T)
    cache = compress(model, context, Ragged(), 0.5)
    before = cache.snapshot()
    questions = [some_ids(total=5, seed=s) for s in (1, 2, 3)]
    first = []
    for question in questions:
        full = torch.cat([context, question], dim=1)
        first.append(model.generate(full, past_key_values=cache, max_new_tokens=70, do_sample=False))
        cache.restore(before)
    for question, answer in zip(reversed(questions), reversed(first), strict=True):
        full = torch.cat([context, question], dim=1)
        again = model.generate(full, past_key_values=cache, max_new_tokens=70, do_sample=False)
        assert torch.equal(again, answer)
        cache.restore(before)


def test_nested_snapshots_survive_appends_over_each_other():
    model = prepare(tiny_model("llama"))
    ids = some_ids(total=T + 12)
    cache = compress(model, ids[:, :T], Ragged(), 0.5)
    stepped_logits(model, cache, ids, None, [4])
    outer = cache.snapshot()
    stepped_logits(model, cache, ids, None, [4])
    inner = cache.snapshot()
    expected = stepped_logits(model, cache, ids, None, [4])
    cache.restore(outer)
    other = some_ids(total=T + 12, seed=9)
    stepped_logits(model, cache, other, None, [6])
    cache.restore(inner)
    assert torch.equal(stepped_logits(model, cache, ids, None, [4]), expected)


def test_a_snapshot_survives_a_later_eviction():
    model = prepare(tiny_model("llama"))
    ids = some_ids(total=T + 8)
    cache = compress(model, ids[:, :T], Ends(), 0.3)
    before = cache.snapshot()
    expected = stepped_logits(model, cache, ids, None, [8])
    cache.restore(before)
    compress(model, ids[:, : T + 4], Ends(), 0.7, cache=cache)
    cache.restore(before)
    assert torch.equal(stepped_logits(model, cache, ids, None, [8]), expected)


@pytest.mark.parametrize("policy", [Ends(), Scatter(), SmallKeys()], ids=lambda p: p.name)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_several_turns_evict_ask_evict_again(family, policy):
    """Two evictions: the masked forward of the merged selections gives the same logits."""
    model = prepare(tiny_model(family))
    total = T + 20 + Q
    ids = some_ids(total=total)
    cache = compress(model, ids[:, :T], policy, 0.5)
    first = cache.selection()
    stepped_logits(model, cache, ids, None, [4])  # a question in between
    compress(model, ids[:, : T + 20], policy, 0.6, cache=cache)
    second = cache.selection()
    for layer in cache.compressible:
        assert cache.layers[layer].stored().unique().tolist() == [Budget(0.6).n_kept(T + 20)]
    merged = first.extend(total).merge(second.extend(total))
    masked = masked_logits(model, ids, None, merged, Q)
    stored = stepped_logits(model, cache, ids, None, [3, 1, 3])
    assert (masked - stored).abs().max() <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_chunked_prefill_equals_the_masked_forward_of_its_evictions(family):
    model = prepare(tiny_model(family))
    ids = some_ids(total=60 + Q)
    budget, chunk = 16, 12
    cache = compress(model, ids[:, :60], Ends(), budget, chunk=chunk)
    column = torch.arange(60 + Q)
    at = torch.full((60 + Q,), NEVER, dtype=torch.int32)
    for end in range(chunk, 61, chunk):
        kept = (column < 2) | (column >= end - (budget - 2))
        at = torch.where((column < end) & ~kept & (at == NEVER), end, at)
    selection = Selection(at[None, None, None])
    masked = masked_logits(model, ids, None, selection, Q)
    assert (masked - stepped_logits(model, cache, ids, None, [Q])).abs().max() <= 1e-4
    assert int(cache.stored_counts().max()) == budget + Q


@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3"])
def test_eviction_while_decoding_is_the_streaming_mask(family, every):
    """Token by token: what leaves at step s is hidden from every query after s, exactly as in a masked forward."""
    model = prepare(tiny_model(family))
    ids = some_ids(total=T + 30)
    budget = 18
    cache = compress(model, ids[:, :T], Ends(), Budget(tokens=budget), phase="both", every=every)
    logits, largest = [], 0
    for step in range(T, T + 30):
        with torch.no_grad():
            logits.append(model(input_ids=ids[:, step : step + 1], past_key_values=cache).logits)
        largest = max(largest, int(cache.stored_counts().max()))
    assert largest == budget + every - 1
    column = torch.arange(T + 30)
    at = torch.full((T + 30,), NEVER, dtype=torch.int32)
    for end in (T, *range(T + every, T + 31, every)):
        kept = (column < 2) | (column >= end - (budget - 2))
        at = torch.where((column < end) & ~kept & (at == NEVER), end, at)
    masked = masked_logits(model, ids, None, Selection(at[None, None, None]), 30)
    assert (masked - torch.cat(logits, dim=1)).abs().max() <= 1e-4


def test_decode_phase_alone_keeps_the_whole_context_until_tokens_come():
    model = prepare(tiny_model("llama"))
    ids = some_ids()
    cache = compress(model, ids[:, :T], SmallKeys(), 20, phase="decode", every=4)
    assert cache.intact and cache.achieved_compression == [0.0]
    model.generate(ids[:, : T + 1], past_key_values=cache, max_new_tokens=12, do_sample=False)
    assert int(cache.stored_counts().max()) <= 23
    assert cache.seen == T + 12


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", [Ends(), Ragged()], ids=lambda p: p.name)
def test_rerotation_is_a_forward_with_consecutive_positions(family, policy):
    """Reference: for each layer and head, keys rotated as if the kept tokens ended right before the next one.

    With one kept set for all layers (`Ends`), that is a forward over the kept tokens alone at those positions, in a
    one-layer model (deeper layers' inputs differ, since the context was read whole).
    """
    model = prepare(tiny_model(family, num_hidden_layers=1, **gemma_single(family)))
    if policy.name == "ragged" and family not in ("llama", "phi3"):
        pytest.skip("the per-head reference below is checked on two families")
    ids = some_ids()
    cache = compress(model, ids[:, :T], policy, 0.5, rerotate=True)
    if policy.name == "ends":
        kept = cache.kept_columns()[0, 0, 0].nonzero().flatten()
        short = torch.cat([ids[:, kept], ids[:, T:]], dim=1)
        first = T - len(kept)
        with torch.no_grad():
            expected = model(
                input_ids=short, position_ids=torch.arange(first, T + Q)[None], use_cache=False
            ).logits[:, -Q:]
    else:
        expected = ragged_reference(model, ids, cache)
    assert (expected - stepped_logits(model, cache, ids, None, [4, 1, 2])).abs().max() <= 1e-4
    plain = compress(model, ids[:, :T], policy, 0.5)
    assert (expected - stepped_logits(model, plain, ids, None, [Q])).abs().max() > 1e-2


def gemma_single(family: str) -> dict:
    return {"layer_types": ["full_attention"]} if family == "gemma3" else {}


def ragged_reference(model, ids, cache):
    """Per-head positions by hand: keys come from a forward at the moved positions, one per head."""
    kept = cache.kept_columns()[0, 0]
    heads, keys, values = kept.shape[0], [], []
    layer = cache.layers[0]
    for head in range(heads):
        columns = kept[head].nonzero().flatten()
        moved = torch.arange(T - len(columns), T)
        from transformers import DynamicCache

        fresh = DynamicCache()
        place = torch.zeros(T, dtype=torch.long)
        place[columns] = moved
        with torch.no_grad():
            model.model(input_ids=ids[:, :T], past_key_values=fresh, position_ids=place[None])
        keys.append(fresh.layers[0].keys[0, head, columns])
        values.append(fresh.layers[0].values[0, head, columns])
    state = cache.snapshot()
    stored = torch.cat([g.keys.reshape(-1, g.keys.shape[-1]) for g in layer.groups()])
    assert (stored - torch.cat(keys)).abs().max() < 1e-5
    with torch.no_grad():
        logits = stepped_logits(model, cache, ids, None, [Q])
    cache.restore(state)
    return logits


def test_rerotation_never_accumulates_rounding():
    """Evicting forty times in bf16 leaves the sinks where one rotation from the first position would put them."""
    model = prepare(tiny_model("llama").to(torch.bfloat16))
    ids = some_ids(total=400)
    cache = compress(model, ids, Ends(), 32, chunk=8, rerotate=True)
    once = compress(model, ids[:, :8], Ends(), 8)
    layer, early = cache.layers[0], once.layers[0]
    assert layer.columns()[0][:2].tolist() == [0, 1]
    half = model.model.rotary_emb.inv_freq.float()
    for slot in range(2):
        delta = (400 - 32 + slot - slot) * half
        key = early.dense()[0][0, :, slot].float()
        a, b = key[:, :8], key[:, 8:]
        turned = torch.cat([a * delta.cos() - b * delta.sin(), b * delta.cos() + a * delta.sin()], -1)
        assert torch.equal(layer.dense()[0][0, :, slot], turned.to(torch.bfloat16))


def test_rerotation_refuses_models_that_rescale_their_frequencies():
    parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = tiny_model("llama", rope_parameters=parameters)
    with pytest.raises(ConfigError, match="rope_type is 'dynamic'"):
        compress(model, some_ids(total=T), Ends(), 0.5, rerotate=True)


def test_greedy_decode_in_a_batch_is_greedy_decode_alone():
    model = prepare(tiny_model("llama"))
    context, question = some_ids(total=T), some_ids(total=5, seed=8)
    policies = [Ends(), Scatter(), Ragged()]
    caches = [compress(model, context, p, r) for p in policies for r in (0.3, 0.7)]
    whole = compress(model, context, Ends(), 0.0)
    joint = whole.fork([c.selection() for c in caches] + [whole.selection()])
    alone = [greedy_decode(model, c, question, 12, set())[0] for c in [*caches, whole]]
    stop = alone[1].token_ids[4]
    expected = []
    for answer in alone:
        later = [i for i, t in enumerate(answer.token_ids) if t == stop and i > 0]
        expected.append(answer.token_ids[: later[0] + 1] if later else answer.token_ids)
    together = greedy_decode(model, joint, question, 12, {stop})
    assert [a.token_ids for a in together] == expected
    assert [a.finish_reason for a in together] == ["eos" if e[-1] == stop else "length" for e in expected]


def test_a_padded_batch_decodes_greedily_what_generate_decodes():
    model = prepare(tiny_model("qwen2"))
    ids = some_ids(2)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    a, b = (
        compress(model, ids[:, :T], Scatter(), 0.5, attention_mask=mask[:, :T], seeds=(0, 1)) for _ in "ab"
    )
    answers = greedy_decode(model, a, ids[:, T:], 6, set())
    out = model.generate(ids, attention_mask=mask, past_key_values=b, max_new_tokens=6, do_sample=False)
    assert [x.token_ids for x in answers] == out[:, T + Q :].tolist()


def test_edge_sizes():
    model = prepare(tiny_model("llama"))
    one = some_ids(total=1)
    cache = compress(model, one, Ends(), 0.9)
    assert cache.stored_counts().unique().tolist() == [1]
    assert cache.achieved_compression == [0.0]
    more = compress(model, some_ids(total=T), Ends(), 10_000)
    assert more.intact
    assert positions(torch.tensor([[0, 1, 1]])).tolist() == [[0, 0, 1]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 1.0}, r"compression_ratio must be in \[0, 1\)"),
        ({"budget": -0.5}, r"compression_ratio must be in \[0, 1\)"),
        ({"budget": 0.5, "phase": "prefil"}, "did you mean 'prefill'"),
        ({"budget": 0.5, "chunk": 0}, "chunk must be at least 1"),
        ({"budget": 0.5, "every": 0}, "every must be at least 1"),
        ({"budget": 0.5, "attention_mask": torch.ones(1, 3)}, "attention_mask must have the shape"),
        ({"budget": 0.5, "attention_mask": torch.zeros(1, T)}, "row without any real token"),
        ({"budget": 0.5, "attention_mask": (torch.arange(T) < 9)[None].long()}, "pad on the left"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match=message):
        compress(model, some_ids(total=T), Ends(), **arguments)


def test_other_cache_types_and_assisted_decoding_are_refused():
    model = prepare(tiny_model("llama"))
    static = StaticCache(config=model.config, max_cache_len=64)
    with pytest.raises(ConfigError, match="StaticCache"):
        compress(model, some_ids(total=T), Ends(), 0.5, cache=static)
    cache = compress(model, some_ids(total=T), Ends(), 0.5)
    with pytest.raises(ConfigError, match="assisted decoding"):
        model.generate(some_ids(), past_key_values=cache, prompt_lookup_num_tokens=3, max_new_tokens=8)


def test_ragged_caches_need_the_attention_that_reads_them():
    model = prepare(tiny_model("llama"))
    cache = compress(model, some_ids(total=T), Ragged(), 0.5)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ConfigError, match="prepare"):
        cache.check_attention()


def test_uniform_caches_work_under_stock_sdpa():
    model = prepare(tiny_model("llama"))
    ids = some_ids()
    cache = compress(model, ids[:, :T], Scatter(), 0.5)
    selection = cache.selection()
    expected = greedy_by_masked_forward(model, ids, selection, 6)
    model.set_attn_implementation("sdpa")
    out = model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False)
    assert torch.equal(out, expected)


def test_as_budget_reads_what_people_write():
    assert as_budget(0.5) == Budget(compression_ratio=0.5)
    assert as_budget(0.0) == Budget(compression_ratio=0.0)
    assert as_budget(64) == Budget(tokens=64)
    assert as_budget(None) == Budget()


@pytest.mark.parametrize(
    "method",
    ["knorm", "tova", "h2o", "dynamic_kv", "rocket_kv", "defensive_kv", "layer_defensive_kv", "quest"],
)
def test_activations_that_are_no_numbers_choose_nothing(method):
    """`quest` evicts nothing, and goes on as the full cache does."""
    model = prepare(tiny_model("llama"))
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] = torch.nan
    ids = torch.randint(3, 250, (1, 90), generator=torch.Generator().manual_seed(1))
    if method == "quest":
        assert compress(model, ids, method, 0.5).intact
        return
    with pytest.raises(ConfigError, match=rf"method '{method}': scores in layer \d are NaN"):
        compress(model, ids, method, 0.5)
    if method != "rocket_kv":
        with pytest.raises(ConfigError, match="are NaN"):
            prefill(model, ids, [Request("a", make_policy(method), Budget(0.5))])


@pytest.mark.parametrize(
    "route", ["adakv(knorm)", "adakv_snapkv", "critical_adakv(snapkv)", "kvzip", "press"]
)
def test_nor_do_they_where_kvpress_decides(route):
    """kvpress's presses keep their scores to themselves: there it is the keys, one layer later."""
    model = prepare(tiny_model("llama", num_hidden_layers=3))
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] = torch.nan
    ids = torch.randint(3, 250, (1, 90), generator=torch.Generator().manual_seed(1))
    with pytest.raises(ConfigError, match=r"(keys|scores) in layer \d are NaN"):
        if route == "press":
            with PolicyPress(make_policy("snapkv"), 0.5)(model):
                model(ids, past_key_values=DynamicCache())
        else:
            compress(model, ids, route, 0.5, tokenizer=toy_tokenizer())
