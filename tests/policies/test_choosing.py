"""Shares that add up, and choices over all layers that equal the choice at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekv.errors import ConfigError
from sparsekv.policies.budget import Budget
from sparsekv.policies.choosing import TopOfAllLayers, allocate, keep_across, keep_top


@pytest.mark.parametrize(
    ("weights", "caps", "total", "expected"),
    [
        ([1, 1, 2], [9, 9, 9], 8, [2, 2, 4]),
        ([1, 1, 1], [9, 9, 9], 8, [3, 3, 2]),  # 2.67 each: the first of equal remainders first
        ([0, 0], [9, 9], 6, [3, 3]),  # nothing claims anything: equal shares
        ([8, 1, 1], [4, 9, 9], 10, [4, 3, 3]),  # 8 is cut to 4, what is left goes to the others
        ([8, 4, 1], [2, 3, 9], 10, [2, 3, 5]),  # cut twice
        ([1, 0, 0], [2, 1, 1], 3, [2, 1, 0]),  # beyond the only claim: the others share
        ([5, 5], [3, 2], 5, [3, 2]),
        ([1, 2], [0, 0], 0, [0, 0]),
    ],
)
def test_allocate_literal(weights: list[int], caps: list[int], total: int, expected: list[int]) -> None:
    assert allocate(weights, caps, total) == expected


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 30)), min_size=1, max_size=9), st.data())
def test_allocate_adds_up_under_its_caps_and_is_fair(
    pairs: list[tuple[int, int]], data: st.DataObject
) -> None:
    weights, caps = [w for w, _ in pairs], [c for _, c in pairs]
    total = data.draw(st.integers(0, sum(caps)))
    counts = allocate(weights, caps, total)
    assert sum(counts) == total
    assert all(0 <= count <= cap for count, cap in zip(counts, caps, strict=True))
    below = [i for i, count in enumerate(counts) if count < caps[i] - 1]
    for i in below:
        for j in below:
            if weights[i] >= weights[j] > 0:  # who claims more and is not capped gets no less, up to rounding
                assert counts[i] >= counts[j] - 1
                assert counts[i] <= (counts[j] + 1) * weights[i] / weights[j] + 1


def test_allocate_refuses_what_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="total of 5 does not fit under caps that add up to 4"):
        allocate([1, 1], [2, 2], 5)


def test_top_of_all_layers_is_keep_top_over_all_of_them_after_the_last() -> None:
    scores = torch.rand(4, 2, 20, generator=torch.Generator().manual_seed(0))
    budget = Budget(compression_ratio=0.7, scope="model")
    choice = TopOfAllLayers(4, budget)
    assert [len(choice.after_layer(layer)) for layer in scores] == [0, 0, 0, 4]
    kept = keep_across(TopOfAllLayers(4, budget), scores)
    assert torch.equal(kept, keep_top(scores[None], budget)[0])
    assert int(kept.sum()) == 6 * 2 * 4
