"""Cross-entropy and KL straight from hidden states, in chunks: the [T, vocabulary] logits never exist at once.

Shape letters: N tokens, C hidden size, V vocabulary.

The gradient with respect to the hidden states (and the head's weight, where it is trained) is computed in the forward,
chunk by chunk, so that nothing is recomputed and nothing of size N x V is saved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK = 128
"""Tokens per chunk: at a vocabulary of 150,000, 77 MB per fp32 tensor."""


@dataclass(frozen=True)
class Head:
    """A language model's output layer: logits = softcap(h @ weight.T + bias).

    Parameters
    ----------
    weight : [V, C]
    bias : [V], optional
    softcap : float, optional
        logits become softcap * tanh(logits / softcap).
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None

    def logits(self, states: Tensor) -> Tensor:
        """fp32 [N, V]."""
        raw = torch.nn.functional.linear(states.to(self.weight.dtype), self.weight, self.bias).float()
        return raw if self.softcap is None else self.softcap * torch.tanh(raw / self.softcap)


@dataclass(frozen=True)
class TokenLosses:
    """A weighted sum over tokens, and what it is made of, per token and without gradient.

    Parameters
    ----------
    total : scalar, sum of ce_weight * CE + kl_weight * KL
    ce, kl : fp32 [N], nats; kl is times temperature², and 0 without a teacher
    """

    total: Tensor
    ce: Tensor
    kl: Tensor


def token_losses(
    states: Tensor,
    head: Head,
    labels: Tensor,
    ce_weight: Tensor,
    *,
    teacher_states: Tensor | None = None,
    teacher_head: Head | None = None,
    kl_weight: Tensor | None = None,
    temperature: float = 1.0,
    chunk: int = CHUNK,
) -> TokenLosses:
    """Cross-entropy to `labels`, and KL(teacher || student) * temperature², of N tokens.

    Parameters
    ----------
    states : FloatTensor [N, C]
        The student's last hidden states at the positions that predict `labels`.
    head : Head
    labels : LongTensor [N]
    ce_weight, kl_weight : FloatTensor [N]
        Per token; 0 leaves a token out.
    teacher_states : FloatTensor [N, C'], optional
    teacher_head : Head, optional
        The student's by default (used without gradient).
    temperature : float > 0
        Both distributions are softened by it (Hinton et al. 2015, arXiv 1503.02531, section 2).
    """
    use_teacher = teacher_states is not None and kl_weight is not None
    total, ce, kl = _Fused.apply(
        states,
        head.weight,
        head.bias,
        head.softcap,
        labels,
        ce_weight,
        teacher_states.detach() if use_teacher and teacher_states is not None else None,
        teacher_head or head,
        kl_weight if use_teacher else None,
        temperature,
        chunk,
        torch.is_grad_enabled(),
    )
    return TokenLosses(total, ce, kl)


class _Fused(torch.autograd.Function):
    """total = sum(ce_weight * CE + kl_weight * KL), with its gradients made on the way."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        labels: Tensor,
        ce_weight: Tensor,
        teacher_states: Tensor | None,
        teacher_head: Head,
        kl_weight: Tensor | None,
        temperature: float,
        chunk: int,
        training: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        head = Head(weight, bias, softcap)
        count = states.shape[0]
        ce = torch.zeros(count, dtype=torch.float32, device=states.device)
        kl = torch.zeros_like(ce)
        training = training and any(ctx.needs_input_grad)
        grad_states = torch.zeros_like(states) if training else states.new_zeros(0)
        needs_weight, needs_bias = (training and ctx.needs_input_grad[i] for i in (1, 2))
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias and bias is not None else None
        for begin in range(0, count, chunk):
            part = slice(begin, min(begin + chunk, count))
            logits = head.logits(states[part])
            log_norm = logits.logsumexp(-1, keepdim=True)
            ce[part] = (log_norm - logits.gather(1, labels[part, None]))[:, 0]
            grad = (logits - log_norm).exp_()
            if teacher_states is not None and kl_weight is not None:
                target = teacher_head.logits(teacher_states[part]).div_(temperature).log_softmax(-1)
                if temperature == 1.0:
                    soft = logits - log_norm
                    student = grad.clone()
                else:
                    soft = (logits / temperature).log_softmax(-1)
                    student = soft.exp()
                teacher = target.exp()
                kl[part] = (teacher * target.sub_(soft)).sum(-1) * temperature**2
                # A sequence of zeros * inf can't occur: log_softmax is finite.
                grad.scatter_add_(1, labels[part, None], grad.new_full((grad.shape[0], 1), -1.0))
                grad.mul_(ce_weight[part, None])
                grad.add_(student.sub_(teacher).mul_(kl_weight[part, None] * temperature))
            else:
                grad.scatter_add_(1, labels[part, None], grad.new_full((grad.shape[0], 1), -1.0))
                grad.mul_(ce_weight[part, None])
            if not training:
                continue
            if softcap is not None:
                grad.mul_(1 - (logits / softcap).square())
            small = grad.to(weight.dtype)
            grad_states[part] = (small @ weight).to(states.dtype)
            if grad_weight is not None:
                grad_weight += (small.T @ states[part].to(weight.dtype)).float()
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        total = (ce * ce_weight).sum()
        if kl_weight is not None:
            total = total + (kl * kl_weight).sum()
        ctx.save_for_backward(
            grad_states,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        )
        ctx.mark_non_differentiable(ce, kl)
        return total, ce, kl

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, bias = ctx.saved_tensors
        grads = [None if x is None else x * grad_total.to(x.dtype) for x in (states, weight, bias)]
        return (*grads, None, None, None, None, None, None, None, None, None)
