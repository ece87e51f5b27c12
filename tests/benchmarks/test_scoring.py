"""Metrics against hand-computed values and invariants."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsekv.benchmarks.scoring import METRICS, PERPLEXITY, clean, f1, higher_is_better, normalize

TEXT = st.text(max_size=30)
VISIBLE = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=8)


@pytest.mark.parametrize(
    ("metric", "prediction", "references", "score"),
    [
        ("string_match_all", " The numbers are 12 and 34.", ["12", "34", "56"], 200 / 3),
        ("string_match_all", "ABC def", ["abc", "DEF"], 100),
        ("string_match_all", "", ["a"], 0),
        ("string_match_all", "concatenate", ["cat"], 100),  # substrings count, as in RULER
        ("string_match_all", "12\n34", ["1234"], 100),  # kvpress removes line breaks
        ("string_match_all", "a b", ["a\tb"], 0),
        ("string_match_part", "It was Paris", ["London", "paris"], 100),
        ("string_match_part", "It was Rome", ["London", "paris"], 0),
        ("exact_match", "The  Cat!", ["a cat"], 100),
        ("em", "the cat sat", ["cat"], 0),
        ("f1", "the cat sat on mat", ["cat sat down"], 100 * 4 / 7),  # 2 common of 4 and 3 words
        ("qa_f1", "cat cat", ["cat", "dog"], 100 * 2 / 3),  # a repeated word counts once
        ("f1", "", ["the"], 100),  # both empty in normal form
        ("f1", "dog", ["the"], 0),
    ],
)
def test_hand_computed(metric, prediction, references, score):
    assert METRICS.get(metric)(prediction, references) == pytest.approx(score)


def test_normal_form_and_clean():
    assert normalize("The U.S.A.,  an a-b Theatre\n") == "usa ab theatre"
    assert clean("\n\x01 x\ty\x1f \n") == "xy"


def test_perplexity_is_not_a_string_metric_and_is_better_when_lower():
    assert PERPLEXITY not in METRICS
    assert [higher_is_better(name) for name in (*METRICS.names(), PERPLEXITY)] == [True] * 4 + [False]


@given(TEXT, st.lists(VISIBLE, min_size=1, max_size=5))
def test_range_order_and_completeness(prediction, references):
    scores = {name: METRICS.get(name)(prediction, references) for name in METRICS.names()}
    assert all(0 <= score <= 100 for score in scores.values())
    assert scores == {name: pytest.approx(METRICS.get(name)(prediction, references[::-1])) for name in scores}
    assert scores["exact_match"] <= f1(prediction, references) + 1e-9
    assert scores["string_match_all"] <= scores["string_match_part"]
    assert METRICS.get("string_match_all")(prediction + " ".join(references), references) == 100
    assert METRICS.get("exact_match")(references[-1], references) == 100
