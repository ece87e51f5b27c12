"""How an answer is judged: 0 (wrong) to 100 (right), one prediction at a time.

`string_match_all` and `string_match_part` are RULER's (arXiv 2404.06654,
scripts/eval/synthetic/constants.py), with kvpress's clean-up: ends stripped, control characters removed.
RULER puts a line break in their place, which can differ only where a match spans a line break of the
prediction.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from sparsekv.registry import Registry

Metric = Callable[[str, Sequence[str]], float]
METRICS: Registry[Metric] = Registry("metric")

PERPLEXITY = "perplexity"
"""The metric that is no function of strings: exp of the mean negative log-likelihood per reference token."""

_CONTROL = re.compile(r"[\x00-\x1f]")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def higher_is_better(metric: str) -> bool:
    """Whether a larger value of this metric is a better one: True for all but perplexity."""
    return metric != PERPLEXITY


def clean(prediction: str) -> str:
    """The prediction without control characters (U+0000 to U+001F, so line breaks too) and outer blanks."""
    return _CONTROL.sub("", prediction.strip()).strip()


def normalize(text: str) -> str:
    """SQuAD's normal form: lower case, without ASCII punctuation, English articles and repeated blanks."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _found(prediction: str, references: Sequence[str]) -> list[bool]:
    lowered = clean(prediction).lower()
    return [reference.lower() in lowered for reference in references]


@METRICS.register("string_match_all")
def string_match_all(prediction: str, references: Sequence[str]) -> float:
    """Percentage of the references that occur in the prediction, as substrings, without regard to case."""
    found = _found(prediction, references)
    return 100.0 * sum(found) / len(found)


@METRICS.register("string_match_part")
def string_match_part(prediction: str, references: Sequence[str]) -> float:
    """100 if any reference occurs in the prediction, as a substring, without regard to case; else 0."""
    return 100.0 * any(_found(prediction, references))


@METRICS.register("exact_match", aliases=("em",))
def exact_match(prediction: str, references: Sequence[str]) -> float:
    """100 if the prediction equals a reference in SQuAD's normal form, else 0 (arXiv 1606.05250, 6.1)."""
    return 100.0 * (normalize(prediction) in {normalize(reference) for reference in references})


def _f1(prediction: str, reference: str) -> float:
    ours, theirs = normalize(prediction).split(), normalize(reference).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2.0 * common / (len(ours) + len(theirs))


@METRICS.register("f1", aliases=("qa_f1",))
def f1(prediction: str, references: Sequence[str]) -> float:
    """The best F1 over words in SQuAD's normal form, as a percentage (arXiv 1606.05250, section 6.1)."""
    return 100.0 * max(_f1(prediction, reference) for reference in references)
