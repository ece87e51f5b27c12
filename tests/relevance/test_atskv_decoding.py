"""`atskv` while decoding, in chunks and later turns: choices worked out again from a masked forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scored import ALL, T, decode, kept_of, scored_model, token_ids

from oracle import masked_logits, positions, stepped_logits
from sparsekv import architecture, compress
from sparsekv.errors import ConfigError
from sparsekv.policies.budget import Budget
from sparsekv.relevance import ATSKV, AttentionStatistics, HandcraftedFeatures
from sparsekv.relevance.threshold import ThresholdController
from sparsekv.selection import NEVER, Selection
from toy import toy_tokenizer

STEPS = 40


def hidden_of(
    model: Any, ids: torch.Tensor, selection: Selection
) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """(logits, per layer the input, rotary, keys and values) of one masked forward over everything."""
    from transformers import DynamicCache

    cache, found = DynamicCache(config=model.config), []

    def hook(module: Any, args: Any, kwargs: Any) -> None:
        found.append({"hidden": kwargs["hidden_states"], "rotary": kwargs["position_embeddings"]})

    handles = [
        m.register_forward_pre_hook(hook, with_kwargs=True) for m in architecture.attention_modules(model)
    ]
    with torch.no_grad():
        logits = model(ids, selection=selection, past_key_values=cache).logits
    for handle in handles:
        handle.remove()
    for layer, entry in zip(cache.layers, found, strict=True):
        entry |= {"keys": layer.keys, "values": layer.values}
    return logits, found


def selection_of(first: torch.Tensor, stored: list[torch.Tensor], steps: list[int]) -> Selection:
    """When each entry left, from what was stored after every step."""
    total = T + sum(steps)
    at = torch.full((1, *first.shape[1:3], total), NEVER, dtype=torch.int32)
    end = T
    for size, kept in zip([0, *steps], [first, *stored], strict=True):
        end += size
        gone = ~kept & (at[..., :end] == NEVER)
        at[..., :end][gone] = end
    return Selection(at)


@pytest.mark.parametrize(
    ("budget", "steps", "every"),
    [
        (Budget(0.6), [1] * STEPS, 8),
        (Budget(tokens=24), [1] * STEPS, 64),
        (Budget(0.75), [1, 1, 7, 1, 1, 1, 12, 1, 1, 1, 1, 1, 5, 1, 1, 1], 1),
    ],
)
@pytest.mark.parametrize("phase", ["both", "decode"])
def test_decoding_keeps_what_the_quantile_of_all_remembered_scores_says(budget, steps, every, phase):
    """Logits are those of a masked forward; every choice is repeated from that forward's hidden states."""
    model = scored_model()
    ids = token_ids(T + sum(steps))
    policy = ATSKV(n_sink=2, n_recent=5)
    cache = compress(model, ids[:, :T], policy, budget, phase=phase, every=every)
    first = kept_of(cache)
    logits, stored = decode(model, cache, ids, steps)
    selection = selection_of(first, stored, steps)
    masked, entries = hidden_of(model, ids, selection)
    assert (masked[:, T:] - logits).abs().max() <= 1e-4
    assert (masked[:, T:] - masked_logits(model, ids, None, None, sum(steps))).abs().max() > 1e-2

    controller = ThresholdController(budget)
    with torch.no_grad():
        ranks = torch.stack(
            [
                torch.nn.functional.logsigmoid(m.relevance(entry["hidden"]))[0].T
                for m, entry in zip(architecture.attention_modules(model), entries, strict=True)
            ]
        )
    column = torch.arange(ids.shape[1])
    held = torch.ones(3, 2, T, dtype=torch.bool)
    end = T
    for size, kept in zip([0, *steps], [first, *stored], strict=True):
        end += size
        held = torch.cat([held, torch.ones(3, 2, size, dtype=torch.bool)], -1)
        now = ranks[..., :end].clone()
        now[..., end - 5 :] = 1e6 + column[end - 5 : end]
        now[..., :2] = 1e8 - 8 * column[:2]
        if size or phase == "both":
            pieces = [[now[i, h][held[i, h]] for h in range(2)] for i in range(3)]
            chosen = controller.cut(pieces, end, every=every if size else None)
            for i in range(3):
                for h in range(2):
                    if chosen is not None:
                        held[i, h, held[i, h].nonzero().flatten()[~chosen[i][h]]] = False
        assert torch.equal(held, kept[0])
        limit = budget.n_kept(end) * 6
        if size or phase == "both":
            assert int(held.sum()) <= limit, "after a step the budget holds"
    assert any(len(kept[0].sum(-1).unique()) > 1 for kept in stored), "ragged"


def test_features_go_on_while_decoding():
    """The remembered scores of what is stored equal those worked out from all weights of the masked forward."""
    features, width = ALL, 3
    model, tokenizer = scored_model(features=features, width=width), toy_tokenizer()
    steps = [1] * 10 + [4] + [1] * 9
    total = T + sum(steps)
    ids = token_ids(total)
    policy = ATSKV(n_sink=0, n_recent=0)
    budget = Budget(0.5)
    cache = compress(model, ids[:, :T], policy, budget, phase="both", every=6, tokenizer=tokenizer)
    first = kept_of(cache)
    controller = cache.decode.rounds.controller
    assert controller.rows[0].rounds == 1
    seen_ranks: list[list[list[torch.Tensor]]] = []
    whole_cut = controller.cut

    def spy(ranks: Any, *args: Any, **kwargs: Any) -> Any:
        seen_ranks.append(ranks)
        return whole_cut(ranks, *args, **kwargs)

    controller.cut = spy
    logits, stored = decode(model, cache, ids, steps)
    selection = selection_of(first, stored, steps)
    masked, entries = hidden_of(model, ids, selection)
    assert (masked[:, T:] - logits).abs().max() <= 1e-4
    # the last round, by hand: which step it was, and what was stored then
    ends = [T + sum(steps[: i + 1]) for i in range(len(steps))]
    before = [first, *stored[:-1]]
    rounds = [i for i, kept in enumerate(stored) if int(kept.sum()) < int(before[i].sum()) + 6 * steps[i]]
    assert len(rounds) == len(seen_ranks) > 1
    last = rounds[-1]
    end = ends[last]
    for index, (module, entry) in enumerate(zip(architecture.attention_modules(model), entries, strict=True)):
        at = selection.evicted_at[0, index]
        weights = full_weights(module, entry, at, total)
        base = module.relevance.hidden_part(entry["hidden"])[0]
        for head in range(2):
            held = torch.cat([before[last][0, index, head], torch.ones(steps[last], dtype=torch.bool)])
            columns = held.nonzero().flatten()
            observers = [*range(T - 32, end)]  # the window of the prefill, then every token
            looked = weights[head, :, observers][..., :end].amax(0)  # [Q, end]
            sums = torch.stack(
                [
                    looked.sum(0),
                    looked.amax(0),
                    looked.new_zeros(end),
                    torch.special.entr(looked).sum(0),
                    torch.tensor([sum(q >= c for q in observers) for c in range(end)]).float(),
                    looked.new_zeros(end),
                ],
                -1,
            )
            decay = torch.tensor([2 ** (-(observers[-1] - q) / 16) for q in observers])
            sees = torch.tensor([[float(q >= c) for c in range(end)] for q in observers])
            sums[:, 2], sums[:, 5] = decay @ looked, decay @ sees
            attention = AttentionStatistics(sums[columns][None, None]).features()
            pair = (entry[name][:, head : head + 1, columns] for name in ("keys", "values"))
            handcrafted = HandcraftedFeatures()(*pair, ids[:, :end], tokenizer, columns)
            with torch.no_grad():
                extra = module.relevance.extra(torch.cat([attention, handcrafted], -1), head)[0, 0]
                wanted = torch.nn.functional.logsigmoid(base[columns, head] + extra)
            torch.testing.assert_close(seen_ranks[-1][index][head], wanted, atol=2e-3, rtol=2e-3)


def full_weights(module: Any, entry: dict[str, Any], at: torch.Tensor, total: int) -> torch.Tensor:
    """[H, G, T, T] attention weights of a masked forward, from scratch."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    with torch.no_grad():
        query = module.q_proj(entry["hidden"]).view(1, total, 4, 16).transpose(1, 2)
        query, _ = apply_rotary_pos_emb(query, query, *entry["rotary"])
        logits = query.view(2, 2, total, 16) @ entry["keys"][0][:, None].transpose(-1, -2) / 4
    column = torch.arange(total)
    visible = (column <= column[:, None]) & (column[:, None] < at[:, None, :])
    return logits.masked_fill(~visible[:, None], -torch.inf).softmax(-1)


def test_active_memory_while_generating():
    """Plain `generate`: within the budget after every step, over it by one step's tokens at most, near the target."""
    model, ids = scored_model(), token_ids(60)
    cache = compress(model, ids, "atskv", 0.75, phase="both", every=64)
    sizes = []
    keep = cache.keep_in_layer

    def watched(index: int, kept: torch.Tensor, layer: Any = None) -> None:
        sizes.append((cache.seen, int(cache.stored_counts().sum()) if index == 0 else None))
        keep(index, kept, layer)

    cache.keep_in_layer = watched  # type: ignore[method-assign]
    torch.manual_seed(0)
    out = model.generate(
        torch.cat([ids, token_ids(3, seed=9)], 1), past_key_values=cache, max_new_tokens=340, do_sample=True
    )
    assert out.shape[1] == 403 and cache.seen == 402
    assert cache.achieved_compression[0] == pytest.approx(0.75, abs=0.02)
    for seen, stored in sizes:
        if stored is not None:
            assert stored <= 6 * (max(1, int(seen * 0.25)) + 3)
    n_rounds = sum(stored is not None for _, stored in sizes)
    assert 5 < n_rounds < 250


def test_beams_snapshots_and_cropping_keep_scores_with_their_tokens():
    model = scored_model()
    ids = token_ids(T + 30)
    budget, steps = Budget(0.6), [1] * 12

    def fresh() -> Any:
        return compress(model, ids[:, :T], ATSKV(n_recent=4), budget, phase="both", every=4)

    cache = fresh()
    _, whole = decode(model, cache, ids, steps)
    # rows in another order, repeated
    cache = fresh()
    cache.batch_repeat_interleave(2)
    two = torch.cat([ids, ids.flip(1)])[:, : T + 12]
    two[1, :T] = ids[0, :T]
    decode(model, cache, two, steps[:5])
    cache.reorder_cache(torch.tensor([1, 0]))
    _, swapped = decode(model, cache, two.flip(0), steps[5:])
    assert torch.equal(swapped[-1][1], whole[-1][0]) and not torch.equal(swapped[-1][0], whole[-1][0])
    # back to a snapshot
    cache = fresh()
    decode(model, cache, ids, steps[:3])
    saved = cache.snapshot()
    decode(model, cache, ids.flip(1), steps[3:])
    cache.restore(saved)
    _, again = decode(model, cache, ids, steps[3:])
    assert torch.equal(again[-1], whole[-1])
    # cropped tokens are forgotten with their scores (nothing had left since)
    cache = compress(model, ids[:, :T], ATSKV(), Budget(tokens=200), phase="both")
    plain, _ = decode(model, cache, ids, steps)
    cache.crop(T + 4)
    cropped, _ = decode(model, cache, ids, steps[4:])
    assert (cropped - plain[:, 4:]).abs().max() < 1e-5
    assert all(layer.recent_inputs[0].shape[1] == cache.seen for _, layer in cache.sparse_layers())


def test_chunks_and_later_turns():
    model = scored_model()
    ids = token_ids(96)
    chunked = compress(model, ids, ATSKV(n_recent=4), 0.5, chunk=24)
    assert chunked.achieved_compression[0] == pytest.approx(0.5) and not chunked.intact
    first = compress(model, ids[:, :T], ATSKV(n_recent=4), 0.5, phase="both")
    later = compress(model, ids, ATSKV(n_recent=4), 0.5, cache=first)
    assert later.achieved_compression[0] == pytest.approx(0.5)
    once = compress(model, ids[:, :T], ATSKV(), 0.5)
    with pytest.raises(ConfigError, match="earlier tokens of this cache were read without it"):
        compress(model, ids, ATSKV(), 0.5, cache=once)


def test_the_threshold_alone_goes_on_while_decoding():
    model = scored_model()
    ids = token_ids(T + 20)
    policy = ATSKV(n_sink=2, n_recent=4, threshold=1.0)
    cache = compress(model, ids[:, :T], policy, phase="both", every=5)
    _, stored = decode(model, cache, ids, [1] * 20)
    sizes = [int(kept.sum()) for kept in stored]
    drops = [i + 1 for i in range(1, 20) if sizes[i] < sizes[i - 1] + 6]
    assert set(drops) <= {5, 10, 15, 20} and len(drops) >= 2


def test_padded_rows_decode_as_alone():
    model = scored_model()
    ids, pad = token_ids(T + 16, rows=2), 13
    mask = torch.ones_like(ids)
    mask[1, :pad] = 0
    policy = ATSKV(n_recent=4)
    cache = compress(model, ids[:, :T], policy, 0.6, attention_mask=mask[:, :T], phase="both", every=4)
    together = stepped_logits(model, cache, ids, mask, [1] * 16)
    for row, start in ((0, 0), (1, pad)):
        alone = compress(model, ids[row : row + 1, start:T], policy, 0.6, phase="both", every=4)
        logits, stored = decode(model, alone, ids[row : row + 1, start:], [1] * 16)
        assert torch.equal(kept_of(cache)[row, ..., start:], stored[-1][0])
        assert (logits[0] - together[row]).abs().max() <= 1e-4
    assert positions(mask)[1, -1] == T + 15 - pad
