"""WikiText (Merity et al. 2016, arXiv 1609.07843) as it was written, before its words and marks were set apart."""

from __future__ import annotations

import re

_MARKS = re.compile(r" @([-,.])@ ")
_RULES = (
    (re.compile(r"^[ \t]*((?:= )+)(.+?)(?: =)+[ \t]*$", re.MULTILINE), r"\2"),
    (re.compile(r"^[ \t]+|[ \t]+$", re.MULTILINE), ""),
    (_MARKS, r"\1"),
    (re.compile(r'" ([^"\n]*?) "'), r'"\1"'),
    (re.compile(r" ([,.;:!?%)\]])"), r"\1"),
    (re.compile(r"([(\[$£€]) "), r"\1"),
    (re.compile(r" (n't|'(?:s|t|d|m|re|ve|ll))\b"), r"\1"),
    (re.compile(r"(?<=s) '(?= )"), "'"),
)
"""Headings, blanks around a line, joined words and numbers, quotations, marks, short forms."""


def wikitext_as_written(text: str) -> str:
    """A text without WikiText's spacing; any other text, known by having none of its marks, as it is.

    Not every blank can be told: an apostrophe that ends a word is joined only to an s. `<unk>` stays.
    """
    if not _MARKS.search(text):
        return text
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return text
