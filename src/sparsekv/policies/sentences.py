"""Random whole sentences leave (sentence_dropout), in prose of any script, code and lists. For training.

Where a sentence ends, told from what the tokens spell:

1. At a line break. So a line of code, a list item, a heading and a paragraph are sentences of their own; blank lines
   belong to the sentence before them, indentation to the one after.
2. At a mark that ends sentences in its script (Unicode's Sentence_Terminal), with the closing quotes and brackets
   behind it: 。 ！ ？ ؟ ۔ । ॥ ። and their kin wherever they stand; `. ! ? …` only before white space, the end of the
   text or a character of a script without spaces, and not before a small letter (`"Stop!" he said.` is one sentence).
3. A full stop after a single letter (J. Smith, U.S.) or after a number that begins a line (`1. Item`) does not end
   one. Nor does one inside a word or number (3.14, a.b). "Dr. Smith" is cut in two: there is no list of abbreviations.
4. Special tokens (chat turns, end of text) stand apart from the text around them.
5. What is longer than `max_tokens` is cut into pieces of that size: text without any mark (Thai, minified code).

A token is never split: one that holds an end goes with the sentence that ends, unless only white space of it comes
before the end.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from sparsekv.errors import ConfigError
from sparsekv.policies.base import TokenPolicy, TokenRow
from sparsekv.policies.blocks import Share, check_share, drop_segments, middle_of
from sparsekv.policies.budget import Budget
from sparsekv.policies.picks import row_generator
from sparsekv.policies.sizes import check_size
from sparsekv.policies.vocabulary import vocabulary_of

_SPACED = ".!?…‼‽⁇⁈⁉"
"""Marks that end a sentence only before white space and the like."""

_ALWAYS = (
    "\u0589\u061d\u061e\u061f\u06d4\u0700\u0701\u0702\u07f9\u0837\u0839\u083d\u083e\u0964\u0965\u0f0d\u0f0e"
    "\u104a\u104b\u1362\u1367\u1368\u166e\u1735\u1736\u17d4\u17d5\u1803\u1809\u1944\u1945\u1aa8\u1aa9\u1aaa"
    "\u1aab\u1b5a\u1b5b\u1b5e\u1b5f\u1c3b\u1c3c\u1c7e\u1c7f\u2e2e\u2e3c\u3002\ua4ff\ua60e\ua60f\ua6f3\ua6f7"
    "\ua876\ua877\ua8ce\ua8cf\ua92f\ua9c8\ua9c9\uaa5d\uaa5e\uaa5f\uaaf0\uaaf1\uabeb\ufe52\ufe56\ufe57\uff01"
    "\uff0e\uff1f\uff61"
)
"""Marks that end a sentence wherever they stand: Unicode's Sentence_Terminal, and Tibetan's and Khmer's."""

_BREAKS = "\n\r\v\f\x85\u2028\u2029"
_CLOSING = "\"'*_)\\]}”’»›」』】》〉）］｝｣＂＇"
_NO_SPACES = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
"""Thai, Lao, Burmese, Khmer, kana, Han: no space follows a mark there."""

_END = re.compile(
    f"(?P<mark>[{_ALWAYS}{_SPACED}]+)[{_CLOSING}]*(?P<gap>\\s*)|(?P<line>[{_BREAKS}]\\s*)", re.UNICODE
)
_LAST_WORD = re.compile(r"\w+$")


def text_ends(text: str) -> list[int]:
    """Where the sentences of `text` end by rules 1 to 3: ascending places in it, its own end not among them."""
    found = []
    for match in _END.finditer(text):
        gap = match["line"] or match["gap"]
        after = match.end() - len(gap)
        lines = max(gap.rfind(mark) for mark in _BREAKS) + 1
        if lines:
            found.append(after + lines)
        elif set(match["mark"]) - set(_SPACED) or _ends_spaced(text, match):
            found.append(after)
    return [place for place in found if place < len(text)]


def _ends_spaced(text: str, match: re.Match[str]) -> bool:
    """True if a mark that also stands inside sentences ends one (rules 2 and 3)."""
    following = text[match.end() : match.end() + 1]
    if following and not match["gap"] and not _NO_SPACES.match(following):
        return False
    if following.islower():
        return False
    if match["mark"] != ".":
        return True
    start = match.start()
    word = _LAST_WORD.search(text[max(0, start - 8) : start])
    if word is None:
        return True
    if len(word[0]) == 1 and word[0].isalpha() and not _NO_SPACES.match(word[0]):
        return False
    line = text[:start][
        -12 : -len(word[0])
    ]  # what stands before the number, if it is short enough for a list's
    begins = not line.strip(" \t") or line.rstrip(" \t")[-1] in _BREAKS
    return not (word[0].isdigit() and len(word[0]) <= 3 and begins)


def sentence_starts(texts: list[str], special: list[bool]) -> list[int]:
    """The tokens that begin a sentence, the first token among them.

    Parameters
    ----------
    texts : list of str [n]
        What each token adds to the text (`Vocabulary.texts`).
    special : list of bool [n]
        Special tokens; their texts are not read.
    """
    shown = ["" if apart else text for text, apart in zip(texts, special, strict=True)]
    ends, place = [], 0
    for text in shown:
        place += len(text)
        ends.append(place)
    starts = {0} | {i for i in range(1, len(special)) if special[i] != special[i - 1]}
    for place in text_ends("".join(shown)):
        token = bisect_left(ends, place)
        inside = shown[token][
            : place - ends[token]
        ]  # what the token holds before the end; all of it: "" here
        begins = place < ends[token] and not inside.strip() and bool(shown[token].strip())
        starts.add(token if begins else token + 1)
    return sorted(start for start in starts if start < len(texts))


@dataclass(frozen=True)
class SentenceDropout(TokenPolicy):
    """Random whole sentences leave; the rules are this module's.

    A budget sets the total, exactly: of the last sentence drawn only as many tokens leave as are missing (its last
    ones). Sentences that reach into the sinks or the recent entries are cut there.

    Parameters
    ----------
    n_sink : int >= 0
        First entries that always stay.
    n_recent : int >= 0, optional
        Last entries that always stay; a budget under n_sink + n_recent is an error. Default: 64, at most half of
        what the sinks leave of the budget.
    max_tokens : int >= 1
        Longest sentence; what is longer is cut into pieces.
    seed : int
        Together with the row's own seed (`TokenContext.seeds`) it fixes the draw, in whatever batch the row is.
    share : "all", "layer" or "head"
        Who loses the same sentences: the whole model, each layer on its own, or each kv head of each layer.

    Needs a tokenizer (`TokenContext.tokenizer`).
    """

    n_sink: int = 4
    n_recent: int | None = None
    max_tokens: int = 128
    seed: int = 0
    share: Share = "all"
    name = "sentence_dropout"

    def __post_init__(self) -> None:
        check_size(self.name, "n_sink", self.n_sink)
        if self.n_recent is not None:
            check_size(self.name, "n_recent", self.n_recent)
        check_size(self.name, "max_tokens", self.max_tokens, 1)
        check_share(self.name, self.share)

    @property
    def reads_text(self) -> bool:
        """True: sentences are found in the text."""
        return True

    def keep_row(self, row: TokenRow, budget: Budget) -> Tensor:
        """BoolTensor [L or 1, H or 1, n]; every head keeps exactly the budget."""
        middle = middle_of(self.name, budget, row.n, self.n_sink, self.n_recent)
        starts = [s for s in self.starts(row) if middle.start < s < middle.stop] if middle.n_dropped else []
        edges = _no_longer_than([middle.start, *starts, middle.stop], self.max_tokens)
        return drop_segments(
            row, middle, edges - middle.start, self.share, row_generator(self.seed, row.seed)
        )

    def starts(self, row: TokenRow) -> list[int]:
        """The tokens of a row that begin a sentence.

        Raises
        ------
        ConfigError
            If the context has no tokenizer.
        """
        tokenizer = row.context.tokenizer
        if tokenizer is None:
            raise ConfigError(f"{self.name} needs a tokenizer to find sentences: pass tokenizer=...")
        words = vocabulary_of(tokenizer)
        return sentence_starts(words.texts(row.ids, tokenizer), words.special(row.ids).tolist())


def _no_longer_than(edges: list[int], limit: int) -> Tensor:
    """LongTensor: the same edges, with more between those further than `limit` apart."""
    cut = [place for lo, hi in pairwise(edges) for place in range(lo, hi, limit)]
    return torch.tensor([*cut, edges[-1]])
