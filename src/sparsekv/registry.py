"""Names to things: methods, benchmarks, metrics, models. Knows nothing of what it holds.

METRICS: Registry[Metric] = Registry("metric")

@METRICS.register("exact_match", aliases=("em",))
def exact_match(prediction, references): ...

METRICS.get("em")           # exact_match
METRICS.get("exact_mach")   # ConfigError: unknown metric 'exact_mach' (did you mean 'exact_match'?); ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar, overload

from sparsekv.errors import unknown

T = TypeVar("T")


class Registry(Generic[T]):
    """Values of one kind by name, in the order they were registered.

    Args:
        kind: what the values are, in the singular, as error messages say it ("method", "benchmark").
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._values: dict[str, T] = {}
        self._aliases: dict[str, str] = {}

    @overload
    def register(self, name: str, value: T, *, aliases: tuple[str, ...] = ...) -> T: ...
    @overload
    def register(
        self, name: str, value: None = ..., *, aliases: tuple[str, ...] = ...
    ) -> Callable[[T], T]: ...
    def register(
        self, name: str, value: T | None = None, *, aliases: tuple[str, ...] = ()
    ) -> T | Callable[[T], T]:
        """Add `value` as `name`; without a value, a decorator that adds what it decorates.

        Args:
            name: the name `names()` lists.
            value: the thing itself (not None: None means decorator).
            aliases: further names that `get` and `in` accept and `names()` does not list.

        Returns:
            The value, or the decorator.

        Raises:
            ValueError: a name or alias is taken (a programming mistake, not the user's).
        """
        if value is None:

            def decorate(decorated: T) -> T:
                return self.register(name, decorated, aliases=aliases)

            return decorate
        taken = [n for n in (name, *aliases) if n in self]
        if taken or len({name, *aliases}) != 1 + len(aliases):
            raise ValueError(f"{self.kind} name registered twice: {', '.join(taken) or (name, *aliases)}")
        self._values[name] = value
        self._aliases.update(dict.fromkeys(aliases, name))
        return value

    def resolve(self, name: str) -> str:
        """The registered name behind `name` (itself, or what it is an alias of).

        Raises:
            ConfigError: there is no such name; the message holds the nearest one.
        """
        name = self._aliases.get(name, name)
        if name not in self._values:
            raise unknown(self.kind, name, self._values)
        return name

    def get(self, name: str) -> T:
        """The value registered as `name` or under that alias.

        Raises:
            ConfigError: there is no such name; the message holds the nearest one.
        """
        return self._values[self.resolve(name)]

    def names(self) -> list[str]:
        """The registered names without aliases, in order of registration."""
        return list(self._values)

    def aliases(self, name: str) -> list[str]:
        """The further names of `name`, in order of registration."""
        return [alias for alias, target in self._aliases.items() if target == name]

    def __contains__(self, name: object) -> bool:
        return name in self._values or name in self._aliases

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)
