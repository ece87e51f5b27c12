"""Predictors that are served as a mean of what training began with and what it ended with.

    weights = share * start + (1 - share) * trained

Averaging the two ends of a fine-tuning keeps more of what the start could do beyond the training data than the end
alone does (Wortsman et al., "Robust fine-tuning of zero-shot models", arXiv 2109.01903, section 3). Linear predictors'
scores are averaged by it exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsekv.relevance.predictor import NAME, relevance_modules
from sparsekv.training.relaxation import ScoreQuantiles
from sparsekv.training.student import student_output

if TYPE_CHECKING:
    from sparsekv.training.trainer import SparseKVTrainer

Weights = dict[int, dict[str, Tensor]]

MEASURED_SAMPLES = 16
"""Contexts whose scores tell the averaged predictors' threshold."""


def predictor_weights(model: Any) -> Weights:
    """Copies of the weights of a model's predictors: layer -> name -> tensor."""
    return {
        index: {name: value.detach().clone() for name, value in getattr(module, NAME).state_dict().items()}
        for index, module in relevance_modules(model).items()
    }


@contextmanager
def averaged(model: Any, start: Weights, share: float) -> Iterator[None]:
    """Within the context the model's predictors are `share` of `start` and the rest of themselves."""
    trained = predictor_weights(model)
    modules = relevance_modules(model)
    try:
        for index, state in trained.items():
            mean = {
                name: torch.lerp(value, start[index][name].to(value.device), share)
                for name, value in state.items()
            }
            getattr(modules[index], NAME).load_state_dict(mean)
        yield
    finally:
        for index, state in trained.items():
            getattr(modules[index], NAME).load_state_dict(state)


@torch.no_grad()
def measured_quantiles(
    trainer: SparseKVTrainer, samples: Iterable[Mapping[str, Any]], n_samples: int = MEASURED_SAMPLES
) -> ScoreQuantiles | None:
    """The quantiles of the predictors' scores, as they are now, on the contexts of the first samples.

    None where no predictors compete for places, or no sample has a context (an iterator that training used up).
    """
    if trainer.relaxation is None or trainer.relaxation.threshold != "quantile":
        return None
    everything = replace(trainer.relaxation.policy(1.0), threshold=float("-inf"), noise=0.0)
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    scores: list[Tensor] = []
    training = model.training
    model.eval()
    try:
        for sample in islice(samples, n_samples):
            batch = trainer._prepare_inputs(trainer.data_collator([sample]))
            inputs = trainer.ready(batch, 0, judged=True)
            plan = trainer.plan(inputs, everything, 0.0)
            plan.keep_scores = True
            with trainer.accelerator.autocast():
                student_output(model, model, inputs, plan)
            scores += [score for rows in plan.scores.values() for score in rows]
    finally:
        model.train(training)
    heard = ScoreQuantiles.of(scores) if scores else None
    if heard is None:
        return None
    found = ScoreQuantiles()
    found.observe(heard)
    return found
