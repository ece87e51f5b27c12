"""What an output folder remembers of earlier runs, and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from toy_runs import Settings, predictions, run

from sparsekv.errors import ConfigError


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"seed": 1}, "seed was 0, now 1"),
        ({"dtype": "bfloat16"}, "dtype was 'float32', now 'bfloat16'"),
        ({"query_aware": True}, "query_aware was False, now True"),
        ({"max_new_tokens": 3}, "max_new_tokens was None, now 3"),
    ],
)
def test_a_folder_of_another_run_is_refused(
    toy_eval: Settings, change: dict[str, Any], expected: str
) -> None:
    settings = toy_eval(methods=["full"], limit=1)
    run(settings)
    before = {p.name: p.read_bytes() for p in Path(settings["output_dir"]).iterdir()}
    with pytest.raises(ConfigError) as caught:
        run(settings | change)
    assert expected in str(caught.value)
    assert before == {p.name: p.read_bytes() for p in Path(settings["output_dir"]).iterdir()}


def test_each_row_names_the_commit_it_was_computed_under(
    toy_eval: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = toy_eval(methods=["full"], limit=1)
    log = Path(settings["output_dir"]) / "predictions.jsonl"
    commits = {}
    for commit, change in (("a", {}), ("b", {"limit": None}), ("c", {"methods": ["full", "knorm"]})):
        monkeypatch.setattr("sparsekv.evaluation.runner.commit", lambda commit=commit: commit)
        outcome = run(settings | change)
        commits[commit] = [(row["method"], row["commit"]) for row in outcome.results]
    assert commits["a"] == [("full", "a")] * 2
    assert commits["b"] == [("full", "a, b")] * 2
    assert commits["c"][:3] == [("full", "a, b"), ("knorm", "c"), ("knorm", "c")]
    # Rows of a folder from before rows named their commit: those of its sessions, and they stay so.
    rows = [{k: v for k, v in row.items() if k != "commit"} for row in predictions(settings)]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for commit in ("d", "e"):
        monkeypatch.setattr("sparsekv.evaluation.runner.commit", lambda commit=commit: commit)
        outcome = run(settings | {"methods": ["full", "tova"], "limit": 1})
        found = {row["method"]: row["commit"] for row in outcome.results}
        assert found == {"full": "a, b, c", "knorm": "a, b, c", "tova": "d"}


def test_other_weights_under_the_same_name_are_refused(toy_eval: Settings, tmp_path: Path) -> None:
    import toy

    settings = toy_eval(methods=["full"], limit=1)
    run(settings | {"model": str(toy.save_toy_model(tmp_path / "x" / "m", seed=1))})
    with pytest.raises(ConfigError, match="weights was"):
        run(settings | {"model": str(toy.save_toy_model(tmp_path / "y" / "m", seed=2))})


def test_a_changed_limit_of_a_benchmark_is_refused(toy_eval: Settings, toy_data: Path) -> None:
    settings = toy_eval(methods=["full"], limit=1)
    run(settings)
    shorter = {"benchmarks": [{"name": "local", "path": str(toy_data), "max_new_tokens": 3}]}
    with pytest.raises(ConfigError, match=r"run: max_new_tokens of local/a/0000 was 6, now 3; use another"):
        run(settings | shorter)
    # A folder from before each row named its limit: its config still does.
    rows = [{k: v for k, v in row.items() if k != "max_new_tokens"} for row in predictions(settings)]
    log = Path(settings["output_dir"]) / "predictions.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ConfigError, match=r"run: max_new_tokens of benchmark local was None, now 3; use"):
        run(settings | shorter)
    assert len(run(settings | {"limit": 2}).results) == 2
    with pytest.raises(ConfigError, match=r"max_new_tokens of "):
        run(settings | shorter)


def test_changed_data_is_refused_and_named(toy_eval: Settings, toy_data: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(toy_data.read_text())
    settings = toy_eval(methods=["full"], benchmarks=[{"name": "local", "path": str(data)}])
    run(settings)
    data.write_text(toy_data.read_text().replace("lazy dog near tower 37", "lazy cat near tower 37"))
    with pytest.raises(
        ConfigError, match=r"the prompt of local/a/0001 has sha .*the data of local/a changed"
    ):
        run(settings)
    data.write_text(toy_data.read_text().replace('"answer": "hen"', '"answer": "cock"'))
    with pytest.raises(ConfigError, match=r"references of local/b/\d+ were \['hen'\], now \['cock'\]"):
        run(settings)
    more = json.loads(toy_data.read_text().splitlines()[-1]) | {"context": "A new row. " * 20}
    data.write_text(toy_data.read_text() + json.dumps(more) + "\n")
    assert {row["n"] for row in run(settings).results} == {2, 3}
