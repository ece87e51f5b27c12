"""Common and frequent words: RULER's cwe and fwe (arXiv 2404.06654, section 3.3;
scripts/data/synthetic/common_words_extraction.py and freq_words_extraction.py)."""

from __future__ import annotations

import math
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass

from sparsekv.benchmarks.fit import Draft, Prompt
from sparsekv.benchmarks.ruler_task import Row
from sparsekv.benchmarks.vocabulary import english_words, key_words

CWE_INTRO = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
CWE_QUESTION = "Question: What are the 10 most common words in the above list? "
CWE_ANSWER = "Answer: The top 10 words that appear most often in the list are:"

FWE_INTRO = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. "
)
FWE_QUESTION = (
    "Question: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text? "
)
FWE_ANSWER = "Answer: According to the coded text above, the three most frequently appeared words are:"

SHORT = 4096
"""Below this length RULER repeats words less often and shortens cwe's worked example."""


@dataclass(frozen=True)
class CommonWords:
    """cwe: the ten words that occur more often than the others in a numbered list, after one worked example.

    Attributes:
        n_common: words to find.
        repeats: occurrences of a common and of another word at 4096 tokens and more; below, RULER uses 6 and
            1.
    """

    n_common: int = 10
    repeats: tuple[int, int] = (30, 3)
    max_new_tokens: int = 120
    metric: str = "string_match_all"

    def draft(self, row: Row) -> Draft:
        """A unit of filler is one distinct word."""
        short = row.context_length < SHORT
        repeats = (6, 1) if short else self.repeats
        n_shot, shot_repeats = (20, (3, 1)) if short else (40, (10, 3))
        rng = row.rng("words")
        shot_words = rng.sample(english_words(), n_shot)
        shot_answer = " ".join(f"{i}. {word}" for i, word in enumerate(shot_words[: self.n_common], 1))
        shot = f"{self._listing(shot_words, shot_repeats, row.rng('shot layout'))} {shot_answer}\n"
        # An item of the list has at least two tokens, which bounds how many words can be needed.
        bound = self.n_common + max(1, row.limit // (2 * repeats[1]))
        words = rng.sample(english_words(), min(bound, len(english_words())))
        if bound > len(words):
            words += rng.sample(key_words(), min(bound - len(words), len(key_words())))

        def build(n: int) -> Prompt:
            context = shot + self._listing(words[:n], repeats, row.rng("layout"), ask=False)
            return Prompt(context, CWE_QUESTION, CWE_ANSWER, tuple(words[: self.n_common]))

        return Draft(build, least=self.n_common + 1, tokens_per_unit=5.0 * repeats[1], most=len(words))

    def _listing(
        self, words: Sequence[str], repeats: tuple[int, int], rng: random.Random, ask: bool = True
    ) -> str:
        common, others = list(words[: self.n_common]), list(words[self.n_common :])
        occurrences = common * repeats[0] + others * repeats[1]
        rng.shuffle(occurrences)
        listing = " ".join(f"{i}. {word}" for i, word in enumerate(occurrences, 1))
        return CWE_INTRO + listing + "\n" + (CWE_QUESTION + CWE_ANSWER if ask else "")


@dataclass(frozen=True)
class FrequentWords:
    """fwe: the three most frequent coded words, whose frequencies follow rank^-2 (zeta distribution).

    The most frequent "word" is "..." and is to be ignored. RULER's alpha is 2.0, so the sum over ranks is
    pi^2/6.

    Attributes:
        word_length: letters of a coded word.
    """

    word_length: int = 6
    max_new_tokens: int = 50
    metric: str = "string_match_all"

    def draft(self, row: Row) -> Draft:
        """A unit of filler is one draw from the distribution, before counts are rounded down."""
        rng = row.rng("words")
        vocabulary: list[str] = ["..."]
        n_vocabulary = max(5, (row.context_length - self.max_new_tokens) // 50)
        while len(vocabulary) < n_vocabulary:
            word = "".join(rng.choices(string.ascii_lowercase, k=self.word_length))
            if word not in vocabulary:
                vocabulary.append(word)

        def build(n: int) -> Prompt:
            while self.counts(n, 5)[3] == self.counts(n, 5)[4]:  # a tie would make the third word ambiguous
                n -= 1
            occurrences = [
                word
                for word, repeats in zip(vocabulary, self.counts(n, n_vocabulary), strict=True)
                for _ in range(repeats)
            ]
            row.rng("layout").shuffle(occurrences)
            context = FWE_INTRO + " ".join(occurrences) + "\n"
            return Prompt(context, FWE_QUESTION, FWE_ANSWER, tuple(vocabulary[1:4]))

        return Draft(build, least=27, tokens_per_unit=3.0)

    @staticmethod
    def counts(n: int, n_ranks: int) -> list[int]:
        """Occurrences of ranks 1 to n_ranks among n draws, rounded down (rank 4: one from n = 27 on)."""
        return [int(n * rank**-2.0 / (math.pi**2 / 6)) for rank in range(1, n_ranks + 1)]
