"""How much attention entries received: a few running sums per entry, no attention matrix is kept.

Shape letters: B rows, H kv heads, G query heads per kv head, T entries, Q observing queries, D head size.

Of the weights p[q, g, i] that query q of grouped head g gives to entry i, only the largest of the group counts, as an
entry must stay if one of the heads that read it needs it:

    p(q, i)     = max_g p[q, g, i]
    mean_i      = sum_q p(q, i) / n_i                            n_i: observing queries that can see i
    max_i       = max_q p(q, i)
    recency_i   = sum_q w_q p(q, i) / sum_q w_q                  w_q = 2^(-age / half life), over queries that see i
    entropy_i   = sum_q h(p(q, i)) / sum_j sum_q h(p(q, j))      h(p) = -p log p: the entry's share of the entropy

All are sums or maxima over queries, so they go on while decoding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from sparsekv.errors import ConfigError, unknown
from sparsekv.policies.attention_scores import attention_weights
from sparsekv.policies.base import LayerContext

WINDOW = 32
"""Newest queries that observe at prefill, and at most between two updates while decoding."""

GROUPED = ("max", "mean")

_FLOOR = 1e-3


@dataclass
class AttentionStatistics:
    """Running statistics of the attention that each entry of each kv head received.

    Parameters
    ----------
    sums : FloatTensor [B, H, T, 6], fp32
        Per entry: sum of weights, largest weight, recency-weighted sum, sum of entropy terms, number of queries that
        saw it, and the sum of those queries' recency weights.
    half_life : float > 0
        Queries after which an observation counts half, for the recency-weighted mean.
    """

    NAMES: ClassVar[tuple[str, ...]] = ("mean", "max", "recency", "entropy_share")

    N_SUMS: ClassVar[int] = 6
    """Numbers per entry of `sums`."""

    sums: Tensor
    half_life: float = 16.0

    def __post_init__(self) -> None:
        if not (isinstance(self.half_life, (int, float)) and self.half_life > 0):
            raise ConfigError(f"attention statistics: half_life must be over 0, got {self.half_life!r}")

    @classmethod
    def empty(cls, batch: int, n_kv_heads: int, *, half_life: float = 16.0) -> AttentionStatistics:
        """Nothing stored and nothing seen yet."""
        return cls(torch.zeros(batch, n_kv_heads, 0, cls.N_SUMS), half_life)

    @classmethod
    def of_window(
        cls, ctx: LayerContext, window: int = WINDOW, *, grouped: str = "max", half_life: float = 16.0
    ) -> AttentionStatistics:
        """What the newest `window` queries of a layer look at (fewer where the forward has fewer).

        One block of B * H * G * window * T weights lives while this runs.
        """
        hidden, rotary = ctx.observing(window)
        total = ctx.keys.shape[2]
        with torch.no_grad():
            weights = attention_weights(
                ctx.module,
                hidden,
                ctx.keys,
                rotary,
                torch.arange(total - hidden.shape[1], total, device=ctx.keys.device),
            )
        found = cls.empty(*weights.shape[:2], half_life=half_life)
        found.update(of_group(weights, grouped))
        return found

    # ---- running ------------------------------------------------------------------------------------------------

    def update(self, weights: Tensor) -> None:
        """Hear what new queries looked at.

        Parameters
        ----------
        weights : FloatTensor [B, H, Q, T']
            Of T' >= T entries: those known, in order, then new ones. The newest Q are the queries' own tokens, so query
            j sees the first T' - Q + j + 1 entries; weights beyond must be 0.

        Raises
        ------
        ConfigError
            If there are fewer entries than before; take evicted ones out with `keep` or `crop` first.
        """
        n_query, total = weights.shape[2], weights.shape[3]
        known = self.sums.shape[2]
        if total < known or n_query > total:
            raise ConfigError(
                f"attention statistics of {known} entries were given {n_query} queries over {total} entries"
            )
        sums = self.sums.to(weights.device)
        weights = weights.float()
        place = torch.arange(total, device=weights.device)
        query = torch.arange(n_query, device=weights.device)
        sees = (place <= total - n_query + query[:, None]).float()  # [Q, T']
        decay = 2.0 ** (-1.0 / self.half_life)
        by_age = decay ** (n_query - 1 - query).float()  # [Q], 1 for the newest
        old = nn.functional.pad(sums, (0, 0, 0, total - known))
        fading = decay**n_query
        count, weight = sees.sum(0), by_age @ sees
        self.sums = torch.stack(
            [
                old[..., 0] + weights.sum(2),
                torch.maximum(old[..., 1], weights.amax(2)),
                old[..., 2] * fading + (by_age @ weights),
                old[..., 3] + torch.special.entr(weights).sum(2),
                old[..., 4] + count,
                old[..., 5] * fading + weight,
            ],
            dim=-1,
        )

    def crop(self, n: int) -> None:
        """Forget all but the first `n` entries. What their queries gave to the others stays in the sums."""
        self.sums = self.sums[:, :, :n]

    def reorder(self, rows: Tensor) -> None:
        """New row i is old row `rows[i]` (beam search)."""
        self.sums = self.sums[rows.to(self.sums.device)]

    def keep(self, kept: Tensor) -> None:
        """Only entries `kept` BoolTensor [B, H, T] stay; every head must keep the same number.

        Raises ConfigError if they differ: hold ragged heads one by one, B = H = 1.
        """
        counts = kept.sum(-1)
        if not bool((counts == counts.flatten()[:1]).all()):
            raise ConfigError("attention statistics hold heads that keep the same number of entries")
        self.sums = self.sums[kept].view(*kept.shape[:2], -1, self.sums.shape[-1])

    # ---- reading ------------------------------------------------------------------------------------------------

    @property
    def mean(self) -> Tensor:
        """FloatTensor [B, H, T]: over the queries that see an entry."""
        return self.sums[..., 0] / self.sums[..., 4].clamp_min(1)

    @property
    def max(self) -> Tensor:
        """FloatTensor [B, H, T]: largest weight ever given."""
        return self.sums[..., 1]

    @property
    def recency(self) -> Tensor:
        """FloatTensor [B, H, T]: mean in which newer queries count more."""
        return self.sums[..., 2] / self.sums[..., 5].clamp_min(torch.finfo(torch.float32).tiny)

    @property
    def entropy_share(self) -> Tensor:
        """FloatTensor [B, H, T]: share of the entropy of what was looked at; sums to 1 (0 if there is none)."""
        of_entry = self.sums[..., 3]
        return of_entry / of_entry.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)

    def features(self) -> Tensor:
        """FloatTensor [B, H, T, 4] for a predictor: log(0.001 + T x) / 4 of the four, in the order of `NAMES`.

        Times T: relative to uniform attention, so that contexts of different length compare.
        """
        raw = torch.stack([self.mean, self.max, self.recency, self.entropy_share], dim=-1)
        return (raw * raw.shape[2]).add_(_FLOOR).log_().div_(4)


def of_group(weights: Tensor, grouped: str = "max") -> Tensor:
    """FloatTensor [B, H, Q, T] of weights [B, H, G, Q, T]: the largest, or the mean, over grouped query heads."""
    if grouped not in GROUPED:
        raise unknown("grouped", grouped, GROUPED)
    return weights.amax(2) if grouped == "max" else weights.mean(2)
