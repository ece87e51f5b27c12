"""YAML files and `key=value` overrides to plain Python: command line > YAML > defaults.

Knows nothing of what a config contains; `config.py` has the schemas. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml

from sparsekv.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars, and no key twice.

    PyYAML follows YAML 1.1, which reads 0123 as 83 (octal), 1:30 as 90, `no` as false and 1e-3 as text.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """As in SafeLoader, but a key that is given twice is an error instead of the last one winning."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            if isinstance(key, Hashable):
                seen.add(key)
        return super().construct_mapping(node, deep=deep)


_SCALARS = {
    "null": (r"~|null|Null|NULL|", "~nN\0"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        None,
    ),
}


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = node.value
    if text.startswith(("0o", "0x")):
        return int(text, 0)
    return int(text, 10)


_Loader.yaml_implicit_resolvers = {}
for _tag, (_pattern, _first) in _SCALARS.items():
    _first_letters = list("-+.0123456789") if _first is None else [c for c in _first if c != "\0"]
    if _tag == "null":
        _first_letters.append("")
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first_letters
    )
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def parse_value(text: str) -> Any:
    """The value of a `key=value` override: YAML, so that lists, null, true and numbers can be written.

    >>> parse_value("[0.5, 0.75]"), parse_value("0123"), parse_value("snapkv")
    ([0.5, 0.75], 123, 'snapkv')
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"value {text!r} cannot be read: {_one_line(error)}") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises
    ------
    ConfigError
        If the file is missing or unreadable, is not YAML (the message says file:line:column), or is not a
        mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"config file '{path}' does not exist") from None
    except IsADirectoryError:
        raise ConfigError(f"config file '{path}' is a folder") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"config file '{path}' is not UTF-8 text: {error.reason}") from None
    except OSError as error:
        raise ConfigError(f"config file '{path}' cannot be read: {error.strerror}") from None
    try:
        content = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark is not None else str(path)
        raise ConfigError(f"{where}: malformed YAML: {_one_line(error)}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected keys and values at the top, found a {type(content).__name__}")
    return content


def load_settings(path: str | Path | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A YAML file with `key=value` overrides on top, `${key}` references resolved.

    Parameters
    ----------
    path : file, or None for no file
    overrides : sequence of "key=value"
        Keys may be nested: `benchmarks.0.rows=5` or `benchmarks[0].rows=5`. Values are YAML.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    where = f"{path}: " if path is not None else ""
    try:
        settings = OmegaConf.create(read_yaml(path) if path is not None else {})
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}{_one_line(error)}") from None
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ConfigError(f"override '{override}' is not of the form key=value")
        value = parse_value(text)
        _check_reachable(settings, key, override)
        try:
            OmegaConf.update(settings, key, value, merge=False)
        except (OmegaConfBaseException, IndexError, ValueError) as error:
            raise ConfigError(f"override '{override}': {_one_line(error)}") from None
    try:
        resolved = OmegaConf.to_container(settings, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}{_one_line(error)}") from None
    if not isinstance(resolved, dict):
        raise ConfigError(f"{where}expected keys and values at the top")
    return {str(key): value for key, value in resolved.items()}


def _check_reachable(settings: Any, key: str, override: str) -> None:
    """Every list index on the way must exist: OmegaConf's own message does not say how many there are."""
    node = settings
    done: list[str] = []
    for part in re.split(r"[.\[]", key):
        name = part.rstrip("]")
        if type(node).__name__ == "ListConfig":
            if not re.fullmatch(r"[0-9]+", name) or int(name) >= len(node):
                raise ConfigError(
                    f"override '{override}': '{'.'.join(done)}' is a list of {len(node)}; "
                    f"'{name}' is not an index from 0 to {len(node) - 1}"
                )
            node = node[int(name)]
        elif type(node).__name__ == "DictConfig":
            if name not in node:
                return
            node = node[name]
        elif node is None:
            return
        else:
            raise ConfigError(f"override '{override}': '{'.'.join(done)}' is {node!r} and has no '{name}'")
        done.append(name)


def _one_line(error: Exception) -> str:
    problem = getattr(error, "problem", None)
    text = problem if problem else str(error)
    return " ".join(str(text).split("\n")[0].split())
