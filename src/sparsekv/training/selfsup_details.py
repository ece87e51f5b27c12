"""Questions about a detail of a text, asked by other words of its sentence: nearer to what people ask than a gap is.

Of the sentence the question gives a few words in any order, so what answers it has to be found by what it is about, not
by the words that stand around a gap. Made without a model.
"""

from __future__ import annotations

import re

from sparsekv.training import questions_passages as wording
from sparsekv.training.data_layout import Turn
from sparsekv.training.selfsup_draw import Draw, Made
from sparsekv.training.selfsup_passages import COMMON, NAME, of_sentences
from sparsekv.training.selfsup_values import enumeration

_NUMBER = re.compile(r"(?<![\w.,])\d[\d,.]*\d(?![\w@])|(?<![\w.,])\d(?![\w.,@])")
_CONTENT = re.compile(r"\b[A-Za-z][a-z]{3,}\b")
_PHRASE = re.compile(r"\b(?P<before>[A-Za-z']+ [A-Za-z']+) (?P<phrase>[a-z]{4,}(?: [a-z]{4,}){1,2})\b")
_CUES = (3, 5)
"""Words of the sentence that the question gives."""


def _spans(text: str) -> dict[str, list[tuple[str, re.Match[str]]]]:
    """What can be asked for in a sentence, by kind: (how the question calls it, where it is).

    The number and the name only where the pattern finds no other, since "the name" would not say which; a name that
    opens the sentence, or a digit within a word, is not seen. Training bears that: docs/experiments.md, entry 9.
    """
    found = {}
    for pattern, kind in ((_NUMBER, "number"), (NAME, "name")):
        matches = list(pattern.finditer(text))
        if len(matches) == 1 and text.count(matches[0].group()) == 1:
            found[kind] = [(kind, matches[0])]
    phrases = [
        (f'phrase after "{match["before"]}"', match)
        for match in _PHRASE.finditer(text)
        if not COMMON & set(match["phrase"].split())
    ]
    return found | ({"phrase": phrases} if phrases else {})


def _turn(draw: Draw, text: str) -> Turn | None:
    spans = _spans(text)
    if not spans:
        return None
    kind = draw.rng.choice(list(spans))
    called, match = draw.rng.choice(spans[kind])
    answer = match["phrase"] if kind == "phrase" else match.group()
    rest = text[: match.start()] + " " + text[match.end() :]
    words = [word for word in dict.fromkeys(_CONTENT.findall(rest)) if word.lower() not in COMMON]
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
