"""An output folder belongs to one run and has one writer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparsekv.errors import ConfigError
from sparsekv.evaluation.folder import RunFolder, check_identity, check_usable, read_run
from sparsekv.evaluation.records import SCHEMA_VERSION


def test_a_new_folder_is_made_and_written(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "a" / "b") as folder:
        assert folder.read_run() == {}
        folder.write_run({"schema_version": SCHEMA_VERSION, "identity": {"seed": 1}})
    with RunFolder(tmp_path / "a" / "b") as folder:
        assert folder.read_run()["identity"] == {"seed": 1}


def test_a_second_writer_is_refused_until_the_first_is_done(tmp_path: Path) -> None:
    with RunFolder(tmp_path), pytest.raises(ConfigError, match="another process"), RunFolder(tmp_path):
        pass
    with RunFolder(tmp_path):
        pass


def test_folders_of_something_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with (
        pytest.raises(ConfigError, match=r"holds no run of sparsekv \(found 'thesis.tex'\)"),
        RunFolder(tmp_path),
    ):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["thesis.tex"]
    with pytest.raises(ConfigError, match="is a file"):
        check_usable(tmp_path / "thesis.tex")


def test_leftovers_of_a_run_that_was_killed_at_once_do_not_count(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / "run.json.tmp").write_text("{")
    check_usable(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}', '{"identity": 3}'])
def test_a_run_json_of_something_else_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ConfigError, match="not written by sparsekv"):
        read_run(tmp_path)


def test_another_schema_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"schema_version": 999, "identity": {}}))
    with pytest.raises(ConfigError, match="schema_version 999"):
        read_run(tmp_path)


def test_the_first_difference_is_named_and_the_others_listed(tmp_path: Path) -> None:
    old = {"model": "a", "dtype": "float32", "seed": 0, "weights": "x"}
    check_identity(tmp_path, old, dict(old))
    with pytest.raises(ConfigError, match=r"seed was 0, now 1; use another"):
        check_identity(tmp_path, old, old | {"seed": 1})
    with pytest.raises(ConfigError, match=r"model was 'a', now 'b' \(also dtype, weights\)"):
        check_identity(tmp_path, old, {"model": "b", "dtype": "bfloat16", "seed": 0, "weights": "y"})
