"""Attention of a few queries over residents and recalled entries, with the weights themselves at hand.

Shape letters: B rows, H kv heads, S = B * H segments, G query heads per kv head, Q queries, D head size, n residents of
a segment (N the most), R entries beside them (padded).

SDPA gives no weights, and recall has to compare them; so logits are made here, group by group of equal segments, and
only they are padded: keys and values of residents are read in place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekv.cache.exchange import Entries
from sparsekv.cache.layer import SparseLayer
from sparsekv.cache.segments import Group


@dataclass(frozen=True)
class Beside:
    """Entries that are attended to beside the residents, padded per segment.

    Parameters
    ----------
    keys, values : FloatTensor [S, R, D]
    columns : LongTensor [S, R]
    valid : BoolTensor [S, R]
        False for padding.
    """

    keys: Tensor
    values: Tensor
    columns: Tensor
    valid: Tensor

    @classmethod
    def of(cls, entries: Entries | None, n_segments: int) -> Beside | None:
        """From entries in the order of their segments; None if there are none."""
        if entries is None:
            return None
        device = entries.segment.device
        sizes = torch.bincount(entries.segment, minlength=n_segments)
        valid = torch.arange(int(sizes.max()), device=device) < sizes[:, None]
        keys, values = (x.new_zeros(*valid.shape, x.shape[-1]) for x in (entries.keys, entries.values))
        columns = torch.zeros(valid.shape, dtype=torch.int64, device=device)
        keys[valid], values[valid], columns[valid] = entries.keys, entries.values, entries.columns
        return cls(keys, values, columns, valid)

    def only(self, chosen: Tensor) -> Beside:
        """Without the entries that are not `chosen` [S, R]."""
        return Beside(self.keys, self.values, self.columns, self.valid & chosen)


class Block:
    """Logits of some queries over a layer's residents and over entries beside them.

    Parameters
    ----------
    layer : SparseLayer, which stores the newest tokens already
    query : FloatTensor [B, Hq, Q, D]
    tail_mask : BoolTensor [B or 1, Q, tail] or None
        Which tail entries each query sees (`attend.tail_mask`); None: all.
    scale : float
    """

    def __init__(self, layer: SparseLayer, query: Tensor, tail_mask: Tensor | None, scale: float) -> None:
        batch, n_heads, self.n_query, width = query.shape
        heads = layer.n_kv_heads
        self.shape = (batch, n_heads, self.n_query, width)
        self.n_groups = n_heads // heads
        self.query = query.reshape(batch * heads, self.n_groups * self.n_query, width)
        self.scale = scale
        self.groups: list[Group] = list(layer.groups())
        self.sizes = torch.tensor(layer.store.counts) + layer.tail
        self.resident = [self._logits(group, tail_mask, heads) for group in self.groups]
        self.beside: Tensor | None = None
        self.entries: Beside | None = None

    def _logits(self, group: Group, tail_mask: Tensor | None, heads: int) -> Tensor:
        """FloatTensor [g, G * Q, n]."""
        logits = _products(self.query[group.start : group.stop], group.keys) * self.scale
        if tail_mask is None:
            return logits
        mask = tail_mask
        if mask.shape[0] > 1:
            mask = mask.repeat_interleave(heads, dim=0)[group.start : group.stop]
        hidden = ~mask.repeat(1, self.n_groups, 1)
        logits[..., group.n_prefix :].masked_fill_(hidden, -torch.inf)
        return logits

    def put_beside(self, entries: Beside | None) -> None:
        """Let the queries see `entries` too."""
        self.entries = entries
        if entries is None:
            self.beside = None
            return
        logits = _products(self.query, entries.keys) * self.scale
        self.beside = logits.masked_fill(~entries.valid[:, None], -torch.inf)

    def hide(self, hidden: Tensor) -> None:
        """Let the queries not see the residents `hidden` (BoolTensor [S, N])."""
        for group, logits in zip(self.groups, self.resident, strict=True):
            out = hidden[group.start : group.stop, : logits.shape[-1]]
            logits.masked_fill_(out[:, None], -torch.inf)

    def log_total(self) -> Tensor:
        """FloatTensor [S, G * Q]: log of the softmax's denominator, over residents and what is beside them."""
        totals = torch.cat([logits.logsumexp(dim=-1) for logits in self.resident])
        return totals if self.beside is None else torch.logaddexp(totals, self.beside.logsumexp(dim=-1))

    def mass(self, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The mean share of attention per entry: residents [S, N] (-1 where there is none), and those beside [S, R].

        `weight` [B, Q] is 0 for queries that do not count (padding); None: all count.
        """
        total = self.log_total()
        counted = self.weights(weight, total)
        total = total.masked_fill(total == -torch.inf, 0)[..., None]
        out = total.new_full((len(self.sizes), int(self.sizes.max())), -1.0)
        for group, logits in zip(self.groups, self.resident, strict=True):
            part = slice(group.start, group.stop)
            share = (logits - total[part]).exp_() * counted[part, :, None]
            out[part, : logits.shape[-1]] = share.sum(dim=1)
        if self.beside is None:
            return out, None
        return out, ((self.beside - total).exp_() * counted[..., None]).sum(dim=1)

    def weights(self, weight: Tensor | None, like: Tensor) -> Tensor:
        """FloatTensor [S, G * Q]: what each query counts; a segment's sum is 1."""
        if weight is None:
            return torch.full_like(like, 1 / like.shape[1])
        heads = like.shape[0] // weight.shape[0]
        counted = weight.to(like).repeat_interleave(heads, dim=0).repeat(1, self.n_groups)
        return counted / counted.sum(dim=1, keepdim=True).clamp(min=1)

    def output(self) -> Tensor:
        """Attention [B, Q, Hq, D] over all that the queries see."""
        result = torch.empty_like(self.query)
        for group, logits in zip(self.groups, self.resident, strict=True):
            part = slice(group.start, group.stop)
            n = logits.shape[-1]
            joint = logits if self.beside is None else torch.cat([logits, self.beside[part]], dim=-1)
            share = joint.softmax(dim=-1)
            # A padding query may see nothing: zeros, as SDPA gives.
            share = share.masked_fill(joint.amax(dim=-1, keepdim=True) == -torch.inf, 0).to(self.query.dtype)
            mixed = share[..., :n] @ group.values
            if self.entries is not None:
                mixed = mixed + share[..., n:] @ self.entries.values[part]
            result[part] = mixed
        batch, n_heads, n_query, width = self.shape
        return result.view(batch, n_heads, n_query, width).transpose(1, 2).contiguous()


def _products(query: Tensor, keys: Tensor) -> Tensor:
    """q . k in fp32 at least: [S, Q, D] and [S, n, D] give [S, Q, n].

    Rounded to 16 bits, a product of 160 would be off by 0.5; stock attention sums in fp32 too.
    """
    if query.dtype != torch.float64:
        query, keys = query.float(), keys.float()
    return (query @ keys.transpose(1, 2)).float()
