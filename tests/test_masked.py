"""The split attention of training against the plain mask: same outputs, same gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekv.masked import attend_selected
from sparsekv.selection import NEVER, Selection


class Heads(torch.nn.Module):
    """What sdpa_attention_forward reads of an attention module."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups
        self.is_causal = True


def tensors(rows: int, groups: int, heads: int, total: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(total + 31 * groups)
    shapes = [(rows, heads * groups, total, 8), (rows, heads, total, 8), (rows, heads, total, 8)]
    return tuple(torch.randn(*shape, generator=generator).requires_grad_() for shape in shapes)


def both_ways(at, weight, mask, groups, heads):
    """(output of the split, output by mask, gradients of each) with the same inputs."""
    found = []
    boundaries = Selection(at[:, None]).boundaries
    assert boundaries is not None
    for spans in (boundaries, None):
        inputs = tensors(at.shape[0], groups, heads, at.shape[-1])
        soft = None if weight is None else weight.clone().requires_grad_()
        output = attend_selected(Heads(groups), *inputs, at, soft, spans, mask)
        real = (at[:, 0] > 0)[:, :, None, None]  # what padding computes is nobody's business
        wanted = torch.linspace(-1, 1, output[0].numel()).reshape(output[0].shape)
        (output * wanted * real).sum().backward()
        leaves = [*inputs] if soft is None else [*inputs, soft]
        grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
        found.append((output * real, grads))
    return found


@settings(max_examples=40, deadline=None)
@given(
    total=st.integers(1, 12),
    boundary=st.integers(1, 12),
    pads=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    groups=st.sampled_from([1, 3]),
    shared=st.booleans(),
    soft=st.booleans(),
    seed=st.integers(0, 99),
)
def test_split_and_mask_agree_in_outputs_and_gradients(total, boundary, pads, groups, shared, soft, seed):
    heads, rows = 2, len(pads)
    generator = torch.Generator().manual_seed(seed)
    pads = [min(pad, total - 1) for pad in pads]
    at = torch.full((rows, 1 if shared else heads, total), NEVER, dtype=torch.int32)
    for row, pad in enumerate(pads):
        leaves = torch.rand(at.shape[1], total, generator=generator) < 0.5
        end = min(max(boundary - row, pad + 1), total)
        leaves[:, end:] = False
        at[row, leaves] = end
        at[row, :, :pad] = 0
    weight = -3 * torch.rand(at.shape, generator=generator) if soft else None
    mask = None
    if any(pads):
        real = at[:, 0] > 0
        causal = torch.ones(total, total, dtype=torch.bool).tril()
        mask = (causal & real[:, None, :] | torch.eye(total, dtype=torch.bool))[:, None]
    (split, split_grads), (masked, masked_grads) = both_ways(at, weight, mask, groups, heads)
    torch.testing.assert_close(split, masked, rtol=1e-4, atol=1e-5)
    for one, other in zip(split_grads, masked_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_evicted_entries_get_no_gradient_from_later_queries():
    at = torch.tensor([[[3, NEVER, NEVER, NEVER, NEVER]]], dtype=torch.int32)
    query, key, value = tensors(1, 1, 1, 5)
    output = attend_selected(Heads(1), query, key, value, at, None, Selection(at[:, None]).boundaries, None)
    output[:, 3:].sum().backward()
    assert value.grad is not None
    assert value.grad[0, 0, 0].abs().sum() == 0
    assert value.grad[0, 0, 1].abs().sum() > 0


def test_padding_that_the_selection_does_not_know_is_left_to_the_mask():
    """A Selection without pads beside an attention mask with pads: the mask decides."""
    at = torch.tensor([[[NEVER, 3, NEVER, NEVER, NEVER]]], dtype=torch.int32)
    query, key, value = tensors(1, 1, 1, 5)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    mask[:, 0] = False
    mask[0, 0] = True
    output = attend_selected(Heads(1), query, key, value, at, None, [(0, 3)], mask[None, None])
    logits = (query[0, 0, 4] @ key[0, 0].T) * 8**-0.5
    weights = logits[[2, 3, 4]].softmax(-1)
    torch.testing.assert_close(output[0, 4, 0], weights @ value[0, 0, [2, 3, 4]])


@pytest.mark.parametrize("ragged", [False, True])
def test_one_head_by_hand(ragged):
    """Two kv heads that keep different entries (and, ragged, different numbers of them)."""
    rows = [[2, NEVER, NEVER], [NEVER, NEVER if ragged else 2, NEVER]]
    at = torch.tensor([rows], dtype=torch.int32)
    query, key, value = tensors(1, 1, 2, 3)
    output = attend_selected(Heads(1), query, key, value, at, None, [(0, 2)], None)
    for head, seen in enumerate([[1, 2], [0, 1, 2] if ragged else [0, 2]]):
        weights = ((query[0, head, 2] @ key[0, head, seen].T) * 8**-0.5).softmax(-1)
        torch.testing.assert_close(output[0, 2, head], weights @ value[0, head, seen])
