"""Questions about a detail of a text, asked by other words of its sentence: nearer to what people ask than a gap is.

Of the sentence the question gives a few words in any order, so what answers it has to be found by what it is about, not
by the words that stand around a gap. Made without a model.
"""

from __future__ import annotations

import re

from sparsekv.stop_words import STOP_WORDS
from sparsekv.training import questions_passages as wording
from sparsekv.training.data_layout import Turn
from sparsekv.training.selfsup_draw import Draw, Made
from sparsekv.training.selfsup_passages import COMMON, of_sentences
from sparsekv.training.selfsup_values import enumeration

_NUMBER_WORDS = (
    "two three four five six seven eight nine ten eleven twelve dozen twenty thirty forty fifty hundred hundreds "
    "thousand thousands million millions"
)
_FREQUENT = (
    "able back become came come done down even find found give given good have into just know known long look made "
    "make many much must next once only over part said same seem seen take taken that they upon used went were"
)
_EMPTY = COMMON | STOP_WORDS | frozenset(_FREQUENT.split())
"""Words that neither ask nor answer."""
_TITLES = frozenset(("mr", "mrs", "ms", "dr", "st"))

_NUMBER = re.compile(r"(?<![\w.,])\d+(?:[.,]\d+)*(?![.,]?\d|\w)")
_ANY_NUMBER = re.compile(rf"\d|\b(?:{'|'.join(_NUMBER_WORDS.split())})\b", re.IGNORECASE)
_NAME = re.compile(r"\b[A-Z][a-z]+(?: [A-Z][a-z]+){0,3}(?![\w'’])")
_PHRASE = re.compile(r"\b[a-z]{4,}(?: [a-z]{4,}){1,2}(?![\w'’-])")
_BEFORE = re.compile(r"(?<![\w'’-])[A-Za-z]+ [A-Za-z]+(?= $)")
_WORD = re.compile(r"[A-Za-z]+")
_CUE = re.compile(r"(?<![\w'’-])[A-Za-z][a-z]{3,}(?![\w'’-])")
_CUES = (3, 5)
"""Words of the sentence that the question gives."""


def _words(text: str) -> set[str]:
    return {word.lower() for word in _WORD.findall(text)}


def _names(text: str) -> list[re.Match[str]]:
    """Capitalised words; what opens the sentence only if there are more of them, since any word has a capital there."""
    return [
        match
        for match in _NAME.finditer(text)
        if not _words(match.group()) & (_EMPTY | _TITLES) and (_inside(text, match) or " " in match.group())
    ]


def _inside(text: str, match: re.Match[str]) -> bool:
    """Whether anything but marks stands before it, and no sentence ends right there."""
    before = text[: match.start()].rstrip("\"'“”‘’([ ")
    return bool(before) and before[-1] not in ".?!:"


def _called(text: str, match: re.Match[str], kind: str, alone: bool) -> str | None:
    """How a question calls what it asks for: "the number" if the sentence holds no other, else by the two words before
    it; None if they do not tell."""
    if alone and text.count(match.group()) == 1:
        return kind
    before = _BEFORE.search(text[: match.start()])
    if (
        before is None
        or len(re.findall(rf"\b{before.group()}\b", text)) > 1
        or _words(before.group()) <= _EMPTY
    ):
        return None
    return f'{kind} after "{before.group()}"'


def _spans(text: str) -> dict[str, list[tuple[str, re.Match[str]]]]:
    """What can be asked for in a sentence, by kind: (how the question calls it, where it is)."""
    numbers, names = list(_NUMBER.finditer(text)), _names(text)
    phrases = [match for match in _PHRASE.finditer(text) if not _words(match.group()) & _EMPTY]
    one_number = len(numbers) == 1 and not _ANY_NUMBER.search(_without(text, numbers[0]))
    one_name = len(names) == 1 and not re.search(r"[A-Z]\w", _without(text, names[0])[1:])
    found = {}
    for kind, matches, alone in (
        ("number", numbers, one_number),
        ("name", names, one_name),
        ("phrase", phrases, False),
    ):
        spans = [(called, match) for match in matches if (called := _called(text, match, kind, alone))]
        if spans:
            found[kind] = spans
    return found


def _without(text: str, match: re.Match[str]) -> str:
    return text[: match.start()] + " " + text[match.end() :]


def _turn(draw: Draw, text: str) -> Turn | None:
    spans = _spans(text)
    if not spans:
        return None
    called, match = draw.rng.choice(spans[draw.rng.choice(list(spans))])
    answer = match.group()
    told = _words(answer) | _words(called) | _EMPTY
    words = [word for word in dict.fromkeys(_CUE.findall(_without(text, match))) if word.lower() not in told]
    if len(words) < _CUES[0]:
        return None
    cues = draw.rng.sample(words, min(len(words), draw.rng.randint(*_CUES)))
    slots = {"kind": called, "cues": enumeration(cues), "hidden": answer}
    return draw.ask(
        wording.DETAIL, wording.DETAIL_PREFIXES, ("{hidden}", "{hidden}."), answer, [answer], slots
    )


def detail(draw: Draw) -> Made | None:
    """A number, a name or a phrase of a sentence, asked by three to five of its other words."""
    return of_sentences(draw, lambda text: _turn(draw, text))
