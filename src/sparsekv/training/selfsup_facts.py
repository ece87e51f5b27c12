"""Planted facts: one is asked for, several are, or all values of one key."""

from __future__ import annotations

import random
from dataclasses import dataclass

from sparsekv.training import questions as wording
from sparsekv.training.data_layout import Turn
from sparsekv.training.selfsup_draw import PAIR_ANSWERS, Draw, Made, Statement, fill, listed
from sparsekv.training.selfsup_values import ATTRIBUTES, KEYS, distinct, enumeration

MOST_FACTS = 8


@dataclass(frozen=True)
class Fact:
    """A key has a value as its attribute `what`."""

    what: str
    key: str
    value: str

    @property
    def slots(self) -> dict[str, str]:
        """For the wordings."""
        return {"what": self.what, "key": self.key, "value": self.value}


@dataclass(frozen=True)
class Sort:
    """What facts are about: kinds of key and value, and what the value is of the key."""

    key_kind: str
    value_kind: str
    what: str

    @staticmethod
    def draw(rng: random.Random) -> Sort:
        """Any sort whose keys and values look different."""
        key_kind = rng.choice(KEYS)
        value_kind = rng.choice([kind for kind in ATTRIBUTES if kind != key_kind])
        return Sort(key_kind, value_kind, rng.choice(ATTRIBUTES[value_kind]))


def _facts(draw: Draw, n: int, alike: bool) -> list[Fact]:
    """Up to `n` facts with distinct keys and values, all of one sort if `alike`."""
    rng = draw.rng
    taken: set[str] = set()
    sort = Sort.draw(rng)
    found = []
    for _ in range(n):
        sort = sort if alike else Sort.draw(rng)
        drawn = distinct(sort.key_kind, 1, rng, taken) + distinct(sort.value_kind, 1, rng, taken)
        if len(drawn) == 2:
            found.append(Fact(sort.what, *drawn))
    return found


def _statements(draw: Draw, facts: list[Fact], templates: tuple[str, ...]) -> list[Statement]:
    """A sentence for each fact, all of one wording in half of the samples."""
    only = draw.rng.choice(templates) if draw.chance(0.5) else None
    return [Statement(fill(only or draw.rng.choice(templates), fact.slots)) for fact in facts]


def ask_value(draw: Draw, fact: Fact) -> Turn:
    """The value of one key."""
    return draw.ask(
        wording.QUESTIONS, wording.PREFIXES, wording.ANSWERS, fact.value, [fact.value], fact.slots
    )


def ask_several(draw: Draw, facts: list[Fact]) -> Turn:
    """The values of several keys that have the same attribute."""
    keys, values = [fact.key for fact in facts], [fact.value for fact in facts]
    slots = {
        "what": facts[0].what,
        "keys": enumeration(keys),
        "blanks": ", ".join(f"{key} = ____" for key in keys),
        **listed(values, keys),
    }
    return draw.ask(
        wording.SEVERAL_QUESTIONS, wording.SEVERAL_PREFIXES, PAIR_ANSWERS, slots["commas"], values, slots
    )


def recall(draw: Draw) -> Made | None:
    """One to eight facts in a text; the value of one key is asked for."""
    for n in range(draw.rng.randint(1, MOST_FACTS), 0, -1):
        facts = _facts(draw, n, alike=draw.chance(0.7))
        pieces = draw.plant(_statements(draw, facts, wording.STATEMENTS))
        if facts and pieces is not None:
            asked = draw.rng.sample(facts, min(draw.n_questions, len(facts)))
            return Made(pieces, [ask_value(draw, fact) for fact in asked])
    return None


def several(draw: Draw) -> Made | None:
    """Two to eight facts of one sort; the values of two to four keys are asked for at once."""
    for n in range(draw.rng.randint(2, MOST_FACTS), 1, -1):
        facts = _facts(draw, n, alike=True)
        pieces = draw.plant(_statements(draw, facts, wording.STATEMENTS))
        if len(facts) > 1 and pieces is not None:
            turns = [
                ask_several(draw, draw.rng.sample(facts, draw.rng.randint(2, min(4, len(facts)))))
                for _ in range(draw.n_questions)
            ]
            return Made(pieces, turns)
    return None


def values(draw: Draw) -> Made | None:
    """Keys with several values each; all values of one of them are asked for."""
    rng = draw.rng
    for n_keys in range(rng.randint(1, 3), 0, -1):
        sort, taken = Sort.draw(rng), set[str]()
        keys = distinct(sort.key_kind, n_keys, rng, taken)
        groups = [
            [
                Fact(sort.what, key, value)
                for value in distinct(sort.value_kind, rng.randint(2, 4), rng, taken)
            ]
            for key in keys
        ]
        groups = [group for group in groups if len(group) > 1]
        facts = [fact for group in groups for fact in group]
        rng.shuffle(facts)
        pieces = draw.plant(_statements(draw, facts, wording.VALUE_STATEMENTS))
        if facts and pieces is not None:
            asked = rng.sample(groups, min(draw.n_questions, len(groups)))
            return Made(pieces, [_ask_values(draw, [f for f in facts if f in group]) for group in asked])
    return None


def _ask_values(draw: Draw, facts: list[Fact]) -> Turn:
    found = [fact.value for fact in facts]
    slots = {"what": facts[0].what, "key": facts[0].key, "n": str(len(facts)), **listed(found)}
    return draw.ask(
        wording.VALUE_QUESTIONS, wording.VALUE_PREFIXES, wording.LIST_ANSWERS, slots["commas"], found, slots
    )
