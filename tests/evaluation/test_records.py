"""Files that survive being killed, and a full disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekv.errors import ConfigError
from sparsekv.evaluation.records import JsonLines
from sparsekv.files import write_atomically

ROWS = [{"id": 0, "text": "α\u2028β"}, {"id": 1, "text": "line\nbreak"}, {"id": 2, "text": ""}]


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "rows.jsonl")
    assert log.read() == []
    log.append(ROWS[:2])
    log.append(ROWS[2:])
    assert log.read() == ROWS
    assert (tmp_path / "rows.jsonl").read_bytes().count(b"\n") == 3


def test_a_lone_surrogate_is_written_as_json_escapes_it(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "rows.jsonl")
    log.append([{"text": "a\ud800b"}])
    assert log.read() == [{"text": "a\ud800b"}]


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(min_value=0, max_value=200))
def test_cut_anywhere_the_whole_rows_before_the_cut_are_left(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    path = tmp_path_factory.mktemp("torn") / "rows.jsonl"
    log = JsonLines(path)
    log.append(ROWS)
    whole = path.read_bytes()
    cut = min(cut, len(whole))
    path.write_bytes(whole[:cut])
    n_whole = whole[:cut].count(b"\n")
    assert log.read() == ROWS[:n_whole]
    log.append(ROWS[n_whole:])
    assert path.read_bytes() == whole


def test_a_torn_last_line_with_a_line_break_is_dropped_too(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id": 0}\n{"id": 1, "te\n')
    assert JsonLines(path).read() == [{"id": 0}]
    assert path.read_bytes() == b'{"id": 0}\n'


def test_a_damaged_line_in_the_middle_is_an_error_that_counts_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id": 0}\n{"id": 1, "te\n{"id": 2}\n')
    with pytest.raises(ConfigError, match="line 2 is damaged"):
        JsonLines(path).read()
    assert path.read_bytes().count(b"\n") == 3


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    log = JsonLines(path)
    log.append(ROWS[:1])
    before = path.read_bytes()
    real_write = os.write
    calls = []

    def half(descriptor: int, data: bytes) -> int:
        calls.append(len(data))
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real_write(descriptor, bytes(data)[: len(data) // 2])

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(OSError, match="No space"):
        log.append(ROWS[1:])
    monkeypatch.undo()
    assert len(calls) == 2
    assert path.read_bytes() == before


def test_a_failed_replacement_leaves_the_old_file_and_no_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.jsonl"
    write_atomically(path, "old")

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["results.jsonl"]


def test_numbers_that_are_not_json_are_refused(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match="JSON"):
        log.append([{"score": float("nan")}])
    assert not (tmp_path / "rows.jsonl").exists()
