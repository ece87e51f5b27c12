"""What later queries really attend to, measured layer by layer: the targets of a regression.

Shape letters: H kv heads, G query heads per kv head, T context tokens, Q tokens of a future, C hidden size, F features.

    a_i = max over futures, queries j of a future, query heads of the group   of   softmax_k(q_j · k) at entry i

The context is read once; each future is read after it and forgotten again. Attention is computed anew from each
layer's queries and keys in blocks of queries, right after the layer ran, so no [Q, T] matrix outlives its block, and
the queries are the future's alone. A sample is read by itself: there is no padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsekv import architecture
from sparsekv.attention import prepare
from sparsekv.cache.layer import SparseLayer
from sparsekv.cache.sparse import SparseCache
from sparsekv.errors import ConfigError
from sparsekv.eviction import row_contexts
from sparsekv.policies.attention_scores import attention_weights
from sparsekv.policies.base import LayerContext
from sparsekv.probe import after_each_layer, run_decoder
from sparsekv.relevance.features import extra_features
from sparsekv.relevance.predictor import RelevanceConfig
from sparsekv.training.fit_futures import Observation


@dataclass
class Entries:
    """One layer's entries of a context.

    Parameters
    ----------
    module : the attention module, whose predictor is fitted
    hidden : FloatTensor [1, T, C], what entered the layer, in the model's dtype
    extra : FloatTensor [1, H, T, F] or None, further features
    received : FloatTensor [1, H, T], fp32: the most attention that any future query gave; in [0, 1]
    """

    module: nn.Module
    hidden: Tensor
    extra: Tensor | None
    received: Tensor


@torch.no_grad()
def observe(
    model: Any,
    observation: Observation,
    config: RelevanceConfig | None = None,
    *,
    tokenizer: Any = None,
    block_size: int = 128,
) -> dict[int, Entries]:
    """Read a context and its futures; layer index -> its entries, for every compressible layer.

    Parameters
    ----------
    model : supported causal language model; it is switched to the "sparsekv" attention, nothing else changes
    observation : Observation
    config : which features the predictors read besides the hidden state
    tokenizer : for features that look at the text
    block_size : int >= 1, queries per block; a block holds H * G * block_size * (T + Q) fp32 weights

    Raises
    ------
    ConfigError
        If there is no future, or a future or the context is empty.
    """
    if not observation.context or not observation.futures or not all(observation.futures):
        raise ConfigError("a context and at least one future of one token or more are needed")
    prepare(model)
    cache = SparseCache(architecture.text_config(model))
    device = next(model.parameters()).device
    found: dict[int, Entries] = {}

    def read(ids: Sequence[int], hook: Any) -> None:
        def after(module: nn.Module, index: int, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> None:
            layer = cache.layers[index]
            if isinstance(layer, SparseLayer):
                ((ctx, _),) = row_contexts(module, index, cache, layer, hidden, rotary)
                hook(ctx)

        with after_each_layer(model, after):
            run_decoder(model, torch.tensor([list(ids)], device=device), cache, None)

    def keep(ctx: LayerContext) -> None:
        extra = None if config is None else extra_features(ctx, config)
        shape = ctx.keys.shape[:3]
        nothing = torch.zeros(shape, dtype=torch.float32, device=ctx.keys.device)
        found[ctx.layer_idx] = Entries(ctx.module, ctx.hidden_states, extra, nothing)

    def look_back(ctx: LayerContext) -> None:
        entries = found[ctx.layer_idx]
        entries.received = torch.maximum(
            entries.received, most_attention(ctx, entries.received.shape[-1], block_size)
        )

    cache.tokenizer, cache.seeds = tokenizer, (observation.seed,)
    cache.ids = torch.tensor([observation.context], dtype=torch.int32, device=device)
    read(observation.context, keep)
    cache.ids = None
    before = cache.snapshot()
    for future in observation.futures:
        read(future, look_back)
        cache.restore(before)
    return found


def most_attention(ctx: LayerContext, n_context: int, block_size: int = 128) -> Tensor:
    """The most attention that each of the first `n_context` entries gets from the queries of this forward.

    Parameters
    ----------
    ctx : LayerContext of one row, right after its layer ran; its hidden states are the observing queries'
    n_context : int >= 1
    block_size : int >= 1, queries per block

    Returns
    -------
    FloatTensor [1, H, n_context], fp32; the maximum over queries and over the query heads of a kv head.
    """
    total, n_query = ctx.keys.shape[2], ctx.hidden_states.shape[1]
    cos, sin = ctx.position_embeddings
    most = torch.zeros(*ctx.keys.shape[:2], n_context, dtype=torch.float32, device=ctx.keys.device)
    for start in range(0, n_query, block_size):
        stop = min(start + block_size, n_query)
        seen = total - n_query + stop  # later entries are in the future of the whole block
        weights = attention_weights(
            ctx.module,
            ctx.hidden_states[:, start:stop],
            ctx.keys[:, :, :seen],
            (cos[:, start:stop], sin[:, start:stop]),
            torch.arange(total - n_query + start, seen, device=ctx.keys.device),
        )
        most = torch.maximum(most, weights[..., :n_context].amax(dim=(2, 3)))
    return most


def scored_slice(n_context: int, n_sink: int, n_recent: int) -> slice:
    """The columns of a context that may leave, and so are fitted; empty where all of them always stay."""
    return slice(min(n_sink, n_context), max(min(n_sink, n_context), n_context - n_recent))


def log_targets(entries: dict[int, Entries], columns: slice, floor: float) -> Tensor:
    """FloatTensor [layers, H, n], fp32: log of what entries received, at least log(floor)."""
    return torch.cat([each.received[:, :, columns] for each in entries.values()]).clamp_min(floor).log()
