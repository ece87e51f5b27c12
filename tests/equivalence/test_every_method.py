"""Every method of the first two routes, and every policy of ours: masked forward = compacted cache, on six families.

Of methods that choose at every step what to read, the eviction: what is stored is read whole here.
"""

from __future__ import annotations

import functools

import pytest
import torch

from oracle import masked_logits, stepped_logits
from sparsekv.attention import prepare
from sparsekv.errors import ConfigError
from sparsekv.generation import compress
from sparsekv.policies import list_methods, make_policy
from sparsekv.policies.base import ModelPolicy, TokenContext
from sparsekv.policies.budget import Budget
from sparsekv.policies.press_table import needs_hub
from sparsekv.policies.presses import KVPRESS_METHODS, parse_method
from sparsekv.relevance import attach_relevance
from sparsekv.selection import NEVER, Selection
from toy import FAMILIES, tiny_model, toy_tokenizer

# long enough for every press's window (lagkv's partitions need more than 260 tokens)
T, Q = 288, 5
PADS = (0, 9, 17)
TOLERANCE = 1e-4
OWN_SIZES = {"simlayerkv", "per_layer_compression"}


def methods() -> list[str]:
    """Names of every method that works offline and only chooses entries, and some wrapper(inner) ones."""
    names = []
    for info in list_methods():
        spec = parse_method(info.name) if info.name in KVPRESS_METHODS else None
        if info.route != "native" and not (spec is not None and needs_hub(spec)):
            names.append(info.name)
    return [*names, "block(knorm)", "chunk(tova)", "chunkkv(keydiff)", "critical(knorm)", "adakv(tova)"]


def refused(family: str, name: str) -> bool:
    """Presses that run the model themselves count Gemma-3's sliding layers into their budget, so they refuse it."""
    return family == "gemma3" and isinstance(make_policy(name), ModelPolicy)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 250, (3, T + Q), generator=torch.Generator().manual_seed(11))
    mask = torch.ones_like(ids)
    for row, pad in enumerate(PADS):
        mask[row, :pad] = 0
    return ids, mask


@functools.cache
def model_of(family: str):
    return attach_relevance(prepare(tiny_model(family, num_hidden_layers=3)))  # for the method of that name


@pytest.mark.parametrize("name", methods())
@pytest.mark.parametrize("family", FAMILIES)
def test_masked_equals_compacted(family, name):
    model, tokenizer = model_of(family), toy_tokenizer()
    policy = make_policy(name)
    ids, mask = batch()
    if refused(family, name):
        with pytest.raises(ConfigError):
            compress(model, ids[:1, :T], policy, 0.5, tokenizer=tokenizer)
        return
    seeds = (0, 1, 2)
    for ratio in (0.3, 0.5, 0.9):
        budget = None if name in OWN_SIZES else ratio
        options = {"attention_mask": mask[:, :T], "seeds": seeds, "tokenizer": tokenizer}
        cache = read_whole(compress(model, ids[:, :T], policy, budget, **options))
        selection = cache.selection()
        masks_prefill = not isinstance(policy, ModelPolicy) and policy.own_prefill
        masked_by = windowed(selection, policy, ids, mask, ratio) if masks_prefill else selection
        masked = masked_logits(model, ids, mask, masked_by.extend(T + Q), Q)
        stored = stepped_logits(model, cache, ids, mask, [2, 1, 2])
        assert (masked - stored).abs().max() <= TOLERANCE
        if ratio != 0.5:
            continue
        for row, pad in enumerate(PADS):
            alone = compress(
                model, ids[row : row + 1, pad:T], policy, budget, seeds=(seeds[row],), tokenizer=tokenizer
            )
            expected = alone.selection().evicted_at > T - pad
            assert torch.equal(selection.evicted_at[row : row + 1, :, :, pad:] > T, expected)
            own = stepped_logits(model, read_whole(alone), ids[row : row + 1, pad:], None, [2, 1, 2])
            assert (own - stored[row]).abs().max() <= TOLERANCE


def read_whole(cache):
    """The cache, with every step reading all that is stored."""
    for _, layer in cache.sparse_layers():
        layer.reader = None
    return cache


def windowed(selection, policy, ids, mask, ratio):
    """A sliding window also hides entries inside the prefill; afterwards only what left by then stays hidden."""
    context = TokenContext(ids[:, :T], mask[:, :T].bool(), n_layers=3, n_kv_heads=2)
    at = policy.select(context, Budget(compression_ratio=ratio)).evicted_at
    return Selection(at.masked_fill(at > T, NEVER))
