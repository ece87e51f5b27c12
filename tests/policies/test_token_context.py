"""What token policies may look at, made from a model in one place."""

from __future__ import annotations

import torch

from sparsekv.architecture import compressible_layers
from sparsekv.policies.base import TokenContext
from toy import tiny_model


def test_a_context_knows_its_model() -> None:
    model = tiny_model("gemma3")
    ids = torch.arange(10).view(2, 5)
    windowed = [i for i, kind in enumerate(model.config.layer_types) if kind == "sliding_attention"]
    for source in (model, model.config):
        context = TokenContext.of_model(source, ids, seeds=(3, 4))
        assert context.n_layers == len(model.model.layers)
        assert context.n_kv_heads == model.config.num_key_value_heads
        assert windowed and not set(context.depth) & set(windowed)
        assert context.depth == tuple(compressible_layers(model))
        assert bool(context.attention_mask.all()) and context.attention_mask.shape == ids.shape
        assert [row.seed for row in context.rows()] == [3, 4]


def test_padding_is_left_out() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    context = TokenContext.of_model(tiny_model("llama"), torch.arange(10).view(2, 5), mask)
    assert context.attention_mask.dtype == torch.bool
    assert [row.ids.tolist() for row in context.rows()] == [[2, 3, 4], [5, 6, 7, 8, 9]]
