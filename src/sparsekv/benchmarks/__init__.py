"""Questions with known answers over long contexts, and how answers are scored. Imports no torch.

Importing the package registers its benchmarks; `BENCHMARKS.get("ruler").load(spec, tokenizer, seed)` gives
examples.
"""

from __future__ import annotations

from sparsekv.benchmarks import local, needle, perplexity, ruler
from sparsekv.benchmarks.base import BENCHMARKS, Benchmark, Example
from sparsekv.benchmarks.scoring import METRICS, PERPLEXITY, higher_is_better
from sparsekv.benchmarks.spec import BenchmarkConfig

__all__ = [
    "BENCHMARKS",
    "METRICS",
    "PERPLEXITY",
    "Benchmark",
    "BenchmarkConfig",
    "Example",
    "higher_is_better",
    "local",
    "needle",
    "perplexity",
    "ruler",
]
