"""Side outputs of attention, computed on a sample of queries so that no full attention matrix is kept.

Shape letters: B rows, Hq query heads, H kv heads, G = Hq / H, S sampled queries, T tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparsekv.errors import ConfigError, unknown
from sparsekv.plan import Seen
from sparsekv.policies.picks import layer_generator
from sparsekv.policies.sparsity import SPARSITY_KINDS
from sparsekv.selection import NEVER


@dataclass(frozen=True)
class RetainedAttention:
    """How much of the attention that the full cache would receive falls on entries that are still visible.

    The mean over sampled queries of the softmax mass (over all earlier entries, nothing hidden) of what they can still
    see: 1 where nothing is lost. Soft evictions count by their weight. Without gradients.

    Parameters
    ----------
    n_queries : int >= 1
        Sampled evenly from the columns after the boundary (all columns where there is none).
    """

    n_queries: int = 16
    name: str = "retained_attention"

    @torch.no_grad()
    def observe(self, seen: Seen) -> Tensor:
        """A scalar in [0, 1]."""
        values = []
        for row in range(seen.query.shape[0]):
            start, first = _span(seen, row)
            total = seen.query.shape[2]
            if first >= total:
                continue
            count = min(self.n_queries, total - first)
            columns = torch.linspace(first, total - 1, count, device=seen.query.device).long()
            mass = attention_weights(seen, row, columns, start)
            visible = columns[:, None] < seen.evicted_at[row, :, None, start:].to(columns.device)
            share = visible.float()
            if seen.log_weight is not None:
                soft = seen.log_weight[row, :, None, start:].to(columns.device, torch.float32).exp()
                share = torch.where(visible, share, soft)
            values.append((mass.mean(1) * share).sum(-1).mean())
        return torch.stack(values).mean() if values else seen.query.new_ones((), dtype=torch.float32)


@dataclass(frozen=True)
class AttentionSparsity:
    """A loss that is small where attention is concentrated on few entries.

    Computed over what each sampled query can see; entries that fade count by their weight, as attention reads them.
    Queries are drawn uniformly and anew for every layer and seed, so the mean is an unbiased estimate of that over all
    queries.

    Parameters
    ----------
    kind : "entropy" or "l1"
        "entropy": -sum p log p, in nats. "l1": ||p||_1 / ||p||_2 (Hoyer's measure; the plain l1 norm of a softmax is
        always 1), between 1 and the square root of the number of visible entries.
    n_queries : int >= 1, optional
        Per row; None: every query, exactly.
    seeds : one int per row
    weights : one number >= 0 per row, optional
        Of the mean over rows; by default all count the same.
    """

    kind: Literal["entropy", "l1"] = "entropy"
    n_queries: int | None = 64
    seeds: Sequence[int] = (0,)
    weights: Sequence[float] | None = None
    name: str = "sparsity"

    def __post_init__(self) -> None:
        if self.kind not in SPARSITY_KINDS:
            raise unknown("sparsity kind", self.kind, SPARSITY_KINDS)
        if self.n_queries is not None and self.n_queries < 1:
            raise ConfigError(f"sparsity n_queries must be at least 1, got {self.n_queries}")

    def observe(self, seen: Seen) -> Tensor:
        """A scalar, differentiable with respect to queries, keys and soft weights."""
        values = []
        for row in range(seen.query.shape[0]):
            start, _ = _span(seen, row)
            columns = self._columns(seen, row, start)
            visible = columns[:, None] < seen.evicted_at[row, :, None, start:].to(columns.device)
            if seen.log_weight is None:
                p = attention_weights(seen, row, columns, start, hidden=~visible)
            else:
                soft = seen.log_weight[row, :, None, start:].to(columns.device, torch.float32)
                p = attention_weights(seen, row, columns, start, fading=torch.where(visible, 0.0, soft))
            if self.kind == "entropy":
                # The gradient of p log p is infinite at 0, where hidden entries are.
                values.append(-(p * p.clamp_min(1e-30).log()).sum(-1).mean())
            else:
                values.append((p.sum(-1) / p.square().sum(-1).clamp_min(1e-12).sqrt()).mean())
        if self.weights is None:
            return torch.stack(values).mean()
        weights = torch.tensor(self.weights, device=values[0].device)
        return (weights * torch.stack(values)).sum() / weights.sum().clamp_min(1e-12)

    def _columns(self, seen: Seen, row: int, start: int) -> Tensor:
        total, device = seen.query.shape[2], seen.query.device
        if self.n_queries is None or self.n_queries >= total - start:
            return torch.arange(start, total, device=device)
        seed = self.seeds[min(row, len(self.seeds) - 1)]
        generator = layer_generator(seed, seen.layer_idx)
        # With replacement: an unbiased mean either way, and one cheap draw.
        return torch.randint(start, total, (self.n_queries,), generator=generator).to(device)


def attention_weights(
    seen: Seen,
    row: int,
    columns: Tensor,
    start: int,
    hidden: Tensor | None = None,
    fading: Tensor | None = None,
) -> Tensor:
    """Softmax weights fp32 [H, G, S, T - start] of the queries at `columns` over the row's entries up to themselves.

    `hidden` BoolTensor [H or 1, S, T - start] takes entries out before the softmax; `fading`, fp32 of that shape, is
    added to their logits.
    """
    heads, groups = seen.key.shape[1], seen.query.shape[1] // seen.key.shape[1]
    key = seen.key[row, :, start:]
    query = seen.query[row, :, columns].reshape(heads, groups * len(columns), -1)
    logits = (query @ key.transpose(1, 2)).float() * seen.scaling
    logits = logits.view(heads, groups, len(columns), key.shape[1])
    if fading is not None:
        logits = logits + fading[:, None]
    future = torch.arange(start, start + key.shape[1], device=columns.device) > columns[:, None]
    blocked = future if hidden is None else future | hidden[:, None]
    return logits.masked_fill(blocked, float("-inf")).softmax(-1)


def _span(seen: Seen, row: int) -> tuple[int, int]:
    """(first real column, first column whose queries may miss something) of a row."""
    if seen.boundaries is not None:
        start, end = seen.boundaries[row]
        return start, end if end < seen.query.shape[2] else start
    at = seen.evicted_at[row]
    start = int((at == 0)[0].sum())
    leaving = at[(at > 0) & (at < NEVER)]
    return start, int(leaving.min()) if leaving.numel() else start
