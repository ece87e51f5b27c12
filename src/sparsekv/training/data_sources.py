"""Where training data comes from: files, folders, the packaged book, data sets on the Hub. Knows no tokenizer.

A row that cannot be used is left out and its reason counted: a warning says so when all are read, and an error if
nothing is left.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from sparsekv.benchmarks.data import NOT_TEXT, is_text, packaged, read_text
from sparsekv.errors import ConfigError, nearest
from sparsekv.training.data_spec import TRAIN_BOOK, DataConfig
from sparsekv.training.data_wikitext import wikitext_as_written

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_TEXT_SUFFIXES = (".txt", ".jsonl")
_ROW_SUFFIXES = (".jsonl", ".parquet")

Row = dict[str, Any]


class Refusals:
    """Why rows were left out, and how many for each reason."""

    def __init__(self) -> None:
        self._reasons: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, reason: str, where: str = "") -> None:
        """One more row with this reason; `where` it is, if known."""
        self._reasons[reason] += 1
        self._first.setdefault(reason, where)

    def warn(self, config: DataConfig) -> None:
        """Say how many rows were left out, if any, and why."""
        total = self._reasons.total()
        if total:
            where, rows = ", ".join(config.path), "row is" if total == 1 else "rows are"
            logger.warning("%s: %d %s left out: %s", where, total, rows, self._counted())

    def _counted(self) -> str:
        """The most common reasons, with their counts and where each came first."""
        return "; ".join(
            f"{count} x {reason}" + (f" (first: {self._first[reason]})" if self._first[reason] else "")
            for reason, count in self._reasons.most_common(5)
        )

    def error(self, config: DataConfig) -> ConfigError:
        """The error if no row was usable."""
        where = ", ".join(config.path)
        return ConfigError(f"path: no usable row in {where}: {self._counted() or 'there are no rows'}")


def documents(config: DataConfig, refused: Refusals) -> Iterator[str]:
    """The documents of a "text" or "selfsup" configuration: a .txt file is one, a row is one.

    Raises
    ------
    ConfigError
        A file, folder or data set that cannot be read.
    """
    found = islice(_documents(config, refused), config.max_documents)
    return map(wikitext_as_written, found) if config.detokenize else found


def _documents(config: DataConfig, refused: Refusals) -> Iterator[str]:
    for path in config.path:
        if path == TRAIN_BOOK:
            yield packaged(f"{path}.txt")
            continue
        for name, rows in _opened(path, config, _TEXT_SUFFIXES, refused):
            if rows is None:
                yield read_text(name, "path")
                continue
            for row in rows:
                text = row.get(config.text_field)
                if isinstance(text, str) and not is_text(text):
                    refused.add(f"field '{config.text_field}' {NOT_TEXT}")
                elif isinstance(text, str) and text.strip():
                    yield text
                elif text is None:
                    fields = ", ".join(map(str, row)) or "none"
                    refused.add(f"no field '{config.text_field}' (the row has: {fields})")
                else:
                    refused.add(f"field '{config.text_field}' is not text, or blank")


def rows(config: DataConfig, refused: Refusals) -> Iterator[Row]:
    """The rows of a "qa" configuration, as they are; see `documents`."""
    return islice(_rows(config, refused), config.max_documents)


def _rows(config: DataConfig, refused: Refusals) -> Iterator[Row]:
    for path in config.path:
        if path == TRAIN_BOOK:
            raise ConfigError(f"path: '{path}' is a text and has no questions; kind 'selfsup' makes some")
        for _, found in _opened(path, config, _ROW_SUFFIXES, refused):
            yield from found or ()


def _opened(
    path: str, config: DataConfig, suffixes: tuple[str, ...], refused: Refusals
) -> Iterator[tuple[str, Iterator[Row] | None]]:
    """Each file behind a path with its rows; None instead of rows for a .txt file."""
    place = Path(path).expanduser()
    if place.is_dir():
        files = sorted(file for file in place.rglob("*") if file.suffix in suffixes and file.is_file())
        if not files:
            raise ConfigError(f"path: folder {path} holds no file that ends in {' or '.join(suffixes)}")
    elif place.is_file():
        if place.suffix not in suffixes:
            raise ConfigError(
                f"path: {path} ends in '{place.suffix}'; allowed for kind '{config.kind}': {', '.join(suffixes)}"
            )
        files = [place]
    elif place.suffix in (".txt", ".jsonl", ".parquet", ".json", ".csv") or not _HUB_ID.fullmatch(path):
        hint = f" (did you mean '{TRAIN_BOOK}'?)" if nearest(path, [TRAIN_BOOK]) else ""
        raise ConfigError(
            f"path: no such file: {path}{hint}; allowed: '{TRAIN_BOOK}', a file, a folder, the id of a data set "
            "(owner/name)"
        )
    else:
        yield path, _hub_rows(path, config)
        return
    for file in files:
        if file.suffix == ".txt":
            yield str(file), None
        elif file.suffix == ".parquet":
            yield str(file), _parquet_rows(file)
        else:
            yield str(file), _jsonl_rows(file, refused)


def _jsonl_rows(path: Path, refused: Refusals) -> Iterator[Row]:
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    refused.add("the line is not JSON", f"{path} line {number}")
                    continue
                if isinstance(row, dict):
                    yield row
                else:
                    refused.add("the row is not an object with fields", f"{path} line {number}")
    except UnicodeDecodeError as error:
        raise ConfigError(f"path: {path} is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise ConfigError(f"path: cannot read {path}: {error.strerror}") from error


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=256):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"path: {path} is not a readable parquet file: {reason}") from error


def _hub_rows(path: str, config: DataConfig) -> Iterator[Row]:
    """Rows as they arrive; nothing is downloaded that is not read."""
    from datasets import load_dataset

    try:
        yield from map(dict, load_dataset(path, config.subset, split=config.split, streaming=True))
    except Exception as error:  # the Hub's clients raise many unrelated types, and all mean the same here
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"path: cannot read data set '{path}' (subset {config.subset}, split {config.split}); "
            f"offline, give a local file instead: {reason}"
        ) from error
