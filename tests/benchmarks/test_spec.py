"""What a benchmark's configuration accepts, and that it costs no torch."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from sparsekv.benchmarks import BENCHMARKS, BenchmarkConfig, Example
from sparsekv.errors import ConfigError


def test_defaults_and_single_values():
    spec = BenchmarkConfig(name="ruler", tasks="vt", context_length=1024)
    assert (spec.tasks, spec.context_length, spec.rows) == (["vt"], [1024], None)
    assert (spec.haystack, spec.squad, spec.truncate) == ("book_eval", "builtin", False)
    assert {"local", "needle", "perplexity", "ruler"} <= set(BENCHMARKS.names())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "rular"}, "unknown benchmark 'rular' (did you mean 'ruler'?)"),
        (
            {"tasks": ["niah_singel_1"]},
            "unknown task 'niah_singel_1' (did you mean 'niah_single_1'?); allowed: niah_",
        ),
        ({"tasks": ["qa", "qa_1"]}, "tasks: one is given twice"),
        ({"tasks": []}, "the list is empty"),
        ({"context_length": [1024, 1024]}, "a value is given twice"),
        ({"context_length": 0}, "context_length is 0; lengths are in tokens, at least 1"),
        ({"rows": 0}, "must be at least 1, not 0"),
        ({"depths": [101]}, "depth 101 is outside 0 to 100"),
        ({"template_tokens": -1}, "must be 0 or more tokens, not -1"),
        ({"haystack": "essays"}, "unknown haystack 'essays'"),
        ({"squad": "no/file.json"}, "squad: no such file: no/file.json"),
        ({"row": 3}, "Extra inputs are not permitted"),
    ],
)
def test_mistakes(fields, message):
    with pytest.raises(ValidationError) as caught:
        BenchmarkConfig(**{"name": "ruler", **fields})
    assert message in str(caught.value)


def test_the_spec_and_the_package_import_nothing_heavy():
    code = (
        "import sys; import sparsekv.benchmarks.spec; "
        "print([m for m in ('torch', 'transformers', 'datasets', 'numpy', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"references": ()}, "example x has no reference answer"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"evidence": ((2, 9),)}, "evidence (2, 9) is outside the context"),
        ({"evidence": ((2, 2),)}, "evidence (2, 2) is outside the context"),
    ],
)
def test_an_impossible_example_is_refused(change, message):
    fields = {
        "example_id": "x",
        "benchmark": "b",
        "task": "t",
        "context": "abcd",
        "question": "",
        "answer_prefix": "",
        "references": ("r",),
        "max_new_tokens": 1,
        "metric": "f1",
        "context_length": None,
        "evidence": ((0, 4),),
    }
    assert Example(**fields).evidence == ((0, 4),)
    with pytest.raises(ConfigError) as caught:
        Example(**{**fields, **change})
    assert message in str(caught.value)
