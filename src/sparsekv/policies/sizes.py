"""Sizes and switches that a user gives (sinks, windows, blocks): checked, and weighed against a budget."""

from __future__ import annotations

from sparsekv.errors import ConfigError
from sparsekv.policies.budget import Budget


def check_size(method: str, field: str, value: object, minimum: int = 0) -> None:
    """Raise a `ConfigError` unless `value` is a whole number of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(f"{method}: {field} must be a whole number >= {minimum}, got {value!r}")


def check_switches(method: str, **switches: object) -> None:
    """Raise a `ConfigError` unless every value, by the name of its field, is true or false; "no" isn't."""
    for field, value in switches.items():
        if not isinstance(value, bool):
            raise ConfigError(f"{method}: {field} must be true or false, got {value!r}")


def require_budget(method: str, budget: Budget, own: str = "") -> None:
    """Raise a `ConfigError` if the budget is empty; `own` names the method's own sizes that would also do."""
    if not budget.given:
        instead = f", or {own}" if own else ""
        raise ConfigError(f"{method} needs a budget (compression_ratio or tokens){instead}; neither is given")


def refuse_budget(method: str, budget: Budget, own: str) -> None:
    """Raise a `ConfigError` if a budget comes together with `own` sizes that already fix the total."""
    if budget.given:
        raise ConfigError(
            f"{method}: {own} and {describe(budget)} are both given, and either sets the total; give one"
        )


def total_beside(method: str, budget: Budget, n: int, **fixed: int) -> int:
    """Entries to keep of `n` under a budget, after checking that it holds what must stay.

    Parameters
    ----------
    method : str
        For the message.
    budget : Budget
        A given one.
    n : int
        Entries there are. A context shorter than the fixed sizes needs only what it has.
    **fixed : int
        What must stay whatever the budget, by the name of its field, e.g. n_sink=4.

    Raises
    ------
    ConfigError
        If the budget is smaller than the fixed sizes; the message names both numbers.
    """
    total = budget.n_kept(n)
    wanted = sum(fixed.values())
    too_few = budget.tokens is not None and budget.tokens < wanted
    if n and (too_few or total < min(wanted, n)):
        sizes = " + ".join(f"{field}={size}" for field, size in fixed.items())
        raise ConfigError(
            f"{method}: a budget of {total} entries ({describe(budget)} of {n} tokens) is under {sizes}; "
            f"raise the budget or lower {' or '.join(fixed)}"
        )
    return total


def describe(budget: Budget) -> str:
    """The budget as its user wrote it."""
    if budget.tokens is not None:
        return f"budget tokens={budget.tokens}"
    return f"compression_ratio={budget.compression_ratio}"
