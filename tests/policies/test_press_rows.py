"""Which rows of keys and values did a press leave? Exact, in any order, and loud where it can't be said."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekv.errors import ConfigError
from sparsekv.policies.press_rows import kept_rows


def rows(seed: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 12, 4, generator=generator).to(dtype) for _ in range(2))  # type: ignore[return-value]


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 99),
    heads=st.lists(st.permutations(range(12)), min_size=2, max_size=2),
    n_kept=st.integers(1, 12),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)
def test_any_rows_in_any_order(seed: int, heads: list[list[int]], n_kept: int, dtype: torch.dtype) -> None:
    keys, values = rows(seed, dtype)
    index = torch.tensor([head[:n_kept] for head in heads])[..., None].expand(-1, -1, 4)
    kept = kept_rows((keys, values), (keys.gather(1, index), values.gather(1, index)), "m")
    assert [set(head.nonzero().flatten().tolist()) for head in kept] == [set(head[:n_kept]) for head in heads]


@pytest.mark.parametrize("part", [0, 1])
def test_one_changed_bit_is_noticed(part: int) -> None:
    before = rows(0)
    after = [tensor[:, 3:9].clone() for tensor in before]
    after[part].view(torch.int32)[1, 2, 3] ^= 1
    with pytest.raises(ConfigError, match="method m changes cache entries"):
        kept_rows(before, (after[0], after[1]), "m")


def test_equal_entries_are_ambiguous_only_where_one_of_them_is_kept() -> None:
    keys, values = rows(1)
    keys[0, 5], values[0, 5] = keys[0, 2], values[0, 2]
    apart = kept_rows((keys, values), (keys[:, 6:], values[:, 6:]), "m")
    assert apart[0].tolist() == [False] * 6 + [True] * 6
    with pytest.raises(ConfigError, match="or two are equal"):
        kept_rows((keys, values), (keys[:, 4:], values[:, 4:]), "m")
    assert kept_rows((keys, values), (keys, values), "m").all()  # nothing left, so nothing to tell apart


def test_a_row_kept_twice_is_noticed() -> None:
    keys, values = rows(2)
    twice = torch.tensor([0, 3, 3])
    with pytest.raises(ConfigError, match="changes cache entries"):
        kept_rows((keys, values), (keys[:, twice], values[:, twice]), "m")
