"""The chunked losses against plain torch on full logits, in values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from sparsekv.training.linear_loss import Head, token_losses


def reference(states, head, labels, ce_weight, teacher, kl_weight, temperature):
    """Sum of weighted CE and KL from whole fp64 logits."""
    logits = F.linear(states, head.weight, head.bias)
    if head.softcap:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    ce = F.cross_entropy(logits, labels, reduction="none")
    total = (ce * ce_weight).sum()
    kl = torch.zeros_like(ce)
    if teacher is not None:
        target = F.linear(teacher, head.weight, head.bias).detach()
        if head.softcap:
            target = head.softcap * torch.tanh(target / head.softcap)
        target = target / temperature
        kl = F.kl_div(
            F.log_softmax(logits / temperature, -1),
            F.log_softmax(target, -1),
            log_target=True,
            reduction="none",
        ).sum(-1)
        kl = kl * temperature**2
        total = total + (kl * kl_weight).sum()
    return total, ce, kl


@pytest.mark.parametrize("chunk", [1, 3, 128])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("teach", [True, False])
def test_values_and_gradients_equal_those_of_full_logits(chunk, temperature, softcap, teach):
    generator = torch.Generator().manual_seed(0)
    n, width, vocabulary = 7, 5, 11
    states = torch.randn(n, width, generator=generator, requires_grad=True)
    weight = torch.randn(vocabulary, width, generator=generator, requires_grad=True)
    bias = torch.randn(vocabulary, generator=generator, requires_grad=True)
    teacher = torch.randn(n, width, generator=generator) if teach else None
    labels = torch.randint(0, vocabulary, (n,), generator=generator)
    ce_weight, kl_weight = (torch.rand(n, generator=generator) for _ in range(2))
    head = Head(weight, bias, softcap)
    made = token_losses(
        states,
        head,
        labels,
        ce_weight,
        teacher_states=teacher,
        kl_weight=kl_weight if teach else None,
        temperature=temperature,
        chunk=chunk,
    )
    (3 * made.total).backward()
    got = [x.grad.clone() for x in (states, weight, bias)]
    for x in (states, weight, bias):
        x.grad = None
    total, ce, kl = reference(states, head, labels, ce_weight, teacher, kl_weight, temperature)
    (3 * total).backward()
    torch.testing.assert_close(made.total, total)
    torch.testing.assert_close(made.ce, ce.detach())
    torch.testing.assert_close(made.kl, kl.detach(), rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(got, (states, weight, bias), strict=True):
        torch.testing.assert_close(ours, theirs.grad, rtol=1e-4, atol=1e-5)


def test_a_teacher_that_is_the_student_has_no_kl_and_a_wrong_one_has():
    torch.manual_seed(0)
    states, weight = torch.randn(4, 6), torch.randn(9, 6)
    ones, labels = torch.ones(4), torch.zeros(4, dtype=torch.long)
    head = Head(weight)
    same = token_losses(states, head, labels, ones, teacher_states=states, kl_weight=ones)
    other = token_losses(states, head, labels, ones, teacher_states=states.flip(0), kl_weight=ones)
    assert same.kl.abs().max() < 1e-6
    assert other.kl.min() > 0.01
