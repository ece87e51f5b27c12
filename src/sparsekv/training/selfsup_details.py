"""Questions about a detail of a text, asked by other words of its sentence: nearer to what people ask than a gap is.

Of the sentence the question gives a few words in any order, so what answers it has to be found by what it is about, not
by the words that stand around a gap. Made without a model, for texts in English.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from sparsekv.stop_words import COMMON, STOP_WORDS
from sparsekv.training import questions_passages as wording
from sparsekv.training.data_layout import Turn
from sparsekv.training.selfsup_draw import Draw, Made
from sparsekv.training.selfsup_passages import of_sentences
from sparsekv.training.selfsup_values import enumeration

_FREQUENT = (
    "able back became become came come done even find found give given good into know known long look made make many "
    "must next part said same seem seen take taken they used went"
)
_EMPTY = COMMON | STOP_WORDS | frozenset(_FREQUENT.split())
"""Words that neither ask nor answer."""

_TITLES = frozenset(("mr", "mrs", "ms", "dr", "st"))
_MONTHS_AND_DAYS = (
    "january february march april may june july august september october november december monday tuesday wednesday "
    "thursday friday saturday sunday"
)
_DATES = frozenset(_MONTHS_AND_DAYS.split())

_NUMBER_WORDS = (
    "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen dozen twenty thirty forty fifty sixty seventy eighty ninety hundreds? thousands? millions? billions?"
)
# not a part of a word, a range, a score, a time or a code
_NUMBER = re.compile(r"(?<![\w.,:/–-])(?<![–:/-] )\d+(?:[.,]\d+)*(?![.,]?\d|\w|-| ?[–:/-] ?\d)")
_ANY_NUMBER = re.compile(rf"\d|\b(?:{'|'.join(_NUMBER_WORDS.split())})\b", re.IGNORECASE)
_PHRASE = re.compile(r"(?<![\w'’-])[a-z]{4,}(?: [a-z]{4,}){1,2}(?![\w'’-])")
_BEFORE = re.compile(r"(?<![\w'’-])[A-Za-z]+ [A-Za-z]+(?= $)")
_WORD = re.compile(r"[A-Za-z]+")
_CUE = re.compile(r"(?<![\w'’-])[A-Za-z][a-z]{3,}(?![\w'’-])")
_CUES = (3, 5)
"""Words of the sentence that the question gives."""

_PIECE = re.compile(r"\S+")
_PLAIN = re.compile(r"[A-Z][a-z]+")
_OPENING, _CLOSING, _ENDS = "\"'“‘([", "\"'”’)],;:.?!", ".?!:"
_MOST_WORDS = 4
"""Words of a name."""


@dataclass(frozen=True)
class _Span:
    """Characters [start, stop) of a sentence, which a question may ask for."""

    start: int
    stop: int
    text: str


def _words(text: str) -> set[str]:
    return {word.lower() for word in _WORD.findall(text)}


def _capitalised(text: str) -> list[list[tuple[int, int, bool]]]:
    """Runs of neighbouring words with a capital in them: of each word where it is, and whether it may be a name's.

    A word that opens a sentence has a capital anyway, so it is none; a function word there is left out.
    """
    runs: list[list[tuple[int, int, bool]]] = [[]]
    opens = True
    for piece in _PIECE.finditer(text):
        raw = piece.group()
        core = raw.lstrip(_OPENING).rstrip(_CLOSING)
        if raw[0] in _OPENING:
            runs.append([])
            opens = True
        title = core.lower() in _TITLES
        pronoun = core in ("I", "I'm", "I've", "I'd", "I'll")
        capital = core != core.lower() or core == "<unk>"
        if capital and not title and not pronoun and not (opens and core.lower() in _EMPTY):
            start = piece.start() + raw.index(core)
            name = bool(_PLAIN.fullmatch(core)) and not opens and core.lower() not in _EMPTY | _DATES
            runs[-1].append((start, start + len(core), name))
        else:
            runs.append([])
        if raw[-1] in _CLOSING and not title:
            runs.append([])
        last = raw.rstrip("\"'”’)]")[-1:]
        if last:  # marks alone leave it as it was
            opens = last in _ENDS and not title
    return [run for run in runs if run]


def _names(text: str) -> tuple[list[_Span], bool]:
    """Names, and whether there is nothing else in the sentence that could be called one."""
    runs = _capitalised(text)
    names = [
        _Span(run[0][0], run[-1][1], text[run[0][0] : run[-1][1]])
        for run in runs
        if len(run) <= _MOST_WORDS and all(name for _, _, name in run)
    ]
    return names, len(runs) == 1


def _numbers(text: str) -> tuple[list[_Span], bool]:
    """Numbers, and whether there is nothing else in the sentence that could be called one."""
    numbers = [_Span(*match.span(), match.group()) for match in _NUMBER.finditer(text)]
    return numbers, len(numbers) == 1 and not _ANY_NUMBER.search(_without(text, numbers[0]))


def _called(text: str, span: _Span, kind: str, alone: bool) -> str | None:
    """How a question calls what it asks for: "the number" if the sentence holds no other, else by the two words before
    it; None if they do not tell."""
    if alone:
        return kind
    before = _BEFORE.search(text[: span.start])
    if before is None or _words(before.group()) <= _EMPTY:
        return None
    if len(re.findall(rf"\b{before.group()}\b", text, re.IGNORECASE)) > 1:
        return None
    return f'{kind} after "{before.group()}"'


def _spans(text: str) -> dict[str, list[tuple[str, _Span]]]:
    """What can be asked for in a sentence, by kind: (how the question calls it, where it is)."""
    phrases = [
        _Span(*match.span(), match.group())
        for match in _PHRASE.finditer(text)
        if not _words(match.group()) & _EMPTY
    ]
    found = {}
    for kind, (spans, alone) in (
        ("number", _numbers(text)),
        ("name", _names(text)),
        ("phrase", (phrases, False)),
    ):
        asked = [(called, span) for span in spans if (called := _called(text, span, kind, alone))]
        if asked:
            found[kind] = asked
    return found


def _without(text: str, span: _Span) -> str:
    return text[: span.start] + " " + text[span.stop :]


def _cues(text: str, span: _Span, called: str) -> list[str]:
    """Words that the question may give: none of the answer, none that it gives already, each once."""
    told = _words(span.text) | _words(called) | _EMPTY
    found: dict[str, str] = {}
    for word in _CUE.findall(_without(text, span)):
        found.setdefault(word.lower(), word)
    return [word for lower, word in found.items() if lower not in told]


def _turn(draw: Draw, text: str) -> Turn | None:
    spans = _spans(text)
    if not spans:
        return None
    called, span = draw.rng.choice(spans[draw.rng.choice(list(spans))])
    cues = _cues(text, span, called)
    if len(cues) < _CUES[0]:
        return None
    cues = draw.rng.sample(cues, min(len(cues), draw.rng.randint(*_CUES)))
    slots = {"kind": called, "cues": enumeration(cues), "hidden": span.text}
    return draw.ask(
        wording.DETAIL, wording.DETAIL_PREFIXES, ("{hidden}", "{hidden}."), span.text, [span.text], slots
    )


def detail(draw: Draw) -> Made | None:
    """A number, a name or a phrase of a sentence, asked by three to five of its other words."""
    return of_sentences(draw, lambda text: _turn(draw, text))
