"""The one attention function: reads a Selection (training), a compacted cache (inference), or neither (stock, bitwise).

Shape letters: B batch, Hq query heads, H kv heads, G = Hq / H, Q queries, T stored or seen entries, D head size.

    model(**batch, selection=Selection)         hides entries by mask: differentiable
    model(**batch, selection=SelectionPlan)     the same, chosen inside each layer from its own keys
    model(..., past_key_values=SparseCache)     reads what is stored

`prepare(model)` switches a model over. Nothing global is set: unprepared models are untouched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparsekv import architecture
from sparsekv.cache import kernel
from sparsekv.cache.attend import attend_stored
from sparsekv.cache.layer import LAYER_ATTRIBUTE, SparseLayer
from sparsekv.cache.sparse import ATTENTION, SparseCache
from sparsekv.cache.unfinished import Unfinished, check_finished
from sparsekv.errors import ConfigError
from sparsekv.eviction import evict_layer
from sparsekv.masked import attend_selected
from sparsekv.plan import Seen, SelectionPlan
from sparsekv.selection import Selection

_HOOKED = "_sparsekv_prepared"


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
    reader = None if layer is None else layer.reader  # worked out anew at each call
    if selection is not None and (compacted or reader is not None):
        raise ConfigError(
            "selection= masks a whole context; it can't be given with a cache that has been compacted, or that reads "
            "a part of what it stores"
        )
    if layer is not None and reader is not None:
        output = reader.attend(layer, query, attention_mask, scaling)
    elif layer is not None and compacted:
        output = attend_stored(layer, query, attention_mask, scaling)
    elif selection is not None and _is_full_attention(module):
        output = _attend_hidden(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout,
            scaling,
            selection=selection,
            layer_inputs=layer_inputs,
            **kwargs,
        )
    else:
        output = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )[0]
    if layer is not None and sparse_cache is not None and sparse_cache.decode is not None:
        evict_layer(sparse_cache, module, layer_idx, layer, layer_inputs)
    return output, None


def _attend_hidden(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    *,
    selection: Selection | SelectionPlan,
    layer_inputs: tuple[Tensor, Any] | None,
    **kwargs: Any,
) -> Tensor:
    """A forward that hides entries and frees nothing. Returns [B, Q, Hq, D]."""
    layer_idx = int(module.layer_idx)  # type: ignore[arg-type]
    plan = selection if isinstance(selection, SelectionPlan) else SelectionPlan(selection=selection)
    at, weight, boundaries = plan.decide(module, layer_idx, key, value, layer_inputs)
    output = attend_selected(
        module, query, key, value, at, weight, boundaries, attention_mask, dropout, scaling, **kwargs
    )
    if plan.observers:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        plan.observe(Seen(module, layer_idx, query, key, at, weight, scale, boundaries))
    return output


def _is_full_attention(module: nn.Module) -> bool:
    window = getattr(module, "sliding_window", None)
    if window is None and hasattr(module, "config"):
        layer_idx = int(module.layer_idx)  # type: ignore[arg-type]
        return layer_idx in architecture.compressible_layers(module.config)
    return window is None


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
    if any(parameter.is_cpu for parameter in plain.parameters()):
        kernel.is_on()  # compiled now, rather than while a first token waits
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
        decoder.register_forward_hook(_announce_end, with_kwargs=True)
        setattr(decoder, _HOOKED, True)
    return model


def _announce_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Tell a SparseCache what is coming: rows, padding, and the ids where a policy looks at the text.

    Where rows are padded, positions that the caller did not give are added: a padded row's tokens stand where they
    would alone. The model's own count columns, padding too, and would contradict those the context was read at.
    """
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, SparseCache):
        return None
    ids = kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0] if args else None
    new = ids if ids is not None else kwargs.get("inputs_embeds")
    if new is None:
        return None  # the model itself complains
    check_finished(cache)
    cache.fit_rows(new.shape[0])
    config: Any = module.config
    cache.check_attention(config._attn_implementation)
    cache.follow_mask(kwargs.get("attention_mask"), new.shape[1])
    if cache.decode is not None and cache.ids is not None:
        if ids is None:
            raise ConfigError(
                "evicting by text while decoding needs input_ids; the model was given inputs_embeds"
            )
        cache.ids = torch.cat([cache.ids, ids.to(cache.ids.device, cache.ids.dtype)], dim=1)
    cache.unfinished = Unfinished.of(cache)
    if cache.real is None or kwargs.get("position_ids") is not None or len(args) > 2:
        return None
    total = cache.seen + new.shape[1]
    # wider than what is known only where the mask is not 2-D: it tells of no new padding
    real = nn.functional.pad(cache.real, (0, total - cache.real.shape[1]), value=True)
    positions = (real.long().cumsum(-1) - 1).clamp(min=0)[:, -new.shape[1] :]
    return args, kwargs | {"position_ids": positions.to(new.device)}


def _announce_end(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Tell a SparseCache that all layers have read what came; not reached if the forward breaks off."""
    cache = kwargs.get("past_key_values")
    if isinstance(cache, SparseCache):
        cache.unfinished = None


def _add_layer_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Hand hidden states and rotary to the attention function where it needs them. Keeps no state, only adds."""
    cache = kwargs.get("past_key_values")
    decoding = isinstance(cache, SparseCache) and cache.decode is not None
    plan = kwargs.get("selection")
    if not decoding and not (isinstance(plan, SelectionPlan) and plan.needs_inputs):
        return None
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    rotary = kwargs["position_embeddings"] if "position_embeddings" in kwargs else args[1]
    added: dict[str, Any] = {"layer_inputs": (hidden, rotary)}
    if decoding:
        added["sparse_cache"] = cache
    return args, kwargs | added
