"""Linear predictors in one pass: the exact minimum of the squared error over everything that was read.

Shape letters: H kv heads, n entries of a sample, C what the predictor's linear layer reads, F further features.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from sparsekv.policies.learned_scores import predictor_of
from sparsekv.relevance.predictor import relevance_modules
from sparsekv.training.fit_config import FitConfig
from sparsekv.training.fit_solvers import Read, Solver, features_of, scored
from sparsekv.training.fit_targets import log_targets


@dataclass
class Sums:
    """What one layer's samples add up to, fp64, with x = [h; 1] and e the features of a kv head.

    Parameters
    ----------
    xx : [C + 1, C + 1]
    xy : [C + 1, H]
    xe, ee, ey : [H, C + 1, F], [H, F, F], [H, F]; F may be 0
    """

    xx: Tensor
    xy: Tensor
    xe: Tensor
    ee: Tensor
    ey: Tensor

    @classmethod
    def of(cls, inputs: Tensor, extra: Tensor | None, targets: Tensor) -> Sums:
        """Of one sample: inputs [n, C], extra [H, n, F] or None, targets [H, n]."""
        x = nn.functional.pad(inputs, (0, 1), value=1.0).double()
        y = targets.double()
        e = x.new_zeros(*y.shape, 0) if extra is None else extra.double()
        return cls(xx=x.T @ x, xy=x.T @ y.T, xe=x.T @ e, ee=e.mT @ e, ey=(e.mT @ y[:, :, None]).squeeze(-1))

    def add(self, other: Sums) -> None:
        """Take another sample's in."""
        for field in fields(self):
            getattr(self, field.name).add_(getattr(other, field.name))

    def solve(self, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
        """(weights on the input [H, C], biases [H], weights on the features [H, F]).

        Every weight but the biases costs `ridge` times the mean square of its kind of input.
        """
        size, n_heads = self.xx.shape[0] - 1, self.xy.shape[1]
        found = []
        for head in range(n_heads):
            matrix = torch.cat(
                [
                    torch.cat([self.xx, self.xe[head]], dim=1),
                    torch.cat([self.xe[head].T, self.ee[head]], dim=1),
                ]
            )
            diagonal = matrix.diagonal()
            for part in (diagonal[:size], diagonal[size + 1 :]):
                if part.numel():
                    part += ridge * part.mean()
            found.append(torch.linalg.solve(matrix, torch.cat([self.xy[:, head], self.ey[head]])))
        solution = torch.stack(found)
        return solution[:, :size], solution[:, size], solution[:, size + 1 :]

    @torch.no_grad()
    def solve_for(self, predictor: Any, ridge: float) -> None:
        """Write the solution into a linear predictor that reads what was summed."""
        weights, bias, of_features = self.solve(ridge)
        predictor.score.weight.copy_(weights)
        predictor.score.bias.copy_(bias)
        if predictor.extra is not None:
            predictor.extra.weight.copy_(of_features)


class LeastSquares(Solver):
    """The minimum of the mean squared error of all entries taken so far; each weighs the same.

    Per layer it holds (C + 1)² numbers, and H · (C + 1) · F with features, however many samples come.
    """

    def __init__(self, model: Any, config: FitConfig) -> None:
        self.config, self.modules = config, relevance_modules(model)
        self.sums: dict[int, Sums] = {}
        self.current = True

    @torch.no_grad()
    def step(self, number: int, samples: Iterable[Read]) -> float | None:
        total, count = 0.0, 0
        for entries, columns, _ in samples:
            targets = log_targets(entries, columns, self.config.futures.floor)
            for (index, each), of_layer in zip(entries.items(), targets, strict=True):
                total += float((scored(each, columns)[0] - of_layer).square().mean()) / len(entries)
                inputs = predictor_of(each.module).score_inputs(each.hidden[:, columns])[0]
                extra = features_of(each, columns)
                sums = Sums.of(inputs, None if extra is None else extra[0], of_layer)
                if index in self.sums:
                    self.sums[index].add(sums)
                else:
                    self.sums[index] = sums
            count += 1
            self.current = False
        return total / count if count else None

    def settle(self) -> None:
        """Solve for every layer, unless nothing came since."""
        if self.current:
            return
        for index, sums in self.sums.items():
            sums.solve_for(predictor_of(self.modules[index]), self.config.regression.ridge)
        self.current = True

    def state_dict(self) -> dict[str, Any]:
        return {str(index): vars(sums) for index, sums in self.sums.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = next(next(iter(self.modules.values())).parameters()).device
        self.sums = {
            int(index): Sums(**{name: value.to(device) for name, value in sums.items()})
            for index, sums in state.items()
        }
