"""The search for the amount of filler, against brute force."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsekv.benchmarks.fit import Draft, Prompt, TokenCounter, TooShort, largest_fit, weave
from sparsekv.errors import ConfigError


class Counter:
    """Counts the tokens that a table gives for n units; a prompt's context is n in decimal."""

    def __init__(self, totals: list[int], seams: int = 0) -> None:
        self.totals, self.seams, self.calls = totals, seams, 0

    def whole(self, prompt: Prompt) -> int:
        self.calls += 1
        return self.totals[int(prompt.context)]

    def pieces(self, prompt: Prompt) -> int:
        return self.totals[int(prompt.context)] + self.seams


def draft(least: int, most: int | None, per_unit: float) -> Draft:
    return Draft(lambda n: Prompt(str(n), "", "", ("x",)), least, per_unit, most)


def totals(costs: list[int], fixed: int) -> list[int]:
    running = [fixed]
    for cost in costs:
        running.append(running[-1] + cost)
    return running


@given(
    st.lists(st.integers(1, 30), min_size=2, max_size=200),
    st.integers(0, 50),
    st.integers(0, 3000),
    st.floats(0.2, 60),
    st.none() | st.integers(0, 100),
)
def test_same_as_brute_force_where_counts_grow(costs, fixed, limit, per_unit, guess):
    table = totals(costs, fixed)
    most = len(costs)
    fitting = [n for n in range(1, most + 1) if table[n] <= limit]
    counter = Counter(table)
    if guess is not None:
        guess = max(1, guess)
    if not fitting:
        with pytest.raises(TooShort) as caught:
            largest_fit(draft(1, most, per_unit), counter, limit, guess)
        assert caught.value.tokens == table[1]
    else:
        n, prompt = largest_fit(draft(1, most, per_unit), counter, limit, guess)
        assert n == fitting[-1] and prompt.context == str(n)
    assert counter.calls <= 22


@given(st.lists(st.integers(-3, 9), min_size=30, max_size=120), st.integers(10, 300), st.floats(0.5, 9))
def test_fits_and_one_more_does_not_where_counts_waver(costs, limit, per_unit):
    table = totals(costs, 5)
    try:
        n, _ = largest_fit(draft(0, len(costs), per_unit), Counter(table), limit)
    except TooShort:
        pytest.fail("5 tokens fit")
    assert table[n] <= limit
    assert n == len(costs) or table[n + 1] > limit


def test_unbounded_supply_ends():
    counter = Counter([3 * n + 7 for n in range(4000)])
    assert largest_fit(draft(1, None, 50.0), counter, 3000)[0] == (3000 - 7) // 3
    assert counter.calls <= 8


def test_the_right_guess_costs_two_looks():
    counter = Counter([25 * n + 60 for n in range(100)])
    assert largest_fit(draft(1, None, 25.0), counter, 1000, guess=37)[0] == 37
    assert counter.calls == 2


def test_counter_leaves_special_tokens_out_but_tells_them(bpe, bpe_with_bos):
    text = "To Sherlock Holmes she is always THE woman."
    assert TokenCounter(bpe)(text) == TokenCounter(bpe_with_bos)(text) == len(bpe(text)["input_ids"])
    assert (TokenCounter(bpe).added, TokenCounter(bpe_with_bos).added) == (0, 1)


def test_one_piece_and_three(bpe):
    count = TokenCounter(bpe)
    prompt = Prompt("a woman", "ly man? ", "The answer", ("x",))
    assert count.whole(prompt) == len(bpe("a womanly man? The answer")["input_ids"])
    assert count.pieces(prompt) == sum(count(piece) for piece in ("a woman", "ly man? ", "The answer"))
    assert count.whole(prompt) < count.pieces(prompt)


def test_the_seams_between_the_pieces_must_fit_too():
    counter = Counter([25 * n + 60 for n in range(100)], seams=2)
    assert largest_fit(draft(1, None, 25.0), counter, 987)[0] == 37  # 985 and 987
    assert largest_fit(draft(1, None, 25.0), counter, 986)[0] == 36
    with pytest.raises(TooShort) as caught:
        largest_fit(draft(37, None, 25.0), counter, 986)
    assert caught.value.tokens == 987


def test_a_tokenizer_without_vocabulary_is_refused():
    class Empty:
        def num_special_tokens_to_add(self, pair):
            return 0

        def __call__(self, text, **kwargs):
            return {"input_ids": []}

    with pytest.raises(ConfigError, match="no tokens"):
        TokenCounter(Empty())


@given(
    st.lists(st.tuples(st.text("abc", min_size=1, max_size=5), st.booleans()), min_size=1), st.integers(0, 9)
)
def test_weave_spans_point_at_the_marked_pieces(pieces, start):
    text, spans = weave(pieces, "--", start)
    assert text == "--".join(piece for piece, _ in pieces)
    assert [text[a - start : b - start] for a, b in spans] == [piece for piece, marked in pieces if marked]
