"""Words and sentences of a haystack, and the packaged data behind it."""

from __future__ import annotations

import json
from importlib.resources import files

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsekv.benchmarks.data import (
    BOOKS,
    SQUAD_SAMPLE,
    check_haystack,
    haystack_text,
    packaged,
    read_text,
    words,
)
from sparsekv.benchmarks.haystack import Haystack, load_haystack, sentence_ends
from sparsekv.benchmarks.squad import load_squad, parse_squad
from sparsekv.errors import ConfigError

STORY = 'Mr. J. Holmes rose. "Who is it?" he asked. "Come in!" Nobody came, i.e. no one. 7 men left. The end'


def test_sentences_of_a_story():
    assert Haystack(STORY).sentences(20) == [
        "Mr. J. Holmes rose.",
        '"Who is it?" he asked.',
        '"Come in!"',
        "Nobody came, i.e. no one.",
        "7 men left.",
        "The",
    ]


def test_ends_are_indices_after_the_last_word():
    assert sentence_ends(["A", "b.", "C", "d"]) == [2, 4]
    assert sentence_ends(["b."]) == [1] and sentence_ends([]) == []


@given(st.integers(0, 70))
def test_the_first_words_are_kept_and_repeat(n):
    haystack = Haystack(STORY)
    assert " ".join(haystack.sentences(n)).split() == (haystack.words * 4)[:n]


def test_the_packaged_book_is_cut_into_sentences_of_usual_length():
    haystack = load_haystack("book_eval")
    sentences = haystack.sentences(len(haystack.words))
    assert " ".join(sentences) == " ".join(haystack.words)
    assert 12 < len(haystack.words) / len(sentences) < 22
    assert not any(sentence.endswith((" Mr.", " Mrs.", " Dr.")) for sentence in sentences)


def test_the_halves_of_the_book_share_no_text():
    halves = []
    for book in BOOKS:
        tokens = packaged(f"{book}.txt").split()
        assert len(tokens) > 50_000
        halves.append({tuple(tokens[i : i + 13]) for i in range(len(tokens) - 13)})
    assert not halves[0] & halves[1]


def test_packaged_data_is_small_and_its_licences_are_named():
    folder = files("sparsekv") / "data"
    entries = {entry.name: len(entry.read_bytes()) for entry in folder.iterdir() if entry.is_file()}
    assert sum(entries.values()) <= 2_000_000
    licences = packaged("LICENSE.md")
    assert all(name in licences for name in entries if name != "LICENSE.md")
    assert "CC BY-SA 4.0" in licences and "public domain" in licences


def test_word_lists_are_distinct_plain_words():
    for name in ("adjectives", "nouns"):
        listed = words(name)
        assert len(set(listed)) == len(listed) > 200 and all(
            word.isalpha() and word.islower() for word in listed
        )


def test_every_answer_of_the_packaged_questions_is_where_it_is_said_to_be():
    squad = load_squad("builtin")
    assert len(squad.documents) == 120 and len(squad.questions) == 612
    for question in squad.questions:
        document = squad.documents[question.document]
        assert {document[a:b] for a, b in question.spans} == set(question.answers)
        assert question.document not in question.article
        assert len(question.article) == 4  # five paragraphs an article


def test_squad_two_leaves_impossible_questions_out():
    content = json.loads(packaged(SQUAD_SAMPLE))
    qas = content["data"][0]["paragraphs"][0]["qas"]
    qas[0]["is_impossible"] = True
    assert len(parse_squad(content, "x").questions) == 611


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"data": [{"paragraphs": [{"qas": []}]}]}, "x is not in SQuAD's format: field 'context' is missing"),
        ([1], "x is not in SQuAD's format"),
        ({"data": []}, "x has no answerable question"),
    ],
)
def test_malformed_squad(content, message):
    with pytest.raises(ConfigError) as caught:
        parse_squad(content, "x")
    assert str(caught.value) == f"squad: {message}"


def test_haystack_names_and_files(tmp_path):
    with pytest.raises(ConfigError, match=r"^unknown haystack 'book_evl' \(did you mean 'book_eval'\?\)"):
        check_haystack("book_evl")
    with pytest.raises(ConfigError, match=r"^haystack: no such file: .*none\.txt$"):
        check_haystack(str(tmp_path / "none.txt"))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ConfigError, match=r"is not UTF-8 text \(byte 3\)$"):
        read_text(tmp_path / "latin.txt", "haystack")
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(ConfigError, match=r"blank\.txt is empty$"):
        haystack_text(str(tmp_path / "blank.txt"))
    (tmp_path / "own.txt").write_text("One two. Three four.")
    assert load_haystack(str(tmp_path / "own.txt")).sentences(4) == ["One two.", "Three four."]
    with pytest.raises(ConfigError, match="is no text"):
        haystack_text("noise")
