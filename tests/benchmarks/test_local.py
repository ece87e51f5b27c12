"""A user's own rows: what is read, and what is refused with which words."""

from __future__ import annotations

import json

import pyarrow
import pytest
from pyarrow import parquet

from sparsekv.benchmarks import BENCHMARKS, BenchmarkConfig
from sparsekv.errors import ConfigError

ROW = {
    "context": "Anna lives in Rome.",
    "question": "Where?",
    "answer": "Rome",
    "max_new_tokens": 5,
    "task": "towns",
}


def write(path, rows) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def load(path, **fields):
    return BENCHMARKS.get("dataset").load(BenchmarkConfig(name="local", path=path, **fields), None, 0)


def test_rows_become_examples(tmp_path):
    second = {**ROW, "answer": ["Rome", 7], "answer_prefix": "In ", "task": "b/c", "max_new_tokens": 9.0}
    one, two = load(write(tmp_path / "set.jsonl", [ROW, "", second]), metric="qa_f1")
    assert (one.context, one.question, one.answer_prefix) == ("Anna lives in Rome.", "Where?", "")
    assert (one.references, one.max_new_tokens, one.metric, one.task) == (("Rome",), 5, "f1", "towns")
    assert (two.references, two.max_new_tokens, two.answer_prefix) == (("Rome", "7"), 9, "In ")
    assert [one.example_id, two.example_id] == ["local/towns/0000", "local/b/c/0000"]
    assert one.context_length is None and one.benchmark == "local"


def test_parquet_with_lists(tmp_path):
    path = tmp_path / "set.parquet"
    rows = [{**ROW, "answer": ["Rome", "Roma"]}, {**ROW, "answer": ["x"], "context": "Other."}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    one, two = load(str(path))
    assert one.references == ("Rome", "Roma") and two.context == "Other."
    assert [one.example_id, two.example_id] == ["local/towns/0000", "local/towns/0001"]


def test_first_rows_of_each_wanted_task(tmp_path):
    rows = [{**ROW, "task": task, "question": str(i)} for i, task in enumerate("aabbab")]
    path = write(tmp_path / "set.jsonl", rows)
    assert [(e.task, e.question) for e in load(path, rows=2)] == [
        ("a", "0"),
        ("a", "1"),
        ("b", "2"),
        ("b", "3"),
    ]
    assert [e.question for e in load(path, tasks=["b"])] == ["2", "3", "5"]
    assert load(path, tasks=["b"])[2].example_id == "local/b/0002"
    with pytest.raises(ConfigError, match=r"has task 'c'; it has: a, b$"):
        load(path, tasks=["c"])


def test_defaults_for_task_and_limit(tmp_path):
    row = {key: ROW[key] for key in ("context", "question", "answer")}
    path = write(tmp_path / "mine.jsonl", [row])
    (example,) = load(path, max_new_tokens=3)
    assert (example.task, example.max_new_tokens) == ("mine", 3)
    with pytest.raises(ConfigError, match=r"mine\.jsonl line 1: field 'max_new_tokens' is missing"):
        load(path)
    (example,) = load(write(tmp_path / "mine.jsonl", [ROW]), max_new_tokens=3)
    assert example.max_new_tokens == 3  # the configuration takes precedence


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (
            {"question": "?", "answer": "x"},
            "line 2: field 'context' is missing; the row has: question, answer",
        ),
        ({**ROW, "context": None}, "line 2: field 'context' is missing"),
        ({**ROW, "context": " "}, "line 2: field 'context' is empty"),
        ({**ROW, "question": 3}, "line 2: field 'question' must be text, not int"),
        ({**ROW, "answer": []}, "line 2: field 'answer' must be a text or a list of at least one"),
        ({**ROW, "answer": ""}, "line 2: field 'answer' is empty"),
        ({**ROW, "answer": ["Rome", " "]}, "line 2: field 'answer' is empty"),
        (
            {**ROW, "answer": float("nan")},
            "line 2: field 'answer' must be a text or a list of at least one, not nan",
        ),
        (
            {**ROW, "answer": ["Rome", {"x": 1}]},
            "line 2: field 'answer' must be a text or a list of at least one, not",
        ),
        ({**ROW, "question": ""}, "line 2: field 'question' is empty"),
        ({**ROW, "context": "a \ud83d b"}, "line 2: field 'context' is not valid text"),
        ({**ROW, "question": "\ud800?"}, "line 2: field 'question' is not valid text"),
        ({**ROW, "answer_prefix": "\ud800"}, "line 2: field 'answer_prefix' is not valid text"),
        ({**ROW, "task": "\ud800"}, "line 2: field 'task' is not valid text"),
        ({**ROW, "answer": ["Rome", "\ud800"]}, "line 2: field 'answer' is not valid text"),
        ({**ROW, "answer": None}, "line 2: field 'answer' is missing"),
        (
            {**ROW, "max_new_tokens": 0},
            "line 2: field 'max_new_tokens' must be a whole number of at least 1, not 0",
        ),
        ({**ROW, "max_new_tokens": "9"}, "line 2: field 'max_new_tokens' must be a whole number"),
        (
            {**ROW, "max_new_tokens": float("inf")},
            "line 2: field 'max_new_tokens' must be a whole number of at least 1, not inf",
        ),
        (
            {**ROW, "max_new_tokens": float("nan")},
            "line 2: field 'max_new_tokens' must be a whole number of at least 1, not nan",
        ),
        ({**ROW, "max_new_tokens": True}, "line 2: field 'max_new_tokens' must be a whole number"),
        ({**ROW, "max_new_tokens": 2.5}, "line 2: field 'max_new_tokens' must be a whole number"),
        (
            json.dumps({**ROW, "max_new_tokens": 7}).replace("7", "-" + 5000 * "7"),
            "line 2: field 'max_new_tokens' must be a whole number of at least 1, not a number of 5000 digits",
        ),
        (
            json.dumps({**ROW, "question": 7}).replace("7", 5000 * "7"),
            "line 2: field 'question' must be text, not LongInteger",
        ),
        (json.dumps({**ROW, "answer": 7}).replace("7", 5000 * "7"), "line 2: field 'answer' must be a text"),
        ("[1]", "line 2: a row must be an object with fields, not list"),
        ('{"context": ', "line 2: not JSON: Expecting value (column 13)"),
    ],
)
def test_a_bad_row_is_named(tmp_path, second, message):
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path / "set.jsonl", [ROW, second]))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_bad_files(tmp_path):
    with pytest.raises(ValueError, match=r"path: no such file: .*none\.jsonl"):
        BenchmarkConfig(name="local", path=str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match=r"ends in '\.csv'; allowed: \.jsonl, \.parquet"):
        BenchmarkConfig(name="local", path=write(tmp_path / "x.csv", [ROW]))
    with pytest.raises(ValueError, match="neither a file nor the id"):
        BenchmarkConfig(name="local", path="what is this")
    with pytest.raises(ValueError, match=r"needs a \.jsonl or \.parquet file"):
        BenchmarkConfig(name="local")
    with pytest.raises(ValueError, match=r"unknown metric 'exact' .*exact_match"):
        BenchmarkConfig(name="local", path=write(tmp_path / "x.jsonl", [ROW]), metric="exact")
    with pytest.raises(ConfigError, match="is empty"):
        load(write(tmp_path / "x.jsonl", ["", ""]))
    with pytest.raises(ConfigError, match="not a readable parquet file"):
        load(write(tmp_path / "x.parquet", [ROW]))


def test_the_hub_offline_fails_in_one_line(monkeypatch):
    import datasets

    def offline(*args, **kwargs):
        assert (args, kwargs) == (("owner/set", "4096"), {"split": "validation"})
        raise ConnectionError("Couldn't reach the Hub\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ConfigError) as caught:
        load("owner/set", subset="4096", split="validation")
    assert str(caught.value) == (
        "path: cannot load data set 'owner/set' (subset 4096, split validation); offline, give a local file "
        "instead: Couldn't reach the Hub"
    )


def test_hub_rows_are_read_as_files_are(monkeypatch):
    import datasets

    table = datasets.Dataset.from_list([{key: ROW[key] for key in ROW if key != "task"}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: table)
    (example,) = load("owner/set")
    assert example.references == ("Rome",) and example.task == "set"
