"""Chains: each thing is where, or what, another one is; only the first of them says where or what."""

from __future__ import annotations

from itertools import pairwise

from sparsekv.training import questions_chains as wording
from sparsekv.training.data_layout import Turn
from sparsekv.training.questions import LIST_ANSWERS
from sparsekv.training.questions_chains import Subject
from sparsekv.training.selfsup_draw import Draw, Made, Statement, fill, listed
from sparsekv.training.selfsup_values import distinct

MOST_LINKS = 4


def chain(draw: Draw) -> Made | None:
    """A chain of one to four links, in half of the samples beside another one. Asked is the value of one of
    its things, or everything that has the value."""
    rng = draw.rng
    subject = rng.choice(wording.SUBJECTS)
    names, value_kind = rng.choice(subject.names), rng.choice(subject.values)
    for n_links in range(rng.randint(1, MOST_LINKS), 0, -1):
        taken: set[str] = set()
        sizes = [n_links + 1, *([rng.randint(1, n_links + 1)] if draw.chance(0.5) else [])]
        chains = [distinct(names, size, rng, taken) for size in sizes]
        ends = distinct(value_kind, len(chains), rng, taken)
        if len(ends) < len(chains) or any(
            len(found) < size for found, size in zip(chains, sizes, strict=True)
        ):
            continue
        pieces = draw.plant(_told(draw, subject, chains, ends))
        if pieces is not None:
            turns = [_ask(draw, subject, chains[0], ends[0]) for _ in range(draw.n_questions)]
            return Made(pieces, turns)
    return None


def _told(draw: Draw, subject: Subject, chains: list[list[str]], ends: list[str]) -> list[Statement]:
    """The statements of all chains, mixed; those of one chain mostly from its root on."""
    rng = draw.rng
    own_line = subject.roots[0].startswith("{b}")
    waiting = []
    for things, value in zip(chains, ends, strict=True):
        lines = [fill(rng.choice(subject.roots), {"b": things[0], "value": value})]
        lines += [fill(rng.choice(subject.links), {"a": a, "b": b}) for b, a in pairwise(things)]
        if not own_line and draw.chance(0.3):
            rng.shuffle(lines)  # notation is carried out line by line and must stay in order
        waiting.append(lines[::-1])
    told = []
    while any(waiting):
        lines = rng.choices(waiting, weights=[len(lines) for lines in waiting])[0]
        told.append(Statement(lines.pop(), own_line))
    return told


def _ask(draw: Draw, subject: Subject, things: list[str], value: str) -> Turn:
    rng = draw.rng
    if draw.chance(0.5):
        slots = {"a": rng.choice(things[1:]), "value": value}
        return draw.ask(
            subject.forward, wording.FORWARD_PREFIXES, wording.FORWARD_ANSWERS, value, [value], slots
        )
    slots = {"value": value, "n": str(len(things)), **listed(things)}
    return draw.ask(subject.backward, wording.BACKWARD_PREFIXES, LIST_ANSWERS, slots["commas"], things, slots)
