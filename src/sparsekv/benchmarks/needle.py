"""Needle in a haystack: one needle at each depth of each length.

The prompt is RULER's niah_single_2 (an essay, a two-word key, a seven-digit value), with the needle at a
given depth in place of a random one, so that a cell of the grid and RULER's score mean the same. The grid
itself is Kamradt's (github.com/gkamradt/LLMTest_NeedleInAHaystack).
"""

from __future__ import annotations

from typing import Any

from sparsekv.benchmarks.base import BENCHMARKS, Example
from sparsekv.benchmarks.data import check_haystack
from sparsekv.benchmarks.fit import TokenCounter
from sparsekv.benchmarks.ruler import generate
from sparsekv.benchmarks.ruler_niah import Niah
from sparsekv.benchmarks.ruler_task import Sources
from sparsekv.benchmarks.spec import BenchmarkConfig
from sparsekv.errors import unknown


def task_name(depth: float) -> str:
    """The task of a depth in percent: "depth_50", "depth_12.5"."""
    return f"depth_{depth:g}"


class Needle:
    """The benchmark `needle`: a task per depth of `BenchmarkConfig.depths`, in percent of the essay's
    sentences.

    Row i hides the same needle at every depth and length.
    """

    name = "needle"

    def tasks(self) -> list[str]:
        """The tasks of the default depths."""
        return [task_name(depth) for depth in BenchmarkConfig.model_fields["depths"].get_default()]

    def check(self, spec: BenchmarkConfig) -> None:
        """`tasks`, if given, must be among those of `depths`."""
        names = [task_name(depth) for depth in spec.depths]
        for task in spec.tasks or []:
            if task not in names:
                raise unknown("task", task, names)
        check_haystack(spec.haystack)

    def load(self, spec: BenchmarkConfig, tokenizer: Any, seed: int) -> list[Example]:
        """Generate the grid; see `Benchmark.load`."""
        sources = Sources(spec, TokenCounter(tokenizer), seed)
        return [
            example
            for depth in spec.depths
            if spec.tasks is None or task_name(depth) in spec.tasks
            for context_length in spec.context_length
            for example in generate(
                self.name, task_name(depth), Niah(depth=depth), context_length, sources, stream=self.name
            )
        ]


BENCHMARKS.register("needle", Needle())
