"""Question answering files in SQuAD's format (arXiv 1606.05250), the packaged one and a user's."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sparsekv.benchmarks.data import BUILTIN, SQUAD_SAMPLE, packaged, read_json
from sparsekv.benchmarks.fit import Spans
from sparsekv.errors import ConfigError


@dataclass(frozen=True)
class Question:
    """A question of a SQuAD-format file.

    Attributes:
        text: the question.
        answers: distinct right answers.
        spans: where they are in the document, in characters, sorted.
        document: index of the document that answers it.
        article: indices of the other documents of the same article.
    """

    text: str
    answers: tuple[str, ...]
    spans: Spans
    document: int
    article: tuple[int, ...]


@dataclass(frozen=True)
class Squad:
    """Questions and documents (distinct paragraphs, sorted) of a file."""

    questions: tuple[Question, ...]
    documents: tuple[str, ...]


def parse_squad(content: Any, name: str) -> Squad:
    """Read the answerable questions of a parsed SQuAD file (v1.1, or v2.0, whose impossible ones are left
    out).

    Raises:
        ConfigError: it is not in SQuAD's format, or has no answerable question.
    """
    try:
        articles = [[(p["context"], p["qas"]) for p in a["paragraphs"]] for a in content["data"]]
        documents = sorted({context for article in articles for context, _ in article})
        index = {document: i for i, document in enumerate(documents)}
        questions = []
        for article in articles:
            members = dict.fromkeys(index[context] for context, _ in article)
            for context, qas in article:
                others = tuple(i for i in members if i != index[context])
                for qa in qas:
                    if qa.get("is_impossible") or not qa["answers"]:
                        continue
                    answers = tuple(dict.fromkeys(answer["text"] for answer in qa["answers"]))
                    found = {(a["answer_start"], a["answer_start"] + len(a["text"])) for a in qa["answers"]}
                    spans = tuple(sorted(found))
                    questions.append(Question(qa["question"], answers, spans, index[context], others))
    except (KeyError, TypeError, AttributeError) as error:
        missing = f": field {error} is missing" if isinstance(error, KeyError) else ""
        raise ConfigError(f"squad: {name} is not in SQuAD's format{missing}") from error
    if not questions:
        raise ConfigError(f"squad: {name} has no answerable question")
    return Squad(tuple(questions), tuple(documents))


def load_squad(name: str) -> Squad:
    """The questions behind `BenchmarkConfig.squad`: "builtin", or the path of a file."""
    return _packaged_squad() if name == BUILTIN else parse_squad(read_json(name, "squad"), name)


@lru_cache(maxsize=1)
def _packaged_squad() -> Squad:
    return parse_squad(json.loads(packaged(SQUAD_SAMPLE)), SQUAD_SAMPLE)
