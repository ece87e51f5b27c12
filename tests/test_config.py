"""What a config file may say, and what is told to someone who got it wrong."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparsekv.config import EvalConfig, load_eval_config, parse_config
from sparsekv.config_files import load_settings, parse_value
from sparsekv.errors import ConfigError

CONFIGS = Path(__file__).parents[1] / "configs" / "eval"

MINIMAL = {"model": "m", "benchmarks": [{"name": "ruler"}], "methods": ["full"]}


def write(path: Path, settings: Any) -> Path:
    path.write_text(settings if isinstance(settings, str) else yaml.safe_dump(settings))
    return path


def problem(settings: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(EvalConfig, settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_command_line_beats_yaml_beats_defaults(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", MINIMAL | {"seed": 7, "limit": 3})
    assert load_eval_config(path).seed == 7
    config = load_eval_config(path, ["limit=5", "benchmarks.0.rows=2", "benchmarks[0].context_length=512"])
    assert (config.seed, config.limit, config.cost_rows) == (7, 5, 0)
    assert (config.benchmarks[0].rows, config.benchmarks[0].context_length) == (2, [512])
    config = load_eval_config(path, ["methods=[full, {name: snapkv, args: {window_size: 8}}]"])
    assert [(m.name, m.args) for m in config.methods] == [("full", {}), ("snapkv", {"window_size": 8})]


def test_values_on_the_command_line_are_yaml_1_2() -> None:
    assert parse_value("0123") == 123  # YAML 1.1 reads 83
    assert parse_value("1e-3") == 0.001  # YAML 1.1 reads text
    assert parse_value("1:30") == "1:30"  # YAML 1.1 reads 90
    assert parse_value("no") == "no"
    assert parse_value("0x1F") == 31
    assert parse_value("null") is None and parse_value("true") is True
    assert parse_value("[0.5, 0.75]") == [0.5, 0.75]


def test_references_between_keys(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", {"model": "m", "output_dir": "results/${model}"})
    assert load_settings(path, ["model=n"]) == {"model": "n", "output_dir": "results/n"}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"limt": 5}, "unknown key 'limt' (did you mean 'limit'?)"),
        (
            {"benchmarks": [{"name": "ruler", "rwos": 1}]},
            "unknown key 'rwos' in benchmarks[0] (did you mean 'rows'?)",
        ),
        (
            {"methods": [{"name": "full", "arg": {}}]},
            "unknown key 'arg' in methods[0] (did you mean 'args'?)",
        ),
        ({"compression_ratios": [0.5, 1.0]}, "compression_ratios[1]: a compression_ratio must be in [0, 1)"),
        ({"compression_ratios": [-0.1]}, "in [0, 1) (the fraction removed), got -0.1"),
        ({"compression_ratios": [float("nan")]}, "in [0, 1) (the fraction removed), got nan"),
        ({"budget_tokens": [0]}, "budget_tokens[0]: input should be greater than or equal to 1, got 0"),
        ({"budget_scope": "heads"}, "budget_scope: input should be 'head', 'layer' or 'model', got 'heads'"),
        ({"phase": "all"}, "phase: input should be 'prefill', 'decode' or 'both', got 'all'"),
        ({"methods": []}, "methods: list should have at least 1 item"),
        ({"device": "cpu", "device_map": "auto"}, "device 'cpu' and device_map 'auto' are both given"),
        ({"benchmarks": [{"name": "rulr"}]}, "unknown benchmark 'rulr' (did you mean 'ruler'?)"),
        (
            {"benchmarks": [{"name": "ruler", "tasks": ["niah_singel_1"]}]},
            "(did you mean 'niah_single_1'?)",
        ),
    ],
)
def test_mistakes_are_named_in_one_line(change: dict[str, Any], expected: str) -> None:
    assert expected in problem(MINIMAL | change)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"limit": "10"}, "limit: input should be a valid integer, got '10'"),
        ({"limit": True}, "limit: input should be a valid integer, got True"),
        ({"limit": 2.0}, "limit: input should be a valid integer, got 2.0"),
        ({"seed": False}, "seed: input should be a valid integer, got False"),
        ({"budget_tokens": ["64"]}, "budget_tokens[0]: input should be a valid integer, got '64'"),
        ({"query_aware": "yes"}, "query_aware: input should be a valid boolean, got 'yes'"),
        ({"truncate": 1}, "truncate: input should be a valid boolean, got 1"),
        ({"compression_ratios": ["1.5"]}, "compression_ratios[0]: input should be a valid number, got '1.5'"),
        ({"compression_ratios": [False]}, "compression_ratios[0]: input should be a valid number, got False"),
        (
            {"benchmarks": [{"name": "ruler", "rows": "10"}]},
            "benchmarks[0].rows: input should be a valid integer",
        ),
        (
            {"benchmarks": [{"name": "ruler", "rows": True}]},
            "benchmarks[0].rows: input should be a valid integer",
        ),
        (
            {"benchmarks": [{"name": "ruler", "rows": 2.0}]},
            "benchmarks[0].rows: input should be a valid integer",
        ),
        (
            {"benchmarks": [{"name": "ruler", "context_length": "4096"}]},
            "benchmarks[0].context_length[0]: input should be a valid integer, got '4096'",
        ),
        ({"benchmarks": [{"name": "needle", "depths": ["50"]}]}, "depths[0]: input should be a valid number"),
        ({"benchmarks": [{"name": "ruler", "truncate": "no"}]}, "truncate: input should be a valid boolean"),
    ],
)
def test_a_text_is_no_number_and_a_number_no_truth(change: dict[str, Any], expected: str) -> None:
    assert expected in problem(MINIMAL | change)


def test_whole_numbers_do_where_fractions_are_wanted() -> None:
    needle = {"name": "needle", "depths": [0, 50], "context_length": 512}
    config = parse_config(EvalConfig, MINIMAL | {"compression_ratios": [0, 0.5], "benchmarks": [needle]})
    assert config.compression_ratios == [0.0, 0.5] and type(config.compression_ratios[0]) is float
    assert config.benchmarks[0].depths == [0.0, 50.0] and config.benchmarks[0].context_length == [512]


def test_a_missing_key_is_named() -> None:
    assert "key 'model' is missing" in problem({k: v for k, v in MINIMAL.items() if k != "model"})


def test_an_unknown_key_is_told_before_the_key_it_was_meant_to_be() -> None:
    settings = {k: v for k, v in MINIMAL.items() if k != "methods"} | {"method": ["full"]}
    assert "unknown key 'method' (did you mean 'methods'?) (and 1 more)" in problem(settings)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: [a, b\nseed: 1\n", "c.yaml:2:5: malformed YAML"),
        ("model: a\nmodel: b\n", "c.yaml:2:1: malformed YAML: key 'model' is given twice"),
        ("- model\n", "expected keys and values at the top, found a list"),
        ("model: ${nope}\n", "Interpolation key 'nope' not found"),
        ("a:\n\t- b\n", "c.yaml:2:1: malformed YAML"),
    ],
)
def test_a_malformed_file_is_told_by_line(tmp_path: Path, text: str, expected: str) -> None:
    path = write(tmp_path / "c.yaml", text)
    with pytest.raises(ConfigError) as caught:
        load_eval_config(path)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_or_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml' does not exist"):
        load_eval_config(tmp_path / "nothing.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        load_eval_config(tmp_path)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("limit", "is not of the form key=value"),
        ("benchmarks.3.rows=1", "'benchmarks' is a list of 1; '3' is not an index from 0 to 0"),
        ("benchmarks.ruler.rows=1", "'ruler' is not an index"),
        ("model.x=3", "'model' is 'm' and has no 'x'"),
        ("limit=[1", "value '[1' cannot be read"),
        ("limt=1", "unknown key 'limt' (did you mean 'limit'?)"),
    ],
)
def test_bad_overrides(tmp_path: Path, override: str, expected: str) -> None:
    path = write(tmp_path / "c.yaml", MINIMAL)
    with pytest.raises(ConfigError) as caught:
        load_eval_config(path, [override])
    assert expected in str(caught.value)


def test_reading_a_config_imports_no_torch(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", MINIMAL)
    code = (
        "import sys; from sparsekv.config import load_eval_config; load_eval_config(sys.argv[1]); "
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_shipped_configs_are_valid_and_say_how_to_run_them(name: str) -> None:
    path = CONFIGS / f"{name}.yaml"
    config = load_eval_config(path)
    assert config.output_dir == f"results/{name}"
    assert path.read_text().splitlines()[0] == f"# sparsekv eval configs/eval/{name}.yaml"
    assert config.methods[0].name == "full"


def test_shipped_configs_name_methods_that_exist(toy_eval: Callable[..., Any]) -> None:
    from sparsekv.evaluation.cells import settings
    from sparsekv.evaluation.plan import check_combinations

    for path in sorted(CONFIGS.glob("*.yaml")):
        config = load_eval_config(path)
        for one in (config, *(config.of_variant(variant) for variant in config.variants)):
            chosen = settings(one)
            check_combinations(chosen)
            assert len({s.label for s in chosen}) == len(one.methods)


def test_the_gain_is_judged_on_texts_that_were_not_trained_on() -> None:
    for name, ratios in (("eit_vs_base", [0.7]), ("any_vs_base", [0.5])):
        config = load_eval_config(CONFIGS / f"{name}.yaml")
        assert config.compression_ratios == ratios and not config.query_aware and len(config.methods) == 10
        assert {(spec.haystack, spec.squad) for spec in config.benchmarks} == {("book_eval", "builtin")}
        assert config.benchmarks[0].rows == 100 and config.benchmarks[0].tasks is None
        assert config.compare is not None and config.compare.min_baseline_score == 20


def test_frozen_predictors_are_judged_on_the_same_rows_as_adapters() -> None:
    ours, theirs = (
        load_eval_config(CONFIGS / f"{name}.yaml") for name in ("relevance_vs_base", "eit_vs_base")
    )
    assert ours.benchmarks == [theirs.benchmarks[0]] and ours.seed == theirs.seed and not ours.query_aware
    assert ours.compare == theirs.compare and ours.compression_ratios == [0.7, 0.8]
    assert {m.name for m in theirs.methods} == {m.name for m in ours.methods}
    base, two_pass, relevance = ours.variants
    assert base.changes() == {} and [m.name for m in two_pass.methods or []] == ["kvzip"]
    assert {(m.name, m.passive, m.budget_scope) for m in relevance.methods or []} == {
        ("atskv", None, "model"),
        ("relevance", None, "model"),
        ("atskv", "cpu", "model"),
    }


def test_the_experiment_of_the_issue_is_complete() -> None:
    config = load_eval_config(CONFIGS / "atskv.yaml")
    assert config.benchmarks[0].context_length == [512, 1024, 2048, 4096]
    names = [(m.name, m.passive) for m in config.methods]
    assert names == [
        *((name, None) for name in ("full", "sliding_window", "dynamic_kv", "rocket_kv", "atskv")),
        ("atskv", "cpu"),
    ]
    assert config.cost_rows and config.cost_tasks and config.adapter == "adapters/smollm2-135m-relevance"
