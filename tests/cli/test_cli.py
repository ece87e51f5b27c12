"""The command line, end to end on the toy model."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparsekv.cli.main import alias_app, app, call, share_cores
from sparsekv.evaluation.runner import Silent

Settings = Callable[..., dict[str, Any]]


@pytest.fixture
def config(toy_eval: Settings, tmp_path: Path) -> Callable[..., Path]:
    """`config(**changes)`: a config file of the toy evaluation."""

    def write(**changes: Any) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(toy_eval(**changes)))
        return path

    return write


def sparsekv(*arguments: str) -> int:
    return call(app, "sparsekv", [str(a) for a in arguments])


def test_eval_prints_the_table_and_writes_the_files(
    config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sparsekv("eval", str(config()), "methods=[full, knorm]", "compression_ratios=[0.75]") == 0
    printed = capsys.readouterr()
    lines = [line.split() for line in printed.out.splitlines() if line.strip()]
    assert lines[0][:4] == ["method", "requested", "achieved", "average"]
    assert lines[2][:3] == ["full", "–", "0.000"] and lines[3][0] == "knorm"
    assert lines[3][1] == "0.75" and 0.74 < float(lines[3][2]) < 0.76
    assert printed.err == ""
    names = {p.name for p in (tmp_path / "out").iterdir()} - {".lock"}
    assert names == {"results.jsonl", "predictions.jsonl", "results.md", "scores.png", "run.json"}
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["command"].startswith("sparsekv eval ") and "'methods=[full, knorm]'" in run["command"]


def test_the_alias_is_the_same_command(
    config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(methods=["full"])
    assert call(alias_app, "sparsekv-eval", ["--config", str(path), "limit=1"]) == 0
    assert len((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()) == 2
    assert sparsekv("eval", str(path), "limit=1") == 0
    assert len((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()) == 2


def test_ctrl_c_says_how_to_go_on(
    config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sparsekv.cli.progress import Bar

    def stop(self: Bar, rows: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Bar, "advance", stop)
    path = config(methods=["full"], batch_rows=1)
    assert sparsekv("eval", str(path)) == 130
    printed = capsys.readouterr()
    assert f"stopped; 1 rows are kept in {path.parent / 'out'}. To go on: sparsekv eval {path}" in printed.err
    assert (path.parent / "out" / "results.md").exists()
    assert Silent().advance(1) is None


BAD = [
    ({"limt": 1}, [], "unknown key 'limt' (did you mean 'limit'?)"),
    ({}, ["limt=1"], "unknown key 'limt' (did you mean 'limit'?)"),
    ({"methods": ["snapvk"]}, [], "unknown method 'snapvk' (did you mean 'snapkv'?)"),
    ({"benchmarks": [{"name": "ruler", "tasks": ["vtt"]}]}, [], "(did you mean 'vt'?)"),
    ({"benchmarks": [{"name": "rulers"}]}, [], "unknown benchmark 'rulers' (did you mean 'ruler'?)"),
    ({"compression_ratios": [1.0]}, [], "compression_ratio must be in [0, 1)"),
    ({}, ["compression_ratios=[-0.5]"], "compression_ratio must be in [0, 1)"),
    (
        {"methods": [{"name": "sink_recent", "args": {"n_recent": 8}}]},
        [],
        "sink_recent: n_recent=8 and compression_ratio=0.5 are both given",
    ),
    ({"budget_tokens": [2], "compression_ratios": []}, [], "is under n_sink=4"),
    ({"compression_ratios": []}, ["methods=[sink_recent]"], "sink_recent needs a budget"),
    ({"compression_ratios": []}, ["methods=[knorm]"], "method 'knorm' needs a budget"),
    ({"benchmarks": [{"name": "local", "path": "/nowhere/rows.jsonl"}]}, [], "/nowhere/rows.jsonl"),
    ({"model": "/nowhere/model"}, [], "model folder '/nowhere/model' does not exist"),
    ({"phase": "decode", "methods": ["kvzip"]}, [], "method 'kvzip' can't evict while decoding"),
    (
        {"chunk": 16, "methods": ["sliding_window"]},
        [],
        "method 'sliding_window' reads the whole context at once",
    ),
    ({"device": "cpu", "device_map": "auto"}, [], "are both given"),
    ({"seed": "x"}, [], "seed: input should be a valid integer"),
]


def one_line_error(capsys: pytest.CaptureFixture[str]) -> str:
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1 and printed.err.endswith("\n")
    assert "Traceback" not in printed.err
    return printed.err


@pytest.mark.parametrize("command", ["eval", "validate"])
@pytest.mark.parametrize(("changes", "overrides", "expected"), BAD)
def test_bad_input_is_one_line_and_exit_code_2(
    config: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    command: str,
    changes: dict[str, Any],
    overrides: list[str],
    expected: str,
) -> None:
    assert sparsekv(command, str(config(**changes)), *overrides) == 2
    assert expected in one_line_error(capsys)


@pytest.mark.parametrize("command", ["eval", "validate"])
def test_missing_and_malformed_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert sparsekv(command, str(tmp_path / "none.yaml")) == 2
    assert "none.yaml' does not exist" in one_line_error(capsys)
    (tmp_path / "bad.yaml").write_text("model: [a\nb: 1\n")
    assert sparsekv(command, str(tmp_path / "bad.yaml")) == 2
    assert "bad.yaml:2:2: malformed YAML" in one_line_error(capsys)


@pytest.mark.parametrize("command", ["eval", "validate"])
def test_a_row_without_context_is_told(
    config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"question": "?", "answer": "x", "max_new_tokens": 4, "task": "a"}\n')
    assert sparsekv(command, str(config(benchmarks=[{"name": "local", "path": str(data)}]))) == 2
    message = one_line_error(capsys)
    assert "context" in message and "rows.jsonl" in message


@pytest.mark.parametrize("command", ["eval", "validate"])
def test_a_context_longer_than_the_model_allows(
    config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    data = tmp_path / "rows.jsonl"
    row = {
        "context": "word " * 1800,
        "question": "?",
        "answer_prefix": "",
        "answer": "x",
        "max_new_tokens": 2,
    }
    data.write_text(json.dumps(row | {"task": "a"}) + "\n")
    benchmarks = [{"name": "local", "path": str(data)}]
    path = config(benchmarks=benchmarks, methods=["sink_recent"], compression_ratios=[], budget_tokens=[64])
    assert sparsekv(command, str(path)) == 2
    assert "the model allows 8192; set truncate: true" in one_line_error(capsys)
    assert sparsekv(command, str(path), "truncate=true") == 0
    assert sparsekv(command, str(path), "chunk=2048", f"output_dir={tmp_path / 'chunked'}") == 0
    capsys.readouterr()
    assert sparsekv(command, str(path), "chunk=2048", "methods=[full]", f"output_dir={tmp_path / 'c'}") == 2
    assert "method 'full' keeps all of them" in one_line_error(capsys)
    if command == "eval":
        (cut,) = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").open()]
        (chunked,) = [json.loads(line) for line in (tmp_path / "chunked" / "predictions.jsonl").open()]
        assert 8000 < cut["context_tokens"] < 8192 < 9000 < chunked["context_tokens"]
        assert chunked["achieved_compression"] == pytest.approx(1 - 64 / chunked["context_tokens"])


def test_an_output_folder_of_another_run(
    config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(methods=["full"], limit=1)
    assert sparsekv("eval", str(path)) == 0
    capsys.readouterr()
    assert sparsekv("eval", str(path), "seed=5") == 2
    assert "holds another run: seed was 0, now 5" in one_line_error(capsys)
    (path.parent / "mine").mkdir()
    (path.parent / "mine" / "notes.txt").write_text("x")
    for command in ("eval", "validate"):
        assert sparsekv(command, str(path), f"output_dir={path.parent / 'mine'}") == 2
        assert "holds no run of sparsekv (found 'notes.txt')" in one_line_error(capsys)
        assert sparsekv(command, str(path), f"output_dir={path.parent / 'mine' / 'notes.txt' / 'deep'}") == 2
        assert "notes.txt' is a file" in one_line_error(capsys)


def test_validate_tells_what_eval_would_tell_of_an_earlier_run(
    config: Callable[..., Path], toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(toy_data.read_text())
    local = {"name": "local", "path": str(data)}
    path = config(methods=["full"], limit=1, benchmarks=[local])
    assert sparsekv("eval", str(path)) == 0
    log = path.parent / "out" / "predictions.jsonl"
    with log.open("a") as stream:
        stream.write('{"torn')
    before = {p.name: p.read_bytes() for p in (path.parent / "out").iterdir()}
    capsys.readouterr()
    assert sparsekv("validate", str(path), "limit=2", "methods=[full, knorm]") == 0
    capsys.readouterr()
    told = {}
    for changes in (
        "seed=5",
        "dtype=bfloat16",
        "chunk=64",
        "max_new_tokens=3",
        "benchmarks.0.max_new_tokens=3",
        "benchmarks.0.metric=f1",
    ):
        for command in ("validate", "eval"):
            extra = ["methods=[{name: sink_recent, budget_tokens: [32]}]"] if "chunk" in changes else []
            assert sparsekv(command, str(path), changes, *extra) == 2
            told[command] = one_line_error(capsys)
            if command == "validate":
                assert before == {p.name: p.read_bytes() for p in (path.parent / "out").iterdir()}
        assert told["validate"] == told["eval"]
        assert f"holds another run: {changes.partition('=')[0].rpartition('.')[2]} " in told["eval"]
        log.write_bytes(before["predictions.jsonl"])
    data.write_text(toy_data.read_text().replace("lazy dog", "lazy cat"))
    assert sparsekv("validate", str(path)) == 2
    assert "the prompt of local/a/0000 has sha" in one_line_error(capsys)


def test_a_full_disk(
    config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = os.write

    def full(descriptor: int, data: bytes) -> int:
        if b'"prompt_sha"' in bytes(data):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", full)
    assert sparsekv("eval", str(config(methods=["full"], limit=1))) == 2
    monkeypatch.undo()
    assert "the disk is full" in one_line_error(capsys)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["evil", "x.yaml"], "No such command 'evil'"),
        (["eval"], "Missing argument"),
        (["eval", "x.yaml", "--fast"], "No such option: --fast"),
        (["ls", "method"], "unknown list 'method' (did you mean 'methods'?)"),
        (["fetch-model", "smollm3"], "unknown model 'smollm3' (did you mean 'smollm2'?)"),
        (["generate", "--file", "none.txt", "--question", "?"], "error: --file: no such file: none.txt"),
        (["generate", "--file", "x", "--question", "?", "--ratio", "1"], "--ratio must be in [0, 1)"),
        (["generate", "--file", "x", "--question", " "], "--question is empty"),
        (
            ["generate", "--file", "x", "--question", "?", "--chunk", "0"],
            "--chunk must be at least 1 token, got 0",
        ),
        (
            ["generate", "--file", "x", "--question", "?", "--budget-tokens", "0"],
            "--budget-tokens must be at least 1 token, got 0",
        ),
        (
            ["generate", "--file", "x", "--question", "?", "--max-new-tokens", "0"],
            "--max-new-tokens must be at least 1 token, got 0",
        ),
        (
            ["generate", "--file", "x", "--question", "?", "--ratio", "0.5", "--budget-tokens", "9"],
            "both given",
        ),
    ],
)
def test_wrong_usage_is_one_line_too(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sparsekv(*arguments) == 2
    assert expected in one_line_error(capsys)


def test_validate_says_what_would_run(
    config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = config()
    assert sparsekv("validate", str(path)) == 0
    printed = capsys.readouterr().out
    assert "5 settings × 2 tasks = 10 cells; 4 examples, 20 rows" in printed
    assert "local/a: 2 rows" in printed
    assert not (path.parent / "out").exists()


def test_ls(capsys: pytest.CaptureFixture[str]) -> None:
    assert sparsekv("ls", "methods") == 0
    methods = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert {"full", "sink_recent", "anchors", "ladder", "h2o", "snapkv", "kvzip", "think"} <= methods
    assert sparsekv("ls", "tasks") == 0
    tasks = {tuple(line.split()[:2]) for line in capsys.readouterr().out.splitlines()}
    assert {("ruler", "niah_single_2"), ("ruler", "vt"), ("perplexity", "continuation")} <= tasks
    assert sparsekv("ls", "models") == 0
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [["--help"], *([name, "-h"] for name in ("eval", "generate", "ls", "validate", "fetch-model"))],
)
def test_help_imports_neither_torch_nor_pydantic(arguments: list[str]) -> None:
    code = (
        "import sys; from sparsekv.cli.main import app, call; code = call(app, 'sparsekv', sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'kvpress', 'omegaconf', 'numpy', 'yaml'} & set(sys.modules); "
        "print('HEAVY', sorted(heavy)); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    assert "Usage: sparsekv" in done.stdout and "HEAVY []" in done.stdout


def test_threads_share_cores_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for given, expected in (
        ({}, "1000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, None),
    ):
        for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        share_cores()
        assert os.environ.get("GOMP_SPINCOUNT") == expected


def test_ls_imports_no_torch() -> None:
    code = (
        "import sys; from sparsekv.cli.main import app, call; "
        "[call(app, 'sparsekv', ['ls', what]) for what in ('methods', 'tasks', 'models')]; "
        "print('HEAVY', 'torch' in sys.modules or 'kvpress' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "HEAVY False" in done.stdout


@pytest.mark.parametrize("arguments", [(), ("relevance",)])
def test_a_command_group_alone_prints_its_help(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    assert sparsekv(*arguments) == 2
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith(" ".join(["Usage: sparsekv", *arguments])) and "Commands:" in told
