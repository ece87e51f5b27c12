"""What a trainer that no config describes was given, as plain settings: a resumed run is held against it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from sparsekv.training.checkpoints import check_settings
from sparsekv.training.curriculum import Curriculum
from sparsekv.training.objective import Objective
from sparsekv.training.output import read_json, without_paths, write_json

SETUP_FILE = "trainer_setup.json"


def described(value: Any) -> Any:
    """A policy, an objective or whatever else a trainer is given, as JSON values: its class and its settings.

    Of what is neither plain nor a dataclass only the class counts; of curricula and objectives all attributes, but for
    what changes as a curriculum listens (`_state`).
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [described(each) for each in value]
    if isinstance(value, Mapping):
        return {str(key): described(each) for key, each in value.items()}
    made = {"class": type(value).__name__}
    if is_dataclass(value):
        return made | {each.name: described(getattr(value, each.name)) for each in fields(value) if each.init}
    if isinstance(value, (Curriculum, Objective)):
        return made | {key: described(each) for key, each in vars(value).items() if key != "_state"}
    return made


def write_setup(folder: Path, setup: Mapping[str, Any]) -> None:
    """Write trainer_setup.json."""
    write_json(folder / SETUP_FILE, without_paths(dict(setup)))


def check_setup(checkpoint: Path, setup: Mapping[str, Any]) -> None:
    """Raise a ConfigError that names what differs, unless a checkpoint was made by a trainer that was given the same.

    One that has no record of it (a config's, or an earlier version's) is let through.
    """
    if (checkpoint / SETUP_FILE).is_file():
        old = read_json(checkpoint / SETUP_FILE)
        check_settings(checkpoint, old, without_paths(dict(setup)), what="trainer")
