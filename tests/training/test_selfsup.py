"""Self-supervised samples: their layout, and that answers are right and in the context."""

from __future__ import annotations

import copy
import re
from collections import Counter
from functools import lru_cache
from itertools import pairwise
from typing import Any

import pytest
from sample_tokenizer import bpe_tokenizer

import toy
from sparsekv.benchmarks.base import Example
from sparsekv.benchmarks.data import packaged
from sparsekv.benchmarks.scoring import PERPLEXITY
from sparsekv.errors import ConfigError
from sparsekv.evaluation.prompts import assemble
from sparsekv.training import questions_passages, selfsup_facts
from sparsekv.training.data_layout import IGNORED, Layout, Turn
from sparsekv.training.questions_passages import GAPS
from sparsekv.training.selfsup import MAKERS, SelfSupervision
from sparsekv.training.selfsup_details import _cues, _spans
from sparsekv.training.selfsup_draw import Draw, Statement
from sparsekv.training.selfsup_text import Corpus, TokenisedText

SAMPLES = 40


@lru_cache(maxsize=1)
def corpus() -> Corpus:
    return Corpus([packaged("book_train.txt")[:60_000]], bpe_tokenizer())


def generator(family: str, **settings: Any) -> SelfSupervision:
    tokens = settings.pop("context_tokens", 400)
    return SelfSupervision(corpus(), Layout(bpe_tokenizer()), tokens, families={family: 1}, **settings)


def context_of(sample: dict[str, Any]) -> str:
    text = bpe_tokenizer().decode(sample["input_ids"][: sample["boundary"]])
    head = "<|start|>user\n"
    assert text.startswith(head)
    return text[len(head) :]


ASKING = [family for family in MAKERS if family != "onward"]


def test_onward_is_plain_text_that_goes_on() -> None:
    made_by = generator("onward", seed=3)
    tokenizer = bpe_tokenizer()
    whole = [" ".join(document.text.split()) for document in made_by.corpus.documents]
    starts = set()
    for index in range(SAMPLES):
        sample = made_by.sample(index)
        n_context, n_next = sample["boundary"], len(sample["input_ids"]) - sample["boundary"]
        assert sample["labels"] == [IGNORED] * n_context + sample["input_ids"][n_context:]
        assert 150 <= n_context <= made_by._rooms[1] and n_next == min(128, made_by._rooms[1] // 4)
        text = tokenizer.decode(sample["input_ids"][:n_context])
        row = Example(
            "x", "b", "t", text.removeprefix(tokenizer.bos_token), "", "", ("x",), 1, PERPLEXITY, None
        )
        prompt = assemble(row, tokenizer)
        assert prompt.context_ids[0, 0] == sample["input_ids"][0] == tokenizer.bos_token_id
        assert tokenizer.decode(prompt.context_ids[0]) == text, "as the evaluation reads plain text"
        text = " ".join(tokenizer.decode(sample["input_ids"][1:]).split())
        assert any(text in document for document in whole), (
            "one stretch of one document, outside the template"
        )
        starts.add(text[:20])
        assert sample["sample_index"] == index
    assert len(starts) > SAMPLES // 2


def test_onward_without_a_bos_token_has_none() -> None:
    tokenizer = copy.deepcopy(bpe_tokenizer())
    tokenizer.bos_token = None
    made_by = SelfSupervision(corpus(), Layout(tokenizer), 400, families={"onward": 1}, seed=3)
    text = " ".join(bpe_tokenizer().decode(made_by.sample(0)["input_ids"]).split())
    assert any(text in " ".join(document.text.split()) for document in made_by.corpus.documents)


@pytest.mark.parametrize("family", ASKING)
def test_layout_is_that_of_the_evaluation(family: str) -> None:
    made_by = generator(family)
    tokenizer = bpe_tokenizer()
    for index in range(SAMPLES):
        sample = made_by.sample(index)
        (turn,) = made_by.made(index)[1].turns
        row = Example(
            "x", "b", "t", context_of(sample), turn.question, turn.answer_prefix, ("x",), 1, "f1", None
        )
        prompt = assemble(row, tokenizer)
        asked = prompt.question_ids[0].tolist()
        answer = [*tokenizer(turn.answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        assert sample["boundary"] == prompt.context_tokens
        assert sample["input_ids"] == prompt.context_ids[0].tolist() + asked + answer
        assert sample["labels"] == [IGNORED] * prompt.context_tokens + asked + answer
        assert sample["sample_index"] == index
        assert sample["boundary"] <= 400 + 8


@pytest.mark.parametrize("family", ASKING)
def test_answers_are_in_the_context_and_in_the_answer(family: str) -> None:
    made_by = generator(family, seed=1)
    prefixed = 0
    for index in range(SAMPLES):
        (turn,) = made_by.made(index)[1].turns
        context = " ".join(context_of(made_by.sample(index)).split()).lower()
        assert turn.values
        for value in turn.values:
            assert " ".join(value.split()).lower() in context
            assert value.lower() in turn.answer.lower()
        prefixed += bool(turn.answer_prefix)
        assert bool(turn.answer_prefix) == turn.answer.startswith(" ")
    assert 4 <= prefixed <= 26  # about a third of 40


def test_recall_asks_for_what_was_planted_beside_the_key() -> None:
    made_by = generator("recall", seed=2)
    depths = []
    for index in range(SAMPLES):
        (turn,) = made_by.made(index)[1].turns
        context = context_of(made_by.sample(index))
        at = context.index(turn.values[0])
        depths.append(at / len(context))
        around = context[max(0, at - 120) : at + 120].lower()
        words = set(re.findall(r"[\w.:-]{3,}", turn.question.lower()))
        assert any(word in around for word in words)
    assert min(depths) < 0.2 and max(depths) > 0.8


def test_values_are_all_values_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    planted: list[str] = []
    asked: list[selfsup_facts.Fact] = []
    plant, ask = Draw.plant, selfsup_facts._ask_values

    def plant_too(draw: Draw, statements: list[Statement]) -> Any:
        planted[:] = [statement.text.lower() for statement in statements]
        return plant(draw, statements)

    def ask_too(draw: Draw, facts: list[selfsup_facts.Fact]) -> Turn:
        asked[:] = facts
        return ask(draw, facts)

    monkeypatch.setattr(Draw, "plant", plant_too)
    monkeypatch.setattr(selfsup_facts, "_ask_values", ask_too)
    for index in range(SAMPLES):
        (turn,) = generator("values").made(index)[1].turns
        key = asked[0].key.lower()
        told = [text for text in planted if key in text]
        assert key in turn.question.lower() and len(turn.values) == len(told) >= 2
        for value, text in zip(turn.values, told, strict=True):  # in the order of the text
            assert value.lower() in text


def chained(statements: list[str]) -> dict[str, str]:
    """What notation like "set a to b" leaves in each name, carried out line by line."""
    held: dict[str, str] = {}
    for line in statements:
        copy = re.fullmatch(r"copy (\S+) into (\S+)", line)
        match = re.fullmatch(r"(?:let |set )?(\S+) (?::=|to|be) (\S+)", line)
        if copy:
            held[copy[2]] = held[copy[1]]
        elif match:
            held[match[1]] = held.get(match[2], match[2])
    return held


def test_chains_in_notation_end_where_the_answer_says() -> None:
    checked = 0
    for index in range(150):
        (turn,) = generator("chain").made(index)[1].turns
        lines = [line.strip() for line in context_of(generator("chain").sample(index)).split("\n")]
        notation = [line for line in lines if re.fullmatch(r"(let|set|copy) \S+ \S+ \S+|\S+ := \S+", line)]
        if not notation:
            continue
        held = chained(notation)
        checked += 1
        if len(turn.values) == 1:
            (name,) = [word for word in re.findall(r"[a-z]+", turn.question) if word in held]
            assert held[name] == turn.values[0]
        else:
            (value,) = [value for value in set(held.values()) if value in turn.question]
            assert {name for name in held if held[name] == value} == set(turn.values)
    assert checked > 15


@pytest.mark.parametrize("family", ["common", "duplicates"])
def test_counts_are_right(family: str) -> None:
    made_by = generator(family, seed=3)
    for index in range(SAMPLES):
        (turn,) = made_by.made(index)[1].turns
        context = context_of(made_by.sample(index)).replace("\n- ", "; ")
        for head in questions_passages.LIST_HEADS:
            context = context.rpartition(head)[2] if head else context
        numbered = re.search(r"^1\) |\s1\) ", context)
        pattern = r"\d+\) (.+?)(?=(?:, | \| |; | |\n)\d+\) |\s*(?:\n---|\n\[end\])?\s*$)"
        if numbered:
            counts = Counter(re.findall(pattern, context))
        else:
            counts = Counter(
                {v: len(re.findall(rf"(?<![\w/]){re.escape(v)}(?![\w/])", context)) for v in turn.values}
            )
        told = [counts[value] for value in turn.values]
        assert min(told) >= (3 if family == "common" else 2)
        if family == "common":
            assert told == sorted(told, reverse=True)
        if numbered:
            others = [count for value, count in counts.items() if value not in turn.values]
            assert max(others) == 1


@pytest.mark.parametrize("family", ["cloze", "name"])
def test_a_gap_is_filled_by_the_answer(family: str) -> None:
    made_by = generator(family, seed=4)
    for index in range(SAMPLES):
        (turn,) = made_by.made(index)[1].turns
        context = " ".join(context_of(made_by.sample(index)).split())
        gap = max((gap for gap in GAPS if gap in turn.question), key=len)
        before, _, after = turn.question.partition(gap)
        (value,) = turn.values
        places = [match.start() for match in re.finditer(re.escape(value), context)]
        assert any(
            before.endswith(context[max(0, i - 6) : i]) or after.startswith(context[i + len(value) :][:6])
            for i in places
        )


def test_a_detail_stands_in_one_sentence_with_the_words_that_ask_for_it() -> None:
    made_by = generator("detail", seed=6)
    kinds: Counter[str] = Counter()
    for index in range(2 * SAMPLES):
        (turn,) = made_by.made(index)[1].turns
        context = " ".join(context_of(made_by.sample(index)).split())
        (value,) = turn.values
        asked = set(re.findall(r"[A-Za-z]{4,}", turn.question))
        after = re.search(r'(\w+) after "([^"]+)"', turn.question)
        if after:
            assert f"{after.group(2)} {value}" in context
        kinds[after.group(1) if after else "alone"] += 1
        places = [match.start() for match in re.finditer(re.escape(value), context)]
        near = [set(re.findall(r"[A-Za-z]{4,}", context[max(0, i - 300) : i + 300])) for i in places]
        assert max(len(asked & words) for words in near) >= 3
        wording = set(" ".join(questions_passages.DETAIL).split())
        told = {word.lower() for word in set(re.findall(r"\w+", turn.question)) - wording}
        assert not told & {word.lower() for word in re.findall(r"\w+", value)}, "the question does not tell"
    assert kinds["phrase"] >= 10 and kinds["name"] >= 10 and kinds["alone"] >= 10, kinds


def _asked_for(text: str) -> dict[str, list[tuple[str, str]]]:
    return {kind: [(called, span.text) for called, span in found] for kind, found in _spans(text).items()}


def test_a_detail_is_called_by_what_it_is_where_the_sentence_has_no_other() -> None:
    assert _asked_for("In 1863 the army of Grant took the old river fortress.") == {
        "number": [("number", "1863")],
        "name": [("name", "Grant")],
        "phrase": [('phrase after "the old"', "river fortress")],
    }
    assert _asked_for("It cost 1,200.5 dollars, not a cent more.")["number"] == [("number", "1,200.5")]
    assert _asked_for("The war of the ports was over in 1917.")["number"] == [("number", "1917")]
    assert _asked_for("When I met Mr. Ulysses Grant there, it rained.")["name"] == [("name", "Ulysses Grant")]
    assert _asked_for('Then "the whale" was seen off Cape Horn again.')["name"] == [("name", "Cape Horn")]


def test_a_detail_among_others_is_called_by_the_words_before_it() -> None:
    assert _asked_for("The army fought from 1861 until spring 1865 there.")["number"] == [
        ('number after "fought from"', "1861"),
        ('number after "until spring"', "1865"),
    ]
    assert _asked_for("Later the army met Grant and his friend Sherman there.")["name"] == [
        ('name after "army met"', "Grant"),
        ('name after "his friend"', "Sherman"),
    ]


@pytest.mark.parametrize(
    ("kind", "before", "answer", "sentence", "others"),
    [
        (
            "number",
            "sailed in",
            "1863",
            "The fleet of {} sailed in 1863 again.",
            ["three ships", "the 19th corps", "ship A7", "thirteen ships", "the F-5"],
        ),
        (
            "name",
            "to young",
            "Robert",
            "{} gave the book to young Robert there.",
            ["Alice", "María", "<unk>", "O'Brien", "Tropical storm Émile", "July"],
        ),
    ],
)
def test_what_could_be_called_so_counts_though_it_is_no_answer(
    kind: str, before: str, answer: str, sentence: str, others: list[str]
) -> None:
    for other in others:
        assert _asked_for(sentence.format(other))[kind] == [(f'{kind} after "{before}"', answer)]


@pytest.mark.parametrize(
    "text",
    [
        "He saw how the red house stood near the red barn doors.",  # "the red" would not tell which
        "The red house stood near the red barn doors.",
        "It was of the grand parade ground.",  # "of the" says nothing
        "They mended the old plumber wagon's wheel.",  # within a word
        "They were said to have been taken there once.",  # nothing but function words
        "The match was won 3–2, at 10:30, by 7-5, after 1861 – 1865.",  # parts of scores, times and ranges
        "There was an agreement with John Smith's brother.",
        "There was a meeting with John F. Kennedy about it.",
        "There was a meeting with Jean-Baptiste about it.",
        "There was a meeting with Howard <unk> about it.",
        "There was a letter of the second World War II.",
        'Then he turned and said, "Leave it to the old man."',
        "It rained there. Tomorrow it may snow there again in July.",
    ],
)
def test_what_is_no_detail_or_ambiguous_is_not_asked(text: str) -> None:
    assert _asked_for(text) == {}


def test_a_question_about_a_detail_gives_no_word_of_its_answer() -> None:
    text = (
        "They sold the tall stone house, a tall garden, they sold one house; the keeper smiled at the Keeper."
    )
    (found,) = [found for found in _spans(text)["phrase"] if found[1].text == "tall stone house"]
    called, span = found
    assert called == 'phrase after "sold the"'
    assert _cues(text, span, called) == ["garden", "keeper", "smiled"]


def test_continuations_follow_their_quotation() -> None:
    made_by = generator("continue", seed=5)
    lengths = []
    for index in range(SAMPLES):
        (turn,) = made_by.made(index)[1].turns
        context = " ".join(context_of(made_by.sample(index)).split())
        answer = " ".join(turn.values[0].split())
        before = context[: context.index(answer)].split()
        assert " ".join(before[-4:]) in turn.question
        lengths.append(len(bpe_tokenizer()(turn.answer)["input_ids"]))
    assert min(lengths) >= 14 and max(lengths) <= 75 and max(lengths) - min(lengths) > 20


def test_several_questions_about_one_context() -> None:
    one, three = generator("recall"), generator("recall", questions=3)
    sample = three.sample(0)
    _, made = three.made(0)
    assert 1 <= len(made.turns) <= 3 and len({turn.values for turn in made.turns}) == len(made.turns)
    text = bpe_tokenizer().decode(sample["input_ids"][sample["boundary"] :])
    assert text.count("<|end|>") == 2 * len(made.turns)  # of the question's turn and of the answer
    assert one.sample(0)["input_ids"][: sample["boundary"]] == sample["input_ids"][: sample["boundary"]]


def test_lengths_are_drawn_from_the_range() -> None:
    made_by = generator("continue", context_tokens=800, min_context_tokens=200)
    sizes = [made_by.sample(i)["boundary"] for i in range(60)]
    assert 150 <= min(sizes) < 300 and 700 < max(sizes) <= 808


def test_weights_are_kept_and_samples_depend_on_the_seed() -> None:
    layout = Layout(bpe_tokenizer())
    made_by = SelfSupervision(corpus(), layout, 200, families={"recall": 3, "cloze": 1})
    drawn = Counter(made_by.made(i)[0] for i in range(200))
    assert 120 <= drawn["recall"] <= 180 and drawn["recall"] + drawn["cloze"] == 200
    other = SelfSupervision(corpus(), layout, 200, families={"recall": 3, "cloze": 1}, seed=1)
    assert made_by.sample(3) == SelfSupervision(
        corpus(), layout, 200, families={"recall": 3, "cloze": 1}
    ).sample(3)
    assert made_by.sample(3) != other.sample(3)


def test_cuts_lie_between_sentences() -> None:
    text = 'One fox. "Two foxes!" Three — foxes.\n\nMr. Four? Five'
    for tokenizer in (bpe_tokenizer(), toy.toy_tokenizer()):
        made = TokenisedText(text, tokenizer)
        parts = [tokenizer.decode(made.ids[a:b]) for a, b in pairwise(made.cuts)]
        assert parts == ["One fox.", ' "Two foxes!"', " Three — foxes.", "\n\nMr. Four?", " Five"]
        assert made.characters(made.cuts[1], made.cuts[2]) == ' "Two foxes!"'


def test_short_documents_fill_a_context_together() -> None:
    texts = [f"Note {i}. The barge came in late and left again." for i in range(50)]
    made_by = SelfSupervision(
        Corpus(texts, bpe_tokenizer()), Layout(bpe_tokenizer()), 300, families={"recall": 1}
    )
    context = context_of(made_by.sample(0))
    assert len(set(re.findall(r"Note \d+", context))) > 3 or context.count("barge") > 3


def test_byte_tokens_and_little_room() -> None:
    layout = Layout(toy.toy_tokenizer())
    texts = ["Snow fell on the tower. The old keeper lit his lamp and waited for Miriam. " * 30]
    made_by = SelfSupervision(Corpus(texts, toy.toy_tokenizer()), layout, 300)
    sizes = [made_by.sample(i)["boundary"] for i in range(100)]
    assert max(sizes) <= 320


def test_no_room_and_no_text_are_errors() -> None:
    layout = Layout(bpe_tokenizer())
    with pytest.raises(ConfigError, match="context_tokens: 20 are too few"):
        SelfSupervision(corpus(), layout, 20)
    with pytest.raises(ConfigError, match="no text to make questions from"):
        Corpus(["", ""], bpe_tokenizer())
    numbers = Corpus(["1 2 3"], bpe_tokenizer())
    with pytest.raises(ConfigError, match="allows no question of the families cloze"):
        SelfSupervision(numbers, layout, 100, families={"cloze": 1}).sample(0)
