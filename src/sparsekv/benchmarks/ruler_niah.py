"""Needles in a haystack: RULER's niah tasks (arXiv 2404.06654, section 3.1; its niah.py)."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from sparsekv.benchmarks.fit import Draft, Prompt, Spans, weave
from sparsekv.benchmarks.haystack import NOISE, Haystack
from sparsekv.benchmarks.ruler_task import Row
from sparsekv.benchmarks.vocabulary import draw_new

NEEDLE = "One of the special magic {kind} for {key} is: {value}."

INTRO_ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n"
)
QUESTION_ONE = "What is the special magic {kind} for {query} mentioned in the provided text? "
ANSWER_ONE = "The special magic {kind} for {query} mentioned in the provided text is"
INTRO_MANY = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n"
)
QUESTION_MANY = "What are all the special magic {kind} for {query} mentioned in the provided text? "
ANSWER_MANY = "The special magic {kind} for {query} mentioned in the provided text are"

DEPTHS: list[float] = [round(100 * i / 39) for i in range(40)]
"""RULER's depths of needles in an essay, in percent of its sentences."""


@dataclass(frozen=True)
class Niah:
    """One niah task.

    Attributes:
        haystack: "noise", "essay", or "needle" (every line is a needle with another key).
        keys: kind of keys, "words" or "uuids".
        values: kind of values, "numbers" or "uuids".
        n_keys: keys hidden in the text, besides a needle haystack's own.
        n_values: values per key.
        n_queries: keys that are asked for.
        depth: where the needles go, in percent; None means at random (RULER).
    """

    haystack: Literal["noise", "essay", "needle"] = "essay"
    keys: str = "words"
    values: str = "numbers"
    n_keys: int = 1
    n_values: int = 1
    n_queries: int = 1
    depth: float | None = None
    max_new_tokens: int = 128
    metric: str = "string_match_all"

    def draft(self, row: Row) -> Draft:
        """A unit of filler is one word of the essay, one unit of noise, or one line."""
        rng = row.rng("needles")
        taken: set[str] = set()
        keys = [draw_new(self.keys, rng, taken) for _ in range(self.n_keys)]
        values = [[draw_new(self.values, rng, taken) for _ in range(self.n_values)] for _ in keys]
        asked = rng.sample(range(self.n_keys), self.n_queries)
        # A needle is evidence when its key is asked for; the other keys are distractors.
        needles = [
            (NEEDLE.format(kind=self.values, key=key, value=value), i in asked)
            for i, key in enumerate(keys)
            for value in values[i]
        ]
        rng.shuffle(needles)
        depths: list[float] = sorted(rng.sample(DEPTHS, len(needles)))
        if self.depth is not None:
            depths = [self.depth] * len(needles)

        one = self.n_queries * self.n_values == 1
        kind = self.values[:-1] if one else self.values
        queried = [keys[i] for i in asked]
        query = queried[0] if len(queried) == 1 else ", ".join(queried[:-1]) + ", and " + queried[-1]
        intro = (INTRO_ONE if one else INTRO_MANY).format(kind=kind)
        question = (QUESTION_ONE if one else QUESTION_MANY).format(kind=kind, query=query)
        answer_prefix = (ANSWER_ONE if one else ANSWER_MANY).format(kind=kind, query=query)
        references = tuple(value for i in asked for value in values[i])

        essay = row.sources.haystack if self.haystack == "essay" else None
        lines = _NeedleLines(self, row.rng("filler"), taken)

        def build(n: int) -> Prompt:
            if essay is not None:
                text, evidence = _in_essay(essay, n, needles, depths, len(intro))
            else:
                units = lines.first(n) if self.haystack == "needle" else [NOISE] * n
                positions = self._line_positions(n, len(needles), row.rng("layout"))
                text, evidence = _in_lines(units, needles, positions, len(intro))
            return Prompt(intro + text + "\n", question, answer_prefix, references, evidence)

        if essay is not None:
            return Draft(build, least=1, tokens_per_unit=1.4)
        return Draft(build, least=len(needles), tokens_per_unit=40.0 if self.haystack == "needle" else 25.0)

    def _line_positions(self, n_lines: int, n_needles: int, rng: random.Random) -> list[int]:
        """The line before which each needle goes, ascending."""
        if self.depth is not None:
            return [int(n_lines * self.depth / 100)] * n_needles
        return sorted(rng.sample(range(n_lines), n_needles))


class _NeedleLines:
    """The lines of a needle haystack, each with its own key and value, drawn as far as they are needed."""

    def __init__(self, task: Niah, rng: random.Random, taken: set[str]) -> None:
        self._task, self._rng, self._taken = task, rng, taken
        self._lines: list[str] = []

    def first(self, n: int) -> list[str]:
        while len(self._lines) < n:
            key = draw_new(self._task.keys, self._rng, self._taken)
            value = draw_new(self._task.values, self._rng, self._taken)
            self._lines.append(NEEDLE.format(kind=self._task.values, key=key, value=value))
        return self._lines[:n]


def _in_essay(
    essay: Haystack, n_words: int, needles: list[tuple[str, bool]], depths: list[float], start: int
) -> tuple[str, Spans]:
    """Needles between the sentences of the essay, the i-th at `depths[i]` percent of the sentences."""
    sentences = essay.sentences(n_words)
    pieces: list[tuple[str, bool]] = []
    done = 0
    for needle, depth in zip(needles, depths, strict=True):
        position = int(len(sentences) * depth / 100)
        if position > done:
            pieces.append((" ".join(sentences[done:position]), False))
        pieces.append(needle)
        done = position
    if done < len(sentences):
        pieces.append((" ".join(sentences[done:]), False))
    return weave(pieces, " ", start)


def _in_lines(
    lines: list[str], needles: list[tuple[str, bool]], positions: list[int], start: int
) -> tuple[str, Spans]:
    """Needles as lines of their own, the i-th before line `positions[i]`."""
    pieces = [(line, False) for line in lines]
    for position, needle in sorted(zip(positions, needles, strict=True), key=lambda pair: -pair[0]):
        pieces.insert(position, needle)
    return weave(pieces, "\n", start)
