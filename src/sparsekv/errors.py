"""The errors a user can cause, and how they are worded. Imports nothing of the project.

Every message is one line that names the field, the value, what is allowed and, where there is one, the
nearest valid name. The command line prints the message of a `ConfigError` as it is and exits with code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SparseKVError(Exception):
    """Base class of every error this library raises on purpose."""


class ConfigError(SparseKVError, ValueError):
    """A mistake in what the user asked for: a value, a name, a file or a combination. One line."""


def nearest(value: object, allowed: Iterable[str]) -> str | None:
    """The name of `allowed` that `value` most likely meant, or None if nothing is close.

    Case and the difference between "-" and "_" do not count.
    """
    spelled: dict[str, str] = {}
    for name in allowed:
        spelled.setdefault(name.lower().replace("-", "_"), name)
    close = difflib.get_close_matches(str(value).lower().replace("-", "_"), spelled, n=1, cutoff=0.6)
    return spelled[close[0]] if close else None


def unknown(field: str, value: object, allowed: Iterable[str]) -> ConfigError:
    """The error for a name that is not one of `allowed`; the caller raises it.

    Args:
        field: what the name was for, e.g. "method", "task", "key".
        value: what was given.
        allowed: the valid names, listed in the message in the order given.

    Returns:
        `ConfigError("unknown method 'snapvk' (did you mean 'snapkv'?); allowed: full, snapkv")`.
    """
    names = list(allowed)
    guess = nearest(value, names)
    hint = f" (did you mean '{guess}'?)" if guess is not None else ""
    return ConfigError(f"unknown {field} '{value}'{hint}; allowed: {', '.join(names) or 'none'}")


def one_line(error: BaseException, limit: int = 300) -> str:
    """The message of another library's error as one line of at most `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
