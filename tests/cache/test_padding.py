"""Padding over turns, chunks and while decoding: each row is what the masked forward says, or what it is alone."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from oracle import masked_logits, stepped_logits
from sample_policies import Ends, Scatter, SmallKeys
from sparsekv.attention import prepare
from sparsekv.errors import ConfigError
from sparsekv.generation import compress
from sparsekv.policies import make_policy
from sparsekv.policies.base import TokenPolicy
from sparsekv.policies.budget import Budget
from sparsekv.selection import NEVER, Selection
from toy import tiny_model, toy_tokenizer

T, Q = 40, 7
TOLERANCE = 1e-4


def padded(total: int, *pads: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 250, (len(pads), total), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
    return ids, mask


@pytest.mark.parametrize("mask_again", [True, False])
def test_a_later_turn_remembers_the_padding_of_the_first(mask_again):
    model = prepare(tiny_model("llama"))
    total = T + 20
    ids, mask = padded(total + Q, 0, 9)
    cache = compress(model, ids[:, :T], Ends(), 0.5, attention_mask=mask[:, :T])
    first = cache.selection()
    second_mask = mask[:, :total] if mask_again else None
    compress(model, ids[:, :total], Ends(), 0.6, cache=cache, attention_mask=second_mask)
    merged = first.extend(total + Q).merge(cache.selection().extend(total + Q))
    masked = masked_logits(model, ids, mask, merged, Q)
    assert (masked - stepped_logits(model, cache, ids, mask, [3, 1, 3])).abs().max() <= TOLERANCE


def test_layer_policies_evict_a_padded_batch_again():
    model = prepare(tiny_model("qwen3"))
    total = T + 20
    ids, mask = padded(total + Q, 0, 9)
    cache = compress(model, ids[:, :T], SmallKeys(), 0.5, attention_mask=mask[:, :T])
    compress(model, ids[:, :total], SmallKeys(), 0.6, cache=cache, attention_mask=mask[:, :total])
    together = stepped_logits(model, cache, ids, mask, [Q])
    for row, pad in enumerate((0, 9)):
        own = ids[row : row + 1, pad:]
        alone = compress(model, own[:, : T - pad], SmallKeys(), 0.5)
        compress(model, own[:, : total - pad], SmallKeys(), 0.6, cache=alone)
        kept = alone.selection().evicted_at > total - pad
        assert torch.equal(cache.selection().evicted_at[row : row + 1, :, :, pad:total] > total + Q, kept)
        assert (stepped_logits(model, alone, own, None, [Q]) - together[row]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_chunks_of_a_padded_batch_equal_the_masked_forward(family):
    """Row 2 sees nothing but padding in the first two chunks."""
    model = prepare(tiny_model(family))
    total, budget, chunk, pads = 60, 16, 12, (0, 5, 29)
    ids, mask = padded(total + Q, *pads)
    cache = compress(model, ids[:, :total], Ends(), budget, chunk=chunk, attention_mask=mask[:, :total])
    column = torch.arange(total + Q)
    at = torch.full((3, total + Q), NEVER, dtype=torch.int32)
    for row, pad in enumerate(pads):
        for end in range(chunk, total + 1, chunk):
            gone = (column >= pad + 2) & (column < end - (budget - 2)) & (at[row] == NEVER)
            at[row, gone] = end
        at[row, :pad] = 0
    masked = masked_logits(model, ids, mask, Selection(at[:, None, None]), Q)
    assert (masked - stepped_logits(model, cache, ids, mask, [3, 1, 3])).abs().max() <= TOLERANCE


@pytest.mark.parametrize(
    "name", ["knorm", "tova", "sink_recent", "uniform_middle", "random", "ladder", "anchors"]
)
def test_methods_take_chunks_that_are_padding_for_some_row(name):
    model = prepare(tiny_model("llama"))
    ids, mask = padded(60, 0, 29)
    cache = compress(
        model, ids, make_policy(name), 16, chunk=12, attention_mask=mask, tokenizer=toy_tokenizer()
    )
    assert cache.stored_counts().unique().tolist() == [16]
    assert not bool(cache.kept_columns()[1, :, :, :29].any())


def test_a_question_padded_inside_the_sequence_is_hidden_while_decoding():
    """The padding lies between context and question, and decode eviction must neither keep it nor count it."""
    model = prepare(tiny_model("llama"))
    ids, mask = padded(70, 0, 10)
    mask[1, 40:44] = 0
    cache = compress(model, ids[:, :T], Ends(), 20, attention_mask=mask[:, :T], phase="both", every=2)
    out = stepped_logits(model, cache, ids, mask, [8] + [1] * 22)
    own = ids[1:, mask[1].bool()]
    alone = compress(model, own[:, :30], Ends(), 20, phase="both", every=2)
    expected = stepped_logits(model, alone, own, None, [4] + [1] * 22)
    assert (out[1, -22:] - expected[0, -22:]).abs().max() <= TOLERANCE
    assert torch.equal(cache.stored_counts()[:, 1], alone.stored_counts()[:, 0])


def test_a_model_wide_budget_of_a_padded_row_is_that_of_the_row_alone():
    model = prepare(tiny_model("llama"))
    ids, mask = padded(T + Q, 5)
    budget = Budget(0.3, scope="model")
    cache = compress(model, ids[:, :T], SmallKeys(), budget, attention_mask=mask[:, :T])
    alone = compress(model, ids[:, 5:T], SmallKeys(), budget)
    assert torch.equal(cache.selection().evicted_at[..., 5:] > T, alone.selection().evicted_at > T - 5)
    assert cache.achieved_compression == alone.achieved_compression


def test_padding_in_layers_that_keep_everything_is_not_counted_as_stored():
    @dataclass(frozen=True)
    class Late(TokenPolicy):
        """Only the last layer loses its first half."""

        name: str = "late"

        def keep_row(self, row, budget):
            kept = torch.ones(row.context.n_layers, 1, row.n, dtype=torch.bool)
            kept[-1, :, : row.n // 2] = False
            return kept

    model = prepare(tiny_model("llama"))
    ids, mask = padded(T, 0, 10)
    cache = compress(model, ids, Late(), 0.5, attention_mask=mask)
    assert cache.achieved_compression == pytest.approx([1 / 6, 1 / 6])


def test_masks_that_contradict_the_cache_are_refused():
    model = prepare(tiny_model("llama"))
    ids, mask = padded(T + Q, 0, 9)
    cache = compress(model, ids[:, :T], Scatter(), 0.5, attention_mask=mask[:, :T])
    with pytest.raises(ConfigError, match="attention_mask differs"):
        model.generate(ids, past_key_values=cache, max_new_tokens=2)  # generate makes a mask of ones
    with pytest.raises(ConfigError, match="give the attention_mask"):
        model(input_ids=ids[:, T:], past_key_values=cache)
    with pytest.raises(ConfigError, match="covers 7 columns"):
        model(input_ids=ids[:, T:], past_key_values=cache, attention_mask=mask[:, T:])
    with pytest.raises(ConfigError, match="earlier turns"):
        compress(model, ids, Ends(), 0.5, cache=cache, attention_mask=torch.ones_like(mask))
    assert cache.seen == T, "a refused forward must leave the cache alone"


def test_layers_that_evict_at_different_times_share_a_mask_wide_enough_for_all():
    """The first layer has just been compacted when the others still hold a longer tail than it stores."""

    @dataclass(frozen=True)
    class Odd(TokenPolicy):
        """Five newest entries in the first layer, two in the others."""

        name: str = "odd"

        def keep_row(self, row, budget):
            column = torch.arange(row.n).expand(row.context.n_layers, 1, -1)
            n_kept = torch.tensor([5] + [2] * (row.context.n_layers - 1))[:, None, None]
            return column >= row.n - n_kept

    model = prepare(tiny_model("llama"))
    ids, mask = padded(T + 60, 0, 10)
    options = {"phase": "both", "every": 1}
    cache = compress(model, ids[:, :T], Odd(), 20, attention_mask=mask[:, :T], **options)
    together = stepped_logits(model, cache, ids, mask, [2] * 30)
    alone = compress(model, ids[1:, 10:T], Odd(), 20, **options)
    assert (
        together[1] - stepped_logits(model, alone, ids[1:, 10:], None, [2] * 30)[0]
    ).abs().max() <= TOLERANCE
