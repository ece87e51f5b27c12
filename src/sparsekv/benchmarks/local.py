"""Any data set in kvpress's schema: a local .jsonl or .parquet file, or a data set on the Hub.

Columns: context, question, answer (a text or a list of them); answer_prefix ("" if absent), max_new_tokens
(`BenchmarkConfig.max_new_tokens` takes precedence, and is needed if absent), task (the file's name if
absent). kvpress's published sets have them, e.g. `path: simonjegou/ruler`, `subset: "4096"`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from math import isfinite
from pathlib import Path
from typing import Any

from sparsekv.benchmarks.base import BENCHMARKS, Example, example_id
from sparsekv.benchmarks.data import NOT_TEXT, is_text, read_text
from sparsekv.benchmarks.scoring import METRICS
from sparsekv.benchmarks.spec import BenchmarkConfig
from sparsekv.errors import ConfigError

SUFFIXES = (".jsonl", ".parquet")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def _is_file_path(path: str) -> bool:
    return path.endswith((*SUFFIXES, ".json", ".csv")) or Path(path).expanduser().exists()


class Local:
    """The benchmark `local`: rows a user brings; its tasks are what the column `task` says."""

    name = "local"

    def tasks(self) -> list[str]:
        """Empty: only the data tells."""
        return []

    def check(self, spec: BenchmarkConfig) -> None:
        """`path` must be given and be an existing file or look like a Hub id; `metric` must be known."""
        METRICS.get(spec.metric)
        if spec.path is None:
            raise ConfigError(
                "path: benchmark 'local' needs a .jsonl or .parquet file, or the id of a data set"
            )
        if not _is_file_path(spec.path):
            if not _HUB_ID.fullmatch(spec.path):
                raise ConfigError(
                    f"path: '{spec.path}' is neither a file nor the id of a data set (owner/name)"
                )
            return
        path = Path(spec.path).expanduser()
        if not path.is_file():
            raise ConfigError(f"path: no such file: {spec.path}")
        if path.suffix not in SUFFIXES:
            raise ConfigError(f"path: {spec.path} ends in '{path.suffix}'; allowed: {', '.join(SUFFIXES)}")

    def load(self, spec: BenchmarkConfig, tokenizer: Any, seed: int) -> list[Example]:
        """The first `rows` rows of each task (all, if None), in the file's order; nothing is drawn or
        measured.

        Raises:
            ConfigError: the file or data set cannot be read, a row lacks a field or has one of a wrong type,
                or a task of `tasks` does not occur.
        """
        self.check(spec)
        path = str(spec.path)
        if not _is_file_path(path):
            rows: Iterable[tuple[str, Any]] = _hub_rows(path, spec)
        elif path.endswith(".parquet"):
            rows = _parquet_rows(path)
        else:
            rows = _jsonl_rows(path)
        default_task = Path(path).stem if _is_file_path(path) else path.rsplit("/", 1)[-1]
        examples: list[Example] = []
        seen: Counter[str] = Counter()
        for where, row in rows:
            example = _example(row, where, spec, default_task, seen)
            wanted = spec.tasks is None or example.task in spec.tasks
            if wanted and (spec.rows is None or seen[example.task] < spec.rows):
                examples.append(example)
            seen[example.task] += 1
        if not seen:
            raise ConfigError(f"path: {path} has no rows")
        for task in spec.tasks or []:
            if task not in seen:
                raise ConfigError(
                    f"tasks: no row of {path} has task '{task}'; it has: {', '.join(sorted(seen))}"
                )
        return examples


def _example(row: Any, where: str, spec: BenchmarkConfig, default_task: str, seen: Counter[str]) -> Example:
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: a row must be an object with fields, not {type(row).__name__}")
    task = _text(row, "task", where, default_task)
    return Example(
        example_id=example_id("local", task, None, seen[task]),
        benchmark="local",
        task=task,
        context=_text(row, "context", where),
        question=_text(row, "question", where),
        answer_prefix=_text(row, "answer_prefix", where, ""),
        references=_answers(row, where),
        max_new_tokens=spec.max_new_tokens or _limit(row, where),
        metric=METRICS.resolve(spec.metric),
        context_length=None,
    )


def _text(row: dict[str, Any], field: str, where: str, default: str | None = None) -> str:
    value = row.get(field)
    if value is None:
        value = default
    if value is None:
        raise ConfigError(
            f"{where}: field '{field}' is missing; the row has: {', '.join(map(str, row)) or 'none'}"
        )
    if not isinstance(value, str):
        raise ConfigError(f"{where}: field '{field}' must be text, not {type(value).__name__}")
    if not is_text(value):
        raise ConfigError(f"{where}: field '{field}' {NOT_TEXT}")
    if field in ("context", "question") and not value.strip():
        raise ConfigError(f"{where}: field '{field}' is empty")
    return value


def _answers(row: dict[str, Any], where: str) -> tuple[str, ...]:
    value = row.get("answer")
    if value is None:
        raise ConfigError(f"{where}: field 'answer' is missing; the row has: {', '.join(map(str, row))}")
    answers = value if isinstance(value, (list, tuple)) else [value]
    if not answers:
        raise ConfigError(f"{where}: field 'answer' must be a text or a list of at least one")
    for answer in answers:
        if not isinstance(answer, (str, int, float)) or (isinstance(answer, float) and not isfinite(answer)):
            raise ConfigError(
                f"{where}: field 'answer' must be a text or a list of at least one, not {answer!r}"
            )
        if not str(answer).strip():  # which every text contains: each answer would be right
            raise ConfigError(f"{where}: field 'answer' is empty")
        if not is_text(str(answer)):
            raise ConfigError(f"{where}: field 'answer' {NOT_TEXT}")
    return tuple(str(answer) for answer in answers)


def _limit(row: dict[str, Any], where: str) -> int:
    value = row.get("max_new_tokens")
    if value is None:
        raise ConfigError(f"{where}: field 'max_new_tokens' is missing; give it here or in the configuration")
    whole = value.is_integer() if isinstance(value, float) else type(value) is int
    if not whole or value < 1:
        raise ConfigError(
            f"{where}: field 'max_new_tokens' must be a whole number of at least 1, not {value!r}"
        )
    return int(value)


def _jsonl_rows(path: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(read_text(path, "path").split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield f"{path} line {number}", json.loads(line, parse_int=_integer)
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"{path} line {number}: not JSON: {error.msg} (column {error.colno})"
            ) from error


class LongInteger:
    """Stands for an integer of more digits than Python reads, so that the check of its field can name it."""

    def __init__(self, digits: str) -> None:
        self._digits = digits

    def __repr__(self) -> str:
        return f"a number of {len(self._digits.lstrip('-'))} digits"


def _integer(digits: str) -> int | LongInteger:
    try:
        return int(digits)
    except ValueError:  # sys.get_int_max_str_digits()
        return LongInteger(digits)


def _parquet_rows(path: str) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        rows = parquet.read_table(Path(path).expanduser()).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"path: {path} is not a readable parquet file: {reason}") from error
    for number, row in enumerate(rows):
        yield f"{path} row {number}", row


def _hub_rows(path: str, spec: BenchmarkConfig) -> Iterator[tuple[str, Any]]:
    from datasets import load_dataset

    try:
        rows = load_dataset(path, spec.subset, split=spec.split)
    except Exception as error:  # the Hub's clients raise many unrelated types, and all mean the same here
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"path: cannot load data set '{path}' (subset {spec.subset}, split {spec.split}); "
            f"offline, give a local file instead: {reason}"
        ) from error
    for number, row in enumerate(rows):
        yield f"{path} row {number}", dict(row)


BENCHMARKS.register("local", Local(), aliases=("dataset",))
