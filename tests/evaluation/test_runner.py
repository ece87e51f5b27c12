"""Runs on the toy model: what is written, resumed, extended and refused."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from toy_runs import Counting, Settings, by_key, lines, predictions, run

from sparsekv.evaluation.answers import Answerer
from sparsekv.evaluation.records import PredictionRow, ResultRow
from sparsekv.evaluation.runner import full_disk_as_oserror
from sparsekv.selection import SelectionTrace


def test_a_run_writes_every_row_and_sums_it_up(toy_eval: Settings) -> None:
    settings = toy_eval(cost_rows=1, cost_new_tokens=3)
    counting = Counting()
    outcome = run(settings, counting)
    rows = predictions(settings)
    assert len(by_key(rows)) == 4 * 5  # examples × (full + 2 methods × 2 ratios)
    assert all(set(row) == set(PredictionRow.__annotations__) for row in rows)
    assert counting.starts == [("answers", 20, 0), ("costs", 10, 0)] and counting.rows == 30
    results = lines(Path(settings["output_dir"]) / "results.jsonl")
    assert results == outcome.results and not outcome.interrupted
    assert len(results) == 2 * 5 and all(set(row) == set(ResultRow.__annotations__) for row in results)
    for result in results:
        own = [row for row in rows if row["cell_id"] == result["cell_id"]]
        assert result["n"] == len(own) == 2
        assert result["score"] == sum(row["score"] for row in own) / 2
        assert result["cache_bytes"] == sum(row["cache_bytes"] for row in own) / 2
        assert result["decode_tokens_per_s"] > 0 and result["prefill_s"] > 0 and result["select_s"] >= 0
        assert result["peak_bytes"] is None or result["peak_bytes"] > 10**7
        expected = result["compression_ratio"]
        assert result["achieved_compression"] == pytest.approx(expected, abs=0.01)
        assert (result["dtype"], result["device"], result["metric"]) == ("float32", "cpu", "string_match_all")
        assert result["full_cache_bytes"] == sum(r["context_tokens"] for r in own) / 2 * 2 * 3 * 2 * 16 * 4
    ratios = [r["cache_bytes"] / r["full_cache_bytes"] for r in results if r["compression_ratio"] == 0.75]
    assert all(0.25 <= ratio < 0.28 for ratio in ratios)


def test_scores_are_those_of_the_metric(toy_eval: Settings, tmp_path: Path) -> None:
    """Rows whose reference is what the model says score 100, others 0."""
    said = {row["example_id"]: row["prediction"] for row in _full_only(toy_eval, tmp_path / "a", None)}
    source = Path(toy_eval()["benchmarks"][0]["path"])
    rows = lines(source)
    for index, (row, text) in enumerate(zip(rows, said.values(), strict=True)):
        row["answer"] = text.strip()[1:4] if index % 2 == 0 else "not what it says"
    changed = tmp_path / "changed.jsonl"
    changed.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = [row["score"] for row in _full_only(toy_eval, tmp_path / "b", changed)]
    assert scores == [100.0, 0.0, 100.0, 0.0]


def _full_only(toy_eval: Settings, folder: Path, data: Path | None) -> list[dict[str, Any]]:
    settings = toy_eval(methods=["full"], output_dir=str(folder))
    if data is not None:
        settings["benchmarks"] = [{"name": "local", "path": str(data)}]
    run(settings)
    return predictions(settings)


def test_run_json_says_what_ran(toy_eval: Settings) -> None:
    settings = toy_eval(methods=["full"])
    run(settings)
    data = json.loads((Path(settings["output_dir"]) / "run.json").read_text())
    assert data["identity"]["model"] == "toy-llama" and data["identity"]["dtype"] == "float32"
    assert data["seed"] == 0 and data["command"] == "test" and data["finished"]
    assert data["config"]["methods"][0]["name"] == "full"
    assert {"python", "torch", "transformers", "kvpress", "sparsekv"} <= set(data["versions"])
    assert data["machine"]["cores"] >= 1 and len(data["sessions"]) == 1


def test_the_same_run_again_does_nothing(toy_eval: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = toy_eval(cost_rows=1, cost_new_tokens=2)
    first = run(settings)
    before = (Path(settings["output_dir"]) / "predictions.jsonl").read_bytes()

    def never(*args: Any) -> None:
        raise AssertionError("answered again")

    monkeypatch.setattr(Answerer, "answer", never)
    counting = Counting()
    second = run(settings, counting)
    assert second.results == first.results and counting.rows == 0
    assert (Path(settings["output_dir"]) / "predictions.jsonl").read_bytes() == before
    assert len(second.run["sessions"]) == 2


def test_costs_can_be_measured_on_the_first_task_alone(toy_eval: Settings) -> None:
    counting = Counting()
    outcome = run(toy_eval(cost_rows=1, cost_tasks=1, cost_new_tokens=2), counting)
    assert counting.starts[1] == ("costs", 5, 0)
    tasks = list(dict.fromkeys(row["task"] for row in outcome.results))
    timed = {row["task"] for row in outcome.results if row["decode_tokens_per_s"] is not None}
    assert len(tasks) == 2 and timed == {tasks[0]}


def test_costs_are_measured_on_the_first_tasks_of_every_length(toy_eval: Settings) -> None:
    """The cost of a context depends on its length, hardly on its task."""
    needle = {
        "name": "needle",
        "context_length": [400, 500],
        "depths": [0, 100],
        "rows": 1,
        "max_new_tokens": 2,
    }
    settings = toy_eval(benchmarks=[needle], methods=["full"], cost_rows=1, cost_tasks=1, cost_new_tokens=2)
    counting = Counting()
    outcome = run(settings, counting)
    assert counting.starts == [("answers", 4, 0), ("costs", 2, 0)]
    timed = [row["context_length"] for row in outcome.results if row["prefill_s"] is not None]
    assert len(outcome.results) == 4 and timed == [400, 500]


def test_costs_are_measured_again_when_their_length_changes(toy_eval: Settings) -> None:
    settings = toy_eval(methods=["full"], cost_rows=2, cost_tasks=1, cost_new_tokens=2)
    first = run(settings).results[0]
    file = Path(settings["output_dir"]) / "costs.jsonl"
    again = Counting()
    second = run(settings | {"cost_new_tokens": 4}, again).results[0]
    assert again.starts[1] == ("costs", 2, 0)
    rows = lines(file)
    assert [row["new_tokens"] for row in rows] == [2, 2, 4, 4]
    for result, pair in ((first, rows[:2]), (second, rows[2:])):
        assert result["decode_tokens_per_s"] == sum(row["decode_tokens_per_s"] for row in pair) / 2
    # Back to the first length: nothing to measure. Rows that do not say how long they were count for no length.
    back = Counting()
    assert run(settings, back).results[0] == first and back.starts[1] == ("costs", 2, 2)
    unsaid = [{k: v for k, v in row.items() if k != "new_tokens"} for row in rows[:2]]
    file.write_text("".join(json.dumps(row) + "\n" for row in unsaid))
    run(settings)
    assert [row.get("new_tokens") for row in lines(file)] == [None, None, 2, 2]


def test_ctrl_c_keeps_what_is_done_and_the_same_command_goes_on(toy_eval: Settings, tmp_path: Path) -> None:
    settings = toy_eval()
    stopped = run(settings, Counting(stop_after=10))
    assert stopped.interrupted and len(predictions(settings)) == 10
    assert {row["n"] for row in stopped.results} == {2} and len(stopped.results) == 5  # task "a" is done
    assert stopped.run["finished"] is None
    done = run(settings)
    whole = toy_eval(output_dir=str(tmp_path / "whole"))
    run(whole)
    assert not done.interrupted
    assert by_key(predictions(settings)) == by_key(predictions(whole))


def test_one_method_shares_its_budget_over_the_model_beside_others(toy_eval: Settings) -> None:
    methods = ["knorm", {"name": "knorm", "budget_scope": "model"}]
    settings = toy_eval(methods=methods, compression_ratios=[0.5], limit=1, record_selections=1)
    results = run(settings).results
    assert [row["budget_scope"] for row in results[:2]] == ["head", "model"]
    counts = {}
    for row in results[:2]:
        (file,) = (Path(settings["output_dir"]) / "selections" / row["cell_id"]).iterdir()
        counts[row["budget_scope"]] = [
            len(head) for layer in SelectionTrace.load(file).kept[0] for head in layer
        ]
    assert len(set(counts["head"])) == 1 < len(set(counts["model"]))
    assert sum(counts["head"]) == sum(counts["model"])


def test_a_torn_last_line_is_answered_again(toy_eval: Settings) -> None:
    settings = toy_eval()
    run(settings)
    path = Path(settings["output_dir"]) / "predictions.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    run(settings)
    assert by_key(predictions(settings)) == by_key([json.loads(line) for line in whole.splitlines()])


def test_methods_ratios_and_rows_extend_a_folder(toy_eval: Settings, tmp_path: Path) -> None:
    settings = toy_eval(methods=["full", "knorm"], compression_ratios=[0.5], limit=1)
    run(settings)
    first = predictions(settings)
    assert len(first) == 2 * 2
    extended = run(toy_eval())
    assert predictions(settings)[: len(first)] == first
    whole = toy_eval(output_dir=str(tmp_path / "whole"))
    assert [r["score"] for r in extended.results] == [r["score"] for r in run(whole).results]
    assert by_key(predictions(settings)) == by_key(predictions(whole))
    # A smaller command afterwards loses nothing: the other cells stay in the results.
    again = run(toy_eval(methods=["full"], limit=1))
    assert len(again.results) == 10 and {row["n"] for row in again.results} == {2}


def test_new_tasks_extend_a_folder(toy_eval: Settings, toy_data: Path) -> None:
    only_a = {"name": "local", "path": str(toy_data), "tasks": ["a"]}
    settings = toy_eval(methods=["full"], benchmarks=[only_a])
    run(settings)
    outcome = run(toy_eval(methods=["full"]))
    assert [row["task"] for row in outcome.results] == ["a", "b"] and len(predictions(settings)) == 4


def test_a_full_disk_keeps_the_results_so_far(toy_eval: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = toy_eval(methods=["full"], batch_rows=1)  # four writes; the third fails
    real = os.write
    written = []

    def fills_up(descriptor: int, data: bytes) -> int:
        if b'"prompt_sha"' in bytes(data):
            written.append(1)
            if len(written) > 2:
                raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", fills_up)
    with pytest.raises(OSError, match="No space"):
        run(settings)
    monkeypatch.undo()
    kept = predictions(settings)
    assert len(kept) == 2
    run(settings)
    assert predictions(settings)[:2] == kept and len(by_key(predictions(settings))) == 4


def test_selections_are_recorded_where_they_can_be_told(toy_eval: Settings) -> None:
    methods = ["full", "knorm", "kvzip", "adakv_snapkv", "merging_knorm"]
    settings = toy_eval(methods=methods, compression_ratios=[0.5], limit=2)
    run(settings)
    outcome = run(settings | {"record_selections": 1})  # a finished run can be recorded too
    folder = Path(settings["output_dir"]) / "selections"
    told = {row["cell_id"] for row in outcome.results if row["method"] != "merging_knorm"}
    assert {p.name for p in folder.iterdir()} == told
    rows = by_key(predictions(settings))
    for cell_id in told:
        (file,) = (folder / cell_id).iterdir()
        trace = SelectionTrace.load(file)
        row = rows[cell_id, file.name.removesuffix(".safetensors").replace(".", "/")]
        heads = [head for layer in trace.kept[0] for head in layer]
        assert trace.length == row["context_tokens"] and len(heads) == 3 * 2
        assert 1 - sum(map(len, heads)) / (6 * trace.length) == pytest.approx(row["achieved_compression"])


def test_a_full_disk_while_recording_is_told_as_one(tmp_path: Path) -> None:
    from safetensors import SafetensorError

    file = tmp_path / "x.safetensors"
    file.with_name("x.safetensors.tmp").touch()
    with pytest.raises(OSError, match="No space left") as caught, full_disk_as_oserror(file):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert caught.value.errno == errno.ENOSPC and list(tmp_path.iterdir()) == []
    with pytest.raises(SafetensorError), full_disk_as_oserror(file):
        raise SafetensorError("something else")


def test_perplexity_is_scored_beside_answers(toy_eval: Settings) -> None:
    benchmarks = [
        {"name": "perplexity", "context_length": 200, "rows": 2, "continuation_tokens": 40},
        toy_eval()["benchmarks"][0],
    ]
    outcome = run(
        toy_eval(methods=["full", "knorm"], compression_ratios=[0.75], benchmarks=benchmarks, limit=1)
    )
    scored = [row for row in outcome.results if row["metric"] == "perplexity"]
    assert [row["method"] for row in scored] == ["full", "knorm"]
    assert all(row["score"] > 1 for row in scored) and scored[0]["score"] != scored[1]["score"]


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_like_one_that_was_not(toy_eval: Settings, tmp_path: Path) -> None:
    """kill -9 while rows are being written, then resume: the predictions of an uninterrupted run."""
    data = tmp_path / "many.jsonl"
    base = lines(Path(toy_eval()["benchmarks"][0]["path"]))
    rows = [row | {"context": f"{i} {row['context']}"} for i in range(4) for row in base]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = toy_eval(benchmarks=[{"name": "local", "path": str(data)}])
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(settings))
    log = Path(settings["output_dir"]) / "predictions.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "sparsekv.cli.main", "eval", str(config)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if log.exists() and log.stat().st_size:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 0 < len(log.read_bytes().splitlines()) < len(rows) * 5
    run(settings)
    whole = settings | {"output_dir": str(tmp_path / "whole")}
    run(whole)
    assert by_key(predictions(settings)) == by_key(predictions(whole))
    assert len(predictions(settings)) == len(rows) * 5
