"""Side outputs of attention against full attention matrices computed by hand."""

from __future__ import annotations

import pytest
import torch

from sparsekv.errors import ConfigError
from sparsekv.observers import AttentionSparsity, RetainedAttention
from sparsekv.plan import Seen
from sparsekv.selection import NEVER

B, HQ, H, T, D = 2, 4, 2, 14, 8
START = (0, 3)
"""First real column of each row."""


def seen(boundaries=((0, 8), (3, 10)), log_weight=None, **changes):
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(B, HQ, T, D, generator=generator).requires_grad_()
    key = torch.randn(B, H, T, D, generator=generator).requires_grad_()
    at = torch.full((B, H, T), NEVER, dtype=torch.int32)
    for row, (start, boundary) in enumerate([(0, 8), (3, 10)]):
        at[row, :, :start] = 0
        at[row, 0, start + 1 : boundary : 2] = boundary
        at[row, 1, start + 2 : boundary : 3] = boundary
    made = {
        "module": torch.nn.Module(),
        "layer_idx": 3,
        "query": query,
        "key": key,
        "evicted_at": at,
        "log_weight": log_weight,
        "scaling": D**-0.5,
        "boundaries": boundaries,
    }
    return Seen(**{**made, **changes})


def probabilities(case, row, hide):
    """Softmax weights [HQ, T, T] of one row; `hide`: evicted entries leave before the softmax."""
    query, key = case.query[row], case.key[row].repeat_interleave(HQ // H, 0)
    at = case.evicted_at[row].repeat_interleave(HQ // H, 0)
    column = torch.arange(T)
    allowed = (column <= column[:, None]) & (column >= START[row])
    allowed = allowed.expand(HQ, T, T)
    if hide:
        allowed = allowed & (column[None, :, None] < at[:, None, :])
    logits = (query @ key.transpose(1, 2)) * case.scaling
    return logits.masked_fill(~allowed, float("-inf")).softmax(-1)


def test_retained_attention_is_the_mass_on_what_is_visible():
    case = seen()
    found = RetainedAttention(n_queries=T).observe(case)
    wanted = []
    for row, boundary in enumerate((8, 10)):
        p = probabilities(case, row, hide=False)[:, boundary:]
        at = case.evicted_at[row].repeat_interleave(2, 0)
        visible = torch.arange(boundary, T)[None, :, None] < at[:, None, :]
        wanted.append((p * visible).sum(-1).mean())
    torch.testing.assert_close(found, torch.stack(wanted).mean().detach())
    assert 0.3 < found < 0.9 and not found.requires_grad
    everything = torch.full((B, H, T), NEVER, dtype=torch.int32)
    assert RetainedAttention().observe(seen(evicted_at=everything)) == pytest.approx(1.0)


def test_soft_evictions_retain_by_their_weight():
    weight = torch.full((B, H, T), 0.3).log()
    hard = RetainedAttention(n_queries=T).observe(seen())
    soft = RetainedAttention(n_queries=T).observe(seen(log_weight=weight))
    torch.testing.assert_close(soft, hard + 0.3 * (1 - hard))


def test_without_boundaries_what_leaves_first_tells_where_to_look():
    with_them, without = (RetainedAttention(n_queries=T).observe(seen(b)) for b in (((0, 8), (3, 10)), None))
    torch.testing.assert_close(with_them, without)


@pytest.mark.parametrize("kind", ["entropy", "l1"])
def test_sparsity_over_every_query_is_exact(kind):
    case = seen()
    found = AttentionSparsity(kind=kind, n_queries=None).observe(case)
    rows = []
    for row in range(B):
        p = probabilities(case, row, hide=True)[:, START[row] :, START[row] :]
        if kind == "entropy":
            value = -(p * torch.where(p > 0, p, 1.0).log()).sum(-1)
        else:
            value = p.sum(-1) / p.norm(dim=-1)
        rows.append(value.mean())
    torch.testing.assert_close(found, torch.stack(rows).mean(), rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(found, (case.query, case.key))
    wanted = torch.autograd.grad(torch.stack(rows).mean(), (case.query, case.key))
    for grad, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-6)
    weighted = AttentionSparsity(kind=kind, n_queries=None, weights=(3.0, 1.0)).observe(case)
    torch.testing.assert_close(weighted, (3 * rows[0] + rows[1]) / 4)
    assert AttentionSparsity(kind=kind, weights=(0.0, 0.0)).observe(case) == 0


def test_extremes_of_the_measures():
    """Uniform attention over n entries: log n and sqrt n; a single entry: 0 and 1."""
    alike = {"query": torch.zeros(1, HQ, T, D), "key": torch.zeros(1, H, T, D)}
    at = torch.full((1, H, T), NEVER, dtype=torch.int32)
    case = seen(((0, T),), evicted_at=at, **alike)
    counts = torch.arange(1, T + 1).float()
    entropy = AttentionSparsity(n_queries=None).observe(case)
    torch.testing.assert_close(entropy, counts.log().mean())
    torch.testing.assert_close(AttentionSparsity("l1", None).observe(case), counts.sqrt().mean())
    column = torch.arange(T, dtype=torch.int32)
    alone = seen(None, evicted_at=(column + 1).expand(1, H, T), **alike)  # every token sees only itself
    assert AttentionSparsity(n_queries=None).observe(alone) == pytest.approx(0.0, abs=1e-6)
    assert AttentionSparsity("l1", None).observe(alone) == pytest.approx(1.0)


def test_sampled_queries_belong_to_row_seed_and_layer():
    def value(seeds=(5, 6), layer=3):
        return float(AttentionSparsity(n_queries=3, seeds=seeds).observe(seen(layer_idx=layer)).detach())

    assert value() == value() and len({value(), value((7, 6)), value((5, 7)), value(layer=4)}) == 4


@pytest.mark.parametrize(
    ("given", "message"),
    [({"kind": "entrop"}, "did you mean 'entropy'"), ({"n_queries": 0}, "n_queries must be at least 1")],
)
def test_mistakes_are_told(given, message):
    with pytest.raises(ConfigError, match=message):
        AttentionSparsity(**given)


@pytest.mark.parametrize("kind", ["entropy", "l1"])
def test_sparsity_counts_fading_entries_by_their_weight(kind):
    """A weight of 1 is nothing evicted, one of 0 is evicted, 0.3 adds log 0.3 to the logits of what would be hidden."""
    measure = AttentionSparsity(kind=kind, n_queries=None)
    nothing = torch.where(seen().evicted_at > 0, NEVER, 0).to(torch.int32)
    whole, hard = (
        measure.observe(seen(evicted_at=nothing)).detach(),
        measure.observe(seen()).detach(),
    )
    weight = torch.zeros(B, H, T)
    torch.testing.assert_close(measure.observe(seen(log_weight=weight)).detach(), whole)
    torch.testing.assert_close(measure.observe(seen(log_weight=weight - 1e4)).detach(), hard)

    weight = torch.full((B, H, T), 0.3).log().requires_grad_()
    case = seen(log_weight=weight)
    found, rows = measure.observe(case), []
    for row in range(B):
        start, column = START[row], torch.arange(T)
        logits = (
            case.query[row] @ case.key[row].repeat_interleave(HQ // H, 0).transpose(1, 2)
        ) * case.scaling
        hidden = column[:, None] >= case.evicted_at[row].repeat_interleave(HQ // H, 0)[:, None, :]
        logits = torch.where(hidden, logits + weight[row].repeat_interleave(HQ // H, 0)[:, None, :], logits)
        allowed = (column <= column[:, None]) & (column >= start)
        p = logits.masked_fill(~allowed, float("-inf")).softmax(-1)[:, start:, start:]
        entropy = -(p * torch.where(p > 0, p, 1.0).log()).sum(-1)
        rows.append((entropy if kind == "entropy" else p.sum(-1) / p.norm(dim=-1)).mean())
    wanted = torch.stack(rows).mean()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    (grad,), (other,) = (
        torch.autograd.grad(found, weight, retain_graph=True),
        torch.autograd.grad(wanted, weight),
    )
    assert other.abs().max() > 0
    torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-6)
