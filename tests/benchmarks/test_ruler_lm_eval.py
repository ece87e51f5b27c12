"""RULER's tasks against lm-eval's generators of them, with the same tokenizer, haystack, words and documents.

Skipped where lm-eval is not installed: `pip install lm-eval==0.4.13 wonderwords nltk`. Prompts are compared
after what is drawn at random (keys, values, names, order) was replaced by its shape; settings by counting.
"""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest

from sparsekv.benchmarks import BENCHMARKS, BenchmarkConfig, Example
from sparsekv.benchmarks.data import SQUAD_SAMPLE, packaged
from sparsekv.benchmarks.haystack import NOISE, Haystack, load_haystack

pytest.importorskip("lm_eval")
pytest.importorskip("wonderwords")
pytest.importorskip("nltk")

from lm_eval.tasks.ruler import cwe_utils, fwe_utils, niah_utils, prepare_niah, qa_utils, vt_utils

ROWS = 4
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
WORD = r"[A-Za-z]+(?:[- '][A-Za-z]+)*-[A-Za-z]+(?:[- '][A-Za-z]+)*"
NIAH = {
    "niah_single_1": {"type_haystack": "repeat", "type_needle_v": "numbers"},
    "niah_single_2": {"type_haystack": "essay", "type_needle_v": "numbers"},
    "niah_single_3": {"type_haystack": "essay", "type_needle_v": "uuids"},
    "niah_multikey_1": {"type_haystack": "essay", "type_needle_v": "numbers", "num_needle_k": 4},
    "niah_multikey_2": {"type_haystack": "needle", "type_needle_v": "numbers"},
    "niah_multikey_3": {"type_haystack": "needle", "type_needle_k": "uuids", "type_needle_v": "uuids"},
    "niah_multivalue": {"type_haystack": "essay", "type_needle_v": "numbers", "num_needle_v": 4},
    "niah_multiquery": {"type_haystack": "essay", "type_needle_v": "numbers", "num_needle_q": 4},
}


def ours(tokenizer, task: str, context_length: int) -> list[Example]:
    spec = BenchmarkConfig(name="ruler", tasks=[task], context_length=context_length, rows=ROWS)
    return BENCHMARKS.get("ruler").load(spec, tokenizer, 0)


def shape(text: str) -> str:
    """The text with its random parts replaced by their kind, and blanks at joints made one."""
    text = re.sub(UUID, "UUID", text)
    text = re.sub(rf"(?<=for ){WORD}(?= is: |, | mentioned)", "WORDS", text)
    text = re.sub(rf"(?<=, )(and )?{WORD}(?=, | mentioned)", r"\1WORDS", text)
    return re.sub(r"\d{7}", "NUMBER", text)


def niah_parts(prompt: str) -> tuple[str, Counter[str], str]:
    """Intro, the needles by shape, and the question with the answer's start."""
    intro, rest = prompt.split("\n", 1)
    body, question = rest.rsplit("\n", 1)
    return (
        shape(intro),
        Counter(re.findall(r"One of the special magic [^.]*\.", shape(body))),
        shape(question),
    )


@pytest.fixture()
def essay(monkeypatch) -> list[str]:
    """Our haystack and our rule for sentences in place of essays and models that would be downloaded."""
    haystack = load_haystack("book_eval")
    monkeypatch.setattr(prepare_niah, "cached_sent_tokenize", lambda t: Haystack(t).sentences(len(t.split())))
    return haystack.words


@pytest.mark.parametrize("context_length", [1024, 4096])
@pytest.mark.parametrize("task", list(NIAH))
def test_niah(bpe, essay, task, context_length):
    settings = {"type_needle_k": "words", **NIAH[task]}
    kind = settings["type_haystack"]
    theirs = prepare_niah.generate_samples(
        essay if kind == "essay" else prepare_niah.get_haystack(kind),
        TOKENIZER=bpe,
        max_seq_length=context_length,
        template=niah_utils.TEMPLATE,
        num_samples=ROWS,
        **settings,
    )
    assert len(theirs) == ROWS
    for their, our in zip(theirs, ours(bpe, task, context_length), strict=True):
        expected = niah_parts(f"{their['input']} {their['gen_prefix']}")
        found = niah_parts(our.context + our.question + our.answer_prefix)
        assert (found[0], found[2]) == (expected[0], expected[2])
        assert len(their["outputs"]) == len(our.references)
        assert found[1].keys() == expected[1].keys() and len(found[1]) == 1
        if kind == "needle":  # they step by 5 or 25 lines, we by one
            assert 0 <= found[1].total() - expected[1].total() <= (25 if context_length >= 4096 else 5) + 1
        else:
            assert found[1] == expected[1]
        if kind == "repeat":
            assert 0 <= our.context.count(NOISE) - their["input"].count(NOISE) <= 25
        if kind == "essay":
            filler = [
                re.sub(r"One of the special magic \w+ for .*? is: \S+\.", "", t)
                for t in (their["input"], our.context)
            ]
            a, b = (text.split("\n", 1)[1].split() for text in filler)
            common = max(0, min(len(a), len(b)) - 40)  # at 1024 lm-eval may fit none of its 500-word steps
            assert a[:common] == b[:common] == essay[:common]


@pytest.mark.parametrize("context_length", [1024, 4096])
def test_variable_tracking(bpe, context_length):
    example = vt_utils.sys_vartrack_w_noise_random(
        tokenizer=bpe, num_samples=1, max_seq_length=500, incremental=5
    )[0]
    theirs = vt_utils.sys_vartrack_w_noise_random(
        tokenizer=bpe, num_samples=ROWS, max_seq_length=context_length, icl_example=example
    )

    def parts(text: str) -> list[str]:
        # lm-eval keeps a typo that RULER has since mended, joins lines with blanks, and separates its example
        # by other empty lines: here, the chain's lines and the sentences around them count.
        text = text.replace("assgined", "assigned").replace(NOISE, "\n")
        text = re.sub(r"\b[A-Z]{5}\b", "NAME5", re.sub(r"\b(?!VAR)[A-Z]{3}\b", "NAME3", text))
        lines = (line.strip() for line in re.sub(r"\b\d{5}\b", "VALUE", text).split("\n"))
        return [re.sub(r"  +", " ", line) for line in lines if line]

    for their, our in zip(theirs, ours(bpe, "vt", context_length), strict=True):
        assert parts(their["input"] + " " + their["gen_prefix"]) == parts(
            our.context + our.question + our.answer_prefix
        )
        assert len(their["outputs"]) == len(our.references) == 5
        # Noise steps: 5 in the example, 10 in the question.
        assert -2 <= our.context.count(NOISE) - their["input"].count(NOISE) <= 20


@pytest.mark.parametrize("context_length", [2048, 8192])
def test_common_words(bpe, context_length):
    theirs = cwe_utils.sys_word_pair_random(num_samples=2, max_seq_length=context_length, tokenizer=bpe)

    def counts(text: str) -> Counter[int]:
        return Counter(Counter(re.findall(r"\d+\. ([^\d]+?)(?= \d+\. |\n|$)", text)).values())

    intro = cwe_utils.CONFIG["template"].split("{context}")[0]
    for their, our in zip(theirs, ours(bpe, "cwe", context_length)[:2], strict=True):
        shot, listing = re.split(rf"\n(?={re.escape(intro)})", our.context)
        assert re.sub(r"\d+\. [^\n:]+", "LIST", shot) == re.sub(
            r"(?<=:)LIST$", " LIST", re.sub(r"\d+\. [^\n:]+", "LIST", their["input_example"])
        )
        mine = listing + our.question + our.answer_prefix
        assert re.sub(r"\d+\. [^\n]+", "LIST", mine) == re.sub(
            r"\d+\. [^\n]+", "LIST", f"{their['input']} {their['gen_prefix']}"
        )
        assert counts(shot.split("\nQuestion")[0]) == counts(their["input_example"].split("\nQuestion")[0])
        common, other = counts(listing), counts(their["input"])
        assert common.keys() == other.keys() and common[max(common)] == other[max(other)] == 10
        assert len(their["outputs"]) == len(our.references) == 10


def test_frequent_words(bpe):
    theirs = fwe_utils.sys_kwext(tokenizer=bpe, max_seq_length=2048, num_samples=2)
    template = re.escape(fwe_utils.TEMPLATE).replace(
        r"\{context\}", r"((?:[a-z]{6} |\.\.\. )*(?:[a-z]{6}|\.\.\.))"
    )
    for their, our in zip(theirs, ours(bpe, "fwe", 2048)[:2], strict=True):
        prompts = (f"{their['input']} {their['gen_prefix']}", our.context + our.question + our.answer_prefix)
        a, b = (
            sorted(Counter(re.fullmatch(template, p).group(1).split()).values(), reverse=True)
            for p in prompts
        )
        assert len(their["outputs"]) == len(our.references) == 3
        # The same shares of ranks 1 to 4, whatever the number of words.
        assert [n / a[0] for n in a[:4]] == pytest.approx([n / b[0] for n in b[:4]], abs=0.01)


def test_documents(bpe):
    data = json.loads(packaged(SQUAD_SAMPLE))
    docs = sorted({p["context"] for a in data["data"] for p in a["paragraphs"]})
    qas = [
        {
            "query": qa["question"],
            "outputs": [answer["text"] for answer in qa["answers"]],
            "context": [docs.index(p["context"])],
            "more_context": [docs.index(o["context"]) for o in a["paragraphs"] if o is not p],
        }
        for a in data["data"]
        for p in a["paragraphs"]
        for qa in p["qas"]
    ]
    theirs = qa_utils.generate_samples(bpe, docs, qas, max_seq_length=4096, num_samples=ROWS)

    def parts(text: str) -> tuple[list[str], list[str]]:
        found = [doc for doc in docs if doc in text]
        for doc in found:
            text = text.replace(doc, "DOC")
        return re.sub(r"(Document \d+:\nDOC\n\n)+", "DOCS", re.sub(r"Question: .*\?", "Q", text)).split(
            "\n"
        ), found

    for their, our in zip(theirs, ours(bpe, "qa_1", 4096), strict=True):
        a, their_docs = parts(f"{their['input']} {their['gen_prefix']}")
        b, our_docs = parts(our.context + our.question + our.answer_prefix)
        assert a == b
        assert 0 <= len(our_docs) - len(their_docs) <= 12  # they step by 10 documents
