"""Caches of different contexts as one batch: every row goes on as it would alone."""

from __future__ import annotations

import pytest
import torch

from sparsekv.cache.join import can_join, join
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
    assert two_tiers.intact and not can_join(two_tiers)
    assert can_join(plain) and not any(can_join(cache) for cache in (moved, later, sliding))
    for wrong in ([], [plain, moved], [later], [two_tiers], [plain, SparseCache(model.config)]):
        with pytest.raises(ConfigError, match="only caches that have read something can be joined"):
            join(wrong)
