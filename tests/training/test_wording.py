"""What is trained is not what is asked: no five words in a row, no shape of key or value, are shared.

Compared are the wordings themselves, slots standing for anything, and many rendered samples. The text of
books is no wording: training and evaluation read different halves.
"""

from __future__ import annotations

import ast
import json
import random
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import pytest
from sample_tokenizer import bpe_tokenizer

import sparsekv
from sparsekv.benchmarks import BENCHMARKS, BenchmarkConfig
from sparsekv.benchmarks.data import SQUAD_SAMPLE, packaged
from sparsekv.benchmarks.ruler_niah import NEEDLE, QUESTION_ONE
from sparsekv.benchmarks.vocabulary import english_words
from sparsekv.training import questions
from sparsekv.training.data_layout import Layout
from sparsekv.training.selfsup import MAKERS, SelfSupervision
from sparsekv.training.selfsup_draw import Draw, fill
from sparsekv.training.selfsup_text import Corpus
from sparsekv.training.selfsup_values import ATTRIBUTES, KEYS, KINDS

ROOT = Path(sparsekv.__file__).parent
SLOT = "{}"
LEAST_WORDS = 3
"""Of a five-gram that holds slots, so many must be words: "{} of {} is {}" is no wording."""

Grams = set[tuple[str, ...]]


def grams(text: str) -> Grams:
    """Five words in a row, in lower case, without marks; a slot counts as a word."""
    words = re.findall(r"\{\w*\}|\w+(?:'\w+)?", text.lower())
    words = [SLOT if word.startswith("{") else word for word in words]
    found = (tuple(words[i : i + 5]) for i in range(len(words) - 4))
    return {gram for gram in found if 5 - gram.count(SLOT) >= LEAST_WORDS}


def all_grams(texts: Iterable[str]) -> Grams:
    return set().union(*map(grams, texts))


def literals(path: Path) -> Iterator[str]:
    """Every text in a module that is no docstring; what an f-string fills in is a slot."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documentation = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [str(p.value) if isinstance(p, ast.Constant) else SLOT for p in node.values]
            yield "".join(parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node.value


def questions_of_a_benchmark(name: str) -> Iterator[str]:
    config = BenchmarkConfig(name=name, context_length=1000, rows=1)
    for example in BENCHMARKS.get(name).load(config, bpe_tokenizer(), seed=3):
        yield example.question + example.answer_prefix
        if "qa" not in example.task:  # there the evidence is a document's text
            yield from (example.context[start:end] for start, end in example.evidence)


@lru_cache(maxsize=1)
def benchmark_grams() -> Grams:
    modules = sorted((ROOT / "benchmarks").glob("*.py"))
    found = all_grams(text for path in modules for text in literals(path))
    found |= all_grams(text for name in ("ruler", "needle") for text in questions_of_a_benchmark(name))
    squad = json.loads(packaged(SQUAD_SAMPLE))["data"]
    return found | all_grams(
        qa["question"] for article in squad for paragraph in article["paragraphs"] for qa in paragraph["qas"]
    )


@lru_cache(maxsize=1)
def corpus() -> Corpus:
    return Corpus([packaged("book_train.txt")[:60_000]], bpe_tokenizer())


def test_every_benchmark_is_covered() -> None:
    # perplexity has no wording, local has the user's; a benchmark that is new must be rendered here too
    assert set(BENCHMARKS.names()) == {"ruler", "needle", "perplexity", "local"}
    for text in (
        "One of the special magic numbers",
        "In these words, some appear more",
        "Find all variables that are assigned",
        "Only give me the answer and do",
        "What are the 10 most common",
    ):
        assert grams(text) & benchmark_grams(), text


def test_no_wording_is_shared() -> None:
    modules = [*(ROOT / "training").glob("questions*.py"), *(ROOT / "training").glob("selfsup*.py")]
    assert len(modules) == 12
    ours = all_grams(text for path in modules for text in literals(path))
    assert len(ours) > 300
    assert not ours & benchmark_grams()


@pytest.mark.parametrize("family", MAKERS)
def test_no_rendered_question_or_statement_is_shared(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    planted: list[str] = []
    plant = Draw.plant

    def recorded(self: Draw, statements: list[object]) -> object:
        planted.extend(statement.text for statement in statements)  # type: ignore[attr-defined]
        return plant(self, statements)  # type: ignore[arg-type]

    monkeypatch.setattr(Draw, "plant", recorded)
    layout = Layout(bpe_tokenizer())
    generator = SelfSupervision(corpus(), layout, 500, families={family: 1}, questions=2, seed=7)
    texts = []
    for index in range(60):
        _, made = generator.made(index)
        texts += [turn.question + " " + turn.answer_prefix for turn in made.turns]
        if family in ("records", "common", "duplicates"):  # contexts that are nothing but wording
            texts.append(bpe_tokenizer().decode(layout.context(made.pieces)))
    assert planted or family not in ("recall", "several", "values", "chain")
    shared = all_grams([*texts, *planted]) & benchmark_grams()
    if family in ("continue", "repeat", "cloze", "name", "detail"):
        shared -= grams(corpus().documents[0].text)  # a quotation of the book is no wording
    assert not shared


def test_the_comparison_finds_what_is_shared() -> None:
    slots = {"kind": "number", "key": "Project Oak", "value": "48", "query": "crate 7"}
    for template in (NEEDLE, QUESTION_ONE):
        assert grams(template) & benchmark_grams()
        assert grams(template.format(**slots)) & benchmark_grams()
        # in the middle of our own wording, in other case and with other marks
        assert grams("Look up: " + template.format(**slots).upper() + "!") & benchmark_grams()
    assert not grams("Look up crate 7 and tell me its number") & benchmark_grams()


def test_keys_and_values_have_shapes_of_their_own() -> None:
    rng = random.Random(0)
    forbidden = {
        "seven digits": r"\d{7}",
        "five digits": r"\d{5}",
        "uuid": r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",
        "a variable of vt": r"[A-Z]{5}|[A-Z]{3}",
        "a coded word of fwe": r"[a-z]{6}",
        "adjective-noun": r"[a-z]+-[a-z]+",
    }
    words = set(english_words())
    for kind, draw in KINDS.items():
        for _ in range(3000):
            value = draw(rng)
            for name, shape in forbidden.items():
                assert not re.fullmatch(shape, value), f"{kind} {value} is {name}"
            if kind in ("word", "phrase"):
                assert not words & set(value.split()) or kind == "phrase", value
    assert re.fullmatch(forbidden["uuid"], "123e4567-e89b-42d3-a456-426614174000")


def test_there_are_many_wordings() -> None:
    assert len(set(questions.STATEMENTS)) >= 12 and len(set(questions.QUESTIONS)) >= 8
    slots = {"what": "tag", "key": "crate 7", "value": "Q1"}
    for template in questions.STATEMENTS:
        text = fill(template, slots)
        assert "rate 7" in text and "Q1" in text and "tag" in text.lower()
    for template in questions.QUESTIONS:
        assert "Q1" not in fill(template, slots) and "rate 7" in fill(template, slots)
    assert set(KEYS) <= set(KINDS) and set(ATTRIBUTES) <= set(KINDS)
    assert (
        fill("{Key} {What} {Value}", {"what": "tag", "key": "crate 7", "value": "abc"}) == "Crate 7 Tag abc"
    )
