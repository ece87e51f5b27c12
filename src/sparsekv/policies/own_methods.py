"""How one of this package's own methods is made of its name and parameters. Loads no torch until it is called."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from sparsekv.errors import ConfigError, unknown
from sparsekv.policies.method_info import MethodInfo

if TYPE_CHECKING:
    from sparsekv.policies.base import Policy


@dataclass(frozen=True)
class OwnMethod:
    """A factory for one of the methods of this package: call it with the policy's parameters.

    Parameters
    ----------
    info : MethodInfo
    policy : str
        "module:class" under `sparsekv.policies` (or a full name), loaded on the first call.
    nested : str
        "field=module:class" of a parameter that is itself a config; its fields may be given directly.
    spellings : tuple of (str, str)
        Other names of parameters that users know, with ours.
    """

    info: MethodInfo
    policy: str
    nested: str = ""
    spellings: tuple[tuple[str, str], ...] = ()

    def __call__(self, **args: Any) -> Policy:
        """The policy with these parameters.

        Raises
        ------
        ConfigError
            For a parameter it does not have, or a value that is not allowed.
        """
        made: Policy = _load(self.policy)(**self._checked(args))
        return made

    def _checked(self, args: dict[str, Any]) -> dict[str, Any]:
        name = self.info.name
        own = _fields(_load(self.policy))
        nested_field, _, nested_home = self.nested.partition("=")
        nested = _load(nested_home) if nested_home else None
        inner = _fields(nested) if nested else []
        spelled = dict(self.spellings)
        given: dict[str, Any] = {}
        for key, value in args.items():
            field = spelled.get(key, key)
            if field not in own and field not in inner:
                raise unknown(f"argument of {name}", key, [*own, *inner, *spelled])
            if field in given:
                raise ConfigError(f"{name}: {field} is given twice (also as {key})")
            given[field] = value
        if nested is None:
            return given
        if isinstance(given.get(nested_field), dict):
            config = given.pop(nested_field)
            return self._checked({**given, **config})
        flat = {key: given.pop(key) for key in inner if key in given}
        if flat and nested_field in given:
            raise ConfigError(f"{name}: {nested_field} and {', '.join(flat)} are both given; give one")
        return {**given, nested_field: nested(**flat)} if flat else given


def _load(home: str) -> Any:
    module, _, attribute = home.partition(":")
    # A policy may live above this package: its name is known here, its module only when it is asked for.
    place = module if module.startswith("sparsekv.") else f"sparsekv.policies.{module}"
    return getattr(import_module(place), attribute)


def _fields(made: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(made)]
