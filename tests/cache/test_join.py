"""Caches of different contexts as one batch: every row goes on as it would alone."""

from __future__ import annotations

import pytest
import torch

from sparsekv.cache.join import join, join_key
from sparsekv.cache.sparse import SparseCache
from sparsekv.cache.tiered import TieredCache
from sparsekv.errors import ConfigError
from sparsekv.generation import Asked, compress, decode_together, greedy_decode
from sparsekv.policies import make_policy
from toy import tiny_model


def ids(n: int, seed: int) -> torch.Tensor:
    return torch.randint(5, 250, (1, n), generator=torch.Generator().manual_seed(seed))


def read(model, n: int, seed: int, method: str, ratio: float, rows: int = 1) -> SparseCache:
    cache = compress(model, ids(n, seed), make_policy(method), ratio, seeds=(seed,))
    cache.batch_repeat_interleave(rows)
    return cache


PARTS = [
    (40, 1, "h2o", 0.5, 2),
    (23, 2, "adakv(knorm)", 0.6, 1),
    (31, 3, "full", 0.0, 1),
    (40, 4, "knorm", 0.3, 3),
]
"""(tokens of the context, seed, method, ratio, rows): different lengths, ragged heads, whole and compacted."""


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_rows_of_a_joined_cache_give_the_logits_they_give_alone(family):
    model = tiny_model(family)
    turn = ids(1, 9)
    parts = [read(model, *part) for part in PARTS]
    for part, (_, seed, *_) in zip(parts, PARTS, strict=True):
        model(input_ids=ids(3 + seed, 20 + seed).expand(part.batch, -1), past_key_values=part)  # a tail
    joined = join(parts)
    assert joined.batch == 7 and joined.seen == 40 + 7
    assert joined.achieved_compression == pytest.approx([r for p in parts for r in p.achieved_compression])
    mask = torch.nn.functional.pad(joined.real_columns(), (0, 1), value=True)
    together = model(
        input_ids=turn.expand(7, -1),
        past_key_values=joined,
        attention_mask=mask.long(),
        position_ids=mask.long().cumsum(-1)[:, -1:] - 1,
    ).logits[:, 0]
    alone = [model(input_ids=turn.expand(p.batch, -1), past_key_values=p).logits[:, 0] for p in parts]
    torch.testing.assert_close(together, torch.cat(alone), atol=2e-5, rtol=1e-4)
    # what was joined stays as it was, and a row that leaves takes nothing along
    joined.batch_select_indices(torch.tensor([0, 6]))
    assert joined.batch == 2 and [p.batch for p in parts] == [2, 1, 1, 3]


def test_answers_side_by_side_are_those_of_each_alone():
    model = tiny_model("llama")
    asked = [(read(model, *part), ids(2 + i, 30 + i), 3 + 5 * i) for i, part in enumerate(PARTS)]
    alone = []
    for part, (_, question, room) in zip(PARTS, asked, strict=True):
        alone.append(greedy_decode(model, read(model, *part), question, room, set()))
    together = decode_together(model, [Asked(*one) for one in asked], set())
    assert together == alone
    assert [[len(a.token_ids) for a in rows] for rows in together] == [[3, 3], [8], [13], [18, 18, 18]]

    # an end token ends a row from its second new token on, also while others go on in the same batch
    stop = {alone[2][0].token_ids[4], alone[3][0].token_ids[0]}
    asked = [(read(model, *part), ids(2 + i, 30 + i), 3 + 5 * i) for i, part in enumerate(PARTS)]
    stopped = decode_together(model, [Asked(*one) for one in asked], stop)
    for whole, cut in zip(
        [a for rows in alone for a in rows], [a for rows in stopped for a in rows], strict=True
    ):
        ends = [i for i, token in enumerate(whole.token_ids) if i > 0 and token in stop]
        assert cut.token_ids == whole.token_ids[: ends[0] + 1 if ends else None]
        assert cut.finish_reason == ("eos" if ends else "length")
    assert {a.finish_reason for rows in stopped for a in rows} == {"eos", "length"}


def test_what_can_not_be_joined():
    model, window = tiny_model("llama"), tiny_model("gemma3")
    plain = read(model, 12, 1, "full", 0.0)
    moved = compress(model, ids(12, 1), make_policy("knorm"), 0.5, rerotate=True)
    later = compress(model, ids(12, 1), make_policy("knorm"), 0.5, phase="both")
    sliding = compress(window, ids(12, 1), make_policy("full"), 0.0)
    two_tiers = compress(model, ids(12, 1), make_policy("full"), cache=TieredCache(model, 100))
    in_bytes = compress(model, ids(12, 1), make_policy("full"), cache=TieredCache(model, "64KiB"))
    recalls = compress(model, ids(12, 1), make_policy("full"), cache=TieredCache(model, 100, recall_tokens=8))
    assert two_tiers.intact and join_key(two_tiers) not in (None, join_key(plain), join_key(recalls))
    assert join_key(plain) and all(join_key(cache) is None for cache in (moved, later, sliding, in_bytes))
    mixed = ([plain, two_tiers], [two_tiers, recalls], [in_bytes, in_bytes])
    for wrong in ([], [plain, moved], [later], [plain, SparseCache(model.config)], *mixed):
        with pytest.raises(ConfigError, match="only caches that have read something can be joined"):
            join(wrong)


def tiered(model, n: int, seed: int, active: int, recall_tokens: int | None) -> TieredCache:
    cache = TieredCache(model, active, recall_tokens=recall_tokens, page_size=4, n_recent=4)
    return compress(model, ids(n, seed), make_policy("adakv(knorm)"), active, cache=cache)


def where(cache: TieredCache) -> tuple[torch.Tensor, torch.Tensor]:
    return cache.kept_columns(), cache.passive_columns()


TIERED = [(60, 1, 20), (41, 2, 9), (60, 3, 60)]
"""(tokens of the context, seed, active size); the passive tier of the last one is empty."""


def test_rows_of_joined_tiers_keep_their_sizes_and_entries():
    model = tiny_model("llama")
    parts = [tiered(model, *shape, None) for shape in TIERED]
    joined = join(parts)
    assert isinstance(joined, TieredCache) and joined.seen == 60
    quotas = torch.tensor([layer.quotas() for _, layer in joined.tiered_layers()]).view(-1, 3, 2)
    for row, part in enumerate(parts):
        assert torch.equal(
            quotas[:, row], torch.tensor([layer.quotas() for _, layer in part.tiered_layers()])
        )
        for together, alone in zip(where(joined), where(part), strict=True):
            assert torch.equal(together[row, ..., 60 - part.seen :], alone[0])
            assert not together[row, ..., : 60 - part.seen].any()


@pytest.mark.parametrize("room", [1, 24])
@pytest.mark.parametrize("recall_tokens", [None, 0, 6, 10_000])
def test_answers_of_joined_tiers_are_those_of_each_alone(recall_tokens, room):
    """To the token and to what each last step attended to, whatever was recalled before they were joined."""
    model = tiny_model("llama")
    questions = [ids(3, 20), ids(5, 21), ids(4, 22)]

    def asked() -> list[Asked]:
        parts = [tiered(model, *shape, recall_tokens) for shape in TIERED]
        return [Asked(*one, room + row) for row, one in enumerate(zip(parts, questions, strict=True))]

    alone = [decode_together(model, [one], set(), with_attended=True)[0][0] for one in asked()]
    parts = asked()
    together = [rows[0] for rows in decode_together(model, parts, set(), with_attended=True)]
    for got, expected in zip(together, alone, strict=True):
        assert got.token_ids == expected.token_ids
        assert got.attended_fraction == pytest.approx(expected.attended_fraction)
    if recall_tokens == 0 and room == 1:
        assert together[0].attended_fraction < 0.5 < 0.8 < together[2].attended_fraction
    assert not any(one.cache.batch for one in parts)  # used up


def test_in_joined_tiers_a_row_holds_what_it_holds_alone():
    model = tiny_model("llama")
    parts = [tiered(model, *shape, None) for shape in TIERED]
    turns = [step(model, part, ids(3, 20 + row)) for row, part in enumerate(parts)]
    joined, together = join(parts), torch.cat(turns)
    before = where(joined)[0]
    for _ in range(24):
        together = step(model, joined, together)
        turns = [step(model, cache, turn) for cache, turn in zip(parts, turns, strict=True)]
        assert torch.equal(together, torch.cat(turns))
        for row, cache in enumerate(parts):
            for ours, theirs in zip(where(joined), where(cache), strict=True):
                assert torch.equal(ours[row, ..., joined.seen - cache.seen :], theirs[0])
    came = where(joined)[0][..., : before.shape[-1]] & ~before
    assert all(bool(row.any()) for row in came)


def step(model, cache: SparseCache, turn: torch.Tensor) -> torch.Tensor:
    mask = torch.nn.functional.pad(cache.real_columns(), (0, turn.shape[1]), value=True).long()
    places = (mask.cumsum(-1) - 1)[:, -turn.shape[1] :]
    out = model(input_ids=turn, past_key_values=cache, attention_mask=mask, position_ids=places)
    return out.logits[:, -1:].argmax(-1)


@pytest.mark.parametrize("two_tiers", [False, True])
def test_padding_that_a_cache_stores_is_not_seen_once_it_is_joined(two_tiers):
    model, batch = tiny_model("llama"), torch.cat([ids(20, 1), ids(20, 2)])
    mask = torch.ones_like(batch)
    mask[1, :6] = 0
    caches = [TieredCache(model, 100) if two_tiers else SparseCache(model.config) for _ in range(2)]
    padded, other = (
        compress(model, x, make_policy("full"), attention_mask=m, cache=cache)
        for x, m, cache in zip((batch, ids(31, 3)), (mask, None), caches, strict=True)
    )
    joined, turn = join([padded, other]), ids(1, 9)
    places = torch.tensor([[20], [14], [31]])
    together = model(
        input_ids=turn.expand(3, -1),
        past_key_values=joined,
        attention_mask=torch.nn.functional.pad(joined.real_columns(), (0, 1), value=True).long(),
        position_ids=places,
    ).logits[:, 0]
    alone = [batch[:1], batch[1:, 6:], ids(31, 3)]
    plain = [model(input_ids=torch.cat([x, turn], dim=1)).logits[0, -1] for x in alone]
    torch.testing.assert_close(together, torch.stack(plain), atol=2e-5, rtol=1e-4)


def test_joined_tiers_lose_and_double_nothing():
    model = tiny_model("llama")
    joined = join([tiered(model, 60, 1, 20, None), tiered(model, 41, 2, 9, None)])
    real = joined.real_columns()
    for n in range(12):
        step(model, joined, ids(1, 50 + n).expand(2, -1))
        resident, passive = where(joined)
        assert not (resident & passive).any()
        everything = torch.nn.functional.pad(real, (0, n + 1), value=True)[:, None, None]
        assert torch.equal(resident | passive, everything.expand_as(resident))
        assert (joined.stored_counts().double().mean(dim=(0, 2)) <= torch.tensor([21.0, 10.0])).all()
    before = where(joined)
    joined.batch_select_indices(torch.tensor([1]))
    for now, then in zip(where(joined), before, strict=True):
        assert torch.equal(now, then[1:]) and now.any()


def test_rows_with_active_sizes_of_their_own_are_not_compressed_again():
    model, longer = tiny_model("llama"), ids(64, 3).expand(2, -1)
    whole = join([join([tiered(model, 60, n, n, None) for n in (10, 25)]), tiered(model, 60, 2, 25, None)])
    one = join([tiered(model, 60, n, n, None) for n in (10, 25)])
    one.batch_select_indices(torch.tensor([0]))
    for cache in (whole, one.fork([one.selection()])):
        rows = longer[:1].expand(cache.batch, -1)
        with pytest.raises(ConfigError, match="rows whose active sizes differ"):
            compress(model, rows, make_policy("sink_recent"), 20, cache=cache)
    whole.reset()
    compress(model, longer, make_policy("sink_recent"), 20, cache=whole)
    uneven, alike = (join([tiered(model, 60, 1, 20, None), tiered(model, 60, 2, n, None)]) for n in (9, 20))
    with pytest.raises(ConfigError, match="active sizes differ"):
        compress(model, longer, make_policy("sink_recent"), 20, cache=uneven)
    compress(model, longer, make_policy("sink_recent"), 20, cache=alike)
    assert alike.seen == 64


def test_rows_of_joined_tiers_go_on_for_long_as_each_would_alone():
    """Pages that lost entries are packed anew row by row: when another row's are is no business of this one."""
    model = tiny_model("llama")
    shapes = [(200, 1, 60), (90, 2, 45), (150, 3, 75), (60, 4, 30)]
    questions = [ids(3, 20 + seed) for _, seed, _ in shapes]

    def after_a_question(place: int) -> TieredCache:
        n, seed, active = shapes[place]
        cache = compress(model, ids(n, seed), make_policy("knorm"), active, cache=TieredCache(model, active))
        model(input_ids=questions[place], past_key_values=cache)
        return cache

    with torch.no_grad():
        parts = [after_a_question(place) for place in range(4)]
        joined = join([after_a_question(place) for place in range(4)])
        for step in range(25):
            new = ids(4, 100 + step).T
            mask = torch.nn.functional.pad(joined.real_columns(), (0, 1), value=True)
            together = model(input_ids=new, past_key_values=joined, attention_mask=mask.long()).logits
            alone = [model(input_ids=new[i : i + 1], past_key_values=parts[i]).logits for i in range(4)]
            torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)
