"""Questions about a text itself: continue it, repeat a part, fill a gap. Made without a model."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from sparsekv.stop_words import COMMON
from sparsekv.training import questions_passages as wording
from sparsekv.training.data_layout import Turn
from sparsekv.training.selfsup_draw import Draw, Made
from sparsekv.training.selfsup_text import Passage

_WORD = re.compile(r"\S+")
_PLAIN = re.compile(r"\b[a-z]{5,}\b")
_NAME = re.compile(r"(?<=[a-z,] )(?!(?:Mr|Mrs|Ms|Dr|St)\b)[A-Z][a-z]+(?: [A-Z][a-z]+){0,2}\b")
_LEAST_WORDS, _MOST_WORDS = 8, 40
"""Words of a sentence that something is asked about."""
ANSWER_TOKENS = (20, 60)
"""Tokens of a continued or repeated stretch."""


@dataclass(frozen=True)
class _Stretch:
    """Words that open a stretch, the stretch from there on, and what follows the opening."""

    opening: str
    whole: str
    rest: str


def _one_line(text: str) -> str:
    """Its words with one blank between them."""
    return " ".join(text.split())


def _stretch(draw: Draw, passage: Passage) -> _Stretch | None:
    """A stretch of 20 to 60 tokens after an opening of 4 to 8 words that occurs once in the passage; shorter
    where the passage is.

    None if the passage is too short or repeats itself everywhere.
    """
    rng = draw.rng
    document = passage[0].document
    text = document.characters(passage[0].first, passage[-1].last)
    words = [match.span() for match in _WORD.finditer(text)]
    n_tokens = passage[-1].last - passage[0].first
    target = min(rng.randint(*ANSWER_TOKENS), n_tokens // 2)
    per_token = len(words) / n_tokens
    n_opening, n_rest = rng.randint(4, 8), max(1, int(target * per_token))
    latest = len(words) - n_opening - n_rest
    if latest < 0:
        return None
    for _ in range(8):
        first = rng.randint(0, latest)
        (start, _), (_, split) = words[first], words[first + n_opening - 1]
        if text.count(text[start:split]) == 1:
            stop = words[first + n_opening + n_rest - 1][1]
            return _Stretch(_one_line(text[start:split]), text[start:stop], text[split:stop].strip())
    return None


ONWARD_TOKENS = 128
"""How much of a text that just goes on is learned; less in a short context."""


def onward(draw: Draw) -> Made | None:
    """Nothing is asked: the text goes on where the context ends, as it does when a book is read."""
    n_next = min(ONWARD_TOKENS, draw.room // 4)
    n_tokens = draw.room - len(draw.layout.bos) + n_next
    passage = max(draw.corpus.passages(n_tokens, draw.rng), key=lambda p: p[-1].last - p[0].first)
    ids = [token for sentence in passage for token in sentence.ids]
    if len(ids) < draw.room // 2 + n_next:
        return None
    return Made([ids[:-n_next]], [], ids[-n_next:])


def continue_passage(draw: Draw) -> Made | None:
    """The words that open a stretch are quoted; the answer is what follows them."""
    passage, pieces = draw.passage()
    turns = []
    for _ in range(draw.n_questions):
        found = _stretch(draw, passage)
        if found is None:
            return None
        slots = {"quote": found.opening, "rest": found.rest}
        answer = [found.rest]
        turns.append(
            draw.ask(wording.CONTINUE, ("...",), ("{rest}",), found.rest, answer, slots, verbatim=True)
        )
    return Made(pieces, turns)


def repeat_span(draw: Draw) -> Made | None:
    """First and last words of a stretch are quoted; the answer is the stretch."""
    passage, pieces = draw.passage()
    turns = []
    for _ in range(draw.n_questions):
        found = _stretch(draw, passage)
        if found is None:
            return None
        n_last = draw.rng.randint(2, 4)
        slots = {"first": found.opening, "last": " ".join(found.rest.split()[-n_last:]), "whole": found.whole}
        answer, prefixes = [found.whole], wording.PASSAGE_PREFIXES
        turns.append(
            draw.ask(wording.REPEAT, prefixes, ("{whole}",), found.whole, answer, slots, verbatim=True)
        )
    return Made(pieces, turns)


def of_sentences(draw: Draw, ask: Callable[[str], Turn | None]) -> Made | None:
    """A context of text alone, and what `ask` makes of its sentences, in any order; None if it makes nothing of them.

    `ask` is given a sentence of usual length on one line, and returns None where that allows no question.
    """
    passage, pieces = draw.passage()
    turns: list[Turn] = []
    for sentence in draw.rng.sample(passage, len(passage)):
        text = _one_line(sentence.text)
        turn = ask(text) if _LEAST_WORDS <= text.count(" ") + 1 <= _MOST_WORDS else None
        if turn is not None:
            turns.append(turn)
        if len(turns) == draw.n_questions:
            break
    return Made(pieces, turns) if turns else None


def _gap_turn(draw: Draw, text: str, pattern: re.Pattern[str], questions: tuple[str, ...]) -> Turn | None:
    """A sentence with one match of a pattern taken out that it holds just once."""
    found = [
        match
        for match in pattern.finditer(text)
        if match.group() not in COMMON and text.count(match.group()) == 1
    ]
    if not found:
        return None
    hidden = draw.rng.choice(found)
    gap = text[: hidden.start()] + draw.rng.choice(wording.GAPS) + text[hidden.end() :]
    answer = hidden.group()
    prefixes = wording.WORD_PREFIXES if questions is wording.CLOZE else wording.NAME_PREFIXES
    return draw.ask(
        questions, prefixes, ("{hidden}", "{hidden}."), answer, [answer], {"gap": gap, "hidden": answer}
    )


def cloze(draw: Draw) -> Made | None:
    """A sentence with one of its longer words taken out."""
    return of_sentences(draw, lambda text: _gap_turn(draw, text, _PLAIN, wording.CLOZE))


def name(draw: Draw) -> Made | None:
    """A sentence with a name taken out: whose is it?"""
    return of_sentences(draw, lambda text: _gap_turn(draw, text, _NAME, wording.NAME))
