"""RULER (arXiv 2404.06654): twelve tasks of any context length, generated offline for any tokenizer.

Prompts, token limits and task settings are those RULER publishes (github.com/NVIDIA/RULER,
scripts/synthetic.yaml and scripts/data/synthetic); context, question and answer prefix are split where
kvpress's data set splits them. What differs, and why:

- essays: `haystack` in place of Paul Graham's essays, which may not be redistributed; sentences are found by
  a rule in place of nltk.
- words of keys and of cwe: lists of this package in place of wonderwords.
- keys and values of a row are distinct (RULER may draw one twice, which has no single right answer).
- an empty part of an essay (a needle at the very start or end) leaves no stray blank.
- qa: the SQuAD-format file of `squad`, its questions in an order drawn from the seed. RULER's qa_2 (HotpotQA)
  is not there.
- every row is fitted to the length on its own, to one word, line or document; RULER fits once and shrinks
  rows in large steps. Tokens the tokenizer adds by itself (BOS) count.
"""

from __future__ import annotations

from typing import Any

from sparsekv.benchmarks.base import BENCHMARKS, DEFAULT_ROWS, Example, example_id
from sparsekv.benchmarks.data import check_haystack, check_squad
from sparsekv.benchmarks.fit import TokenCounter, TooShort, largest_fit
from sparsekv.benchmarks.ruler_niah import Niah
from sparsekv.benchmarks.ruler_qa import DocumentQa
from sparsekv.benchmarks.ruler_task import Row, RulerTask, Sources
from sparsekv.benchmarks.ruler_vt import VariableTracking
from sparsekv.benchmarks.ruler_words import CommonWords, FrequentWords
from sparsekv.benchmarks.spec import BenchmarkConfig
from sparsekv.errors import ConfigError
from sparsekv.registry import Registry

TASKS: Registry[RulerTask] = Registry("task")
TASKS.register("niah_single_1", Niah(haystack="noise"))
TASKS.register("niah_single_2", Niah())
TASKS.register("niah_single_3", Niah(values="uuids"))
TASKS.register("niah_multikey_1", Niah(n_keys=4))
TASKS.register("niah_multikey_2", Niah(haystack="needle"))
TASKS.register("niah_multikey_3", Niah(haystack="needle", keys="uuids", values="uuids"))
TASKS.register("niah_multivalue", Niah(n_values=4))
TASKS.register("niah_multiquery", Niah(n_keys=4, n_queries=4))
TASKS.register("vt", VariableTracking())
TASKS.register("cwe", CommonWords())
TASKS.register("fwe", FrequentWords())
TASKS.register("qa_1", DocumentQa(), aliases=("qa",))


def generate(
    benchmark: str,
    name: str,
    task: RulerTask,
    context_length: int,
    sources: Sources,
    stream: str | None = None,
) -> list[Example]:
    """The rows of one task at one length.

    Args:
        benchmark: name of the benchmark the examples belong to.
        name: the task's name, part of ids and seeds.
        task: what drafts the rows.
        context_length: most tokens of prompt, answer and template together.
        sources: shared by all tasks of a `load`; holds the number of rows.
        stream: what the draws are seeded by; the task's name if None.

    Raises:
        ConfigError: a row's fixed parts alone are longer than `context_length`; the message says what it
            takes.
    """
    spec = sources.spec
    max_new_tokens = spec.max_new_tokens or task.max_new_tokens
    reserved = max_new_tokens + spec.template_tokens + sources.count.added
    examples = []
    guess: int | None = None
    for index in range(spec.rows or DEFAULT_ROWS):
        row = Row(stream or name, index, context_length, max_new_tokens, context_length - reserved, sources)
        try:
            units, prompt = largest_fit(task.draft(row), sources.count, row.limit, guess)
        except TooShort as error:
            raise ConfigError(
                f"context_length {context_length} is too small for {benchmark} task '{name}': row {index} "
                f"needs at least {error.tokens + reserved} tokens ({error.tokens} of prompt and {reserved} "
                "kept free for the answer and special tokens)"
            ) from error
        if guess is None:
            guess = units  # always row 0's, so that no row depends on how many are asked for
        examples.append(
            Example(
                example_id=example_id(benchmark, name, context_length, index),
                benchmark=benchmark,
                task=name,
                context=prompt.context,
                question=prompt.question,
                answer_prefix=prompt.answer_prefix,
                references=prompt.references,
                max_new_tokens=max_new_tokens,
                metric=task.metric,
                context_length=context_length,
                evidence=prompt.evidence,
            )
        )
    return examples


class Ruler:
    """The benchmark `ruler`."""

    name = "ruler"

    def tasks(self) -> list[str]:
        """RULER's names of the twelve tasks."""
        return TASKS.names()

    def check(self, spec: BenchmarkConfig) -> None:
        """Every task must be known, none given twice (once by an alias), and files must be there."""
        names = [TASKS.resolve(task) for task in spec.tasks or []]
        if len(set(names)) != len(names):
            raise ConfigError(f"tasks: one is given twice in {spec.tasks}")
        check_haystack(spec.haystack)
        check_squad(spec.squad)

    def load(self, spec: BenchmarkConfig, tokenizer: Any, seed: int) -> list[Example]:
        """Generate the examples; see `Benchmark.load`."""
        sources = Sources(spec, TokenCounter(tokenizer), seed)
        names = [TASKS.resolve(task) for task in spec.tasks or TASKS.names()]
        return [
            example
            for name in names
            for context_length in spec.context_length
            for example in generate(self.name, name, TASKS.get(name), context_length, sources)
        ]


BENCHMARKS.register("ruler", Ruler())
