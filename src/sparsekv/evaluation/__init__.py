"""Benchmarks × methods × budgets on one model: planned, answered, measured and written down.

    with RunFolder("results/mine") as folder:
        outcome = run_evaluation(load_eval_config("configs/eval/demo.yaml"), folder)

A config with variants is for `run_variants`, which runs one after the other and compares them.
Names load on first use: they need torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsekv.evaluation.folder import RunFolder
    from sparsekv.evaluation.plan import Plan, make_plan
    from sparsekv.evaluation.runner import Outcome, run_evaluation
    from sparsekv.evaluation.variants import VariantsOutcome, run_variants

_HOME = {
    "Outcome": "runner",
    "Plan": "plan",
    "RunFolder": "folder",
    "VariantsOutcome": "variants",
    "make_plan": "plan",
    "run_evaluation": "runner",
    "run_variants": "variants",
}

__all__ = ["Outcome", "Plan", "RunFolder", "VariantsOutcome", "make_plan", "run_evaluation", "run_variants"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
