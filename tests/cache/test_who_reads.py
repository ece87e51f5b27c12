"""Who may read a cache, and how: models that are not prepared, positions not given, modes that are over, pickles."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsekv.attention import prepare
from sparsekv.cache.sparse import SparseCache
from sparsekv.cache.tiered import TieredCache
from sparsekv.errors import ConfigError
from sparsekv.generation import compress
from sparsekv.policies import AnchorConfig, Anchors
from sparsekv.selection import Selection
from toy import tiny_model, toy_tokenizer

T, TOTAL = 50, 60


def some_ids(rows: int = 2) -> torch.Tensor:
    return torch.randint(3, 250, (rows, TOTAL), generator=torch.Generator().manual_seed(0))


def padded_mask(pads: int = 20) -> torch.Tensor:
    """The second of two rows starts with padding."""
    mask = torch.ones(2, TOTAL, dtype=torch.int64)
    mask[1, :pads] = 0
    return mask


def two_tiers(model: Any) -> SparseCache:
    return compress(model, some_ids()[:, :T], "knorm", 0.7, cache=TieredCache(model, 10, recall_tokens=100))


NEEDS_PREPARE = {
    "ragged": lambda model: compress(model, some_ids()[:, :T], "adakv(knorm)", 0.5),
    "padded": lambda model: compress(
        model, some_ids()[:, :T], "knorm", 10, attention_mask=padded_mask()[:, :T]
    ),
    "evicts": lambda model: compress(model, some_ids()[:, :T], "sink_recent", 10, phase="decode", every=1),
    "quest": lambda model: compress(model, some_ids()[:, :T], "quest", 10),
    "two tiers": two_tiers,
}


@pytest.mark.parametrize("kind", NEEDS_PREPARE)
def test_a_model_that_is_not_prepared_is_told_so(kind: str) -> None:
    """Its attention would read the new tokens alone, or all that is stored, without a word."""
    cache = NEEDS_PREPARE[kind](prepare(tiny_model("llama")))
    with pytest.raises(ConfigError, match=r"call sparsekv\.prepare\(model\) first"):
        tiny_model("llama")(some_ids()[:, T : T + 1], past_key_values=cache)


def test_an_attention_that_was_switched_is_noticed_by_a_copied_cache() -> None:
    model = prepare(tiny_model("llama"))
    cache = copy.deepcopy(compress(model, some_ids()[:, :T], "adakv(knorm)", 0.5))
    model.set_attn_implementation("sdpa")
    with pytest.raises(ConfigError, match="attention 'sdpa' can't read"):
        model(some_ids()[:, T : T + 1], past_key_values=cache)


def test_a_uniform_cache_is_read_by_stock_attention() -> None:
    ids, model, stock = some_ids(), prepare(tiny_model("llama")), tiny_model("llama")
    cache = compress(model, ids[:, :T], "knorm", 0.5)
    twin = copy.deepcopy(cache)
    positions = torch.arange(T, TOTAL)[None]
    ours = model(ids[:, T:], past_key_values=cache, position_ids=positions).logits
    theirs = stock(ids[:, T:], past_key_values=twin, position_ids=positions).logits
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["full", "knorm"])
def test_positions_that_are_not_given_leave_out_padding(method: str) -> None:
    """The context was read at them; the model's own would count the padding, too."""
    ids, mask, model = some_ids(), padded_mask(), prepare(tiny_model("llama"))
    cache = compress(model, ids[:, :T], method, 25, attention_mask=mask[:, :T])
    alone = compress(model, ids[1:, 20:T], method, 25)
    expected = model(ids[1:, T:], past_key_values=alone).logits
    logits = model(ids[:, T:], past_key_values=cache, attention_mask=mask).logits[1:]
    torch.testing.assert_close(logits, expected, atol=5e-5, rtol=1e-4)


def test_positions_go_on_after_a_mask_of_another_shape() -> None:
    """It says nothing of padding: the new tokens have none."""
    ids, mask, model = some_ids(), padded_mask(), prepare(tiny_model("llama"))
    cache = compress(model, ids[:, :T], "full", attention_mask=mask[:, :T])
    alone = compress(model, ids[:1, :T], "full")
    seen = torch.ones(2, 1, TOTAL - T, TOTAL, dtype=torch.bool).tril(T)
    logits = model(ids[:, T:], past_key_values=cache, attention_mask=seen).logits[:1]
    expected = model(ids[:1, T:], past_key_values=alone).logits
    torch.testing.assert_close(logits, expected, atol=5e-5, rtol=1e-4)


def test_a_selection_that_does_not_name_padding_stores_none() -> None:
    """What is compacted is always seen: no mask could hide it again."""
    ids, mask, model = some_ids(), padded_mask(), prepare(tiny_model("llama"))
    kept = torch.ones(2, 1, 1, T, dtype=torch.bool)
    kept[..., 30:40] = False
    logits = []
    for pad in (None, mask[:, :T] == 0):
        cache = compress(model, ids[:, :T], "full", attention_mask=mask[:, :T])
        cache.apply(Selection.from_kept(kept, pad=pad))
        assert cache.stored_counts()[0].tolist() == [[40, 40], [20, 20]]
        logits.append(model(ids[:, T:], past_key_values=cache, attention_mask=mask).logits)
    assert torch.equal(*logits)
    row = compress(model, ids[1:, :T], "full", attention_mask=mask[1:, :T])
    assert row.fork([Selection.from_kept(kept[1:])]).stored_counts()[0].tolist() == [[20, 20]]


def test_rows_that_are_repeated_in_a_later_turn_keep_what_they_keep_alone() -> None:
    """Text and seeds of the new rows, not of those that the old ones become."""
    model, tokenizer = prepare(tiny_model("llama")), toy_tokenizer()
    policy = Anchors(AnchorConfig(recent_size=2, sink_size=1), fill="uniform")
    ids = torch.full((4, TOTAL), 70)
    for row in range(4):
        ids[row, 31 + 5 * row : 34 + 5 * row] = ord(",") - 33 + 3

    def kept(first: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        cache = compress(model, first, policy, 20, tokenizer=tokenizer)
        return compress(model, whole, policy, 12, tokenizer=tokenizer, cache=cache).kept_columns()

    together = kept(ids[[0, 2], :30], ids)
    for row in range(4):
        assert torch.equal(together[row : row + 1], kept(ids[row : row + 1, :30], ids[row : row + 1]))
    cache = compress(model, some_ids()[:, :30], "random", 20, seeds=(1, 2))
    again = compress(model, some_ids()[[0, 0, 1, 1], :55], "random", 20, seeds=(5, 6, 7, 8), cache=cache)
    assert again.seeds == (5, 6, 7, 8)


@pytest.mark.parametrize("method", ["knorm", "adakv(knorm)", "quest", "two tiers", "disk"])
def test_a_cache_goes_on_outside_of_inference_mode(method: str, tmp_path: Path) -> None:
    ids, model = some_ids(), prepare(tiny_model("llama"))

    def read() -> SparseCache:
        cache = None
        if method in ("two tiers", "disk"):
            passive = "cpu" if method == "two tiers" else f"disk:{tmp_path / 'tier'}"
            cache = TieredCache(model, 20, passive=passive, page_size=4)
        name = "knorm" if cache is not None else method
        cache = compress(model, ids[:, :T], name, 0.6, cache=cache)
        model(ids[:, T : T + 1], past_key_values=cache)
        return cache

    def go_on(cache: SparseCache) -> torch.Tensor:
        with torch.no_grad():
            steps = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(T + 1, TOTAL)]
        cache.close()
        return torch.cat(steps, dim=1)

    with torch.inference_mode():
        cache = read()
    found = go_on(cache)
    with torch.no_grad():
        expected = go_on(read())
    assert torch.equal(found, expected)


@pytest.mark.parametrize("method", ["quest", "rocket_kv"])
@torch.no_grad()
def test_a_cache_that_is_read_in_part_can_be_pickled_after_a_step(method: str) -> None:
    ids, model = some_ids(), prepare(tiny_model("llama"))
    cache = compress(model, ids[:, :T], method, 10)
    model(ids[:, T : T + 1], past_key_values=cache)
    twin = pickle.loads(pickle.dumps(cache))
    step = ids[:, T + 1 : T + 2]
    assert torch.equal(model(step, past_key_values=twin).logits, model(step, past_key_values=cache).logits)


@pytest.mark.parametrize("method", ["knorm", "sink_recent"])
def test_training_mode_with_checkpointing_is_refused(method: str) -> None:
    """transformers leaves out the cache then; everything would seem compressed, and nothing was."""
    model = prepare(tiny_model("llama"))
    model.gradient_checkpointing_enable()
    model.train()
    with pytest.raises(ConfigError, match=r"call model\.eval\(\) first"):
        compress(model, some_ids()[:, :T], method, 10)
    model.eval()
    assert compress(model, some_ids()[:, :T], method, 10).stored_counts().unique().tolist() == [10]


def test_cropping_by_more_than_was_seen_forgets_everything() -> None:
    model = prepare(tiny_model("llama"))
    cache = compress(model, some_ids()[:, :T], "full")
    cache.crop(-TOTAL)
    assert cache.seen == 0
