"""Contexts that are nearly only facts: records line by line, and lists whose entries are to be counted."""

from __future__ import annotations

import random
from collections.abc import Callable

from sparsekv.training import questions_passages as wording
from sparsekv.training.questions import LIST_ANSWERS, STATEMENTS
from sparsekv.training.selfsup_draw import Draw, Made, Pieces, fill, listed
from sparsekv.training.selfsup_facts import Fact, Sort, ask_several, ask_value
from sparsekv.training.selfsup_values import KINDS

_ENTRY_KINDS = ("word", "word", "word", "place", "person", "thing", "code", "number")
_SEPARATORS = (", ", " ", "\n", " | ", "; ", "\n- ")
_MOST_UNITS = 5000
_END_TOKENS = 4


def records(draw: Draw) -> Made | None:
    """Lines of keys and values up to the room; one key's value, several keys', or a value's key is asked."""
    rng = draw.rng
    intro, end, _ = draw.frame()
    sort = Sort.draw(rng)
    head = fill(rng.choice(wording.RECORD_HEADS), {"what": sort.what})
    line = rng.choice(STATEMENTS) if draw.chance(0.3) else rng.choice(wording.RECORD_LINES)
    facts: dict[str, Fact] = {}
    values: set[str] = set()
    shown: list[Fact] = []

    def grow(n: int) -> str:
        nonlocal shown
        for _ in range(20 * n):
            if len(facts) >= n:
                break
            key, value = KINDS[sort.key_kind](rng), KINDS[sort.value_kind](rng)
            if key not in facts and value not in values:
                values.add(value)
                facts[key] = Fact(sort.what, key, value)
        shown = list(facts.values())[:n]
        return (
            intro
            + head
            + "\n".join(fill(line, {**fact.slots, "i": str(i)}) for i, fact in enumerate(shown, 1))
        )

    ids = _filled(draw, grow, least=2)
    if ids is None or len(shown) < 2:
        return None
    turns = []
    for _ in range(draw.n_questions):
        kind = rng.random()
        if kind < 0.6:
            turns.append(ask_value(draw, rng.choice(shown)))
        elif kind < 0.85:
            turns.append(ask_several(draw, rng.sample(shown, min(rng.randint(2, 4), len(shown)))))
        else:
            fact = rng.choice(shown)
            prefixes, answers = ("It is", "That would be"), ("{key}", "{key}.")
            turns.append(draw.ask(wording.REVERSE, prefixes, answers, fact.key, [fact.key], fact.slots))
    return Made([ids, end], turns)


def _ranking(draw: Draw) -> tuple[list[tuple[str, int]], bool]:
    """The leading entries with their counts, and whether the counts differ."""
    rng = draw.rng
    ranked = draw.chance(0.6)
    n = rng.choice((1, 1, 2, 3, 5) if ranked else (2, 3, 5, 8, 10))
    least = rng.randint(3, 6)
    words = _new_entries(draw, rng.choice(_ENTRY_KINDS), n, set())
    return [(word, least + (len(words) - 1 - i if ranked else 0)) for i, word in enumerate(words)], ranked


def common(draw: Draw) -> Made | None:
    """A list in which some entries occur far more often than all others, which occur once; they are asked
    for."""
    leaders, ranked = _ranking(draw)
    made = _shuffled_list(draw, leaders)
    if made is None:
        return None
    pieces, entries = made
    names = [name for name, _ in leaders]
    if not ranked:
        names.sort(key=entries.index)
    slots = {"n": "one entry" if len(names) == 1 else f"{len(names)} entries", **listed(names)}
    questions = wording.RANKED if ranked else wording.COMMON
    turn = draw.ask(questions, wording.LIST_PREFIXES, LIST_ANSWERS, slots["commas"], names, slots)
    return Made(pieces, [turn])


def duplicates(draw: Draw) -> Made | None:
    """A list in which one to five entries occur twice or three times; they are asked for."""
    rng = draw.rng
    names = _new_entries(draw, rng.choice(_ENTRY_KINDS), rng.randint(1, 5), set())
    made = _shuffled_list(draw, [(name, rng.choice((2, 2, 3))) for name in names])
    if made is None:
        return None
    pieces, entries = made
    names.sort(key=entries.index)
    slots = listed(names)
    turn = draw.ask(wording.DUPLICATES, wording.LIST_PREFIXES, LIST_ANSWERS, slots["commas"], names, slots)
    return Made(pieces, [turn])


def _new_entries(draw: Draw, kind: str, n: int, taken: set[str]) -> list[str]:
    """`n` entries of a kind that are not in `taken`; they are added there."""
    found: list[str] = []
    misses = 0
    while len(found) < n:
        # a kind may run out; made-up words don't
        entry = KINDS[kind if misses < 20 else "word"](draw.rng)
        if entry in taken:
            misses += 1
            continue
        taken.add(entry)
        found.append(entry)
    return found


def _shuffled_list(draw: Draw, repeated: list[tuple[str, int]]) -> tuple[Pieces, list[str]] | None:
    """A context that is a list: the repeated entries, and as many single ones as there is room for. Also
    the entries in order. None if the repeated ones don't fit."""
    rng = draw.rng
    intro, end, _ = draw.frame()
    head, separator = rng.choice(wording.LIST_HEADS), rng.choice(_SEPARATORS)
    numbered = draw.chance(0.3)
    kind = rng.choice(_ENTRY_KINDS)
    taken = {name for name, _ in repeated}
    fixed = [name for name, count in repeated for _ in range(count)]
    singles: list[str] = []
    order = rng.getrandbits(64)
    entries: list[str] = []

    def grow(n: int) -> str:
        nonlocal entries
        singles.extend(_new_entries(draw, kind, n - len(fixed) - len(singles), taken))
        entries = fixed + singles[: n - len(fixed)]
        random.Random(order).shuffle(entries)
        shown = [f"{i}) {entry}" for i, entry in enumerate(entries, 1)] if numbered else entries
        return intro + head + separator.join(shown)

    ids = _filled(draw, grow, least=len(fixed) + 1)
    return None if ids is None else ([ids, end], entries)


def _filled(draw: Draw, grow: Callable[[int], str], least: int) -> list[int] | None:
    """Tokens of `grow(n)` with about as many units as there is room for; None if `least` units don't fit.

    The last call of `grow` is the one whose tokens are returned.
    """
    room = draw.room - _END_TOKENS
    few = max(least, 12)
    first, second = (len(ids) for ids in draw.layout.many_ids([grow(few), grow(2 * few)]))
    n = few + int((0.96 * room - first) * few / max(1, second - first))
    while n >= least:
        ids = draw.layout.ids(grow(min(n, _MOST_UNITS)))
        if len(ids) <= room:
            return ids
        n = min(n - 1, int(0.98 * n * room / len(ids)))
    return None
