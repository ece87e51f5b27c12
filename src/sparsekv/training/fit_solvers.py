"""What turns scores and targets into predictors: steps downhill, or least squares.

A solver takes one step's samples as they are read, one at a time, and holds no more than one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from sparsekv.relevance.predictor import NAME, relevance_modules, relevance_of
from sparsekv.training.fit_config import FitConfig
from sparsekv.training.fit_losses import make_loss
from sparsekv.training.fit_targets import Entries, log_targets

Read = tuple[dict[int, Entries], slice, int]
"""A sample that was read: its entries by layer, the columns that are fitted, the seed of what is drawn."""


def predictor_of(entries: Entries) -> Any:
    """The predictor that scores these entries."""
    return getattr(entries.module, NAME)


def scores_of(entries: dict[int, Entries], columns: slice) -> Tensor:
    """g, fp32 [layers, H, n], of some columns; gradients flow to the predictors."""
    return torch.cat([_scored(each, columns) for each in entries.values()])


def _scored(entries: Entries, columns: slice) -> Tensor:
    return relevance_of(entries.module, entries.hidden[:, columns])


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


def make_solver(model: Any, config: FitConfig) -> Solver:
    """The solver of a config, for a model with predictors."""
    if config.regression.solver == "least_squares":
        return LeastSquares(model, config)
    return Descent(model, config)


class Descent(Solver):
    """AdamW on the loss of a config. The loss of a step is the mean over its samples."""

    def __init__(self, model: Any, config: FitConfig) -> None:
        self.config, self.loss = config, make_loss(config.regression)
        parameters = [
            p.requires_grad_()
            for m in relevance_modules(model).values()
            for p in getattr(m, NAME).parameters()
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
            bias = predictor_of(each).score.bias
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


class LeastSquares(Solver):
    """The exact minimum of the mean squared error of everything taken so far, for linear predictors.

    With x the predictor's own input (normalised) and a 1 for the bias, it sums x xᵀ and x yᵀ in fp64: per layer
    (C + 1)² numbers, however many samples come. Every entry of the run weighs the same.
    """

    def __init__(self, model: Any, config: FitConfig) -> None:
        self.config = config
        self.modules = relevance_modules(model)
        self.squares: dict[int, Tensor] = {}
        self.products: dict[int, Tensor] = {}
        self.current = True

    @torch.no_grad()
    def step(self, number: int, samples: Iterable[Read]) -> float | None:
        total, count = 0.0, 0
        for entries, columns, _ in samples:
            targets = log_targets(entries, columns, self.config.futures.floor)
            for (index, each), of_layer in zip(entries.items(), targets, strict=True):
                inputs, scores = _inputs_and_scores(each, columns)
                total += float((scores - of_layer).square().mean()) / len(entries)
                self._add(index, inputs, of_layer)
            count += 1
            self.current = False
        return total / count if count else None

    def _add(self, index: int, inputs: Tensor, targets: Tensor) -> None:
        x = with_ones(inputs).double()
        y = targets.T.double()
        self.squares[index] = self.squares.get(index, 0) + x.T @ x
        self.products[index] = self.products.get(index, 0) + x.T @ y

    @torch.no_grad()
    def settle(self) -> None:
        """Solve for every layer; nothing is done where nothing came since."""
        if self.current:
            return
        for index, squares in self.squares.items():
            size = squares.shape[0] - 1
            penalty = self.config.regression.ridge * squares.diagonal()[:size].mean()
            matrix = squares.clone()
            matrix.diagonal()[:size] += penalty
            solution = torch.linalg.solve(matrix, self.products[index])
            score = getattr(self.modules[index], NAME).score
            score.weight.copy_(solution[:size].T)
            score.bias.copy_(solution[size])
        self.current = True

    def state_dict(self) -> dict[str, Any]:
        return {"squares": dict(self.squares), "products": dict(self.products)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = next(next(iter(self.modules.values())).parameters()).device
        self.squares = {index: value.to(device) for index, value in state["squares"].items()}
        self.products = {index: value.to(device) for index, value in state["products"].items()}


def with_ones(inputs: Tensor) -> Tensor:
    """[n, C] with a column of ones after it."""
    return torch.nn.functional.pad(inputs, (0, 1), value=1.0)


def _inputs_and_scores(entries: Entries, columns: slice) -> tuple[Tensor, Tensor]:
    """(what the predictor's linear layer reads [n, C], its scores [H, n])."""
    caught: list[Tensor] = []
    score = predictor_of(entries).score
    handle = score.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    try:
        scores = _scored(entries, columns)
    finally:
        handle.remove()
    return caught[0][0], scores[0]
