"""RULER's tasks: wording, settings, lengths, independence of rows, and prompts that can really be solved."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest

from sparsekv.benchmarks import BENCHMARKS, BenchmarkConfig, Example
from sparsekv.benchmarks.haystack import NOISE
from sparsekv.benchmarks.ruler import TASKS
from sparsekv.benchmarks.ruler_words import FrequentWords
from sparsekv.errors import ConfigError

LIMITS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
NEEDLE = re.compile(r"One of the special magic (numbers|uuids) for (\S+) is: (\S+)\.")
SHAPES = {
    "words": r"[a-z]+-[a-z]+",
    "numbers": r"[1-9]\d{6}",
    "uuids": r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}",
}


def load(tokenizer, seed: int = 0, **fields) -> list[Example]:
    return BENCHMARKS.get("ruler").load(BenchmarkConfig(name="ruler", **fields), tokenizer, seed)


def text_of(example: Example) -> str:
    return example.context + example.question + example.answer_prefix


def used(example: Example, tokenizer) -> int:
    return len(tokenizer(text_of(example))["input_ids"]) + example.max_new_tokens


def test_twelve_tasks_with_rulers_limits_and_metrics(bpe):
    examples = load(bpe, context_length=1024, rows=1)
    assert [example.task for example in examples] == BENCHMARKS.get("ruler").tasks() and len(examples) == 12
    for example in examples:
        family = example.task.split("_")[0]
        assert example.max_new_tokens == LIMITS[family]
        assert example.metric == ("string_match_part" if family == "qa" else "string_match_all")
        assert example.example_id == f"ruler/{example.task}/1024/0000" and example.context_length == 1024


@pytest.mark.parametrize(
    ("tokenizer_name", "context_length"),
    [("bpe", 640), ("bpe", 1024), ("bpe", 4096), ("bpe_with_bos", 1024), ("word_level", 640)],
)
def test_prompts_fill_the_length_and_never_exceed_it(tokenizer_name, context_length, request):
    tokenizer = request.getfixturevalue(tokenizer_name)
    tasks = [
        task for task in TASKS.names() if context_length > 640 or task != "cwe"
    ]  # cwe needs some 900 tokens
    for example in load(
        tokenizer, tasks=tasks, context_length=context_length, rows=3 - context_length // 2048
    ):
        free = context_length - used(example, tokenizer)
        noise, line = len(tokenizer(NOISE)["input_ids"]) + 2, 150
        slack = {
            "niah_single_1": noise,
            "vt": noise,
            "niah_multikey_2": line,
            "niah_multikey_3": line,
            "fwe": 60,
        }
        # One more word, line or document would not fit; a cwe word is written 1 or 3 times.
        most = 700 if example.task == "qa_1" else slack.get(example.task, 35)
        assert 0 <= free <= most, (example.example_id, free)


def test_one_more_word_of_the_essay_does_not_fit(bpe):
    words = BENCHMARKS.get("ruler").load(
        BenchmarkConfig(name="ruler", tasks=["niah_single_2"], context_length=1024, rows=20), bpe, 3
    )
    free = [1024 - used(example, bpe) for example in words]
    assert max(free) <= 12 and sum(free) / len(free) < 4


def test_a_row_depends_on_seed_and_index_only(bpe):
    few = load(bpe, context_length=1024, rows=2)
    more = {example.example_id: example for example in load(bpe, context_length=[1024], rows=4)}
    assert len(more) == 48
    assert all(more[example.example_id] == example for example in few)
    alone = load(bpe, tasks="cwe", context_length=[2048, 1024], rows=1)
    assert alone[1] == more["ruler/cwe/1024/0000"]
    other = {example.example_id: example for example in load(bpe, seed=1, context_length=1024, rows=2)}
    assert all(other[example.example_id].references != example.references for example in few)


def test_rows_ask_for_the_same_needle_at_every_length(bpe):
    short, long = load(bpe, tasks=["niah_multivalue"], context_length=[1024, 2048], rows=1)
    assert short.references == long.references and len(long.context) > 1.7 * len(short.context)


@pytest.mark.parametrize(
    ("task", "keys", "values", "n_keys", "n_values", "n_queries"),
    [
        ("niah_single_1", "words", "numbers", 1, 1, 1),
        ("niah_single_2", "words", "numbers", 1, 1, 1),
        ("niah_single_3", "words", "uuids", 1, 1, 1),
        ("niah_multikey_1", "words", "numbers", 4, 1, 1),
        ("niah_multikey_2", "words", "numbers", None, 1, 1),
        ("niah_multikey_3", "uuids", "uuids", None, 1, 1),
        ("niah_multivalue", "words", "numbers", 1, 4, 1),
        ("niah_multiquery", "words", "numbers", 4, 1, 4),
    ],
)
def test_needles(bpe, task, keys, values, n_keys, n_values, n_queries):
    for example in load(bpe, tasks=[task], context_length=1024, rows=3):
        found = NEEDLE.findall(example.context)
        assert all(re.fullmatch(SHAPES[keys], key) and re.fullmatch(SHAPES[values], v) for _, key, v in found)
        assert {kind for kind, _, _ in found} == {values}
        by_key: dict[str, list[str]] = {}
        for _, key, value in found:
            by_key.setdefault(key, []).append(value)
        assert all(len(v) == n_values for v in by_key.values())
        if n_keys is None:
            lines = example.context.split("\n")[1:-1]
            assert len(lines) == len(found) > 4
        else:
            assert len(by_key) == n_keys
        # A reader of the prompt alone finds the references.
        query = re.search(r"magic \w+ for (.*) mentioned in the provided text\? $", example.question).group(1)
        asked = re.split(r", and |, ", query)
        assert len(asked) == n_queries
        assert [sorted(by_key[key]) for key in asked] == [
            sorted(example.references[i : i + n_values]) for i in range(0, len(example.references), n_values)
        ]
        shown = [example.context[a:b] for a, b in example.evidence]
        assert len(shown) == n_values * n_queries
        assert {NEEDLE.fullmatch(sentence).group(3) for sentence in shown} == set(example.references)


def test_wording_of_one_and_of_many(bpe):
    one, many = load(bpe, tasks=["niah_single_3", "niah_multiquery"], context_length=1024, rows=1)
    assert one.context.startswith(
        "A special magic uuid is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the uuid afterwards.\n"
    )
    assert re.fullmatch(
        r"What is the special magic uuid for \S+ mentioned in the provided text\? ", one.question
    )
    assert re.fullmatch(
        r"The special magic uuid for \S+ mentioned in the provided text is", one.answer_prefix
    )
    assert many.context.startswith(
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the numbers afterwards.\n"
    )
    query = r"\S+, \S+, \S+, and \S+"
    assert re.fullmatch(
        rf"What are all the special magic numbers for {query} mentioned in the provided text\? ",
        many.question,
    )
    assert re.fullmatch(
        rf"The special magic numbers for {query} mentioned in the provided text are", many.answer_prefix
    )


def test_variable_tracking_has_a_worked_example_and_a_chain_of_five(bpe):
    for example in load(bpe, tasks=["vt"], context_length=1024, rows=3):
        value = re.fullmatch(
            r"Question: Find all variables that are assigned the value (\d{5}) in the text above\. ",
            example.question,
        ).group(1)
        assert example.answer_prefix == (
            "Answer: According to the chain(s) of variable assignment in the text above, "
            f"5 variables are assigned the value {value}, they are: "
        )
        chain = {value: None}
        for name, source in re.findall(r"^VAR ([A-Z]+) = (?:VAR )?(\w+) ?$", example.context, re.MULTILINE):
            if source in chain:
                chain[name] = None
        assert tuple(chain)[1:] == example.references and all(len(name) == 5 for name in example.references)
        shown = [example.context[a:b] for a, b in example.evidence]
        assert shown == [f"VAR {example.references[0]} = {value}"] + [
            f"VAR {b} = VAR {a}" for a, b in zip(example.references, example.references[1:], strict=False)
        ]
        # The worked example: names of three letters, its answer after a double blank, at most 500 tokens.
        shot, question = example.context.split("\n\nMemorize and track", 1)
        names = re.findall(r"^VAR ([A-Z]{3}) =", shot, re.MULTILINE)
        assert len(names) == 5 and shot.endswith("they are:  " + " ".join(names))
        prompt = shot.removesuffix(" " + " ".join(names))
        assert 470 < len(bpe(prompt)["input_ids"]) <= 500 + 10  # fitted with other names of three letters
        assert question.startswith(" the chain(s) of variable assignment hidden in the following text.\n\n")


@pytest.mark.parametrize(("context_length", "common", "other"), [(1024, 6, 1), (4096, 30, 3)])
def test_common_words_are_the_common_words(bpe, context_length, common, other):
    (example,) = load(bpe, tasks=["cwe"], context_length=context_length, rows=1)
    intro = (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often.\n"
    )
    _, shot, listing = example.context.split(intro)
    counts = Counter(re.findall(r"\d+\. (\S+)", listing))
    assert {word for word, n in counts.most_common(10)} == set(example.references)
    assert Counter(counts.values()) == {common: 10, other: len(counts) - 10}
    assert [int(n) for n in re.findall(r"(\d+)\. ", listing)] == list(range(1, sum(counts.values()) + 1))
    # The worked example: 20 words (3 or 1 times) below 4096 tokens, else 40 (10 or 3 times), then its answer.
    shown, answer = shot.split("Answer: The top 10 words that appear most often in the list are:")
    shot_counts = Counter(re.findall(r"\d+\. (\S+)", shown))
    assert sorted(shot_counts.values()) == ([1] * 10 + [3] * 10 if common == 6 else [3] * 30 + [10] * 10)
    assert re.findall(r"\d+\. (\S+)", answer) == [
        word for word, n in shot_counts.items() if n > other * 2
    ] or set(re.findall(r"\d+\. (\S+)", answer)) == {word for word, n in shot_counts.most_common(10)}
    assert example.question == "Question: What are the 10 most common words in the above list? "


def test_frequent_words_follow_the_zeta_distribution(bpe):
    (example,) = load(bpe, tasks=["fwe"], context_length=2048, rows=1)
    body = example.context.removeprefix(
        "Read the following coded text and track the frequency of each coded word. "
        "Find the three most frequently appeared coded words. "
    )
    counts = Counter(body.split())
    assert counts.most_common(4)[0][0] == "..."
    assert [word for word, _ in counts.most_common(4)[1:]] == list(example.references)
    first, second, third, fourth, fifth = (n for _, n in counts.most_common(5))
    assert [second / first, third / first, fourth / first] == pytest.approx([1 / 4, 1 / 9, 1 / 16], rel=0.1)
    assert fourth > fifth and all(len(word) == 6 for word in list(counts) if word != "...")


def test_zeta_counts_by_hand():
    # 100 / zeta(2) = 60.79; over 1, 4, 9, 16, 25
    assert FrequentWords.counts(100, 5) == [60, 15, 6, 3, 2]
    assert FrequentWords.counts(26, 4)[3] == 0 and FrequentWords.counts(27, 4)[3] == 1


def test_documents_hold_the_answer_once(bpe):
    examples = load(bpe, tasks=["qa"], context_length=1024, rows=8)
    assert {example.task for example in examples} == {"qa_1"}
    assert len({example.question for example in examples}) == 8
    for example in examples:
        assert {example.context[a:b] for a, b in example.evidence} == set(example.references)
        numbers = [int(n) for n in re.findall(r"^Document (\d+):$", example.context, re.MULTILINE)]
        assert numbers == list(range(1, len(numbers) + 1))
        instruction = (
            "Answer the question based on the given documents. "
            "Only give me the answer and do not output any other words.\n\n"
        )
        assert example.context.startswith(f"{instruction}The following are given documents.\n\nDocument 1:\n")
        assert example.context.endswith("\n\n")
        assert re.fullmatch(rf"{re.escape(instruction)}Question: .+ ", example.question)
        assert example.answer_prefix == "Answer:"


def test_more_documents_than_there_are_repeat(bpe):
    (example,) = load(bpe, tasks=["qa"], context_length=40_000, rows=1)
    documents = re.split(r"(?:^|\n\n)Document \d+:\n", example.context)[1:]
    assert len(documents) > len(set(documents)) == 120 and len(example.evidence) == len(
        [d for d in documents if example.references[0] in d]
    )


def test_kvpress_splits_the_prompt_where_we_do(bpe):
    """The patterns of kvpress's script that made its RULER data set."""
    questions = {
        "niah": r"What (?:is|are all) the special magic",
        "vt": r"Question: Find all variables that are assigned the value",
        "cwe": r"Question: What are the 10 most common words in the above list\?",
        "fwe": r"Question: Do not provide any explanation\.",
        "qa": r"Answer the question based on the given documents\.",
    }
    for example in load(bpe, context_length=1024, rows=1):
        family = example.task.split("_")[0]
        text = text_of(example)
        start = list(re.finditer(questions[family], text))[-1].start()
        answer = (
            re.search("The special magic" if family == "niah" else "Answer:", text[start:]).start() + start
        )
        assert (example.context, example.question, example.answer_prefix) == (
            text[:start],
            text[start:answer],
            text[answer:],
        )


@pytest.mark.parametrize("task", TASKS.names())
def test_too_short_a_length_says_what_it_takes(bpe, task):
    with pytest.raises(
        ConfigError, match=rf"^context_length 150 is too small for ruler task '{task}': row 0"
    ) as caught:
        load(bpe, tasks=[task], context_length=150, rows=1)
    needed = int(re.search(r"at least (\d+) tokens", str(caught.value)).group(1))
    if task != "vt":  # whose worked example grows with the length
        (example,) = load(bpe, tasks=[task], context_length=needed, rows=1)
        assert used(example, bpe) <= needed
        with pytest.raises(ConfigError, match="too small"):
            load(bpe, tasks=[task], context_length=needed - 1, rows=1)


def test_room_is_kept_for_template_and_own_answer_limit(bpe):
    fields = {"tasks": ["niah_single_2"], "context_length": 1024, "rows": 1}
    (plain,), (short,), (templated,) = (
        load(bpe, **fields, **more) for more in ({}, {"max_new_tokens": 28}, {"template_tokens": 100})
    )
    assert short.max_new_tokens == 28 and abs(used(short, bpe) - 1024) <= 12
    assert len(bpe(text_of(short))["input_ids"]) - len(bpe(text_of(plain))["input_ids"]) == pytest.approx(
        100, abs=12
    )
    assert used(templated, bpe) == pytest.approx(924, abs=12)


def test_noise_and_own_text_as_haystack(bpe, tmp_path):
    (noisy,) = load(bpe, tasks=["niah_single_3"], context_length=512, rows=1, haystack="noise")
    assert NOISE in noisy.context
    (tmp_path / "own.txt").write_text("Snow fell on the town. " * 5)
    (own,) = load(
        bpe, tasks=["niah_single_2"], context_length=512, rows=1, haystack=str(tmp_path / "own.txt")
    )
    assert own.context.count("Snow fell") > 30  # repeated as often as needed


def test_more_rows_than_questions_and_questions_too_long_for_the_length(bpe, tmp_path):
    paragraphs = [
        {
            "context": f"Lake {name} is {feet} feet deep. " + "It is cold. " * padding,
            "qas": [
                {
                    "question": f"How deep is {name}?",
                    "answers": [{"text": feet, "answer_start": 9 + len(name)}],
                }
            ],
        }
        for name, feet, padding in (("Ara", "70", 0), ("Bel", "81", 3), ("Cor", "92", 400))
    ]
    path = tmp_path / "lakes.json"
    path.write_text(json.dumps({"version": "1.1", "data": [{"title": "Lakes", "paragraphs": paragraphs}]}))
    short = load(bpe, tasks=["qa"], context_length=300, rows=2, squad=str(path))
    assert sorted(example.references for example in short) == [("70",), ("81",)]
    long = load(bpe, tasks=["qa"], context_length=4000, rows=3, squad=str(path))
    assert sorted(example.references for example in long) == [("70",), ("81",), ("92",)]
    with pytest.raises(ConfigError, match=r"^rows: more than 2 rows of qa_1, .* of the 3 questions fit into"):
        load(bpe, tasks=["qa"], context_length=300, rows=3, squad=str(path))


def test_counting_prints_no_warning(bpe, caplog, capfd):
    bpe.deprecation_warnings.clear()
    load(bpe, tasks=["fwe"], context_length=1024, rows=1)  # model_max_length is 512
    assert "longer than" not in capfd.readouterr().err + caplog.text
