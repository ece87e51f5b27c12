"""Questions about one of many documents: RULER's qa task (arXiv 2404.06654, section 3.4;
scripts/data/synthetic/qa.py) on any file in SQuAD's format."""

from __future__ import annotations

from dataclasses import dataclass

from sparsekv.benchmarks.base import row_rng
from sparsekv.benchmarks.fit import Draft, Prompt, TooShort
from sparsekv.benchmarks.ruler_task import Row
from sparsekv.benchmarks.squad import Question, Squad
from sparsekv.errors import ConfigError

INSTRUCTION = (
    "Answer the question based on the given documents. "
    "Only give me the answer and do not output any other words.\n\n"
)
INTRO = INSTRUCTION + "The following are given documents.\n\n"
QUESTION = INSTRUCTION + "Question: {question} "
ANSWER = "Answer:"


@dataclass(frozen=True)
class DocumentQa:
    """One question, its document, then others of its article, then any others, shuffled; repeated if too few.

    Questions are asked in an order drawn from the seed (RULER asks in the file's order).
    """

    max_new_tokens: int = 32
    metric: str = "string_match_part"

    def draft(self, row: Row) -> Draft:
        """A unit of filler is one document."""
        squad = row.sources.squad
        asked = row.sources.memo(("qa", row.stream, row.limit), lambda: _Asked(row)).at(row.index)
        rng = row.rng("documents")
        related = [*asked.article]
        others = [i for i in range(len(squad.documents)) if i != asked.document and i not in set(related)]
        rng.shuffle(related)
        rng.shuffle(others)
        supply = [asked.document, *related, *others]

        def build(n: int) -> Prompt:
            chosen = (supply * (n // len(supply) + 1))[:n]
            row.rng("layout").shuffle(chosen)
            return _prompt(squad, asked, chosen)

        return Draft(build, least=1, tokens_per_unit=180.0)


def _prompt(squad: Squad, asked: Question, chosen: list[int]) -> Prompt:
    """The question about the chosen documents, in that order."""
    text, evidence = INTRO, []
    for number, document in enumerate(chosen, 1):
        text += f"Document {number}:\n"
        if document == asked.document:
            evidence += [(len(text) + start, len(text) + end) for start, end in asked.spans]
        text += squad.documents[document] + "\n\n"
    return Prompt(text, QUESTION.format(question=asked.text), ANSWER, asked.answers, tuple(evidence))


class _Asked:
    """The questions in the order they are asked at one length: shuffled, without those whose own document is
    too long for it (where RULER would never end)."""

    def __init__(self, row: Row) -> None:
        self._row = row
        self._waiting = list(row.sources.squad.questions)
        row_rng(row.sources.seed, row.stream, "order").shuffle(self._waiting)
        self._waiting.reverse()
        self._fitting: list[Question] = []
        self._shortest = 0

    def at(self, index: int) -> Question:
        squad, count = self._row.sources.squad, self._row.sources.count
        while len(self._fitting) <= index and self._waiting:
            question = self._waiting.pop()
            alone = _prompt(squad, question, [question.document])
            tokens = max(count.whole(alone), count.pieces(alone))
            self._shortest = min(tokens, self._shortest or tokens)
            if tokens <= self._row.limit:
                self._fitting.append(question)
        if index < len(self._fitting):
            return self._fitting[index]
        if not self._fitting:
            raise TooShort(self._shortest)
        raise ConfigError(
            f"rows: more than {len(self._fitting)} rows of {self._row.stream}, but only so many of the "
            f"{len(squad.questions)} questions fit into context_length {self._row.context_length}"
        )
