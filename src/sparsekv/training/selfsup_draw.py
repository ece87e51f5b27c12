"""What the families of self-supervised questions share: a draw, its context put together, its questions asked."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from sparsekv.training.data_layout import Layout, Turn
from sparsekv.training.questions import ENDS, INTROS, LEADS, LIST_ANSWERS, TAILS
from sparsekv.training.selfsup_text import Corpus, Passage
from sparsekv.training.selfsup_values import capitalised, enumeration

_P_INTRO, _P_PREFIX, _P_REPEATED = 0.3, 0.35, 0.15

Pieces = list[str | list[int]]
"""A context: texts that are still to be tokenised, and token ids."""


@dataclass(frozen=True)
class Made:
    """A context and what is asked about it; or, with `onward`, plain token ids (without bos) and those that follow."""

    pieces: Pieces
    turns: list[Turn]
    onward: list[int] | None = None


@dataclass(frozen=True)
class Statement:
    """A sentence to be planted; on a line of its own where it is notation rather than prose."""

    text: str
    own_line: bool = False


@dataclass(frozen=True)
class Draw:
    """One sample that is being made.

    Parameters
    ----------
    rng : of everything that is drawn
    corpus : where text comes from
    layout : how a sample is tokenised
    room : tokens of the context, without the template's
    n_questions : how many to ask, where there is so much to ask
    """

    rng: random.Random
    corpus: Corpus
    layout: Layout
    room: int
    n_questions: int

    def chance(self, probability: float) -> bool:
        """True with a probability."""
        return self.rng.random() < probability

    def frame(self) -> tuple[str, str, int]:
        """Text before and after the body of a context, and the tokens that are left for the body."""
        intro = self.rng.choice(INTROS) if self.chance(_P_INTRO) else ""
        end = self.rng.choice(ENDS)
        intro_ids, end_ids = self.layout.many_ids([intro or " ", end])
        if 3 * len(intro_ids) > self.room:
            intro, intro_ids = "", []
        return intro, end, self.room - len(intro_ids) - len(end_ids)

    def plant(self, statements: Sequence[Statement]) -> Pieces | None:
        """A context of the corpus' text with statements between its sentences, in the order given.

        None if they take more than two thirds of the room.
        """
        intro, end, room = self.frame()
        encoded = self.layout.many_ids([("\n" if s.own_line else " ") + s.text for s in statements])
        left = room - sum(map(len, encoded))
        if 3 * left < room:
            return None
        body = self._repeated(left) if self.chance(_P_REPEATED) else self._running(left)
        places = sorted(self.rng.randrange(len(body) + 1) for _ in statements)
        for place, statement, ids in reversed(list(zip(places, statements, encoded, strict=True))):
            body.insert(place, _Unit(statement.text, ids, own_line=statement.own_line))
        return [intro, *_joined(body), end]

    def passage(self) -> tuple[Passage, Pieces]:
        """A context of text alone, and its longest passage."""
        intro, end, room = self.frame()
        passages = self.corpus.passages(max(1, room), self.rng)
        body = [unit for passage in passages for unit in _units(passage)]
        return max(passages, key=lambda p: p[-1].last - p[0].first), [intro, *_joined(body), end]

    def _running(self, n_tokens: int) -> list[_Unit]:
        return [unit for p in self.corpus.passages(n_tokens, self.rng) for unit in _units(p)]

    def _repeated(self, n_tokens: int) -> list[_Unit]:
        """A few sentences over and over."""
        size = min(self.rng.randint(15, 60), max(1, n_tokens))
        passages = self.corpus.passages(size, self.rng)
        text = " ".join(" ".join(sentence.text for sentence in p) for p in passages)
        own_line = self.chance(0.5)
        ids = self.layout.ids(("\n" if own_line else " ") + text)
        return [_Unit(text, ids, own_line=own_line) for _ in range(max(1, n_tokens // len(ids)))]

    def ask(
        self,
        questions: Sequence[str],
        prefixes: Sequence[str],
        answers: Sequence[str],
        bare: str,
        values: Sequence[str],
        slots: dict[str, str],
        verbatim: bool = False,
    ) -> Turn:
        """A question with its answer.

        Parameters
        ----------
        questions, prefixes, answers : wordings; one is drawn of each
        bare : the answer alone, which follows a prefix
        values : what a right answer must hold
        slots : what the wordings' slots are filled with
        verbatim : the answer is a quotation, to which no full stop may be added
        """
        rng = self.rng
        question = rng.choice(LEADS) + fill(rng.choice(questions), slots) + rng.choice(TAILS)
        if self.chance(_P_PREFIX):
            prefix = fill(rng.choice(prefixes), slots)
            return Turn(
                question, prefix, f" {bare}" if verbatim or self.chance(0.5) else f" {bare}.", tuple(values)
            )
        return Turn(question, "", fill(rng.choice(answers), slots), tuple(values))


def fill(template: str, slots: dict[str, str]) -> str:
    """A wording with its slots filled; a slot with a capital starts a sentence, except values, which stay as
    they are because they are to be copied."""
    capitals = {name.capitalize(): capitalised(text) for name, text in slots.items()}
    if "what" in slots:
        capitals["What"] = slots["what"][:1].upper() + slots["what"][1:]
    return template.format(**slots, **capitals)


def listed(values: Sequence[str], keys: Sequence[str] | None = None) -> dict[str, str]:
    """Slots for `questions.LIST_ANSWERS`; with keys also {pairs}, {pair_lines}, {pair_bullets}."""
    items = list(values)
    slots = {
        "commas": ", ".join(items),
        "and": enumeration(items),
        "semicolons": "; ".join(items),
        "lines": "\n".join(items),
        "bullets": _bullets(items),
    }
    if keys is not None:
        pairs = [f"{key}: {value}" for key, value in zip(keys, items, strict=True)]
        slots |= {"pairs": "; ".join(pairs), "pair_lines": "\n".join(pairs), "pair_bullets": _bullets(pairs)}
    return slots


def _bullets(items: Sequence[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


PAIR_ANSWERS = (*LIST_ANSWERS, "{pairs}", "{pair_lines}", "{pair_bullets}")


@dataclass(frozen=True)
class _Unit:
    """A sentence of a context: its text, its tokens with the blank before it (None: not tokenised yet)."""

    text: str
    ids: list[int]
    own_line: bool = False
    new_passage: bool = False


def _units(passage: Passage) -> list[_Unit]:
    return [_Unit(s.text, s.ids, new_passage=i == 0) for i, s in enumerate(passage) if s.text]


def _joined(body: Sequence[_Unit]) -> Pieces:
    """Units one after the other; where the blank before a unit isn't the one it was tokenised with, its
    text is put there to be tokenised again."""
    pieces: Pieces = []
    for i, unit in enumerate(body):
        if i == 0:
            pieces.append(unit.text)
        elif unit.new_passage:
            pieces.append("\n\n" + unit.text)
        elif body[i - 1].own_line and not unit.own_line:
            pieces.append("\n" + unit.text)
        else:
            pieces.append(unit.ids)
    return pieces
