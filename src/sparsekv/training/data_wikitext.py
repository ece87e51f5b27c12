"""WikiText (Merity et al. 2016, arXiv 1609.07843) as it was written, before its words and marks were set apart."""

from __future__ import annotations

import re

_SPACED = re.compile(r" @[-,.]@ | , | \. ?$|^ ?= .* = ?$", re.MULTILINE)
"""What tells a text that is spaced so: other text hardly ever has one of these."""

_RULES = (
    (re.compile(r"^[ \t]*((?:= )+)(.+?)(?: =)+[ \t]*$", re.MULTILINE), r"\2"),
    (re.compile(r"^[ \t]+|[ \t]+$", re.MULTILINE), ""),
    (re.compile(r" @([-,.])@ "), r"\1"),
    (re.compile(r'" ([^"\n]*?) "'), r'"\1"'),
    (re.compile(r"(?<=s) '(?= [a-z.,;:!?)]|$)", re.MULTILINE), "'"),
    (re.compile(r" ([,.;:!?%)\]])"), r"\1"),
    (re.compile(r"([(\[$£€]) "), r"\1"),
    (re.compile(r" (n't|'(?:s|t|d|m|re|ve|ll))\b"), r"\1"),
    (re.compile(r"(?<=\d)(:) (?=\d)|(?<=\d) ([–/]) (?=\d)"), r"\1\2"),
)
"""Headings, blanks around a line, joined words and numbers, quotations, the apostrophe that ends a word, marks, short
forms, times and ranges."""


def wikitext_as_written(text: str) -> str:
    """A text without WikiText's spacing; one that is not spaced so stays as it is.

    Not every blank can be told: quotation marks are paired within a line, so an odd one (12 " wide) misleads them, and
    an apostrophe is joined only to an s before it, which may be the opening of a quotation. `<unk>` stays.
    """
    if not _SPACED.search(text):
        return text
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return text
