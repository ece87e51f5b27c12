"""Fill a prompt up to a length in tokens: the largest number of filler units that still fits.

A draft holds everything of a row that is drawn at random; only the number of units (words of an essay, lines
of noise, documents) is open. RULER searches once and shrinks single rows in steps of up to 500 words; here
every row is fitted on its own, to one unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from sparsekv.errors import ConfigError

Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Prompt:
    """The text of an example; the fields are those of `Example`."""

    context: str
    question: str
    answer_prefix: str
    references: tuple[str, ...]
    evidence: Spans = ()


@dataclass(frozen=True)
class Draft:
    """A row whose amount of filler is open.

    Attributes:
        build: the prompt with n units of filler; the same n gives the same prompt.
        least: the smallest number of units that makes sense.
        tokens_per_unit: a first guess; a wrong one costs time only.
        most: the largest number of units there are, or None.
    """

    build: Callable[[int], Prompt]
    least: int
    tokens_per_unit: float
    most: int | None = None


class TooShort(Exception):
    """Not even the least filler fits; `tokens` is what the prompt then has."""

    def __init__(self, tokens: int) -> None:
        super().__init__(tokens)
        self.tokens = tokens


class TokenCounter:
    """Counts tokens of text, without those a tokenizer adds by itself (`added` says how many they are)."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.added: int = tokenizer.num_special_tokens_to_add(pair=False)
        if self("The quick brown fox.") == 0:
            raise ConfigError("the tokenizer turns text into no tokens: its vocabulary is missing or empty")

    def __call__(self, text: str) -> int:
        """Number of tokens of `text`."""
        encoded = self._tokenizer(
            text,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return len(encoded["input_ids"])

    def whole(self, prompt: Prompt) -> int:
        """Number of tokens of a prompt in one piece, as RULER counts."""
        return self(prompt.context + prompt.question + prompt.answer_prefix)

    def pieces(self, prompt: Prompt) -> int:
        """Number of tokens of a prompt in three pieces, as it is fed; often one or two more."""
        return self(prompt.context) + self(prompt.question) + self(prompt.answer_prefix)


def largest_fit(
    draft: Draft, count: TokenCounter, limit: int, guess: int | None = None
) -> tuple[int, Prompt]:
    """The largest number of units with which a prompt fits, in one piece and in three, and that prompt.

    Token counts need not grow by the same amount with every unit, nor always grow: what is returned fits, and
    one unit more does not.

    Args:
        draft: what to fill.
        count: counts tokens.
        limit: most tokens the prompt may have.
        guess: where to start. The result is the same for the same guess.

    Raises:
        TooShort: `draft.least` units do not fit.
    """
    low, high = draft.least - 1, None if draft.most is None else draft.most + 1
    n = max(draft.least, int(limit / draft.tokens_per_unit) if guess is None else guess)
    if high is not None:
        n = min(n, high - 1)
    per_unit, last, steps = draft.tokens_per_unit, None, 0
    while high is None or high - low > 1:
        tokens = count.whole(draft.build(n))
        if tokens <= limit:
            low = n
        else:
            high = n
        # Over few units the noise of token boundaries would hide the slope.
        if last is not None and abs(n - last[0]) >= 8 and (tokens - last[1]) * (n - last[0]) > 0:
            per_unit = (tokens - last[1]) / (n - last[0])
        last, steps = (n, tokens), steps + 1
        if steps > 12 and high is not None:
            n = (low + high) // 2
            continue
        n += int((limit - tokens) / per_unit)
        n = max(n, low + 1) if high is None else min(max(n, low + 1), high - 1)
    while low >= draft.least:
        prompt = draft.build(low)
        if count.pieces(prompt) <= limit:
            return low, prompt
        low -= 1
    smallest = draft.build(draft.least)
    raise TooShort(max(count.whole(smallest), count.pieces(smallest)))


def weave(pieces: Iterable[tuple[str, bool]], separator: str, start: int = 0) -> tuple[str, Spans]:
    """Join texts and remember where the marked ones went.

    Args:
        pieces: texts, each with whether it is marked.
        separator: put between them.
        start: characters that will precede the joined text; added to the spans.

    Returns:
        The joined text and the spans of the marked pieces, in order.
    """
    texts: list[str] = []
    spans: list[tuple[int, int]] = []
    position = start
    for text, marked in pieces:
        if marked:
            spans.append((position, position + len(text)))
        texts.append(text)
        position += len(text) + len(separator)
    return separator.join(texts), tuple(spans)
