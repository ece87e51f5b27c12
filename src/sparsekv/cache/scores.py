"""Attention of a few queries over residents and recalled entries, with the weights themselves at hand.

Shape letters: B rows, H kv heads, S = B * H segments, G query heads per kv head, Q queries, D head size, n residents of
the fullest segment, R entries beside them (padded).

SDPA gives no weights, and recall has to compare them; so logits are made here, group by group of equal segments, and
only they are padded: keys and values of residents are read in place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from sparsekv.cache.entry_request import Bools, Ints
from sparsekv.cache.exchange import Entries
from sparsekv.cache.layer import SparseLayer
from sparsekv.cache.passive import PageEntries
from sparsekv.cache.segments import Group


@dataclass(frozen=True)
class Beside:
    """Entries that are attended to beside the residents, padded per segment.

    Parameters
    ----------
    keys, values : FloatTensor [S, R, D]
    columns : int64 [S, R]
    valid : bool [S, R]
        False for padding.
    """

    keys: Tensor
    values: Tensor
    columns: Ints
    valid: Bools

    @classmethod
    def of(cls, found: PageEntries, device: torch.device) -> Beside | None:
        """From entries in the order of their segments; None if there are none."""
        counts = found.counts.numpy().reshape(-1)
        most = int(counts.max(initial=0))
        if not most:
            return None
        keys, values, columns = found.keys.to(device), found.values.to(device), found.columns.numpy()
        valid = np.arange(most) < counts[:, None]
        if not valid.all():  # padding repeats entries: finite, and weighs nothing
            at = (
                ((counts.cumsum() - counts)[:, None] + np.arange(most)).clip(max=len(columns) - 1).reshape(-1)
            )
            index = torch.from_numpy(at).to(device)
            keys, values, columns = keys.index_select(0, index), values.index_select(0, index), columns[at]
        shape = (len(counts), most)
        return cls(keys.unflatten(0, shape), values.unflatten(0, shape), columns.reshape(shape), valid)

    def only(self, chosen: Bools) -> Beside | None:
        """Without the entries that are not `chosen` [S, R]; None if none is left."""
        valid = self.valid & chosen
        return replace(self, valid=valid) if valid.any() else None

    def entries(self) -> Entries:
        """The same, without padding."""
        segment, place = np.nonzero(self.valid)
        at = torch.from_numpy(segment * self.valid.shape[1] + place).to(self.keys.device)
        keys, values = (x.flatten(0, 1).index_select(0, at) for x in (self.keys, self.values))
        return Entries(segment, self.columns[segment, place], keys, values)


class Block:
    """Logits of some queries over a layer's residents and over entries beside them.

    Parameters
    ----------
    layer : SparseLayer, which stores the newest tokens already
    query : FloatTensor [B, Hq, Q, D]
    tail_mask : BoolTensor [B or 1, Q, tail] or None
        Which tail entries each query sees (`attend.tail_mask`); None: all.
    scale : float
    weight : BoolTensor [B, Q], optional
        False for queries that do not count in means (padding); None: all count.

    Attributes
    ----------
    query : FloatTensor [S, G * Q, D]
        Times `scale`, in fp32 at least: rounded to 16 bits, a product of 160 would be off by 0.5.
    resident : FloatTensor [S, G * Q, n]
        Logits; -inf beyond a segment's entries.
    """

    def __init__(
        self,
        layer: SparseLayer,
        query: Tensor,
        tail_mask: Tensor | None,
        scale: float,
        weight: Tensor | None = None,
    ) -> None:
        self.shape, self.dtype = query.shape, query.dtype
        batch, n_heads, n_query, width = query.shape
        heads = layer.n_kv_heads
        self.n_groups = n_heads // heads
        self.query = _wide(query).reshape(batch * heads, self.n_groups * n_query, width) * scale
        self.groups: list[Group] = list(layer.groups())
        self.resident = self._logits(tail_mask, heads)
        self.counted = None if weight is None else self._counted(weight, heads)
        self.entries: Beside | None = None
        self._beside: Tensor | None = None
        self._residents_total: Tensor | None = None
        self._total: Tensor | None = None

    def _logits(self, tail_mask: Tensor | None, heads: int) -> Tensor:
        if len(self.groups) == 1:
            logits = self.query @ _wide(self.groups[0].keys).transpose(1, 2)
        else:
            fullest = max(group.keys.shape[1] for group in self.groups)
            logits = self.query.new_full((*self.query.shape[:2], fullest), -torch.inf)
            for group in self.groups:
                own = logits[group.start : group.stop, :, : group.keys.shape[1]]
                own.copy_(self.query[group.start : group.stop] @ _wide(group.keys).transpose(1, 2))
        if tail_mask is None:
            return logits
        hidden = ~tail_mask.repeat(1, self.n_groups, 1)
        if hidden.shape[0] > 1:
            hidden = hidden.repeat_interleave(heads, dim=0)
        for group in self.groups:
            out = hidden if hidden.shape[0] == 1 else hidden[group.start : group.stop]
            logits[group.start : group.stop, :, group.n_prefix : group.keys.shape[1]].masked_fill_(
                out, -torch.inf
            )
        return logits

    def _counted(self, weight: Tensor, heads: int) -> Tensor:
        """FloatTensor [S, G * Q]: what each query counts; a segment's sum is 1."""
        counted = weight.to(self.query).repeat_interleave(heads, dim=0).repeat(1, self.n_groups)
        return counted / counted.sum(dim=1, keepdim=True).clamp(min=1)

    # ---- what is seen -------------------------------------------------------------------------------------------

    def put_beside(self, entries: Beside | None) -> None:
        """Let the queries see `entries` too."""
        self.entries, self._beside, self._total = entries, None, None
        if entries is None:
            return
        self._beside = self.query @ _wide(entries.keys).transpose(1, 2)
        if not entries.valid.all():
            absent = torch.from_numpy(~entries.valid).to(self._beside.device)
            self._beside.masked_fill_(absent[:, None], -torch.inf)

    def hide(self, hidden: Bools) -> None:
        """Let the queries not see the residents `hidden` [S, n]."""
        if hidden.any():
            self.resident.masked_fill_(torch.from_numpy(hidden).to(self.resident.device)[:, None], -torch.inf)
            self._residents_total = self._total = None

    def log_total(self) -> Tensor:
        """FloatTensor [S, G * Q]: log of the softmax's denominator, over residents and what is beside them."""
        if self._residents_total is None:
            self._residents_total = self.resident.logsumexp(dim=-1)
        if self._total is None:
            total = self._residents_total
            if self._beside is not None:
                total = torch.logaddexp(total, self._beside.logsumexp(dim=-1))
            self._total = total
        return self._total

    # ---- what weighs how much -----------------------------------------------------------------------------------

    def shares(self) -> Tensor:
        """FloatTensor [S, n]: the mean share of the queries' attention per resident; 0 where there is none."""
        return self._mean(self._share(self.resident))

    def shares_beside(self) -> Tensor | None:
        """FloatTensor [S, R]: the same per entry beside; None if there are none."""
        return None if self._beside is None else self._mean(self._share(self._beside))

    def log_worth(self, logits: Tensor) -> Tensor:
        """FloatTensor [S, P]: the log of the mean share that something of these logits [S, G * Q, P] would have."""
        relative = logits.to(self.query) - self._finite_total()[..., None]
        if self.counted is None:
            return relative.logsumexp(dim=1) - math.log(relative.shape[1])
        return (relative + self.counted.log()[..., None]).logsumexp(dim=1)

    def output(self) -> Tensor:
        """Attention [B, Q, Hq, D] over all that the queries see; zeros for one that sees nothing, as SDPA gives."""
        share, parts = self._share(self.resident), []
        for group in self.groups:
            own = share[group.start : group.stop, :, : group.keys.shape[1]]
            parts.append(own @ _wide(group.values))
        mixed = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self._beside is not None and self.entries is not None:
            mixed = mixed + self._share(self._beside) @ _wide(self.entries.values)
        return mixed.to(self.dtype).view(self.shape).transpose(1, 2).contiguous()

    def _share(self, logits: Tensor) -> Tensor:
        return (logits - self._finite_total()[..., None]).exp_()

    def _mean(self, of_queries: Tensor) -> Tensor:
        if self.counted is None:
            return of_queries.mean(dim=1)
        return (of_queries * self.counted[..., None]).sum(dim=1)

    def _finite_total(self) -> Tensor:
        """`log_total`, but 0 for a query that sees nothing (padding): its shares are 0, not NaN."""
        total = self.log_total()
        return total.masked_fill(total == -torch.inf, 0)


def _wide(x: Tensor) -> Tensor:
    """In fp32 at least; stock attention sums in fp32 too."""
    return x if x.dtype == torch.float64 else x.float()
