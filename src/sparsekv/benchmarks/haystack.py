"""Text that needles hide in: a book cut into words and sentences, or RULER's noise."""

from __future__ import annotations

import re
from bisect import bisect_right
from functools import lru_cache

from sparsekv.benchmarks.data import BOOKS, haystack_text

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""One unit of RULER's noise haystack."""

_END = re.compile(r"[.!?]+[\"')\]\u2019\u201d]*$")
_ABBREVIATION = re.compile(
    r"(?:Mr|Mrs|Ms|Messrs|Dr|Prof|Rev|Hon|Col|Capt|Gen|Sgt|Esq|St|Mt|No|Co|vs|etc|[A-Z])\.$"
)
_OPENING = "\"'([\u2018\u201c"


def sentence_ends(words: list[str]) -> list[int]:
    """Where sentences end in a list of words: each number is the index after a sentence's last word.

    A word that ends in ".", "!" or "?" (and closing quotes) ends a sentence when the next one starts with a
    capital letter or a digit, unless it is a title or an initial ("Mr.", "J."). The last word always ends
    one.
    """
    ends = []
    for index, word in enumerate(words[:-1]):
        if not _END.search(word) or _ABBREVIATION.match(word.lstrip(_OPENING)):
            continue
        following = words[index + 1].lstrip(_OPENING)[:1]
        if following.isupper() or following.isdigit():
            ends.append(index + 1)
    return [*ends, len(words)] if words else []


class Haystack:
    """A text as words and sentences; asked for more words than it has, it starts over, as in RULER.

    Args:
        text: any text; runs of blanks count as one.
    """

    def __init__(self, text: str) -> None:
        self.words = text.split()
        self._ends = sentence_ends(self.words)
        starts = [0, *self._ends[:-1]]
        self._sentences = [" ".join(self.words[a:b]) for a, b in zip(starts, self._ends, strict=True)]

    def sentences(self, n_words: int) -> list[str]:
        """The sentences of the first `n_words` words; the last one may be cut short."""
        rounds, rest = divmod(n_words, len(self.words))
        whole = bisect_right(self._ends, rest)
        cut_from = self._ends[whole - 1] if whole else 0
        cut = [" ".join(self.words[cut_from:rest])] if rest > cut_from else []
        return self._sentences * rounds + self._sentences[:whole] + cut


def load_haystack(name: str) -> Haystack:
    """The haystack behind `BenchmarkConfig.haystack`: a packaged book, or the text of a file."""
    return _packaged_haystack(name) if name in BOOKS else Haystack(haystack_text(name))


@lru_cache(maxsize=len(BOOKS))
def _packaged_haystack(name: str) -> Haystack:
    return Haystack(haystack_text(name))
