"""How many entries stay: kvpress's rounding, written out, and what a budget refuses."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsekv.errors import ConfigError
from sparsekv.policies.budget import Budget


@pytest.mark.parametrize(
    ("n", "ratio", "kept"),
    [
        (10, 0.0, 10),
        (10, 0.5, 5),
        (10, 0.3, 7),
        (7, 0.5, 3),
        (1024, 0.75, 256),
        (10, 0.9, 1),  # 10 * (1 - 0.9) is 0.9999999999999998 in floating point; never fewer than one
        (1, 0.99, 1),
        (100, 0.9, 9),  # 100 * (1 - 0.9) = 9.999999999999998, cut as kvpress cuts it
        (0, 0.5, 0),
    ],
)
def test_n_kept_of_a_ratio(n: int, ratio: float, kept: int) -> None:
    assert Budget(compression_ratio=ratio).n_kept(n) == kept


def test_n_kept_of_tokens_is_at_most_what_there_is() -> None:
    assert [Budget(tokens=5).n_kept(n) for n in (0, 1, 4, 5, 6, 1000)] == [0, 1, 4, 5, 5, 5]


@given(n=st.integers(1, 10**6), ratio=st.floats(0, 1, exclude_max=True))
def test_the_rounding_is_kvpress_s(n: int, ratio: float) -> None:
    kept = Budget(compression_ratio=ratio).n_kept(n)
    assert kept == max(1, int(n * (1 - ratio))) and 1 <= kept <= n


@given(n=st.integers(1, 5000), a=st.floats(0, 0.999), b=st.floats(0, 0.999))
def test_removing_more_keeps_no_more(n: int, a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert Budget(compression_ratio=high).n_kept(n) <= Budget(compression_ratio=low).n_kept(n)


def test_given() -> None:
    assert not Budget().given
    assert Budget(compression_ratio=0.0).given and Budget(tokens=1).given
    with pytest.raises(ConfigError, match="neither compression_ratio nor tokens"):
        Budget().n_kept(10)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"compression_ratio": 1.0}, r"compression_ratio must be in \[0, 1\) .* got 1.0"),
        ({"compression_ratio": -0.1}, r"got -0.1"),
        ({"compression_ratio": float("nan")}, r"got nan"),
        ({"compression_ratio": "0.5"}, r"got '0.5'"),
        ({"compression_ratio": 0.5, "tokens": 8}, "compression_ratio=0.5 and budget tokens=8 are both given"),
        ({"tokens": 0}, "budget tokens must be a whole number >= 1, got 0"),
        ({"tokens": 2.0}, "got 2.0"),
        ({"tokens": True}, "got True"),
        ({"tokens": 8, "scope": "heads"}, "unknown budget scope 'heads' .did you mean 'head'"),
    ],
)
def test_refused(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        Budget(**args)
    assert "\n" not in str(raised.value)
