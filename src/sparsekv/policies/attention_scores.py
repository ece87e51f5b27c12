"""H2O: how much attention has each entry received so far? Summed blockwise, so no eager attention is needed.

Shape letters: B batch, H kv heads, G query heads per kv head, T entries, Q queries, D head size.

The value is exactly that of kvpress's `ObservedAttentionPress` under eager attention. Nothing of size Q x T
is ever held for more than one block of queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparsekv.errors import ConfigError
from sparsekv.policies.base import LayerContext, LayerPolicy
from sparsekv.policies.budget import Budget

BLOCK_SIZE = 64
"""Queries whose weights exist at once: so few that they stay in a CPU's caches."""


def attention_weights(
    module: nn.Module,
    hidden_states: Tensor,
    keys: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    columns: Tensor,
) -> Tensor:
    """The weights that some queries give to entries: a causal softmax over those entries.

    Parameters
    ----------
    module : the attention module (its query projection and `scaling` are used)
    hidden_states : FloatTensor [B, Q, hidden]
        Input to the layer, of the observing tokens.
    keys : FloatTensor [B, H, T, D]
        RoPE applied, in order of position.
    position_embeddings : (cos, sin), each [B or 1, Q, rotary size]
    columns : LongTensor [Q]
        Place of each observing token among the T entries; it sees those up to its own.

    Returns
    -------
    FloatTensor [B, H, G, Q, T], fp32; gradients flow to hidden states and keys.
    """
    return weights_of_queries(observing_queries(module, hidden_states, position_embeddings), keys, columns)


def observing_queries(
    module: nn.Module, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]
) -> Tensor:
    """FloatTensor [B, Hq, Q, D]: the queries of some tokens, RoPE applied and scaled, for `weights_of_queries`."""
    from kvpress.utils import get_prerope_query_states

    query = _rotate(get_prerope_query_states(module, hidden_states), *position_embeddings)
    return query * (getattr(module, "scaling", None) or query.shape[-1] ** -0.5)


def weights_of_queries(query: Tensor, keys: Tensor, columns: Tensor) -> Tensor:
    """As `attention_weights`, from scaled queries [B, Hq, Q, D]: those of all kv heads of `keys`, or of one alone."""
    batch, n_kv_heads, total, width = keys.shape
    groups, n_query = query.shape[1] // n_kv_heads, query.shape[2]
    folded = query.reshape(batch, n_kv_heads, groups * n_query, width)
    logits = (folded @ keys.transpose(2, 3)).view(batch, n_kv_heads, groups, n_query, total)
    first = int(columns.min()) + 1  # all see what is before
    future = torch.arange(first, total, device=keys.device) > columns[:, None]
    logits[..., first:].masked_fill_(future, float("-inf"))
    return logits.softmax(-1, dtype=torch.float32)


def observed_attention(
    module: nn.Module,
    hidden_states: Tensor,
    keys: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    block_size: int = BLOCK_SIZE,
    *,
    differentiable: bool = False,
) -> Tensor:
    """Mean attention weight that each entry receives from the queries that can see it.

    Parameters
    ----------
    module : the attention module (its query projection and `scaling` are used)
    hidden_states : FloatTensor [B, Q, hidden]
        Input to the layer, of the newest Q tokens.
    keys : FloatTensor [B, H, T, D]
        RoPE applied, in order of position, T >= Q.
    position_embeddings : (cos, sin), each [B or 1, Q, rotary size]
    block_size : int >= 1
        Queries per block; a block holds B * H * G * block_size * T fp32 weights.
    differentiable : bool
        True: gradients flow to keys, hidden states and the query projection. The weights of a block are computed
        again in the backward pass, so that no more than one block is held there either.

    Returns
    -------
    FloatTensor [B, H, T], fp32
        Averaged over the G query heads of each kv head. Higher = keep.
    """
    total, n_query = keys.shape[2], hidden_states.shape[1]
    cos, sin = position_embeddings
    column = torch.arange(total, device=keys.device)
    received = torch.zeros(keys.shape[:3], dtype=torch.float32, device=keys.device)
    with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
        for start in range(0, n_query, block_size):
            stop = min(start + block_size, n_query)
            seen = total - n_query + stop  # later entries are in the future of the whole block
            block = (
                module,
                hidden_states[:, start:stop],
                keys[:, :, :seen],
                (cos[:, start:stop], sin[:, start:stop]),
                column[total - n_query + start : seen],
            )
            if torch.is_grad_enabled():
                share = checkpoint(_mean_of_group, *block, use_reentrant=False)
            else:
                share = _mean_of_group(*block)
            received = received + nn.functional.pad(share, (0, total - seen))
    return received / (total - column).clamp(max=n_query)


def _mean_of_group(*block: Any) -> Tensor:
    """FloatTensor [B, H, T]: weights of a block summed over its queries, averaged over a group's query heads."""
    weights = attention_weights(*block)
    return weights.flatten(2, 3).sum(2) / weights.shape[2]


def attention_over_uniform(
    ctx: LayerContext, window: int | None, block_size: int = BLOCK_SIZE, *, differentiable: bool = False
) -> Tensor:
    """Attention that each entry receives, as a multiple of what it would get if queries looked everywhere alike.

    Parameters
    ----------
    ctx : LayerContext
    window : int >= 1, optional
        Only the newest `window` queries observe. None: all of this forward.
    block_size, differentiable
        As in `observed_attention`.

    Returns
    -------
    FloatTensor [B, H, T], fp32: 1 = as much as under uniform attention.
    """
    hidden, rotary = ctx.observing(window)
    total, n_query = ctx.keys.shape[2], hidden.shape[1]
    received = observed_attention(
        ctx.module, hidden, ctx.keys, rotary, block_size, differentiable=differentiable
    )
    of_query = 1.0 / torch.arange(total - n_query + 1, total + 1, device=received.device)
    later = of_query.flip(0).cumsum(0).flip(0) / torch.arange(n_query, 0, -1, device=received.device)
    return received / torch.cat([later[:1].expand(total - n_query), later])


def _rotate(query: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on the first `cos.shape[-1]` channels of [B, Hq, Q, D] (Phi-3 can leave the rest unrotated)."""
    size = cos.shape[-1]
    turned, rest = query[..., :size], query[..., size:]
    first, second = turned.chunk(2, dim=-1)
    half = torch.cat((-second, first), dim=-1)
    return torch.cat((turned * cos[:, None] + half * sin[:, None], rest), dim=-1)


@dataclass(frozen=True)
class H2O(LayerPolicy):
    """Keep the entries that received the most attention (Zhang et al. 2023, arXiv 2306.14048, section 4).

    kvpress calls it `observed_attention` and needs eager attention for it; here the weights are summed
    blockwise.

    Parameters
    ----------
    block_size : int >= 1
        Queries per block: memory against speed, the result is the same.
    """

    block_size: int = BLOCK_SIZE
    name: str = "h2o"
    positive_scores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.block_size, bool) or not isinstance(self.block_size, int) or self.block_size < 1:
            raise ConfigError(f"h2o block_size must be a whole number >= 1, got {self.block_size!r}")

    def score_layer(self, ctx: LayerContext, budget: Budget) -> Tensor:
        """Mean observed attention, fp32 [B, H, T]."""
        hidden, rotary = ctx.observing()
        return observed_attention(ctx.module, hidden, ctx.keys, rotary, block_size=self.block_size)

    def scores_with_gradient(self, ctx: LayerContext, budget: Budget) -> Tensor:
        """As `score_layer`; gradients flow to keys, hidden states and the query projection."""
        hidden, rotary = ctx.observing()
        return observed_attention(
            ctx.module, hidden, ctx.keys, rotary, block_size=self.block_size, differentiable=True
        )
