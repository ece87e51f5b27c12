"""Several variants of the toy model: the same rows, one folder each, one model at a time."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy_runs import Counting, Settings, by_key, lines, run

from sparsekv.config import EvalConfig, parse_config
from sparsekv.errors import ConfigError
from sparsekv.evaluation import runner
from sparsekv.evaluation.answers import Answerer
from sparsekv.evaluation.folder import RunFolder
from sparsekv.evaluation.records import ComparisonRow
from sparsekv.evaluation.variants import VariantsOutcome, plan_variants, run_variants
from toy import save_toy_model
from toy_variants import save_toy_adapter, variants_of


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy_adapter(tmp_path_factory.mktemp("adapters") / "toy-eit")


@pytest.fixture
def variants(toy_eval: Settings, adapter: Path) -> Settings:
    """`variants(**changes)`: settings of a run of base and adapter."""

    def settings(**changes: Any) -> dict[str, Any]:
        return toy_eval(**(variants_of(adapter) | changes))

    return settings


def run_all(settings: dict[str, Any], progress: Any = None, finished: Any = None) -> VariantsOutcome:
    config = parse_config(EvalConfig, settings)
    with RunFolder(config.output_dir) as folder:
        return run_variants(config, folder, command="test", progress=progress, finished=finished)


def test_each_variant_runs_as_it_would_alone(variants: Settings, adapter: Path, tmp_path: Path) -> None:
    settings = variants()
    counting = Counting()
    outcome = run_all(settings, counting)
    assert counting.starts == [
        ("base (1 of 2): answers", 12, 0),
        ("eit (2 of 2): answers", 8, 0),
    ]
    out = Path(settings["output_dir"])
    assert {p.name for p in out.iterdir()} == {".lock", "base", "eit", "comparisons.jsonl", "run.json"}
    alone = {key: value for key, value in settings.items() if key != "variants"}
    learned = settings["variants"][1] | {"output_dir": str(tmp_path / "x")}
    learned.pop("name")
    for name, own in (("base", {"output_dir": str(tmp_path / "y")}), ("eit", learned)):
        single = run(alone | own)
        assert single.results == outcome.outcomes[name].results == lines(out / name / "results.jsonl")
        assert by_key(lines(out / name / "predictions.jsonl")) == by_key(
            lines(Path(own["output_dir"]) / "predictions.jsonl")
        )
    said = [{r["prediction"] for r in lines(out / name / "predictions.jsonl")} for name in ("base", "eit")]
    assert said[0] != said[1]  # the adapter is really on
    identities = [json.loads((out / name / "run.json").read_text())["identity"] for name in ("base", "eit")]
    assert [i["adapter"] for i in identities] == [None, "toy-eit"]
    assert identities[0]["weights"] != identities[1]["weights"]


def test_comparisons_are_of_the_rows_in_the_folders(variants: Settings) -> None:
    perplexity = {"name": "perplexity", "context_length": 200, "rows": 2, "continuation_tokens": 40}
    benchmarks = [*variants()["benchmarks"], perplexity]  # answers of a random model all score 0
    settings = variants(compare={"resamples": 100}, benchmarks=benchmarks)
    outcome = run_all(settings)
    out = Path(settings["output_dir"])
    rows = lines(out / "comparisons.jsonl")
    assert rows == outcome.comparisons and all(set(row) == set(ComparisonRow.__annotations__) for row in rows)
    results = {
        (name, r["method"], r["task"]): r
        for name in ("base", "eit")
        for r in lines(out / name / "results.jsonl")
    }
    singles = [row for row in rows if row["task"] is not None]
    assert {row["against"] for row in rows} == {"baseline", "own"} and len(singles) == 3 * (4 + 1)
    for row in singles:
        ours = results[row["variant"], row["method"], row["task"]]
        theirs = results[row["reference_variant"], row["reference_method"], row["task"]]
        assert (row["score"], row["reference_score"]) == (ours["score"], theirs["score"])
        assert row["achieved_compression"] == ours["achieved_compression"]
        assert (row["n"], row["resamples"]) == (2, 100)
        assert row["difference"] == pytest.approx(ours["score"] - theirs["score"])
        assert (row["difference"] != 0) == (row["benchmark"] == "perplexity")
    run_json = json.loads((out / "run.json").read_text())
    assert run_json["finished"] and run_json["config"]["variants"][1]["name"] == "eit"


def test_the_same_run_again_answers_nothing_and_more_rows_extend_it(
    variants: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = variants(limit=1)
    first = run_all(settings)
    with monkeypatch.context() as patch:
        patch.setattr(Answerer, "answer", lambda *arguments: pytest.fail("answered again"))
        second = run_all(settings)
    assert second.comparisons == first.comparisons and len(second.run["sessions"]) == 2
    counting = Counting()
    third = run_all(settings | {"limit": 2}, counting)
    assert counting.starts == [("base (1 of 2): answers", 12, 6), ("eit (2 of 2): answers", 8, 4)]
    assert {row["n"] for row in third.comparisons if row["task"] is not None} == {2}
    # A smaller command compares what it asks for, though the folder holds more.
    assert run_all(settings).comparisons == first.comparisons


def test_another_adapter_reuses_what_the_base_answered(variants: Settings, tmp_path: Path) -> None:
    settings = variants(limit=1)
    run_all(settings | {"variants": settings["variants"][:1]})
    other = settings["variants"][1] | {
        "name": "other",
        "adapter": str(save_toy_adapter(tmp_path / "o", seed=5)),
    }
    counting = Counting()
    run_all(settings | {"variants": [settings["variants"][0], other]}, counting)
    assert counting.starts == [("base (1 of 2): answers", 6, 6), ("other (2 of 2): answers", 4, 0)]
    with pytest.raises(ConfigError, match=r"out/other' holds another run: adapter was 'o', now 'toy-eit'"):
        run_all(
            settings | {"variants": [settings["variants"][0], settings["variants"][1] | {"name": "other"}]}
        )


def test_ctrl_c_in_the_second_variant_keeps_the_first(variants: Settings, tmp_path: Path) -> None:
    settings = variants()
    told: list[str] = []
    stopped = run_all(settings, Counting(stop_after=15), lambda name, *rest: told.append(name))
    assert stopped.interrupted and stopped.comparisons == [] and told == ["base", "eit"]
    assert not (Path(settings["output_dir"]) / "comparisons.jsonl").exists()
    assert [len(lines(Path(settings["output_dir"]) / n / "predictions.jsonl")) for n in told] == [12, 4]
    done = run_all(settings)
    assert done.comparisons == run_all(settings | {"output_dir": str(tmp_path / "whole")}).comparisons


def test_one_model_is_in_memory_at_a_time(variants: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    alive: list[int] = []
    load: Callable[..., Any] = runner.load_model

    def watched(*arguments: Any, **options: Any) -> Any:
        alive.append(sum(model() is not None for model in seen))
        model, tokenizer = load(*arguments, **options)
        seen.append(weakref.ref(model))
        return model, tokenizer

    monkeypatch.setattr(runner, "load_model", watched)
    gc.disable()  # nothing is freed by chance
    try:
        run_all(variants(limit=1))
    finally:
        gc.enable()
    assert alive == [0, 0] and [model() for model in seen] == [None, None]


def test_a_merged_folder_is_a_variant_like_its_adapter(
    variants: Settings, adapter: Path, tmp_path: Path
) -> None:
    from sparsekv.models.merge import merge_adapter

    settings = variants(compare={"resamples": 100})
    merged = merge_adapter(adapter, tmp_path / "merged", model=settings["model"])
    settings["variants"].append(
        settings["variants"][1] | {"name": "plain", "model": str(merged), "adapter": None}
    )
    outcome = run_all(settings)
    assert not outcome.interrupted
    ours, theirs = (
        [(r["cell_id"], r["example_id"], r["prediction"]) for r in lines(path / "predictions.jsonl")]
        for path in (Path(settings["output_dir"]) / name for name in ("eit", "plain"))
    )
    assert ours == theirs and len(ours) == 8


def test_a_variant_changes_what_it_names(adapter: Path) -> None:
    settings = {
        "model": "m",
        "adapter": "a",
        "benchmarks": [{"name": "ruler"}],
        "methods": ["full", "knorm"],
        "compression_ratios": [0.5],
        "budget_tokens": [64],
        "output_dir": "out",
        "variants": [
            {"name": "one"},
            {"name": "two", "adapter": None, "model": "n", "compression_ratios": [0.9]},
            {"name": "three", "methods": ["tova"], "budget_tokens": [8], "budget_scope": "layer"},
        ],
    }
    config = parse_config(EvalConfig, settings)
    one, two, three = (config.of_variant(variant) for variant in config.variants)
    assert (one.model, one.adapter, one.output_dir) == ("m", "a", "out/one")
    assert (one.compression_ratios, one.budget_tokens, one.variants) == ([0.5], [64], [])
    assert (two.model, two.adapter, two.compression_ratios, two.budget_tokens) == ("n", None, [0.9], [])
    assert (three.adapter, [m.name for m in three.methods], three.budget_scope) == ("a", ["tova"], "layer")
    assert (three.compression_ratios, three.budget_tokens) == ([], [8])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"variants": [{"name": "a b"}]}, "a variant's name is a folder's: letters, digits, _ and -, got 'a b'"),
        ({"variants": [{"name": "a"}, {"name": "A"}]}, "variants: the name 'a' is given twice"),
        ({"variants": [{"name": "a", "adaptor": "x"}]}, "'adaptor' in variants[0] (did you mean 'adapter'?)"),
        ({"variants": [{"name": "a", "methods": []}]}, "variants[0].methods: list should have at least 1 item"),
        ({"variants": [], "compare": {}}, "compare is given without variants"),
        ({"compare": {"baseline": "bse"}}, "unknown compare.baseline 'bse' (did you mean 'base'?); allowed: base, eit"),
        ({"compare": {"confidence": 1.0}}, "compare.confidence: input should be less than 1"),
        ({"compare": {"min_baseline_score": 101}}, "min_baseline_score: input should be less than or equal"),
        ({"variants": [{"name": "a", "compression_ratios": [1.0]}]}, "compression_ratio must be in [0, 1)"),
    ],
)  # fmt: skip
def test_mistakes_in_the_config(variants: Settings, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(EvalConfig, variants(**changes))
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_mistakes_of_any_variant_are_told_before_the_first_one_runs(
    variants: Settings, adapter: Path, tmp_path: Path
) -> None:
    bare = save_toy_adapter(tmp_path / "bare", relevance=False)
    other = save_toy_model(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer_config.json").read_text())
    (other / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    tokenizer.pop("chat_template", None)
    (other / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    base = {"name": "base"}
    for second, expected in (
        (
            {"adapter": str(tmp_path / "none")},
            f"variant 'b': adapter folder '{tmp_path / 'none'}' does not exist",
        ),
        (
            {"methods": ["relevance"]},
            "variant 'b': method 'relevance' needs relevance predictors: no",
        ),
        (
            {"methods": ["relevance"], "adapter": str(bare)},
            "needs relevance predictors: no relevance.safetensors in 'bare' or 'toy-llama'; give",
        ),
        (
            {"methods": [{"name": "soft_threshold", "args": {"on": "relevance"}}], "adapter": str(bare)},
            "method 'soft_threshold' needs relevance predictors",
        ),
        ({"methods": ["snapvk"]}, "variant 'b': unknown method 'snapvk' (did you mean 'snapkv'?)"),
        ({"model": str(other)}, "variants 'base' and 'b' read local/a/0000 as different tokens"),
    ):
        settings = variants(variants=[base, {"name": "b", **second}])
        with pytest.raises(ConfigError) as caught:
            run_all(settings)
        assert expected in str(caught.value)
        assert {p.name for p in Path(settings["output_dir"]).iterdir()} == {".lock"}
    with pytest.raises(ConfigError, match=r"compare.method 'tova' is not a method of variant 'eit'"):
        plan_variants(parse_config(EvalConfig, variants(compare={"baseline": "eit", "method": "tova"})))


def test_folders_of_the_other_kind_are_refused(
    variants: Settings, toy_eval: Settings, tmp_path: Path
) -> None:
    settings = variants(limit=1)
    run_all(settings)
    with pytest.raises(ConfigError, match="holds a run of several variants, this one is of one model"):
        run(toy_eval(limit=1))
    single = toy_eval(limit=1, output_dir=str(tmp_path / "single"))
    run(single)
    with pytest.raises(ConfigError, match="holds a run of one model, this one is of several variants"):
        run_all(settings | {"output_dir": str(tmp_path / "single")})
    with pytest.raises(ConfigError, match=r"out/base' holds another run: seed was 0, now 5"):
        run_all(settings | {"seed": 5})
    config = parse_config(EvalConfig, settings)
    with RunFolder(config.output_dir) as folder, pytest.raises(ConfigError, match="use run_variants"):
        runner.run_evaluation(config, folder)
