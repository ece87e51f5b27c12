"""What kind of token: special, punctuation, stop word, number or content. A table per tokenizer, filled on demand.

Built on `policies.vocabulary`, which knows special tokens and punctuation in any script.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from sparsekv.policies.vocabulary import UNSEEN, grown, vocabulary_of
from sparsekv.stop_words import STOP_WORDS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KINDS = ("special", "punctuation", "stop_word", "number", "content")
"""The kinds, in the order of `token_types`' numbers; a token has the first that fits."""

_SPECIAL, _PUNCTUATION, _STOP_WORD, _NUMBER, _CONTENT = range(len(KINDS))

_IN_NUMBERS = set(".,:/-+%")


def token_types(ids: Tensor, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """LongTensor [n] on the CPU: for each of `ids` [n] its place in `KINDS`.

    White space alone counts as punctuation (structure, no content). A token is judged by its own text, so a piece of a
    word that is spelled like a stop word counts as one; of a mark split over several tokens all pieces are punctuation.
    """
    ids = ids.cpu().long()
    vocabulary = vocabulary_of(tokenizer)
    table = _table(tokenizer, int(ids.max()) + 1 if ids.numel() else 0)
    distinct = ids.unique()
    for token in distinct[table[distinct] == UNSEEN].tolist():
        (text,) = vocabulary.texts(torch.tensor([token]), tokenizer)
        table[token] = _kind_of(text)
    kinds = table[ids].long()
    kinds[vocabulary.punctuation(ids, tokenizer)] = _PUNCTUATION
    kinds[vocabulary.special(ids)] = _SPECIAL
    return kinds


def _kind_of(text: str) -> int:
    word = text.strip().casefold()
    if not word:
        return _PUNCTUATION if text else _CONTENT
    if word in STOP_WORDS:
        return _STOP_WORD
    if any(c.isdigit() for c in word) and all(c.isdigit() or c in _IN_NUMBERS for c in word):
        return _NUMBER
    return _CONTENT


def _table(tokenizer: PreTrainedTokenizerBase, size: int) -> Tensor:
    """Int8Tensor [>= size] of the kinds that are known; models pad their vocabulary beyond the tokenizer's."""
    table = _TABLES.get(tokenizer)
    size = max(size, len(tokenizer) if table is None else table.numel())
    if table is None or table.numel() < size:
        _TABLES[tokenizer] = table = grown(table, size)
    return table


_TABLES: WeakKeyDictionary[PreTrainedTokenizerBase, Tensor] = WeakKeyDictionary()
