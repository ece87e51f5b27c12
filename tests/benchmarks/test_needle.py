"""The grid of depth and length."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from sparsekv.benchmarks import BENCHMARKS, BenchmarkConfig
from sparsekv.benchmarks.haystack import NOISE, sentence_ends


def load(tokenizer, **fields):
    return BENCHMARKS.get("needle").load(BenchmarkConfig(name="needle", **fields), tokenizer, 0)


def test_one_needle_at_each_depth_of_each_length(bpe):
    grid = load(bpe, context_length=[1024, 2048], depths=[0, 12.5, 50, 100], rows=2)
    assert [(e.task, e.context_length) for e in grid[::2]] == [
        (task, length)
        for task in ("depth_0", "depth_12.5", "depth_50", "depth_100")
        for length in (1024, 2048)
    ]
    assert len({example.example_id for example in grid}) == len(grid) == 16
    assert (
        len({example.references for example in grid}) == 2
    )  # row i hides the same at every depth and length
    for example in grid:
        ((start, end),) = example.evidence
        assert example.references[0] in example.context[start:end]
        depth = float(example.task.removeprefix("depth_"))
        intro = example.context.index("\n") + 1
        n_before, n_after = (
            len(sentence_ends(text.split())) for text in (example.context[intro:start], example.context[end:])
        )
        assert n_before == int((n_before + n_after) * depth / 100) and n_before + n_after > 30
        used = len(bpe(example.context + example.question + example.answer_prefix)["input_ids"]) + 128
        assert example.context_length - 12 <= used <= example.context_length


def test_noise_haystack_counts_depth_in_units(bpe):
    (middle,) = load(bpe, context_length=1024, depths=50, rows=1, haystack="noise")
    before, after = (middle.context[:a].count(NOISE) for a in (middle.evidence[0][0], None))
    assert before == after // 2 > 5


def test_tasks_choose_among_the_depths(bpe):
    assert BENCHMARKS.get("needle").tasks() == ["depth_0", "depth_25", "depth_50", "depth_75", "depth_100"]
    (only,) = load(bpe, tasks="depth_25", context_length=1024, rows=1)
    everything = load(bpe, context_length=1024, rows=1)
    assert only == everything[1]
    with pytest.raises(ValidationError, match=r"unknown task 'depth_5' \(did you mean 'depth_50'\?\)"):
        BenchmarkConfig(name="needle", tasks=["depth_5"], depths=[50])
