"""The texts and word lists that come with the package, and files a user names in their place."""

from __future__ import annotations

import json
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from sparsekv.errors import ConfigError, unknown

BOOKS = ("book_eval", "book_train")
"""Halves of one public-domain book that share no story: what is trained on is not what is evaluated on."""
NOISE_HAYSTACK = "noise"
"""The haystack that is no text but RULER's repeated sentences."""
SQUAD_SAMPLE = "squad_sample.json"
BUILTIN = "builtin"
"""The name of the packaged SQuAD sample in a configuration."""


@lru_cache(maxsize=16)
def packaged(file_name: str) -> str:
    """The text of a file in `sparsekv/data` (licences: LICENSE.md beside it)."""
    return (files("sparsekv") / "data" / file_name).read_text(encoding="utf-8")


def words(name: str) -> list[str]:
    """A packaged list of distinct words: "adjectives" or "nouns"."""
    return packaged(f"{name}.txt").split()


NOT_TEXT = "is not valid text (half of a surrogate pair)"


def is_text(text: str) -> bool:
    """False for what UTF-8, and so a tokenizer, can't take: JSON, and arguments in other encodings, may hold it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def read_text(path: str | Path, field: str) -> str:
    """The text of a user's UTF-8 file.

    Args:
        path: the file.
        field: the configuration key that named it, for the message.

    Raises:
        ConfigError: it is missing, not a file, unreadable, not UTF-8, or blank.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ConfigError(f"{field}: no such file: {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{field}: {path} is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise ConfigError(f"{field}: cannot read {path}: {error.strerror}") from error
    if not text.strip():
        raise ConfigError(f"{field}: {path} is empty")
    return text


def read_json(path: str | Path, field: str) -> Any:
    """The value of a user's JSON file; mistakes raise ConfigError with the line number."""
    text = read_text(path, field)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{field}: {path} is not JSON: line {error.lineno}: {error.msg}") from error


def _check_source(field: str, value: str, names: list[str], suffix: str) -> None:
    """Raise ConfigError unless `value` is one of `names` or an existing file."""
    if value in names or Path(value).expanduser().is_file():
        return
    if "/" in value or "\\" in value or value.endswith(suffix):
        raise ConfigError(f"{field}: no such file: {value}")
    raise unknown(field, value, [*names, f"the path of a {suffix} file"])


def check_haystack(value: str) -> None:
    """Raise ConfigError unless `value` is a packaged book, "noise" or an existing file."""
    _check_source("haystack", value, [*BOOKS, NOISE_HAYSTACK], ".txt")


def check_squad(value: str) -> None:
    """Raise ConfigError unless `value` is "builtin" or an existing file."""
    _check_source("squad", value, [BUILTIN], ".json")


def haystack_text(name: str) -> str:
    """The text behind `BenchmarkConfig.haystack`: a packaged book by name, or the content of a file.

    Raises:
        ConfigError: neither a book nor a readable file; "noise" is no text and is not accepted here.
    """
    if name in BOOKS:
        return packaged(f"{name}.txt")
    if name == NOISE_HAYSTACK:
        raise ConfigError(
            "haystack 'noise' repeats five sentences and is no text; allowed here: a book or a file"
        )
    check_haystack(name)
    return read_text(name, "haystack")
