"""Perplexity of a continuation: how well the next words of a book are predicted once its cache was
compressed.

Each row is a stretch of the haystack: a context of at most `context_length` tokens that ends at the end of a
word, and the continuation, at most `continuation_tokens` tokens that start with the blank after it. The
runner prefills and compresses the context, then scores the continuation; the metric is better when LOWER.
"""

from __future__ import annotations

import math
import re
from typing import Any

from sparsekv.benchmarks.base import BENCHMARKS, DEFAULT_ROWS, Example, example_id, row_rng
from sparsekv.benchmarks.data import check_haystack, haystack_text
from sparsekv.benchmarks.fit import Draft, Prompt, TokenCounter, TooShort, largest_fit
from sparsekv.benchmarks.haystack import sentence_ends
from sparsekv.benchmarks.scoring import PERPLEXITY
from sparsekv.benchmarks.spec import BenchmarkConfig
from sparsekv.errors import ConfigError, unknown

TASK = "continuation"
_GOLDEN = (math.sqrt(5) - 1) / 2


class _Text:
    """A text with the places of its words and sentences; blanks and line breaks stay as they are."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.words = [(match.start(), match.end()) for match in re.finditer(r"\S+", text)]
        self.sentence_starts = [0, *sentence_ends([text[a:b] for a, b in self.words])[:-1]]

    def between(self, first: int, n_words: int, with_blank: bool) -> str:
        """`n_words` words from word `first`, with the blank before them if asked."""
        if n_words == 0:
            return ""
        start = self.words[first - 1][1] if with_blank and first else self.words[first][0]
        return self.text[start : self.words[first + n_words - 1][1]]

    def longest(self, first: int, tokens: int, count: TokenCounter, with_blank: bool) -> tuple[int, str]:
        """As many whole words from word `first` as fit into `tokens` tokens: their number and text."""

        def build(n: int) -> Prompt:
            return Prompt(self.between(first, n, with_blank), "", "", ())

        draft = Draft(build, least=1, tokens_per_unit=1.4, most=len(self.words) - first)
        try:
            n, prompt = largest_fit(draft, count, tokens)
        except TooShort as error:
            raise ConfigError(f"{tokens} tokens are too few for one word of {error.tokens} tokens") from error
        return n, prompt.context

    def starts(self, tokens: int, count: TokenCounter) -> list[int]:
        """The sentences (index of their first word) from which at least `tokens` tokens follow."""

        def build(n: int) -> Prompt:
            return Prompt(self.between(len(self.words) - n, n, False), "", "", ())

        n, _ = largest_fit(Draft(build, least=0, tokens_per_unit=1.4, most=len(self.words)), count, tokens)
        return [start for start in self.sentence_starts if start < len(self.words) - n]


class Perplexity:
    """The benchmark `perplexity`, with one task, `continuation`."""

    name = "perplexity"

    def tasks(self) -> list[str]:
        """The one task."""
        return [TASK]

    def check(self, spec: BenchmarkConfig) -> None:
        """The task must be the one there is; the haystack a text."""
        for task in spec.tasks or []:
            if task != TASK:
                raise unknown("task", task, [TASK])
        check_haystack(spec.haystack)
        if spec.haystack == "noise":
            haystack_text(spec.haystack)

    def load(self, spec: BenchmarkConfig, tokenizer: Any, seed: int) -> list[Example]:
        """Cut the rows out of the haystack; see `Benchmark.load`.

        Rows start at sentences that spread evenly over the text (multiples of the golden ratio from a start
        drawn from the seed), so that few rows overlap, and row i does not depend on their number.

        Raises:
            ConfigError: the text is shorter than one context and its continuation.
        """
        text, count = _Text(haystack_text(spec.haystack)), TokenCounter(tokenizer)
        offset = row_rng(seed, self.name, "offset").random()
        examples = []
        for context_length in spec.context_length:
            need = context_length + spec.continuation_tokens
            starts = text.starts(need, count)
            if not starts:
                raise ConfigError(
                    f"haystack '{spec.haystack}' is too short for perplexity: a row needs {need} tokens "
                    f"(context_length {context_length} and {spec.continuation_tokens} to continue)"
                )
            for index in range(spec.rows or DEFAULT_ROWS):
                first = starts[int((offset + index * _GOLDEN) % 1.0 * len(starts))]
                n, context = text.longest(first, context_length, count, with_blank=False)
                _, continuation = text.longest(first + n, spec.continuation_tokens, count, with_blank=True)
                examples.append(
                    Example(
                        example_id=example_id(self.name, TASK, context_length, index),
                        benchmark=self.name,
                        task=TASK,
                        context=context,
                        question="",
                        answer_prefix="",
                        references=(continuation,),
                        max_new_tokens=spec.continuation_tokens,
                        metric=PERPLEXITY,
                        context_length=context_length,
                    )
                )
        return examples


BENCHMARKS.register("perplexity", Perplexity())
