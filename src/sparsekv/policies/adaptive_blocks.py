"""Blocks leave at random, those that matter less more often (adaptive_block_dropout). For training.

What a block is worth is measured in the layer, from its own queries and keys, never guessed:

    density      mean attention that its entries receive from the newest queries, relative to uniform attention
    sink share   share of their attention that the block's own queries spend on the sinks: they have nowhere to look
    worth        log density - sink_weight * sink share

Blocks leave in ascending order of worth + temperature * Gumbel noise. So, with temperature 1 and sink_weight 0, a
block of twice the density is twice as likely as another to be the last that stays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekv.errors import ConfigError
from sparsekv.policies.attention_scores import attention_over_uniform, attention_weights
from sparsekv.policies.base import LayerContext, LayerPolicy
from sparsekv.policies.blocks import Share, check_share, drop_ranks, grid_edges, middle_of
from sparsekv.policies.budget import Budget
from sparsekv.policies.picks import evenly, row_generator
from sparsekv.policies.sizes import check_size

_QUERIES_AT_ONCE = 128


@dataclass(frozen=True)
class AdaptiveBlockDropout(LayerPolicy):
    """Random blocks of the absolute grid leave, those of low density or high sink share more often.

    A budget sets the total, exactly: of the last block only as many entries leave as are missing (its last ones).

    Parameters
    ----------
    block_size : int >= 1
        In tokens.
    temperature : float >= 0
        Noise against worth: 0 always drops the least worth, large values drop blindly.
    sink_weight : float >= 0
        What a sink share of 1 takes off a block's worth, in units of log density.
    window : int >= 1, optional
        The newest queries that measure the density. None: all of them, blockwise.
    samples : int >= 1
        Queries per block, evenly spread, that measure the sink share.
    n_sink : int >= 0
        First entries that always stay; the sinks whose share is measured.
    n_recent : int >= 0, optional
        Last entries that always stay; a budget under n_sink + n_recent is an error. Default: 64, at most half of
        what the sinks leave of the budget.
    seed : int
        With the row's seed (`LayerContext.seed`) and the layer it fixes the noise, in whatever batch the row is.
    share : "head" or "layer"
        Each kv head drops its own blocks by its own measures, or a layer's heads by their mean.
    """

    block_size: int = 64
    temperature: float = 1.0
    sink_weight: float = 1.0
    window: int | None = 64
    samples: int = 4
    n_sink: int = 4
    n_recent: int | None = None
    seed: int = 0
    share: Share = "head"
    name = "adaptive_block_dropout"
    ratio_free = False

    def __post_init__(self) -> None:
        check_size(self.name, "block_size", self.block_size, 1)
        check_size(self.name, "samples", self.samples, 1)
        check_size(self.name, "n_sink", self.n_sink)
        if self.window is not None:
            check_size(self.name, "window", self.window, 1)
        if self.n_recent is not None:
            check_size(self.name, "n_recent", self.n_recent)
        for field in ("temperature", "sink_weight"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ConfigError(f"{self.name}: {field} must be a number >= 0, got {value!r}")
        check_share(self.name, self.share, ("layer", "head"))

    @torch.no_grad()
    def score_layer(self, ctx: LayerContext, budget: Budget) -> Tensor:
        """FloatTensor [B, H, T]: the later an entry would leave, the higher; inf for what always stays."""
        batch, heads, total, _ = ctx.keys.shape
        middle = middle_of(self.name, budget, total, self.n_sink, self.n_recent)
        scores = torch.full((batch, heads, total), torch.inf)
        if middle.n_dropped:
            edges = grid_edges(middle.start, middle.stop, self.block_size)
            worth = self.worth(ctx, edges + middle.start).double().cpu()
            if self.share == "layer":
                worth = worth.mean(1, keepdim=True)
            order = (worth + self.temperature * self._gumbel(ctx, worth.shape[1:])).argsort(-1)
            scores[..., middle.start : middle.stop] = drop_ranks(edges, order)
        return scores.to(ctx.keys.device)

    def worth(self, ctx: LayerContext, edges: Tensor) -> Tensor:
        """FloatTensor [B, H, S]: what each block [edges[s], edges[s + 1]) is worth to each kv head.

        Where a block's hidden states are gone (an eviction after later tokens), its sink share can't be measured;
        it counts as the mean of the others', so that its density alone decides.
        """
        size = edges.diff().to(ctx.keys.device)
        block = torch.repeat_interleave(torch.arange(size.shape[0], device=size.device), size)
        received = attention_over_uniform(ctx, self.window)[..., int(edges[0]) : int(edges[-1])]
        density = (
            received.new_zeros(*received.shape[:2], size.shape[0]).index_add_(-1, block, received) / size
        )
        log_density = density.clamp_min(torch.finfo(density.dtype).tiny).log()
        if not self.sink_weight or not self.n_sink:
            return log_density
        return log_density - self.sink_weight * self._sink_share(ctx, edges)

    def _sink_share(self, ctx: LayerContext, edges: Tensor) -> Tensor:
        """FloatTensor [B, H, S]."""
        hidden, (cos, sin) = ctx.observing()
        first = ctx.keys.shape[2] - hidden.shape[1]  # the place of the oldest of them
        columns, block = [], []
        for number, (start, end) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)):
            picked = start + evenly(self.samples, end - start)
            picked = picked[picked >= first]
            columns.append(picked)
            block.append(torch.full_like(picked, number))
        device = ctx.keys.device
        column, of_block = torch.cat(columns).to(device), torch.cat(block).to(device)
        shares = [ctx.keys.new_zeros(*ctx.keys.shape[:2], 0, dtype=torch.float32)]
        for some in column.split(_QUERIES_AT_ONCE):
            if some.numel():
                at, seen = some - first, int(some[-1]) + 1
                rotary = cos[:, at], sin[:, at]
                keys = ctx.keys[:, :, :seen]
                weights = attention_weights(ctx.module, hidden[:, at], keys, rotary, some)
                shares.append(weights[..., : self.n_sink].sum(-1).mean(2))
        n_blocks = edges.shape[0] - 1
        measured = torch.cat(shares, dim=-1)
        count = torch.bincount(of_block, minlength=n_blocks)
        total = measured.new_zeros(*measured.shape[:2], n_blocks).index_add_(-1, of_block, measured)
        known = count > 0
        others = total.sum(-1, keepdim=True) / count.sum().clamp(min=1)
        return torch.where(known, total / count.clamp(min=1), others)

    def _gumbel(self, ctx: LayerContext, shape: torch.Size) -> Tensor:
        """Noise of one row's layer, fp64: the same in any batch."""
        row = row_generator(self.seed, ctx.seed)
        of_row = int(torch.randint(2**62, (), generator=row))
        drawn = torch.rand(shape, dtype=torch.float64, generator=row_generator(of_row, ctx.layer_idx))
        return -(-drawn.clamp(min=1e-300).log()).log()
