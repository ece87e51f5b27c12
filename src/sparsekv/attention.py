"""The one attention function: reads a Selection (training), a compacted cache (inference), or neither (stock, bitwise).

Shape letters: B batch, Hq query heads, H kv heads, G = Hq / H, Q queries, T stored or seen entries, D head size.

    model(**batch, selection=Selection)         hides entries by mask: differentiable
    model(**batch, selection=SelectionPlan)     the same, chosen inside each layer from its own keys
    model(..., past_key_values=SparseCache)     reads what is stored

`prepare(model)` switches a model over. Nothing global is set: unprepared models are untouched.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparsekv import architecture
from sparsekv.cache.layer import LAYER_ATTRIBUTE, SparseLayer
from sparsekv.cache.sparse import ATTENTION, SparseCache
from sparsekv.errors import ConfigError
from sparsekv.eviction import evict_layer
from sparsekv.policies.base import LayerContext, LayerPolicy
from sparsekv.policies.budget import Budget
from sparsekv.selection import NEVER, Selection

_HOOKED = "_sparsekv_prepared"


@dataclass
class SelectionPlan:
    """A layer policy that selects inside the forward: entries of the context vanish for everything after `boundary`.

    Parameters
    ----------
    policy : LayerPolicy
    budget : Budget
        Scope "head" or "layer" (a model-wide budget needs every layer's scores first).
    boundary : int
        First column that misses what was evicted; the policy sees the columns before it.
    attention_mask : BoolTensor [B, T], optional
        False for padding (left).

    `selected[layer]` holds what each layer chose in the last forward, [B, H, T] int32. It is refilled by every forward,
    so recomputation under gradient checkpointing finds the same values.
    """

    policy: LayerPolicy
    budget: Budget
    boundary: int
    attention_mask: Tensor | None = None
    selected: dict[int, Tensor] = field(default_factory=dict)

    def select_layer(
        self, module: nn.Module, layer_idx: int, key: Tensor, value: Tensor, inputs: tuple[Tensor, Any]
    ) -> Tensor:
        """`evicted_at` [B, H, T] of one layer."""
        hidden, (cos, sin) = inputs
        at = torch.full(key.shape[:3], NEVER, dtype=torch.int32, device=key.device)
        end = self.boundary
        for row in range(key.shape[0]):
            start = 0
            if self.attention_mask is not None:
                start = int((~self.attention_mask[row, :end].bool()).sum())
            at[row, :, :start] = 0
            spot = min(row, cos.shape[0] - 1)
            ctx = LayerContext(
                module=module,
                layer_idx=layer_idx,
                hidden_states=hidden[row : row + 1, start:end],
                keys=key[row : row + 1, :, start:end],
                values=value[row : row + 1, :, start:end],
                position_embeddings=(cos[spot : spot + 1, start:end], sin[spot : spot + 1, start:end]),
                cache_position=torch.arange(end - start, device=key.device),
            )
            with torch.no_grad():
                kept = self.policy.keep_layer(ctx, self.budget)[0]
            at[row, :, start:end] = at[row, :, start:end].masked_fill(~kept, end)
        self.selected[layer_idx] = at
        return at


def sparsekv_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    selection: Selection | SelectionPlan | None = None,
    layer_inputs: tuple[Tensor, Any] | None = None,
    sparse_cache: SparseCache | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over [B, Hq, Q, D] queries, in the signature of transformers' attention functions.

    `selection` is a forward argument of the model; `layer_inputs` (hidden states, rotary cos and sin) and
    `sparse_cache` are added by the hook of `prepare`.
    """
    layer: SparseLayer | None = getattr(key, LAYER_ATTRIBUTE, None)
    layer_idx = int(module.layer_idx)  # type: ignore[arg-type]
    compacted = layer is not None and not layer.intact
    if compacted and selection is not None:
        raise ConfigError(
            "selection= masks a whole context; it can't be given with a cache that has been compacted"
        )
    if layer is not None and compacted:
        output = attend_stored(layer, query, attention_mask, scaling)
    else:
        bias = None
        if selection is not None and _is_full_attention(module):
            if isinstance(selection, SelectionPlan):
                if layer_inputs is None:
                    raise ConfigError("a SelectionPlan needs a model that went through sparsekv.prepare")
                at = selection.select_layer(module, layer_idx, key, value, layer_inputs)
                bias = selection_bias(at, None, attention_mask, query, key.shape[2])
            else:
                at, weight = selection.layer(layer_idx), selection.layer_log_weight(layer_idx)
                bias = selection_bias(at, weight, attention_mask, query, key.shape[2])
        if bias is not None:
            attention_mask = (
                bias.repeat_interleave(query.shape[1] // bias.shape[1], 1) if bias.shape[1] > 1 else bias
            )
        output = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )[0]
    if layer is not None and sparse_cache is not None and sparse_cache.decode is not None:
        evict_layer(sparse_cache, module, layer_idx, layer, layer_inputs)
    return output, None


def _is_full_attention(module: nn.Module) -> bool:
    window = getattr(module, "sliding_window", None)
    if window is None and hasattr(module, "config"):
        layer_idx = int(module.layer_idx)  # type: ignore[arg-type]
        return layer_idx in architecture.compressible_layers(module.config)
    return window is None


def selection_bias(
    evicted_at: Tensor, log_weight: Tensor | None, attention_mask: Tensor | None, query: Tensor, total: int
) -> Tensor | None:
    """What is added to (or, as a bool, allowed in) the attention logits; None if nothing is hidden.

        bias(q, k) = -inf if q < k;  0 if q < evicted_at[k];  else log_weight[k], or -inf where there is none

    Parameters
    ----------
    evicted_at : IntTensor [B, H or 1, T]
    log_weight : FloatTensor [B, H or 1, T], optional
    attention_mask : BoolTensor [B or 1, 1, Q, T] or None (plain causal)
    query : [B, Hq, Q, D]; its queries are the last Q columns
    total : int
        T, the number of keys.

    Returns
    -------
    BoolTensor, or FloatTensor if soft, [B, H or 1, Q, T]
    """
    n_query = query.shape[2]
    evicted_at = evicted_at.to(query.device)
    if evicted_at.shape[-1] > total:
        raise ConfigError(f"the selection covers {evicted_at.shape[-1]} columns, the model sees {total}")
    evicted_at = nn.functional.pad(evicted_at, (0, total - evicted_at.shape[-1]), value=NEVER)
    hidden = evicted_at < total
    if attention_mask is not None:
        hidden &= evicted_at > 0  # the mask hides the padding already
    if log_weight is None and not bool(hidden.any()):
        return None
    columns = torch.arange(total, device=query.device)
    queries = columns[total - n_query :]
    causal = columns <= queries[:, None]
    allowed = causal if attention_mask is None else attention_mask
    visible = queries[:, None] < evicted_at[:, :, None, :]
    if log_weight is None:
        return visible & allowed
    log_weight = nn.functional.pad(log_weight, (0, total - log_weight.shape[-1])).to(
        query.device, query.dtype
    )
    soft = torch.where(
        visible, torch.zeros((), dtype=query.dtype, device=query.device), log_weight[:, :, None, :]
    )
    return soft.masked_fill(~(allowed & (evicted_at > 0)[:, :, None, :]), float("-inf"))


def attend_stored(
    layer: SparseLayer, query: Tensor, attention_mask: Tensor | None, scaling: float | None
) -> Tensor:
    """Attention of the newest Q tokens over everything a layer stores. Returns [B, Q, Hq, D].

    The G query heads of a kv head are folded into its queries ([segments, G * Q, D]), which keeps SDPA on its fused
    kernel without repeating keys; each group of equal segments is one call.
    """
    batch, n_heads, n_query, width = query.shape
    heads = layer.n_kv_heads
    folded = query.reshape(batch * heads, (n_heads // heads) * n_query, width)
    tail_mask = _tail_mask(layer, attention_mask, n_query, query.device)
    output = torch.empty_like(folded)
    for group in layer.groups():
        mask = None
        if tail_mask is not None:
            mask = tail_mask
            if mask.shape[0] > 1:  # rows differ (padding): [B, Q, tail] -> one mask per segment
                mask = mask.repeat_interleave(heads, dim=0)[group.start : group.stop]
            mask = nn.functional.pad(mask, (group.n_prefix, 0), value=True)
            mask = mask.repeat(1, n_heads // heads, 1)[None]
        output[group.start : group.stop] = nn.functional.scaled_dot_product_attention(
            folded[None, group.start : group.stop], group.keys[None], group.values[None], mask, scale=scaling
        )[0]
    return output.view(batch, n_heads, n_query, width).transpose(1, 2).contiguous()


def _tail_mask(
    layer: SparseLayer, attention_mask: Tensor | None, n_query: int, device: torch.device
) -> Tensor | None:
    """BoolTensor [B or 1, Q, tail]: which tail entries each new query sees; None if all. Prefixes are always seen."""
    tail = layer.tail
    if attention_mask is not None:
        mask = attention_mask[:, 0, :, -tail:]
        if mask.dtype != torch.bool:
            mask = mask == 0
        if bool(mask.all()):
            return None
        return mask[:1] if bool((mask == mask[:1]).all()) else mask
    if n_query == 1:
        return None
    return torch.ones(n_query, tail, dtype=torch.bool, device=device).tril(tail - n_query)[None]


def prepare(model: Any) -> Any:
    """Switch a model to the "sparsekv" attention and return it.

    The attention function is wrapped by kvpress's attention patch exactly once, in whatever order the two packages
    were imported, so that head-wise kvpress presses work too. Calling it again changes nothing.

    Raises
    ------
    ConfigError
        If the model's architecture is not supported.
    """
    import kvpress.attention_patch  # kvpress patches all registered functions when it is first imported

    architecture.check_supported(model)
    # kvpress's import may have wrapped an earlier registration: always register the wrapped raw function anew.
    ALL_ATTENTION_FUNCTIONS[ATTENTION] = kvpress.attention_patch.attention_patch(sparsekv_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    plain = architecture.unwrap(model)
    if (
        plain.config._attn_implementation != ATTENTION
        or architecture.text_config(plain)._attn_implementation != ATTENTION
    ):
        plain.set_attn_implementation(ATTENTION)
    for module in architecture.attention_modules(plain):
        if not getattr(module, _HOOKED, False):
            module.register_forward_pre_hook(_add_layer_inputs, with_kwargs=True)
            setattr(module, _HOOKED, True)
    decoder = architecture.text_model(plain)
    if not getattr(decoder, _HOOKED, False):
        decoder.register_forward_pre_hook(_announce_input, with_kwargs=True)
        setattr(decoder, _HOOKED, True)
    return model


def _announce_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Tell a SparseCache what is coming: rows, padding, and the ids where a policy looks at the text."""
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, SparseCache):
        return
    ids = kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0] if args else None
    new = ids if ids is not None else kwargs.get("inputs_embeds")
    if new is None:
        return  # the model itself complains
    cache.fit_rows(new.shape[0])
    cache.follow_mask(kwargs.get("attention_mask"), new.shape[1])
    if cache.decode is not None and cache.ids is not None:
        if ids is None:
            raise ConfigError(
                "evicting by text while decoding needs input_ids; the model was given inputs_embeds"
            )
        cache.ids = torch.cat([cache.ids, ids.to(cache.ids.device, cache.ids.dtype)], dim=1)


def _add_layer_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Hand hidden states and rotary to the attention function where it needs them. Keeps no state, only adds."""
    cache = kwargs.get("past_key_values")
    decoding = isinstance(cache, SparseCache) and cache.decode is not None
    if not decoding and not isinstance(kwargs.get("selection"), SelectionPlan):
        return None
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    rotary = kwargs["position_embeddings"] if "position_embeddings" in kwargs else args[1]
    added: dict[str, Any] = {"layer_inputs": (hidden, rotary)}
    if decoding:
        added["sparse_cache"] = cache
    return args, kwargs | added
