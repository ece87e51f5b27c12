"""Keys and values that are planted: names, codes, numbers, dates, places, made-up words.

None has the shape of a benchmark's: no "adjective-noun" pair, no number of five or seven digits, no UUID, no
five capital letters, no random letters of length six (a test compares them).
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Callable


def _words(text: str) -> list[str]:
    return text.split()


_FIRST = _words(
    "Odile Bram Ines Tobias Marguerite Anselm Priya Kofi Leonie Emeka Yusuf Saskia Matteo Freya Hugo Noor "
    "Ingrid Dmitri Amara Cedric Paloma Joachim Wanda Ezra Liesel Rafael Thandi Oskar Beatrix Milo Zofia Idris"
)
_LAST = _words(
    "Farrow Lindqvist Okafor Brandt Castellan Mehta Duarte Vasquez Halloran Nakamura Petrov Eriksen Abara "
    "Delacroix Whitcombe Stavros Moreau Tanaka Quill Rosen Achterberg Penhale Sorrell Kowalski Haddad Ferreira"
)
_COLOURS = _words(
    "crimson teal ochre indigo olive maroon turquoise lavender amber scarlet beige violet cobalt ivory coral "
    "charcoal magenta emerald saffron plum"
)
_SHADES = ("pale", "dark", "bright", "dull", "deep", "light")
_STEMS = _words(
    "Tarn Wex Brack Hollow Sand Elm Gar Mor Pen Dun Ash Kil Lor Stan Rook Cald Thorn Wick Beck Fen Hart Oss"
)
_ENDS = ("by", "ford", "wick", "ham", "mouth", "stead", "ton", "holm", "burn", "dale", "fell", "haven")
_SITES = ("Quay", "Mill", "Depot", "Bridge", "Yard", "Station", "Hall", "Lane", "Cross", "Wharf", "Gate")
_THINGS = _words(
    "locker crate cabinet drawer box parcel shelf trunk barrel flask folder ledger engine valve pump lamp "
    "trolley barge wagon kiosk desk bench turbine beacon"
)
_VENTURES = ("Project", "Team", "Account", "Order", "Unit", "Programme", "Section", "Contract")
_NOUNS = _words(
    "otter copper lantern walnut harbour pepper granite velvet falcon orchard marble willow anchor ginger badger "
    "thistle canyon ribbon pigeon magnet saddle bottle garlic tunnel blanket hammer almond heron pebble cactus"
)
_MONTHS = _words("January February March April May June July August September October November December")
_ONSETS = _words("b br d dr f fl g gr h k kl l m n p pr r s sk st t tr v z")
_VOWELS = _words("a e i o u ai ea oo")
_CODAS = ["", "", "l", "n", "r", "s", "m", "x", "nd", "rt", "sk"]
_HEX = "0123456789abcdef"
_THING = re.compile(r"[a-z]+ \d+")

DIGITS = (2, 3, 4, 4, 6, 8, 9, 10)
"""Lengths of numbers."""


def made_up(rng: random.Random) -> str:
    """A lower-case word that can be spoken and that no dictionary has, of 4 letters or more, never of 6."""
    while True:
        word = "".join(
            rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS)
            for _ in range(rng.choice((2, 2, 3)))
        )
        if len(word) >= 4 and len(word) != 6:
            return word


def number(rng: random.Random) -> str:
    """A whole number of one of the lengths `DIGITS`."""
    length = rng.choice(DIGITS)
    return str(rng.randrange(10 ** (length - 1), 10**length))


def _letters(rng: random.Random, n: int) -> str:
    return "".join(rng.choices(string.ascii_uppercase, k=n))


def _code(rng: random.Random) -> str:
    digits = "".join(rng.choices(string.digits, k=rng.choice((2, 3, 4))))
    shape = rng.randrange(4)
    if shape == 0:
        return f"{_letters(rng, 2)}-{digits}-{_letters(rng, 1)}"
    if shape == 1:
        return f"{_letters(rng, 1)}{digits}{_letters(rng, 2)}"
    if shape == 2:
        return f"{_letters(rng, 3)}/{digits}"
    return f"{digits}{_letters(rng, 1)}-{_letters(rng, 3)}"


def _hex(rng: random.Random) -> str:
    shape = rng.choice(((4, 4), (6, 4, 6), (3, 5, 3), (8,), (12, 4), (4, 6, 8, 6)))
    return rng.choice("-:.").join("".join(rng.choices(_HEX, k=n)) for n in shape)


def _date(rng: random.Random) -> str:
    day, month, year = rng.randint(1, 28), rng.randrange(12), rng.randint(1801, 2089)
    shape = rng.randrange(3)
    if shape == 0:
        return f"{day} {_MONTHS[month]} {year}"
    if shape == 1:
        return f"{_MONTHS[month]} {day}, {year}"
    return f"{year}-{month + 1:02}-{day:02}"


def _place(rng: random.Random) -> str:
    return f"{rng.choice(_STEMS)}{rng.choice(_ENDS)} {rng.choice(_SITES)}"


KINDS: dict[str, Callable[[random.Random], str]] = {
    "number": number,
    "code": _code,
    "hex": _hex,
    "person": lambda rng: f"{rng.choice(_FIRST)} {rng.choice(_LAST)}",
    "date": _date,
    "time": lambda rng: f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}",
    "colour": lambda rng: f"{rng.choice(_SHADES)} {rng.choice(_COLOURS)}",
    "place": _place,
    "word": made_up,
    "phrase": lambda rng: " ".join(made_up(rng) for _ in range(rng.choice((2, 3)))),
    "decimal": lambda rng: f"{rng.randint(0, 999)}.{rng.randint(0, 99):02}",
    "amount": lambda rng: f"${rng.randint(1, 99)},{rng.randint(0, 999):03}",
    "thing": lambda rng: f"{rng.choice(_THINGS)} {rng.randint(2, 999)}",
    "pair": lambda rng: f"{rng.choice(('/', ' + ', ' & ')).join(rng.sample(_NOUNS, 2))}",
    "venture": lambda rng: f"{rng.choice(_VENTURES)} {made_up(rng).capitalize()}",
}
"""Kinds of keys and values by name."""

KEYS = ("person", "place", "word", "hex", "code", "pair", "thing", "venture")
"""Kinds that something is asked by."""

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "number": ("serial number", "tally", "dial setting", "extension", "file number", "badge number"),
    "code": ("entry code", "call sign", "permit", "docket", "tag"),
    "hex": ("checksum", "session token", "fingerprint", "key string"),
    "person": ("owner", "keeper", "contact", "inspector", "author"),
    "date": ("due date", "opening date", "deadline"),
    "time": ("departure time", "starting time"),
    "colour": ("ribbon colour", "paint shade", "colour"),
    "place": ("home port", "destination", "storage site"),
    "word": ("nickname", "password", "code name"),
    "phrase": ("motto", "passphrase"),
    "pair": ("emblem", "watchword"),
    "decimal": ("reading", "score", "rate"),
    "amount": ("price", "fee", "balance"),
}
"""What a value of a kind can be of its key; all take a plural in "s"."""


def distinct(kind: str, n: int, rng: random.Random, taken: set[str]) -> list[str]:
    """`n` new keys or values of a kind, none of which is in `taken` or part of another; they are added there.

    Fewer if the kind has not enough of them.
    """
    found: list[str] = []
    for _ in range(20 * n):
        if len(found) == n:
            break
        value = KINDS[kind](rng)
        if not any(value in other or other in value for other in taken):
            taken.add(value)
            found.append(value)
    return found


def capitalised(text: str) -> str:
    """A thing's name at the start of a sentence ("Locker 48"). Names are capitalised anyway, and codes and
    made-up words must stay as they are, since they are asked for."""
    return text[:1].upper() + text[1:] if _THING.fullmatch(text) else text


def enumeration(items: list[str], last: str = "and") -> str:
    """ "a", "a and b", "a, b and c"."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {last} {items[-1]}"
