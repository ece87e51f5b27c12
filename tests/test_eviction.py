"""Which hidden states belong to which stored entries, once some were taken out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from oracle import stepped_logits
from sample_policies import Scatter
from sparsekv import make_cache
from sparsekv.attention import prepare
from sparsekv.cache.tiered import TieredCache
from sparsekv.errors import ConfigError
from sparsekv.eviction import newest_stored, row_contexts
from sparsekv.generation import compress
from sparsekv.policies import make_policy
from sparsekv.policies.adaptive_blocks import AdaptiveBlockDropout
from sparsekv.policies.attention_scores import attention_weights
from sparsekv.policies.base import LayerContext, TokenPolicy, TokenRow
from sparsekv.policies.budget import Budget
from sparsekv.policies.learned_scores import relevance_of_entries
from sparsekv.policies.window_scores import window_attention
from sparsekv.relevance import RelevanceConfig, attach_relevance
from toy import tiny_model

T = 40


def some_ids(total: int) -> torch.Tensor:
    return torch.randint(3, 250, (1, total), generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize(
    ("columns", "n"),
    [
        ([[0, 1, 2, 3]], 4),
        ([[5, 6, 7, 8, 9]], 5),
        ([[2, 3, 5, 8, 9]], 2),
        ([[2, 7, 8, 9], [6, 7, 8, 9]], 3),
        ([[2, 7, 8, 9], [6, 7, 0, 9]], 1),
        ([[6, 7, 8]], 0),
        ([[]], 0),
    ],
)
def test_the_run_of_newest_tokens_that_all_heads_store(columns: list[list[int]], n: int) -> None:
    seen = 4 if columns == [[0, 1, 2, 3]] else 10
    assert newest_stored(torch.tensor(columns, dtype=torch.int64), seen) == n


@pytest.mark.parametrize("pads", [0, 7])
def test_a_token_policy_is_asked_once_where_all_layers_store_the_same(pads: int) -> None:
    @dataclass(frozen=True)
    class Counting(Scatter):
        asked: list[tuple[int, int]] = field(default_factory=list)

        def keep_row(self, row: TokenRow, budget: Budget) -> torch.Tensor:
            self.asked.append((row.seed, row.n))
            return super().keep_row(row, budget)

    model, ids = tiny_model("llama", num_hidden_layers=3), some_ids(T).expand(2, -1)
    mask = torch.ones(2, T, dtype=torch.long)
    mask[1, :pads] = 0
    policy = Counting()
    cache = compress(model, ids, policy, 0.5, attention_mask=mask, seeds=(3, 4))
    assert policy.asked == [(3, T), (4, T - pads)]
    kept = cache.kept_columns()
    alone = compress(model, ids[1:, pads:], Scatter(), 0.5, seeds=(4,))
    assert torch.equal(kept[1, ..., pads:], alone.kept_columns()[0]) and not kept[1, ..., :pads].any()
    assert not torch.equal(kept[0, 0], kept[0, 1]), "layers draw for themselves"
    in_pieces = Counting()
    compress(model, ids, in_pieces, 0.5, chunk=T // 2, seeds=(3, 4))
    assert len(in_pieces.asked) > 4, "what layers and heads store differs by then"


class WithGap(TokenPolicy):
    """Token 35 leaves, and all before 20."""

    name = "with_gap"

    def keep_row(self, row: TokenRow, budget: Budget) -> torch.Tensor:
        column = torch.arange(row.n)
        return ((column >= 20) & (column != 35))[None, None]


def context_after_a_gap() -> tuple[Any, torch.Tensor, LayerContext]:
    """A layer context, where 4 of 19 hidden states (of tokens 21 to 39) are those of the newest entries."""
    model, ids = prepare(tiny_model("llama")), some_ids(T)
    cache = compress(model, ids, WithGap(), Budget(0.5))
    with torch.no_grad():
        hidden = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))
        rotary = model.model.rotary_emb(hidden, torch.arange(T)[None])
    module, layer = model.model.layers[0].self_attn, cache.layers[0]
    ((ctx, columns),) = row_contexts(module, 0, cache, layer, hidden, rotary)
    assert columns.shape == (2, 19) and ctx.hidden_states.shape[1] == 19
    return module, hidden, ctx


def test_windows_look_only_through_tokens_whose_entries_are_there() -> None:
    """With the other hidden states the causal limit would be that of other tokens."""
    module, hidden, ctx = context_after_a_gap()
    assert ctx.n_aligned == 4 and not ctx.covers_entries
    weights = window_attention(ctx, 8)
    assert weights.shape[3] == 4
    # token 37, by hand: it sees the entries of tokens 20..34, 36 and 37
    from kvpress.utils import get_prerope_query_states
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    with torch.no_grad():
        query = get_prerope_query_states(module, hidden[:, 37:38])
        cos, sin = (x[:, -3:-2] for x in ctx.position_embeddings)
        query, _ = apply_rotary_pos_emb(query, query, cos, sin)
        wanted = (query.view(2, 2, 16) @ ctx.keys[0, :, :17].transpose(1, 2) / 4).softmax(-1)
    torch.testing.assert_close(weights[0, :, :, 1, :17], wanted)
    assert not weights[0, :, :, 1, 17:].any()


def test_the_newest_token_observes_even_if_its_own_entry_is_gone() -> None:
    """It sees all that is stored, wherever its own entry is."""
    _, _, ctx = context_after_a_gap()
    ctx.n_aligned = 0
    hidden, (cos, sin) = ctx.observing(8)
    assert hidden.shape[1] == cos.shape[1] == sin.shape[1] == 1
    assert torch.equal(hidden, ctx.hidden_states[:, -1:])


def test_learned_scores_of_entries_whose_hidden_states_are_gone_are_refused() -> None:
    """As many hidden states as entries do not make them theirs."""
    model = attach_relevance(prepare(tiny_model("llama")))
    _, _, ctx = context_after_a_gap()
    ctx.module = model.model.layers[0].self_attn
    assert ctx.hidden_states.shape[1] == ctx.keys.shape[2]
    with pytest.raises(ConfigError, match=r"'relevance' scores a token from its hidden state.* are gone"):
        relevance_of_entries(ctx, "relevance")
    ctx.n_aligned = None
    assert relevance_of_entries(ctx, "relevance").shape == (1, 2, 19)


@pytest.mark.parametrize("method", ["relevance", "soft_threshold"])
def test_methods_on_relevance_are_refused_at_once_where_hidden_states_will_be_gone(method: str) -> None:
    model, ids = attach_relevance(prepare(tiny_model("llama"))), some_ids(T)
    args = {"on": "relevance", "n_sink": 1, "n_recent": 1} if method == "soft_threshold" else {}
    policy = make_policy(method, **args)
    first = compress(model, ids[:, :20], policy, 16)
    assert first.stored_counts().unique().tolist() == [16]
    for options in ({"phase": "both"}, {"phase": "decode"}, {"chunk": 8}, {"cache": first}):
        with pytest.raises(ConfigError, match=f"method '{method}' needs the whole context at once"):
            compress(model, ids, policy, 16, **options)
    with pytest.raises(ConfigError, match=f"method '{method}'.* needs the whole context at once"):
        make_cache(policy, model, 16)
    if method == "soft_threshold":
        compress(model, ids, make_policy(method, n_sink=1, n_recent=1), 16, phase="both")


@pytest.mark.parametrize(("active", "question"), [(16, 40), (8, 40), (8, 20)])
def test_attention_features_go_on_over_two_tiers(active: int, question: int) -> None:
    """The tier moves some of a question's tokens out in the forward in which they came."""
    model = attach_relevance(prepare(tiny_model("llama")), RelevanceConfig(features=("hidden", "attention")))
    ids, policy = some_ids(20 + question + 9), make_policy("atskv", n_sink=1, n_recent=1)
    options: dict[str, Any] = {"phase": "both", "every": 64, "cache": TieredCache(model, active)}
    cache = compress(model, ids[:, :20], policy, 8, **options)
    logits = stepped_logits(model, cache, ids, None, [question, *[1] * 9])
    assert bool(logits.isfinite().all()) and float(cache.stored_counts().float().mean()) <= active
    assert cache.seen == 29 + question
    for _, layer in cache.sparse_layers():
        (notes,) = layer.recent_inputs
        # observers of an entry: never more than the tokens from its own on
        assert bool((notes[0, :, :, 5] <= torch.arange(cache.seen, 0, -1)[:, None]).all())


def test_a_blocks_own_queries_are_those_whose_entries_are_there() -> None:
    """The sink share of a block is measured by tokens 36 to 39 only; the other blocks count as their mean."""
    _, _, ctx = context_after_a_gap()
    policy = AdaptiveBlockDropout(block_size=4, n_sink=2, n_recent=1, samples=4)
    edges = torch.tensor([3, 7, 11, 15, 19])
    share = policy._sink_share(ctx, edges)
    hidden, rotary = ctx.observing()
    weights = attention_weights(ctx.module, hidden, ctx.keys, rotary, torch.arange(15, 19))
    wanted = weights[..., :2].sum(-1).mean((2, 3))
    torch.testing.assert_close(share, wanted[..., None].expand(-1, -1, 4))
