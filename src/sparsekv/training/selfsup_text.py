"""Texts that contexts are cut from: tokenised once, then cut between sentences by slicing token ids.

A sentence's slice starts with the blank before it, as it is tokenised within running text. So slices and
sentences tokenised with a blank in front can be joined, and mostly give the tokens of the joined text.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from sparsekv.benchmarks.haystack import sentence_ends
from sparsekv.errors import ConfigError

_WORD = re.compile(r"\S+")


class TokenisedText:
    """A document as tokens, with the places where it can be cut.

    Parameters
    ----------
    text : any text
    tokenizer : a fast tokenizer, which tells the characters of each token

    Attributes
    ----------
    ids : int32 [n]
    starts, ends : int64 [n], the characters of each token
    cuts : tokens at which a sentence starts, ascending; the last is n
    """

    def __init__(self, text: str, tokenizer: Any) -> None:
        if not tokenizer.is_fast:
            raise ConfigError("self-supervised questions need a fast tokenizer (tokenizer.json)")
        encoded = tokenizer(
            text,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        self.text = text
        self.ids = np.asarray(encoded["input_ids"], dtype=np.int32)
        offsets = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        self.starts, self.ends = offsets[:, 0].copy(), offsets[:, 1].copy()
        self.cuts = self._cuts()

    def __len__(self) -> int:
        return len(self.ids)

    def _cuts(self) -> list[int]:
        words = [match.span() for match in _WORD.finditer(self.text)]
        cuts = [0]
        for index in sentence_ends([self.text[a:b] for a, b in words])[:-1]:
            end = words[index - 1][1]
            token = int(np.searchsorted(self.starts, end, side="left"))
            # A token that holds the end of one sentence and the blank after it can't be cut.
            if cuts[-1] < token < len(self.ids) and self.ends[token - 1] == end:
                cuts.append(token)
        return [*cuts, len(self.ids)]

    def characters(self, first: int, last: int) -> str:
        """The text of tokens [first, last), with its leading blanks."""
        start = int(self.ends[first - 1]) if first else 0
        return self.text[start : int(self.ends[last - 1])]


@dataclass(frozen=True)
class Sentence:
    """Tokens [first, last) of a document. The last one of a passage may be cut short."""

    document: TokenisedText
    first: int
    last: int

    @cached_property
    def ids(self) -> list[int]:
        """Its tokens, from the blank before it on."""
        tokens: list[int] = self.document.ids[self.first : self.last].tolist()
        return tokens

    @cached_property
    def text(self) -> str:
        """Its text without blanks around it."""
        return self.document.characters(self.first, self.last).strip()


Passage = list[Sentence]
"""Sentences that follow each other in a document; at least one."""


class Corpus:
    """Documents to cut passages from.

    Parameters
    ----------
    texts : the documents
    tokenizer : a fast tokenizer
    """

    def __init__(self, texts: Sequence[str], tokenizer: Any) -> None:
        self.documents = [made for text in texts if len(made := TokenisedText(text, tokenizer))]
        self._ends = list(accumulate(len(document) for document in self.documents))
        if not self._ends:
            raise ConfigError("there is no text to make questions from")

    @property
    def n_tokens(self) -> int:
        """Of all documents."""
        return self._ends[-1]

    def passages(self, n_tokens: int, rng: random.Random) -> list[Passage]:
        """Passages of together at most `n_tokens` tokens, and few less: one where the document is long
        enough, else of several documents, drawn in proportion to their length.

        Empty if `n_tokens` is below 1.
        """
        found: list[Passage] = []
        left = n_tokens
        while left > 0 and len(found) < 64:
            passage = self._passage(left, rng)
            found.append(passage)
            left -= passage[-1].last - passage[0].first
            if left < n_tokens // 8:
                break
        return found

    def _passage(self, n_tokens: int, rng: random.Random) -> Passage:
        document = self.documents[bisect_right(self._ends, rng.randrange(self._ends[-1]))]
        cuts = document.cuts
        latest = max(1, bisect_right(cuts, len(document) - n_tokens))
        first = rng.randrange(min(latest, len(cuts) - 1))
        stop = cuts[first] + n_tokens
        last = bisect_right(cuts, stop) - 1
        marks = cuts[first : last + 1]
        # A passage of short lines or one long sentence: cut it where the tokens end.
        if marks[-1] - marks[0] < n_tokens // 2 and marks[-1] < len(document):
            marks.append(min(stop, len(document)))
        return [Sentence(document, a, b) for a, b in pairwise(marks)]
