"""What a tokenizer's tokens are: special, punctuation, a piece of a character, or text. Decoded once each."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNSEEN, _OTHER, _PUNCTUATION, _PIECE = -1, 0, 1, 2

_REPLACEMENT = "\ufffd"
"""What a decoder writes for bytes that are no whole character."""

_SPACE = "\u2581"
"""How SentencePiece writes a space inside a token."""

_MAX_PIECES = 8
"""A character has at most 4 bytes, but a piece may end one character and begin the next: allow a chain."""


def is_punctuation(text: str, extra: tuple[str, ...] = ()) -> bool:
    """True if `text`, without outer white space, is Unicode punctuation (P*) and strings of `extra`."""
    rest = text
    for mark in sorted(extra, key=len, reverse=True):
        rest = rest.replace(mark, "")
    found_extra = len(rest) < len(text)
    rest = rest.strip()
    return (bool(rest) or found_extra) and all(unicodedata.category(c).startswith("P") for c in rest)


def grown(table: Tensor | None, size: int) -> Tensor:
    """Int8Tensor [size] of kinds by token: those of `table`, the others `UNSEEN`.

    It can be filled in whether it was made in inference mode or not.
    """
    with torch.inference_mode(False):
        larger = torch.full((size,), UNSEEN, dtype=torch.int8)
        if table is not None:
            larger[: table.numel()] = table
    return larger


class Vocabulary:
    """A table of what a tokenizer's tokens are.

    A token is decoded when it is first met, so that a vocabulary of 260,000 costs nothing in advance. The
    table does not hold the tokenizer (it is kept under a weak reference to it), so the methods take it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, extra_punctuation: tuple[str, ...] = ()) -> None:
        added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special_ids = torch.tensor(sorted(added | set(tokenizer.all_special_ids)), dtype=torch.long)
        self.extra_punctuation = extra_punctuation
        self._kind = grown(None, len(tokenizer))
        self._joined: dict[tuple[int, ...], str | None] = {}
        self._text: dict[int, str] = {}

    def special(self, ids: Tensor) -> Tensor:
        """BoolTensor [n] on the CPU: the special tokens among `ids` [n]."""
        return torch.isin(ids.cpu(), self.special_ids)

    def punctuation(self, ids: Tensor, tokenizer: PreTrainedTokenizerBase) -> Tensor:
        """BoolTensor [n] on the CPU: punctuation among `ids` [n]; of a mark split over tokens, all pieces."""
        ids = ids.cpu()
        kind = self._kinds(ids, tokenizer)
        found = kind == _PUNCTUATION
        piece = (kind == _PIECE).tolist()
        sequence = ids.tolist()
        i = 0
        while i < len(sequence):
            end = self._character_end(sequence, piece, i, tokenizer) if piece[i] else None
            if end is None:
                i += 1
                continue
            if is_punctuation(self._joined[tuple(sequence[i:end])] or "", self.extra_punctuation):
                found[i:end] = True
            i = end
        return found

    def texts(self, ids: Tensor, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """What each token of `ids` [n] adds to the text: joined, they are the text, leading spaces included.

        Of a character split over several tokens the last one holds it and the others are empty; bytes that are no
        whole character are a replacement character each.
        """
        ids = ids.cpu()
        piece = (self._kinds(ids, tokenizer) == _PIECE).tolist()
        sequence = ids.tolist()
        found = []
        i = 0
        while i < len(sequence):
            end = self._character_end(sequence, piece, i, tokenizer) if piece[i] else None
            if end is None:
                found.append(_REPLACEMENT if piece[i] else self._spelled(sequence[i], tokenizer))
                i += 1
                continue
            found += [""] * (end - i - 1) + [self._joined[tuple(sequence[i:end])] or ""]
            i = end
        return found

    def _spelled(self, token: int, tokenizer: PreTrainedTokenizerBase) -> str:
        """The text of a token that is no piece of a character."""
        if token not in self._text:
            text = _decode(tokenizer, [token])
            raw = tokenizer.convert_ids_to_tokens(token)
            # Some decoders strip the space from what they take for the start of a text.
            lost = isinstance(raw, str) and raw.startswith(_SPACE) and not text.startswith(" ")
            self._text[token] = " " + text if lost else text
        return self._text[token]

    def _kinds(self, ids: Tensor, tokenizer: PreTrainedTokenizerBase) -> Tensor:
        """Int8Tensor [n]: the kind of each token taken alone."""
        largest = int(ids.max()) if ids.numel() else -1
        if largest >= self._kind.numel():  # models pad their embedding beyond the tokenizer's vocabulary
            self._kind = grown(self._kind, largest + 1)
        unseen = ids.unique()
        for token in unseen[self._kind[unseen] == UNSEEN].tolist():
            text = _decode(tokenizer, [token])
            if _REPLACEMENT in text:
                kind = _PIECE
            else:
                kind = _PUNCTUATION if is_punctuation(text, self.extra_punctuation) else _OTHER
            self._kind[token] = kind
        return self._kind[ids]

    def _character_end(
        self, sequence: list[int], piece: list[bool], start: int, tokenizer: PreTrainedTokenizerBase
    ) -> int | None:
        """End of the shortest run of pieces from `start` that spells whole characters, None if there is none.

        What it spells is left in `_joined`, None for broken bytes.
        """
        for end in range(start + 2, min(start + _MAX_PIECES, len(sequence)) + 1):
            if not piece[end - 1]:
                return None
            run = tuple(sequence[start:end])
            if run not in self._joined:
                text = _decode(tokenizer, list(run))
                whole = _REPLACEMENT not in text
                self._joined[run] = text if whole else None
            if self._joined[run] is not None:
                return end
        return None


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, extra_punctuation: tuple[str, ...] = ()) -> Vocabulary:
    """The table of `tokenizer`, made on first use and kept as long as the tokenizer lives.

    Tokens added to the tokenizer later make a new table.
    """
    tables = _TABLES.setdefault(tokenizer, {})
    key = (extra_punctuation, len(tokenizer.added_tokens_decoder))  # len(tokenizer) copies the vocabulary
    if key not in tables:
        tables[key] = Vocabulary(tokenizer, extra_punctuation)
    return tables[key]


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


_TABLES: WeakKeyDictionary[PreTrainedTokenizerBase, dict[tuple[tuple[str, ...], int], Vocabulary]] = (
    WeakKeyDictionary()
)
