"""What turns scores and targets into predictors: steps downhill here, `fit_least_squares` for linear ones.

A solver takes one step's samples as they are read, one at a time, and holds no more than one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from sparsekv.policies.learned_scores import predictor_of
from sparsekv.relevance.predictor import relevance_modules, relevance_of
from sparsekv.training.fit_config import FitConfig
from sparsekv.training.fit_losses import make_loss
from sparsekv.training.fit_targets import Entries, log_targets

Read = tuple[dict[int, Entries], slice, int]
"""A sample that was read: its entries by layer, the columns that are fitted, the seed of what is drawn."""


def scores_of(entries: dict[int, Entries], columns: slice) -> Tensor:
    """g, fp32 [layers, H, n], of some columns; gradients flow to the predictors."""
    return torch.cat([scored(each, columns) for each in entries.values()])


def scored(entries: Entries, columns: slice) -> Tensor:
    """g, fp32 [1, H, n], of one layer."""
    return relevance_of(entries.module, entries.hidden[:, columns], features_of(entries, columns))


def features_of(entries: Entries, columns: slice) -> Tensor | None:
    """FloatTensor [1, H, n, F] or None: what predictors read of some columns beside the hidden state."""
    return None if entries.extra is None else entries.extra[:, :, columns]


class Solver(ABC):
    """Fits the predictors of a model."""

    @abstractmethod
    def step(self, number: int, samples: Iterable[Read]) -> float | None:
        """Take the samples of step `number` (from 0) and return their mean loss before it; None without samples."""

    @abstractmethod
    def settle(self) -> None:
        """Bring the predictors to what was taken so far: before they are saved, judged or logged."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What going on needs besides the predictors; tensors and plain values."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""


class Descent(Solver):
    """AdamW on the loss of a config. The loss of a step is the mean over its samples."""

    def __init__(self, model: Any, config: FitConfig) -> None:
        self.config, self.loss = config, make_loss(config.regression)
        parameters = [
            p.requires_grad_()
            for m in relevance_modules(model).values()
            for p in predictor_of(m).parameters()
        ]
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr)
        self.starts_fresh = config.start_from is None

    def step(self, number: int, samples: Iterable[Read]) -> float | None:
        total, count = 0.0, 0
        self.optimizer.zero_grad()
        for entries, columns, seed in samples:
            targets = log_targets(entries, columns, self.config.futures.floor)
            if number == 0 and count == 0 and self.starts_fresh:
                self._start_at(entries, targets)
            loss = self.loss(scores_of(entries, columns), targets, seed)
            loss.backward()
            total, count = total + float(loss.detach()), count + 1
        if not count:
            return None
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * share_of_lr(number, self.config)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad /= count
        self.optimizer.step()
        return total / count

    def settle(self) -> None:
        """Nothing to do: every step moves the predictors."""

    @torch.no_grad()
    def _start_at(self, entries: dict[int, Entries], targets: Tensor) -> None:
        """Let scores start where targets lie: from afar, hundreds of steps would move nothing but the bias."""
        options = self.config.regression
        for each, of_layer in zip(entries.values(), targets, strict=True):
            bias = predictor_of(each.module).score.bias
            if options.loss == "mse":
                bias.copy_(of_layer.mean(-1))
            elif options.loss == "bce" and options.top_ratio > 0:
                bias.fill_(math.log((1 - options.top_ratio) / options.top_ratio))

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)


def share_of_lr(step: int, config: FitConfig) -> float:
    """The factor in (0, 1] on the learning rate of step `step`, from 0."""
    warmup = config.warmup if config.warmup >= 1 else math.ceil(config.warmup * config.steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(config.steps - warmup, 1)
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1 - done if config.schedule == "linear" else 1.0
