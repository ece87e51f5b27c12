"""H2O: how much attention has each entry received so far? Summed blockwise, so no eager attention is needed.

Shape letters: B batch, H kv heads, G query heads per kv head, T entries, Q queries, D head size.

The value is exactly that of kvpress's `ObservedAttentionPress` under eager attention. Nothing of size Q x T
is ever held for more than one block of queries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsekv.errors import ConfigError
from sparsekv.policies.base import LayerContext, LayerPolicy
from sparsekv.policies.budget import Budget


def observed_attention(
    module: nn.Module,
    hidden_states: Tensor,
    keys: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    block_size: int = 128,
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

    Returns
    -------
    FloatTensor [B, H, T], fp32
        Averaged over the G query heads of each kv head. Higher = keep.
    """
    from kvpress.utils import get_prerope_query_states

    batch, n_kv_heads, total, width = keys.shape
    n_query = hidden_states.shape[1]
    scaling = getattr(module, "scaling", None) or width**-0.5
    cos, sin = position_embeddings
    column = torch.arange(total, device=keys.device)
    received = torch.zeros(batch, n_kv_heads, total, dtype=torch.float32, device=keys.device)
    groups = 1
    with torch.no_grad():
        for start in range(0, n_query, block_size):
            stop = min(start + block_size, n_query)
            seen = total - n_query + stop  # later entries are in the future of the whole block
            query = get_prerope_query_states(module, hidden_states[:, start:stop])
            query = _rotate(query, cos[:, start:stop], sin[:, start:stop])
            groups = query.shape[1] // n_kv_heads
            folded = query.reshape(batch, n_kv_heads, groups * (stop - start), width)
            logits = (folded @ keys[:, :, :seen].transpose(2, 3)) * scaling
            logits = logits.view(batch, n_kv_heads, groups, stop - start, seen)
            own = total - n_query + torch.arange(start, stop, device=keys.device)
            logits.masked_fill_(column[:seen] > own[:, None], float("-inf"))
            received[..., :seen] += logits.softmax(-1, dtype=torch.float32).sum((2, 3))
    n_observers = (total - column).clamp(max=n_query)
    return received / (n_observers * groups)


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
    block_size : int >= 1, default 128
        Queries per block: memory against speed, the result is the same.
    """

    block_size: int = 128
    name: str = "h2o"

    def __post_init__(self) -> None:
        if isinstance(self.block_size, bool) or not isinstance(self.block_size, int) or self.block_size < 1:
            raise ConfigError(f"h2o block_size must be a whole number >= 1, got {self.block_size!r}")

    def score_layer(self, ctx: LayerContext, budget: Budget) -> Tensor:
        """Mean observed attention, fp32 [B, H, T]."""
        return observed_attention(
            ctx.module, ctx.hidden_states, ctx.keys, ctx.position_embeddings, block_size=self.block_size
        )
