"""What training writes: metrics as it goes, and the folder `final/` at the end. No path of a machine in any file.

    output_dir/
      metrics.jsonl        one row per `log_every` steps and per evaluation
      checkpoint-N/        training.checkpoints
      final/               adapter or model, predictors, tokenizer, training_config.json, curriculum_state.json,
                           metrics.jsonl, README.md; appears when it is whole

Imports no torch.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsekv.config import parse_config
from sparsekv.errors import ConfigError, one_line
from sparsekv.files import write_atomically
from sparsekv.models import public_name
from sparsekv.training.card import write_card
from sparsekv.training.config import TrainConfig
from sparsekv.training.curriculum import Curriculum
from sparsekv.training.fit_config import FitConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FINAL = "final"
CONFIG_FILE = "training_config.json"
CURRICULUM_FILE = "curriculum_state.json"
METRICS_FILE = "metrics.jsonl"
ADAPTER_CONFIG_FILE = "adapter_config.json"
_PARTIAL = f".{FINAL}.partial-"

_ABSOLUTE = re.compile(r"(/|~/|[A-Za-z]:[\\/])[^\\/]")


def public_settings(config: TrainConfig | FitConfig) -> dict[str, Any]:
    """A config as JSON values without anything of this machine: absolute paths become their last part.

    So files that lay anywhere but under the working folder are known by their name alone.
    """
    settings: dict[str, Any] = without_paths(config.model_dump(mode="json"))
    settings["model"] = public_name(config.model)
    return settings


def without_paths(value: Any) -> Any:
    """A value with the last part alone of every absolute path in it."""
    if isinstance(value, dict):
        return {key: without_paths(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_paths(each) for each in value]
    if isinstance(value, str) and _ABSOLUTE.match(value):
        return re.split(r"[\\/]", value.rstrip("\\/"))[-1]
    return value


def write_training_config(folder: Path, config: TrainConfig) -> None:
    """Write training_config.json. `sparsekv train` reads it; files that `public_settings` left only the name of have to
    be put where it runs, or be given by overrides.
    """
    write_json(folder / CONFIG_FILE, public_settings(config))


def read_training_config(folder: Path) -> TrainConfig:
    """The config in a folder's training_config.json.

    Raises
    ------
    ConfigError
        If there is none, or it cannot be read.
    """
    path = folder / CONFIG_FILE
    return parse_config(TrainConfig, read_json(path), source=str(path))


def write_curriculum(folder: Path, curriculum: Curriculum) -> None:
    """Write curriculum_state.json."""
    write_json(folder / CURRICULUM_FILE, {"name": curriculum.name, "state": curriculum.state_dict()})


def load_curriculum(folder: Path, curriculum: Curriculum) -> None:
    """Give a curriculum the state in a folder's curriculum_state.json.

    Raises
    ------
    ConfigError
        If there is none, or it is that of another curriculum.
    """
    path = folder / CURRICULUM_FILE
    saved = read_json(path)
    if saved.get("name") != curriculum.name:
        raise ConfigError(f"{path} is of curriculum {saved.get('name')!r}, not {curriculum.name!r}")
    curriculum.load_state_dict(saved.get("state", {}))


class MetricsLog:
    """metrics.jsonl: one JSON object per line, each with its `step`.

    Every append is on the disk before it returns. A process killed while it appends leaves a torn last line, which
    `start` removes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, step: int, values: Mapping[str, Any]) -> None:
        """Add the row of a step; NaN and infinities become null."""
        row = {"step": step, **{key: _finite(value) for key, value in values.items()}}
        line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
        with open(self.path, "ab") as stream:
            stream.write(line.encode())
            stream.flush()
            os.fsync(stream.fileno())

    def rows(self) -> list[dict[str, Any]]:
        """The rows up to the first torn or damaged line."""
        rows: list[dict[str, Any]] = []
        for line in (
            self.path.read_text(encoding="utf-8", errors="replace").split("\n") if self.path.exists() else ()
        ):
            try:
                row = json.loads(line)
            except ValueError:
                break
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                break
            rows.append(row)
        return rows

    def start(self, step: int) -> None:
        """Begin, or go on, after `step` finished steps: later rows are removed, so that none comes twice."""
        kept = [row for row in self.rows() if row["step"] <= step]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
        write_atomically(self.path, text)


def save_final(
    output_dir: Path,
    config: TrainConfig,
    *,
    save_weights: Callable[[Path], object],
    tokenizer: PreTrainedTokenizerBase,
    curriculum: Curriculum,
) -> Path:
    """Write `output_dir/final`, which appears under its name only when it is whole; an older one is replaced.

    Parameters
    ----------
    output_dir : Path
        With metrics.jsonl, if any.
    config : TrainConfig
    save_weights : callable
        Writes what was trained into the folder it is given: the adapter or, in full fine-tuning, the model; and
        relevance.safetensors if predictors were trained. For train_model "frozen" that file alone.
    tokenizer, curriculum

    Returns
    -------
    Path
        The folder.
    """
    with whole_folder(output_dir) as folder:
        save_weights(folder)
        name_base(folder, public_name(config.model))
        tokenizer.save_pretrained(folder)
        write_training_config(folder, config)
        write_curriculum(folder, curriculum)
        log = MetricsLog(output_dir / METRICS_FILE)
        if log.path.exists():
            shutil.copyfile(log.path, folder / METRICS_FILE)
        write_card(folder, public_settings(config), log.rows(), base=config.model)
    return output_dir / FINAL


@contextmanager
def whole_folder(output_dir: Path) -> Iterator[Path]:
    """An empty folder to fill, which becomes `output_dir/final` at the end; an older one is replaced only then."""
    target = output_dir / FINAL
    output_dir.mkdir(parents=True, exist_ok=True)
    remove_partial(output_dir)
    work = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=output_dir))
    try:
        folder = work / FINAL
        folder.mkdir()
        yield folder
        if target.exists():
            target.rename(work / "replaced")
        folder.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def remove_partial(output_dir: Path) -> None:
    """Remove what processes that were killed while they wrote `final/` left behind."""
    for folder in output_dir.glob(f"{_PARTIAL}*"):
        shutil.rmtree(folder, ignore_errors=True)


def name_base(folder: Path, base: str) -> None:
    """Let an adapter's config name its base by `base`, a public id, instead of where it lay."""
    path = folder / ADAPTER_CONFIG_FILE
    if path.exists():
        set_in_json(path, "base_model_name_or_path", base)


def set_in_json(path: Path, key: str, value: Any) -> None:
    """Set one key of the JSON object in a file; a ConfigError if it can't be read."""
    write_json(path, {**read_json(path), key: value})


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a value as JSON that a person can read, whole or not at all."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises
    ------
    ConfigError
        If it can't be read, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return value


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
