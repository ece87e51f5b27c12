"""Keys, values and words for RULER's tasks, from lists that come with the package.

RULER draws words from the `wonderwords` package and, for very long lists, from a file of English words. Here
keys are pairs from two short lists of common words, and cwe's words are those lists plus the words of the
packaged book, so that nothing is downloaded. Kinds and shapes are RULER's: "adjective-noun", seven digits,
UUID 4.
"""

from __future__ import annotations

import random
import re
import uuid
from functools import lru_cache

from sparsekv.benchmarks.data import BOOKS, packaged, words
from sparsekv.errors import unknown

_PLAIN_WORD = re.compile(r"\b[a-z]{4,12}\b")


@lru_cache(maxsize=1)
def key_words() -> tuple[str, ...]:
    """Every "adjective-noun" pair, sorted."""
    nouns = words("nouns")
    return tuple(sorted(f"{adjective}-{noun}" for adjective in words("adjectives") for noun in nouns))


@lru_cache(maxsize=1)
def english_words() -> tuple[str, ...]:
    """Distinct lower-case words of 4 to 12 letters: the word lists and the vocabulary of the book, sorted."""
    found = {word for book in BOOKS for word in _PLAIN_WORD.findall(packaged(f"{book}.txt"))}
    return tuple(sorted(found.union(words("adjectives"), words("nouns"))))


def draw(kind: str, rng: random.Random) -> str:
    """One key or value of RULER's kinds: "words", "numbers" (seven digits) or "uuids" (version 4)."""
    if kind == "words":
        return rng.choice(key_words())
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    raise unknown("kind of key or value", kind, ["words", "numbers", "uuids"])


def draw_new(kind: str, rng: random.Random, taken: set[str]) -> str:
    """As `draw`, but one that is not in `taken`; it is added there."""
    while (value := draw(kind, rng)) in taken:
        continue
    taken.add(value)
    return value
