"""Predictors that are served as a mean of what training began with and what it ended with.

    weights = share * start + (1 - share) * trained

Averaging the two ends of a fine-tuning keeps more of what the start could do beyond the training data than the end
alone does (Wortsman et al., "Robust fine-tuning of zero-shot models", arXiv 2109.01903, section 3). Linear predictors'
scores are averaged by it exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsekv.relevance.predictor import NAME, relevance_modules
from sparsekv.training.held_out import scored_plan
from sparsekv.training.relaxation import ScoreQuantiles
from sparsekv.training.samples import Samples
from sparsekv.training.sharded import fill, whole

if TYPE_CHECKING:
    from sparsekv.training.trainer import SparseKVTrainer

Weights = dict[int, dict[str, Tensor]]

MEASURED_SAMPLES = 16
"""Contexts whose scores tell the averaged predictors' threshold."""


def predictor_weights(model: Any) -> Weights:
    """Copies of the weights of a model's predictors: layer -> name -> tensor, whole."""
    return {
        index: {
            name: whole(value).detach().clone() for name, value in getattr(module, NAME).state_dict().items()
        }
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
            fill(getattr(modules[index], NAME), mean)
        yield
    finally:
        for index, state in trained.items():
            fill(getattr(modules[index], NAME), state)


@torch.no_grad()
def measured_quantiles(
    trainer: SparseKVTrainer, dataset: Any, n_samples: int = MEASURED_SAMPLES
) -> ScoreQuantiles | None:
    """The quantiles of the predictors' scores, as they are now, on the contexts of some samples.

    Parameters
    ----------
    trainer : whose relaxation trains the predictors
    dataset : `Samples`, spread over which they are taken; of a stream the first ones; None has none

    Returns
    -------
    The mean of every context's quantiles; None without relaxation, or if no sample has a context.
    """
    if trainer.relaxation is None:
        return None
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    policy = trainer.relaxation.policy(1.0)
    found: list[Tensor] = []
    training = model.training
    model.eval()
    try:
        for sample in _some(dataset, n_samples):
            batch = trainer._prepare_inputs(trainer.data_collator([sample]))
            inputs = trainer.ready(batch, 0, judged=True)
            with trainer.accelerator.autocast():
                scored = scored_plan(model, inputs, trainer.plan(inputs, policy, 0.0), policy)
            heard = [score for rows in scored.scores.values() for score in rows]
            quantiles = ScoreQuantiles.of(heard) if heard else None
            if quantiles is not None:
                found.append(quantiles)
    finally:
        model.train(training)
    if not found:
        return None
    mean = ScoreQuantiles()
    mean.observe(torch.stack(found).mean(0))
    return mean


def _some(dataset: Any, n: int) -> Iterable[Mapping[str, Any]]:
    if dataset is None:
        return []
    if not isinstance(dataset, Samples):
        return islice(dataset, n)
    n = min(n, len(dataset))
    return (dataset[place * len(dataset) // n] for place in range(n))
