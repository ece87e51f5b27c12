"""The flagship: a masked forward and a compacted cache give the same logits. What is trained is what is served."""

from __future__ import annotations

import pytest
import torch

from oracle import masked_logits, stepped_logits
from sample_policies import Ends, Ragged, Scatter, SmallKeys
from sparsekv.attention import prepare
from sparsekv.generation import compress
from sparsekv.plan import SelectionPlan
from sparsekv.policies.budget import Budget
from sparsekv.selection import Selection
from toy import FAMILIES, tiny_model

T, Q = 48, 9
TOLERANCE = 1e-4
POLICIES = [Ends(), Scatter(), Ragged(), SmallKeys()]


def batch(padded: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    ids = torch.randint(3, 250, (3 if padded else 1, T + Q), generator=torch.Generator().manual_seed(7))
    if not padded:
        return ids, None
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    mask[2, :20] = 0
    return ids, mask


@pytest.mark.parametrize("padded", [False, True], ids=["single", "padded"])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_masked_forward_equals_compacted_cache(family, policy, padded):
    model = prepare(tiny_model(family))
    ids, mask = batch(padded)
    for ratio in (0.3, 0.5, 0.9):
        context_mask = None if mask is None else mask[:, :T]
        seeds = tuple(range(len(ids)))
        cache = compress(model, ids[:, :T], policy, ratio, attention_mask=context_mask, seeds=seeds)
        assert max(cache.achieved_compression) > ratio / 2
        selection = cache.selection().extend(T + Q)
        masked = masked_logits(model, ids, mask, selection, Q)
        stored = stepped_logits(model, cache, ids, mask, [4, 1, 1, 3])
        assert (masked - stored).abs().max() <= TOLERANCE
        plain = masked_logits(model, ids, mask, None, Q)
        assert (masked - plain).abs().max() > 100 * TOLERANCE, (
            "the eviction must matter for this to mean anything"
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_rows_are_what_they_are_alone(family):
    model = prepare(tiny_model(family))
    ids, mask = batch(True)
    for policy in POLICIES:
        cache = compress(model, ids[:, :T], policy, 0.5, attention_mask=mask[:, :T], seeds=(0, 1, 2))
        together = cache.selection()
        logits = stepped_logits(model, cache, ids, mask, [4, 1, 4])
        for row, pad in enumerate((0, 7, 20)):
            alone = compress(model, ids[row : row + 1, pad:T], policy, 0.5, seeds=(row,))
            kept = alone.selection()
            expected = kept.evicted_at > T - pad
            assert torch.equal(together.evicted_at[row : row + 1, :, :, pad:] > T, expected)
            own = stepped_logits(model, alone, ids[row : row + 1, pad:], None, [4, 1, 4])
            assert (own - logits[row]).abs().max() <= TOLERANCE


def test_one_flipped_entry_of_one_head_is_noticed():
    """Negative control: the equivalence would fail if a single entry of a single head were wrong."""
    for family in FAMILIES:
        model = prepare(tiny_model(family))
        ids, _ = batch(False)
        cache = compress(model, ids[:, :T], Scatter(), 0.5)
        selection = cache.selection().extend(T + Q)
        stored = stepped_logits(model, cache, ids, None, [Q])
        flipped = selection.evicted_at.clone()
        evicted = (flipped[0, 0, 1] == T).nonzero()[0]
        flipped[0, 0, 1, evicted] = T + Q
        wrong = masked_logits(model, ids, None, Selection(flipped), Q)
        assert (wrong - stored).abs().max() > 10 * TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padded", [False, True], ids=["single", "padded"])
def test_nothing_evicted_is_bitwise_the_plain_model(family, padded):
    plain, model = tiny_model(family), prepare(tiny_model(family))
    ids, mask = batch(padded)
    context_mask = None if mask is None else mask[:, :T]
    cache = compress(model, ids[:, :T], Ends(), 0.0, attention_mask=context_mask)
    options = {
        "max_new_tokens": 8,
        "do_sample": False,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    options["attention_mask"] = torch.ones_like(ids) if mask is None else mask
    ours = model.generate(ids, past_key_values=cache, **options)
    from transformers import DynamicCache

    stock = DynamicCache(config=plain.config)
    with torch.no_grad():
        padding = {} if mask is None else {"attention_mask": mask[:, :T]}
        if mask is not None:
            padding["position_ids"] = (mask[:, :T].cumsum(-1) - 1).masked_fill(mask[:, :T] == 0, 0)
        plain.model(input_ids=ids[:, :T], past_key_values=stock, **padding)
    theirs = plain.generate(ids, past_key_values=stock, **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert all(torch.equal(a, b) for a, b in zip(ours.scores, theirs.scores, strict=True))


def test_masked_forward_with_nothing_evicted_is_bitwise_the_plain_forward():
    for family in FAMILIES:
        plain, model = tiny_model(family), prepare(tiny_model(family))
        ids, mask = batch(True)
        selection = Selection.full(mask)
        with torch.no_grad():
            ours = model(input_ids=ids, attention_mask=mask, selection=selection).logits
            theirs = plain(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("padded", [False, True], ids=["single", "padded"])
def test_a_plan_selects_in_the_forward_what_compress_selects_after_it(padded):
    for family in FAMILIES:
        model = prepare(tiny_model(family))
        ids, mask = batch(padded)
        context_mask = None if mask is None else mask[:, :T]
        cache = compress(model, ids[:, :T], SmallKeys(), 0.5, attention_mask=context_mask)
        selection = cache.selection()
        plan = SelectionPlan(SmallKeys(), Budget(compression_ratio=0.5), boundary=T, attention_mask=mask)
        masked = masked_logits(model, ids, mask, plan, Q)
        for layer in cache.compressible:
            assert torch.equal(plan.selected[layer][..., :T] > T, selection.layer(layer) > T)
        assert (masked - stepped_logits(model, cache, ids, mask, [Q])).abs().max() <= TOLERANCE


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_gradients_flow_through_a_soft_selection_and_checkpointing_does_not_change_them(family):
    grads = []
    for checkpointing in (False, True):
        model = prepare(tiny_model(family)).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        ids, _ = batch(False)
        logit = torch.linspace(-2, 2, T + Q).expand(1, 3, 2, -1).clone().requires_grad_()
        at = torch.full((1, 3, 2, T + Q), T, dtype=torch.int32)
        at[..., T:] = torch.iinfo(torch.int32).max
        selection = Selection(at, torch.nn.functional.logsigmoid(logit))
        loss = model(input_ids=ids, labels=ids, selection=selection, use_cache=False).loss
        loss.backward()
        weight = next(p for n, p in model.named_parameters() if "embed" in n)
        grads.append((loss.detach(), logit.grad.clone(), weight.grad.clone()))
    assert grads[0][1].abs().sum() > 0
    assert float(grads[0][1][..., T:].abs().sum()) == 0, "entries that never leave have no gate"
    for first, second in zip(*grads, strict=True):
        assert torch.allclose(first, second, rtol=1e-5, atol=1e-7)


def test_soft_selection_limits_are_the_hard_one_and_the_plain_model():
    model = prepare(tiny_model("llama"))
    ids, _ = batch(False)
    hard = Selection.from_kept(torch.arange(T)[None, None, None] % 2 == 0, context_len=T).extend(T + Q)
    for value, reference in ((0.0, None), (-1e9, hard)):
        soft = Selection(hard.evicted_at, torch.full(hard.evicted_at.shape, value))
        expected = masked_logits(model, ids, None, reference, Q)
        assert torch.allclose(masked_logits(model, ids, None, soft, Q), expected, atol=1e-5)
