"""Rows of perplexity are stretches of the book."""

from __future__ import annotations

from itertools import pairwise

import pytest

from sparsekv.benchmarks import BENCHMARKS, PERPLEXITY, BenchmarkConfig
from sparsekv.benchmarks.data import packaged
from sparsekv.errors import ConfigError


def load(tokenizer, seed=0, **fields):
    return BENCHMARKS.get("perplexity").load(BenchmarkConfig(name="perplexity", **fields), tokenizer, seed)


@pytest.mark.parametrize("book", ["book_eval", "book_train"])
def test_context_and_continuation_are_consecutive_and_full(bpe, book):
    text = packaged(f"{book}.txt")
    for example in load(bpe, context_length=[100, 1024], continuation_tokens=64, rows=6, haystack=book):
        (continuation,) = example.references
        assert example.context + continuation in text
        assert continuation[0].isspace() and not example.context[0].isspace()
        assert 0 <= example.context_length - len(bpe(example.context)["input_ids"]) <= 12
        assert 0 <= 64 - len(bpe(continuation)["input_ids"]) <= 12
        assert (example.metric, example.question, example.answer_prefix) == (PERPLEXITY, "", "")
        assert example.max_new_tokens == 64 and example.task == "continuation"


def test_rows_are_spread_and_do_not_depend_on_their_number(bpe):
    text = packaged("book_eval.txt")
    many = load(bpe, context_length=512, rows=20)
    assert load(bpe, context_length=512, rows=3) == many[:3]
    starts = sorted(text.index(example.context) for example in many)
    gaps = [b - a for a, b in pairwise(starts)]
    assert min(gaps) > len(text) / 60 and max(gaps) < len(text) / 7  # evenly would be 1/20
    assert load(bpe, seed=1, context_length=512, rows=3) != many[:3]


def test_a_text_that_just_suffices_and_one_that_does_not(bpe, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text(packaged("book_eval.txt")[:6000].rsplit(" ", 1)[0])
    total = len(bpe(path.read_text())["input_ids"])
    (row,) = load(bpe, context_length=total - 80, continuation_tokens=64, rows=1, haystack=str(path))
    assert 0 <= 64 - len(bpe(row.references[0])["input_ids"]) <= 12
    with pytest.raises(ConfigError, match=rf"too short for perplexity: a row needs {total + 64} tokens"):
        load(bpe, context_length=total, continuation_tokens=64, rows=1, haystack=str(path))


def test_noise_is_no_text_to_be_perplexed_by():
    with pytest.raises(ValueError, match="noise"):
        BenchmarkConfig(name="perplexity", haystack="noise")
