"""The cache as a whole: rows, time, layers that differ, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from oracle import masked_logits, stepped_logits
from sample_policies import Ends, Ragged, SmallKeys
from sparsekv.attention import prepare
from sparsekv.cache.sparse import SparseCache
from sparsekv.errors import ConfigError
from sparsekv.generation import compress
from sparsekv.policies import make_policy
from sparsekv.policies.base import LayerContext, LayerPolicy
from sparsekv.policies.budget import Budget
from sparsekv.selection import Selection, stack
from toy import tiny_model, toy_tokenizer

T, Q = 40, 7


def some_ids(rows: int = 1, total: int = T + Q, seed: int = 3) -> torch.Tensor:
    return torch.randint(3, 250, (rows, total), generator=torch.Generator().manual_seed(seed))


@dataclass
class Favoured(LayerPolicy):
    """Random scores; one layer's are all higher than the others'."""

    name: str = "favoured"
    layer: int = 0

    def score_layer(self, ctx: LayerContext, budget: Budget) -> torch.Tensor:
        generator = torch.Generator().manual_seed(ctx.layer_idx)
        return torch.rand(ctx.keys.shape[:3], generator=generator) + 10 * (ctx.layer_idx == self.layer)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_model_wide_budget_that_leaves_one_layer_whole(layer):
    model = prepare(tiny_model("llama"))
    ids = some_ids()
    cache = compress(model, ids[:, :T], Favoured(layer=layer), Budget(0.3, scope="model"))
    assert cache.stored_counts()[layer].unique().tolist() == [T]
    assert int(cache.stored_counts().sum()) == int(T * 0.7) * 6
    masked = masked_logits(model, ids, None, cache.selection().extend(T + Q), Q)
    assert (masked - stepped_logits(model, cache, ids, None, [3, 4])).abs().max() <= 1e-4


def test_snapshots_of_one_buffer_survive_each_other_after_a_restore():
    """Seventy single tokens move the cache to a fresh buffer; the old one then serves two snapshots."""
    model = prepare(tiny_model("llama"))
    ids = some_ids(total=T + 80)
    cache = compress(model, ids[:, :T], Ragged(), 0.5)
    stepped_logits(model, cache, ids, None, [1])
    outer = cache.snapshot()
    stepped_logits(model, cache, ids, None, [1])
    inner = cache.snapshot()
    expected = stepped_logits(model, cache, ids, None, [1] * 70)
    cache.restore(outer)
    stepped_logits(model, cache, some_ids(total=T + 80, seed=9), None, [1, 1])
    cache.restore(inner)
    assert torch.equal(stepped_logits(model, cache, ids, None, [1] * 70), expected)


def test_remembered_inputs_follow_rows_crops_and_snapshots():
    model = prepare(tiny_model("llama"))
    ids = some_ids(2, T + 9)
    cache = compress(model, ids[:, :T], SmallKeys(), 20, phase="decode", every=100)
    layer = cache.layers[1]
    before = cache.snapshot()
    held = layer.recent_inputs[0].clone()
    assert held.shape[:2] == (2, T)
    stepped_logits(model, cache, ids, None, [3])
    grown = layer.recent_inputs[0].clone()
    assert torch.equal(grown[:, :T], held) and grown.shape[1] == T + 3
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(layer.recent_inputs[0], grown.flip(0))
    cache.crop(T + 1)
    assert torch.equal(layer.recent_inputs[0], grown.flip(0)[:, : T + 1])
    cache.restore(before)
    assert torch.equal(layer.recent_inputs[0], held)
    cache.reset()
    assert layer.recent_inputs is None and cache.nbytes == 0


def test_an_observation_window_longer_than_the_first_answers():
    """SnapKV looks through 64 queries; with an eviction every 8 tokens they come from the context."""
    model = prepare(tiny_model("llama"))
    ids = some_ids(total=141)
    cache = compress(model, ids[:, :140], make_policy("snapkv"), 100, phase="both", every=8)
    model.generate(ids, past_key_values=cache, max_new_tokens=40, do_sample=False)
    assert 100 <= int(cache.stored_counts().max()) < 108


def test_chunks_are_of_equal_size_so_that_the_last_fills_the_window():
    model = prepare(tiny_model("llama"))
    cache = compress(model, some_ids(total=140), make_policy("snapkv"), 0.5, chunk=100)
    assert cache.stored_counts().unique().tolist() == [70]


def test_a_second_turn_knows_each_token_once_and_evicts_by_its_own_policy_only():
    model = prepare(tiny_model("llama"))
    ids = some_ids(total=T + 20)
    options = {"phase": "both", "every": 1, "tokenizer": toy_tokenizer()}
    cache = compress(model, ids[:, :T], make_policy("anchors"), 20, **options)
    compress(model, ids, make_policy("anchors"), 45, cache=cache, **options)
    assert torch.equal(cache.ids, ids.to(torch.int32))
    assert cache.stored_counts().unique().tolist() == [40], "20 of the first turn and the 20 new ones"


def test_beams_with_a_policy_that_reads_the_text_while_decoding():
    model = prepare(tiny_model("llama"))
    ids = some_ids()
    options = {"phase": "both", "every": 4, "tokenizer": toy_tokenizer()}
    cache = compress(model, ids[:, :T], make_policy("anchors"), 30, **options)
    out = model.generate(
        ids, past_key_values=cache, max_new_tokens=10, num_beams=3, num_return_sequences=3, do_sample=False
    )
    assert out.shape == (3, T + Q + 10)
    assert cache.ids.shape == (3, T + Q + 9)
    assert torch.equal(cache.ids[:, : T + Q].long(), ids.expand(3, -1))


def test_rows_that_are_no_multiple_are_refused():
    model = prepare(tiny_model("llama"))
    cache = compress(model, some_ids(2, T), Ends(), 0.5)
    with pytest.raises(ConfigError, match="holds 2 rows, the model was given 3"):
        model(input_ids=some_ids(3, Q), past_key_values=cache)
    with pytest.raises(ConfigError, match="for 1 rows and 40 columns; the cache has 2 rows"):
        cache.apply(Selection.from_kept(torch.arange(T)[None, None, None] < 9))


def test_stock_attention_does_not_read_a_ragged_cache_silently():
    model = prepare(tiny_model("llama"))
    ids = some_ids()
    cache = compress(model, ids[:, :T], Ragged(), 0.5)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ConfigError, match="prepare"):
        model(input_ids=ids[:, T : T + 1], past_key_values=cache)


def test_a_moved_window_refuses_to_crop_before_anything_is_cropped():
    model = prepare(tiny_model("gemma3"))
    ids = some_ids()
    cache = compress(model, ids[:, :T], Ends(), 0.5)
    stepped_logits(model, cache, ids, None, [5])
    cache.crop(T + 5)  # nothing to forget
    with pytest.raises(ConfigError, match="snapshot and restore"):
        cache.crop(T)
    assert [layer.get_seq_length() for layer in cache.layers] == [T + 5] * 3


def test_forks_keep_the_seed_and_take_hard_selections_only():
    model = prepare(tiny_model("llama"))
    cache = compress(model, some_ids(total=T), Ends(), 0.0, seeds=(7,))
    whole = cache.selection()
    assert cache.fork([whole, whole]).seeds == (7, 7)
    with pytest.raises(ConfigError, match="log_weight"):
        stack([Selection(whole.evicted_at, torch.zeros(1, 1, 1, T))])


def test_a_model_wide_budget_can_not_evict_while_decoding():
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match="phase='prefill'"):
        compress(model, some_ids(total=T), SmallKeys(), Budget(0.5, scope="model"), phase="both")


def test_a_prefill_by_generate_itself_learns_the_padding():
    model = prepare(tiny_model("llama"))
    ids, mask = some_ids(2), torch.ones(2, T + Q, dtype=torch.int64)
    mask[1, :9] = 0
    cache = SparseCache(model.config)
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=4, do_sample=False)
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert torch.equal(out, expected)
    assert cache.real_seen().tolist() == [T + Q + 3, T + Q + 3 - 9]
