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

CHUNK_BYTES = 32 * 2**20
"""Logits made at once, of the student and of the teacher each: few enough to stay small, enough tokens for one product
to be worth reading the output layer's weight (341 tokens in bf16 at a vocabulary of 49,152)."""

ROWS = {"cpu": 8}
MOST_ROWS = 64
"""Tokens whose fp32 logits exist at once: on a CPU so few that they stay in its caches, elsewhere MOST_ROWS."""


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
        return self.finished(self.raw(states))

    def raw(self, states: Tensor) -> Tensor:
        """[N, V] in the weight's type, before the softcap."""
        return torch.nn.functional.linear(states.to(self.weight.dtype), self.weight, self.bias)

    def finished(self, raw: Tensor) -> Tensor:
        """fp32, the softcap applied; never the given tensor itself."""
        logits = raw.to(torch.float32, copy=True)
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)


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
    chunk: int | None = None,
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
    chunk : int >= 1, optional
        Tokens whose logits exist at once; by default what `CHUNK_BYTES` hold, at least 64.
    """
    if chunk is None:
        chunk = max(64, CHUNK_BYTES // (head.weight.shape[0] * head.weight.element_size()))
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
        rows = min(chunk, ROWS.get(states.device.type, MOST_ROWS))
        for begin in range(0, count, chunk):
            part = slice(begin, min(begin + chunk, count))
            raw = head.raw(states[part])
            raw_teacher = None if teacher_states is None else teacher_head.raw(teacher_states[part])
            for first in range(part.start, part.stop, rows):
                own = slice(first, min(first + rows, part.stop))
                local = slice(own.start - begin, own.stop - begin)
                ce[own], kl_of_rows, grad = _of_rows(
                    head.finished(raw[local]),
                    None if raw_teacher is None else teacher_head.finished(raw_teacher[local]),
                    labels[own],
                    ce_weight[own],
                    None if teacher_states is None or kl_weight is None else kl_weight[own],
                    temperature,
                    softcap,
                    training,
                )
                if kl_of_rows is not None:
                    kl[own] = kl_of_rows
                if grad is not None:
                    if grad_bias is not None:
                        grad_bias += grad.sum(0)
                    raw[local] = grad.to(raw.dtype)  # the gradient takes the logits' place
            if not training:
                continue
            grad_states[part] = (raw @ weight).to(states.dtype)
            if grad_weight is not None:
                grad_weight += (raw.T @ states[part].to(weight.dtype)).float()
        total = (ce * ce_weight).sum()
        if kl_weight is not None:
            total = total + (kl * kl_weight).sum()  # kl is 0 without a teacher
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


def _of_rows(
    logits: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    ce_weight: Tensor,
    kl_weight: Tensor | None,
    temperature: float,
    softcap: float | None,
    training: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(CE [n], KL [n] or None, gradient of their weighted sum [n, V]) from fp32 logits [n, V], in as few passes over
    the vocabulary as there are; no gradient unless `training`. Both logits are used up.

    The gradient is (ce_weight + kl_weight) p - ce_weight [label] - kl_weight q at temperature 1, and with another
    temperature t: ce_weight (p - [label]) + t kl_weight (p_t - q_t).
    """
    log_p = logits.log_softmax(-1)
    ce = -log_p.gather(1, labels[:, None])[:, 0]
    kl: Tensor | None = None
    soft = q = None
    p_weight = ce_weight
    if teacher is not None and kl_weight is not None:
        plain = temperature == 1.0
        log_soft = log_p if plain else (logits / temperature).log_softmax(-1)
        log_q = (teacher if plain else teacher.div_(temperature)).log_softmax(-1)
        q = log_q.exp()
        # no 0 * inf can occur: log_softmax is finite
        kl = log_q.sub_(log_soft).mul_(q).sum(-1) * temperature**2
        if plain:
            p_weight = ce_weight + kl_weight
        else:
            soft = log_soft
    if not training:
        return ce, kl, None
    grad = log_p.exp_().mul_(p_weight[:, None])
    if q is not None and kl_weight is not None:
        if soft is not None:
            q.sub_(soft.exp_())
        grad.addcmul_(q, kl_weight[:, None], value=-temperature)
    grad.scatter_add_(1, labels[:, None], -ce_weight[:, None])
    if softcap is not None:
        grad.mul_(1 - (logits / softcap).square())
    return ce, kl, grad
