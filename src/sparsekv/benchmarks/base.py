"""What an example is, and what a benchmark must offer. Knows no model and no torch."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from sparsekv.errors import ConfigError
from sparsekv.registry import Registry

if TYPE_CHECKING:
    from sparsekv.benchmarks.spec import BenchmarkConfig

DEFAULT_ROWS = 50
"""Examples per task and length where the configuration gives no `rows` and rows are generated."""


@dataclass(frozen=True)
class Example:
    """One question about one context, and how its answer is judged.

    The prompt is `context + question + answer_prefix`, with nothing between them; eviction sees `context`
    only (query-agnostic) or `context + question` (query-aware). This is the split of kvpress's RULER data
    set.

    Attributes:
        example_id: stable and unique in an evaluation, e.g. "ruler/niah_single_2/1024/0007".
        benchmark: name of the benchmark.
        task: name of the task within it.
        context: the text that is prefilled and compressed.
        question: what is asked about it; "" in perplexity.
        answer_prefix: the start of the answer, given to the model; may be "".
        references: right answers, at least one. In perplexity exactly one: the continuation that is scored.
        max_new_tokens: limit of the answer in tokens; in perplexity the limit of the continuation.
        metric: a name of `scoring.METRICS`, or `scoring.PERPLEXITY`, which the runner computes from the
            model's probabilities of `references[0]` and which is better when LOWER.
        context_length: the length in tokens that was asked for (see `BenchmarkConfig.context_length`), or
            None.
        evidence: spans `(start, end)` of characters of `context` that hold the answer (needle sentences,
            assignment lines, answers of a document), sorted; empty where the benchmark does not know them.
    """

    example_id: str
    benchmark: str
    task: str
    context: str
    question: str
    answer_prefix: str
    references: tuple[str, ...]
    max_new_tokens: int
    metric: str
    context_length: int | None
    evidence: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if not self.references:
            raise ConfigError(f"example {self.example_id} has no reference answer")
        if self.max_new_tokens < 1:
            raise ConfigError(
                f"example {self.example_id}: max_new_tokens is {self.max_new_tokens}, not at least 1"
            )
        for start, end in self.evidence:
            if not 0 <= start < end <= len(self.context):
                raise ConfigError(
                    f"example {self.example_id}: evidence ({start}, {end}) is outside the context"
                )


class Benchmark(Protocol):
    """A family of tasks. Implementations hold no state: the same arguments give the same examples."""

    name: str

    def tasks(self) -> list[str]:
        """Names of its tasks; empty where only the data tells them."""
        ...

    def check(self, spec: BenchmarkConfig) -> None:
        """Raise ConfigError for what is wrong in `spec` as far as it shows without reading a file."""
        ...

    def load(self, spec: BenchmarkConfig, tokenizer: Any, seed: int) -> list[Example]:
        """The examples, by task, then length, then row.

        Row i of a task is the same for every number of rows and whatever other tasks are asked for.

        Args:
            spec: what to load.
            tokenizer: a transformers tokenizer; lengths are measured with it.
            seed: of everything that is drawn.

        Raises:
            ConfigError: a missing or malformed file, or a length too small for a task.
        """
        ...


BENCHMARKS: Registry[Benchmark] = Registry("benchmark")


def example_id(benchmark: str, task: str, context_length: int | None, row: int) -> str:
    """The id of an example: "benchmark/task/length/row", without the length where there is none."""
    middle = "" if context_length is None else f"/{context_length}"
    return f"{benchmark}/{task}{middle}/{row:04d}"


def row_rng(seed: int, *names: object) -> random.Random:
    """A generator for one purpose of one row, independent of every other one.

    Args:
        seed: the run's seed.
        names: what sets the purpose apart, e.g. task, row, "layout". Their text is hashed (SHA-512), so the
            stream is the same in every process and Python version.
    """
    return random.Random("/".join(str(name) for name in (seed, *names)))
