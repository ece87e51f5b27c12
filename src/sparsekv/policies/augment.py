"""Eviction as augmentation: each training step evicts by another method, drawn from a list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from sparsekv.errors import ConfigError
from sparsekv.policies import make_policy
from sparsekv.policies.base import LayerPolicy, Policy, Route, TokenPolicy
from sparsekv.policies.picks import row_generator
from sparsekv.policies.sizes import check_switches
from sparsekv.policies.soft_scores import SoftScores, as_soft
from sparsekv.policies.trainable import trainable, why_untrainable


@dataclass(frozen=True)
class EvictionAug(Policy):
    """Several methods, of which one is drawn per step. It decides nothing itself: ask `draw`.

    Parameters
    ----------
    policies : sequence of str, Policy or kvpress press
        Method names (see `make_policy`), policies, or presses. Each must choose entries before the forward or inside a
        layer, as a training step needs; their ratio is the step's, so a press with one of its own is an error.
    seed : int
    soft_scores : bool
        Methods that pick by scores of their own fade entries by them instead (`SoftScores`), so that the model learns
        to score what it needs; the others evict as ever.
    temperature : float > 0
        Of the soft scores, in standard deviations.

    Raises
    ------
    ConfigError
        If the list is empty or holds a method that can't be used in a training step; if `soft_scores` is no switch, or
        is on and none of them has scores with a gradient.
    """

    policies: tuple[Policy, ...] = ("snapkv", "h2o", "knorm", "tova")  # type: ignore[assignment]
    seed: int = 0
    soft_scores: bool = False
    temperature: float = 1.0
    name = "eviction_aug"
    route: ClassVar[Route] = "scores"

    def __post_init__(self) -> None:
        check_switches(self.name, soft_scores=self.soft_scores)
        given: Any = self.policies
        if isinstance(given, (str, Policy)) or not isinstance(given, Sequence) or not given:
            raise ConfigError(f"{self.name}: policies must be a list of at least one method, got {given!r}")
        policies: tuple[Policy, ...] = tuple(_as_policy(one) for one in given)
        if self.soft_scores:
            policies = tuple(as_soft(one, self.temperature) for one in policies)
            if not any(isinstance(one, SoftScores) for one in policies):
                names = ", ".join(one.name for one in policies)
                raise ConfigError(
                    f"{self.name}: soft_scores=True, but none of {names} has scores with a gradient"
                )
        object.__setattr__(self, "policies", policies)

    @property
    def reads_text(self) -> bool:
        """True if one of the methods needs a tokenizer."""
        return any(policy.reads_text for policy in self.policies)

    def draw(self, seed: int) -> TokenPolicy | LayerPolicy:
        """One of the policies, all equally likely; the same for the same seed (a step's number, for example)."""
        place = torch.randint(len(self.policies), (), generator=row_generator(self.seed, seed))
        return trainable(self.policies[int(place)])


def _as_policy(given: Any) -> TokenPolicy | LayerPolicy:
    if isinstance(given, str):
        policy = make_policy(given)
    elif isinstance(given, Policy):
        policy = given
    else:
        from sparsekv.policies.presses import from_press

        policy = from_press(given)
        own = getattr(given, "compression_ratio", 0)
        if own:
            raise ConfigError(
                f"eviction_aug: {type(given).__name__} has a compression_ratio of its own ({own}); "
                "leave it at 0, the step sets the ratio"
            )
    reason = "needs a prefill of its own" if policy.own_prefill else why_untrainable(policy)
    if reason is not None:
        raise ConfigError(
            f"eviction_aug: method {policy.name or type(policy).__name__} {reason}; "
            "give methods that choose entries before the forward or inside a layer"
        )
    return trainable(policy)
