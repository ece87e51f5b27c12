"""H2O's blockwise sums against kvpress's ObservedAttentionPress under eager attention, and by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kvpress import ObservedAttentionPress
from kvpress_reference import layer_contexts, token_ids
from torch import nn

from sparsekv import architecture
from sparsekv.errors import ConfigError
from sparsekv.policies import make_policy
from sparsekv.policies.attention_scores import H2O, observed_attention
from sparsekv.policies.budget import Budget


def eager_scores(model: Any, input_ids: torch.Tensor) -> list[torch.Tensor]:
    """ObservedAttentionPress's scores per layer, from real eager attention weights."""
    model.set_attn_implementation("eager")
    press, found = ObservedAttentionPress(), []

    def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        heads = module.config.num_key_value_heads
        keys = torch.zeros(input_ids.shape[0], heads, input_ids.shape[1], 1)
        found.append(press.score(module, None, keys, None, output[1], kwargs))

    handles = [m.register_forward_hook(hook, with_kwargs=True) for m in architecture.attention_modules(model)]
    with torch.no_grad():
        model.model(input_ids=input_ids)
    for handle in handles:
        handle.remove()
    model.set_attn_implementation("sdpa")
    return found


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "phi3", "gemma3"])
@pytest.mark.parametrize("block_size", [1, 37, 128])
def test_equals_observed_attention_under_eager(tiny_model: Any, family: str, block_size: int) -> None:
    model = tiny_model(family)
    input_ids = token_ids(96, rows=2)
    expected = eager_scores(model, input_ids)
    for layer in architecture.compressible_layers(model):
        ctx = layer_contexts(model, input_ids)[layer]
        scores = H2O(block_size=block_size).score_layer(ctx, Budget())
        torch.testing.assert_close(scores, expected[layer], atol=2e-6, rtol=1e-5)
        for ratio in (0.3, 0.5, 0.9):
            kept = H2O(block_size=block_size).keep_layer(ctx, Budget(ratio))
            n_kept = max(1, int(96 * (1 - ratio)))
            wanted = torch.zeros_like(kept).scatter_(-1, expected[layer].topk(n_kept).indices, True)
            assert torch.equal(kept, wanted)


def test_partial_rotary_embedding(tiny_model: Any) -> None:
    """Phi-3 may rotate only some channels (kvpress's own query code can't)."""
    model = tiny_model(
        "phi3", rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    )
    input_ids = token_ids(70)
    ctx = layer_contexts(model, input_ids)[1]
    assert ctx.position_embeddings[0].shape[-1] == 8
    torch.testing.assert_close(
        H2O().score_layer(ctx, Budget()), eager_scores(model, input_ids)[1], atol=2e-6, rtol=1e-5
    )


class OneHead(nn.Module):
    """A Llama-like attention layer with one head of size 2 and the identity as query projection."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_attention_heads=1)
        self.head_dim, self.scaling = 2, 1.0
        self.q_proj = nn.Identity()


def test_by_hand_with_fewer_queries_than_entries() -> None:
    """Two queries over three entries, keys zero: weights 1/2 1/2 0 and 1/3 1/3 1/3."""
    hidden, keys = torch.randn(1, 2, 2), torch.zeros(1, 1, 3, 2)
    rotary = torch.ones(1, 2, 2), torch.zeros(1, 2, 2)
    scores = observed_attention(OneHead(), hidden, keys, rotary)
    # entries 0 and 1 are seen by both queries, entry 2 by the last one only
    torch.testing.assert_close(scores, torch.tensor([[[5 / 12, 5 / 12, 1 / 3]]]))


def test_by_hand_with_rotation() -> None:
    """A quarter turn maps the query (1, 0) to (0, 1): logits ln 3 and 0 give weights 3/4 and 1/4."""
    hidden = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    keys = torch.tensor([[[[0.0, 3.0], [5.0, 0.0]]]]).mul(torch.tensor(3.0).log() / 3.0)
    rotary = torch.zeros(1, 2, 2), torch.ones(1, 2, 2)
    scores = observed_attention(OneHead(), hidden, keys, rotary, block_size=1)
    # query 0 sees entry 0 alone (weight 1), query 1 gives it 3/4: mean 7/8; entry 1 gets 1/4 from query 1
    torch.testing.assert_close(scores, torch.tensor([[[7 / 8, 1 / 4]]]))


def test_never_holds_more_than_a_block(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    softmax = torch.Tensor.softmax

    def watched(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, self.numel())
        return softmax(self, *args, **kwargs)

    ctx = layer_contexts(tiny_model("llama"), token_ids(208))[0]
    monkeypatch.setattr(torch.Tensor, "softmax", watched)
    H2O(block_size=16).score_layer(ctx, Budget())
    assert largest == 4 * 16 * 208  # query heads x block x entries


def test_names_and_arguments() -> None:
    assert make_policy("h2o", block_size=7) == H2O(block_size=7)
    assert make_policy("observed_attention") == H2O()
    with pytest.raises(ConfigError, match="block_size must be a whole number >= 1, got 0"):
        H2O(block_size=0)
