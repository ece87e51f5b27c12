"""What a user is told about a method: a row of `sparsekv ls methods` and docs/methods.md. No torch here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MethodInfo:
    """One eviction method.

    Parameters
    ----------
    name : str
        As configs and `make_policy` spell it.
    route : str
        How it decides: "tokens" (positions and ids, before the forward), "scores" (a score per entry),
        "masked" (keys picked per head), "native" (kvpress's own hooks run).
    idea, cost, when : str
        One sentence each: what it keeps, what deciding costs, when to use it.
    paper : str
        "arXiv 2309.17453", or "" where there is none.
    aliases : tuple of str
        Further names that `make_policy` accepts.
    """

    name: str
    route: str
    idea: str
    paper: str = ""
    cost: str = ""
    when: str = ""
    aliases: tuple[str, ...] = ()
