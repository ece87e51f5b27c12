"""What kvpress itself leaves in its cache, and a layer's tensors as the framework hands them to a policy.

Rows are recognised by comparing every kept row with every original one: slow, and independent of the code
under test.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from sparsekv import architecture
from sparsekv.policies.base import LayerContext


def token_ids(n: int = 150, seed: int = 0, rows: int = 1) -> Tensor:
    """LongTensor [rows, n] of ids that the toy models know."""
    return torch.randint(3, 259, (rows, n), generator=torch.Generator().manual_seed(seed))


class FirstPrefill(DynamicCache):
    """Remembers the keys of each layer's first update."""

    def __init__(self) -> None:
        super().__init__()
        self.original: dict[int, Tensor] = {}

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        stored = super().update(key, value, layer_idx, *args, **kwargs)
        self.original.setdefault(layer_idx, stored[0].clone())
        return stored


def layer_contexts(
    model: Any, input_ids: Tensor, *, attention: list[Tensor] | None = None, **more: Any
) -> list[LayerContext]:
    """Every layer's tensors in a plain prefill.

    `attention` gets every layer's weights, if the model's attention tells them (eager); `more`: further fields of the
    contexts.
    """
    found: list[LayerContext] = []
    cache = DynamicCache()

    def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        layer = cache.layers[module.layer_idx]
        found.append(
            LayerContext(
                module=module,
                layer_idx=module.layer_idx,
                hidden_states=kwargs["hidden_states"],
                keys=layer.keys,
                values=layer.values,
                position_embeddings=kwargs["position_embeddings"],
                cache_position=kwargs["cache_position"],
                **more,
            )
        )
        if attention is not None:
            attention.append(output[1])

    modules = architecture.attention_modules(model)
    handles = [m.register_forward_hook(hook, with_kwargs=True) for m in modules]
    try:
        with torch.no_grad():
            model.model(input_ids=input_ids, past_key_values=cache)
    finally:
        for handle in handles:
            handle.remove()
    return found


def kvpress_kept(model: Any, press: Any, input_ids: Tensor) -> Tensor:
    """BoolTensor [L, H, T]: what `press` leaves of one context, by its own hooks."""
    modules = architecture.attention_modules(model)
    cache = FirstPrefill()
    for module in modules:
        module.masked_key_indices = None
    with torch.no_grad(), press(model):
        model.model(input_ids=input_ids, past_key_values=cache)
    kept = []
    for layer, module in enumerate(modules):
        original, left = cache.original[layer], cache.layers[layer].keys
        if module.masked_key_indices is not None:
            # kvcompose_unstructured leaves in the cache what it read a second time; the context comes first
            assert left.shape[2] >= original.shape[2]
            seen = torch.ones(original.shape[1:3], dtype=torch.bool)
            _, heads, entries = module.masked_key_indices
            seen[heads, entries] = False
        else:
            same = (left[0][:, :, None, :] == original[0][:, None, :, :]).all(-1)  # [H, kept, T]
            assert bool((same.sum(-1) == 1).all()), "the press changed its keys"
            seen = same.any(1)
        kept.append(seen)
        module.masked_key_indices = None
    return torch.stack(kept)
