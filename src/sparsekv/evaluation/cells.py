"""Cells: what one score belongs to. (benchmark, task, context length) × method × budget."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from sparsekv.config import EvalConfig, MethodConfig
from sparsekv.errors import ConfigError
from sparsekv.evaluation.tier import Tier, tier_options
from sparsekv.policies import METHODS, list_methods, make_policy
from sparsekv.policies.base import NativePolicy, Policy
from sparsekv.policies.budget import Budget, Scope

UNCOMPRESSED = "full"
"""The method that every table starts with: it evicts nothing, so it has one cell per task."""


@dataclass(frozen=True)
class Setting:
    """One method at one budget: what a cell has besides its task.

    Parameters
    ----------
    method : the registry's name, or "wrapper(inner)"
    args : the parameters of its policy
    label : what tables call it (does not define the cell)
    compression_ratio, budget_tokens : at most one is given
    budget_scope, phase, query_aware, chunk : as in the config
    tier : where what the method evicts goes; None: it is lost
    """

    method: str
    args: dict[str, Any] = field(hash=False)
    label: str = field(compare=False)
    compression_ratio: float | None
    budget_tokens: int | None
    budget_scope: Scope
    phase: str
    query_aware: bool
    chunk: int | None
    tier: Tier | None = None

    @property
    def budget(self) -> Budget:
        """The same as a Budget; neither ratio nor tokens if the method's own sizes decide."""
        return Budget(self.compression_ratio, self.budget_tokens, self.budget_scope)

    def policy(self) -> Policy:
        """A fresh policy with the args; a ConfigError if the method doesn't take them."""
        return make_policy(self.method, **self.args)

    @property
    def shown_budget(self) -> str:
        """See the function `shown_budget`."""
        return shown_budget(self.compression_ratio, self.budget_tokens)


@dataclass(frozen=True)
class Task:
    """A benchmark's task at one requested length in tokens (None where there is none)."""

    benchmark: str
    task: str
    context_length: int | None

    def __str__(self) -> str:
        length = "" if self.context_length is None else f"/{self.context_length}"
        return f"{self.benchmark}/{self.task}{length}"


@dataclass(frozen=True)
class Cell:
    """A task in a setting."""

    task: Task
    setting: Setting

    @property
    def cell_id(self) -> str:
        """Readable, stable, safe as a file name; its end is a hash of all that defines the cell."""
        definition = self.definition()
        definition.pop("label")
        text = json.dumps(definition, sort_keys=True, ensure_ascii=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        setting = self.setting
        budget = setting.shown_budget.replace(" tokens", "t")
        tier = "" if setting.tier is None else f".passive_{setting.tier.passive}"
        readable = f"{str(self.task).replace('/', '.')}.{setting.method}.{budget}{tier}"
        return f"{re.sub(r'[^A-Za-z0-9_.()-]+', '_', readable)}.{digest}"

    def definition(self) -> dict[str, Any]:
        """All that defines the cell, and its label, as JSON."""
        found = {**asdict(self.task), **asdict(self.setting)}
        del found["tier"]
        # Cells of one tier have the ids that they had before there were two.
        tier = self.setting.tier
        return found if tier is None else {**found, "tier": tier.definition()}

    @classmethod
    def from_definition(cls, definition: dict[str, Any]) -> Cell:
        """The inverse of `definition`."""
        parts = dict(definition)
        task = Task(parts.pop("benchmark"), parts.pop("task"), parts.pop("context_length"))
        return cls(task, Setting(**parts | {"tier": Tier.from_definition(parts.get("tier"))}))


def settings(config: EvalConfig) -> list[Setting]:
    """Every method × budget of a config, in its order.

    Raises
    ------
    ConfigError
        For an unknown method, parameters it does not take, or the same setting twice.
    """
    found: list[Setting] = []
    labels: dict[str, tuple[str, dict[str, Any], Tier | None]] = {}
    for method in config.methods:
        name, tier = resolve(method.name), Tier.of(method)
        for ratio, tokens in _budgets(config, method, name):
            setting = Setting(
                method=name,
                args=dict(method.args),
                label=name if name == UNCOMPRESSED else method.label or shown(name, method.args, tier),
                compression_ratio=ratio,
                budget_tokens=tokens,
                budget_scope="head" if name == UNCOMPRESSED else method.budget_scope or config.budget_scope,
                phase="prefill" if name == UNCOMPRESSED else config.phase,
                query_aware=config.query_aware,
                chunk=config.chunk,
                tier=tier,
            )
            setting = in_own_phase(setting)
            other = labels.setdefault(setting.label, (name, setting.args, tier))
            if other != (name, setting.args, tier):
                raise ConfigError(f"label '{setting.label}' stands for two methods; give each its own label")
            if setting in found:
                raise ConfigError(f"method '{name}' with budget {setting.shown_budget} is listed twice")
            found.append(setting)
    return found


def own_phase(policy: Policy) -> str | None:
    """The phase of a kvpress method that decides by itself to evict while decoding; None for all others."""
    if not (isinstance(policy, NativePolicy) and policy.decoding):
        return None
    from kvpress import DecodingPress

    # The others (one press for the prompt and one while decoding, DMS) also evict after the prefill.
    return "decode" if isinstance(getattr(policy, "template", None), DecodingPress) else "both"


def in_own_phase(setting: Setting) -> Setting:
    """The setting, with phase "prefill" (the default) replaced by its method's own phase, if it has one.

    Raises
    ------
    ConfigError
        If the method does not exist, or does not take the arguments.
    """
    own = own_phase(setting.policy())
    return replace(setting, phase=own) if own is not None and setting.phase == "prefill" else setting


def shown(method: str, args: Mapping[str, Any], tier: Tier | None = None) -> str:
    """A method in a table: its name, and its parameters and those of its second tier where some were given."""
    parts = sorted(args.items())
    if tier is not None:
        parts += tier_options(tier.passive, tier.recall_tokens, tier.page_size).items()
    return f"{method}[{', '.join(f'{k}={v}' for k, v in parts)}]" if parts else method


def shown_budget(compression_ratio: float | None, budget_tokens: int | None) -> str:
    """ "0.50" for a ratio (more digits where it has more), "512 tokens" for a count, "own" for own sizes."""
    if compression_ratio is not None:
        short = f"{compression_ratio:.2f}"
        return short if float(short) == compression_ratio else f"{compression_ratio:g}"
    return f"{budget_tokens} tokens" if budget_tokens is not None else "own"


def resolve(name: str) -> str:
    """The name behind an alias, so that both give the same cell; "wrapper(inner)" is returned as it is."""
    if name in METHODS:
        return METHODS.resolve(name)
    aliases = {alias: info.name for info in list_methods() for alias in info.aliases}
    return aliases.get(name, name)


def _budgets(config: EvalConfig, method: MethodConfig, name: str) -> list[tuple[float | None, int | None]]:
    if name == UNCOMPRESSED:
        return [(0.0, None)]
    own = method.compression_ratios is not None or method.budget_tokens is not None
    ratios: Sequence[float] = (method.compression_ratios or []) if own else config.compression_ratios
    tokens: Sequence[int] = (method.budget_tokens or []) if own else config.budget_tokens
    budgets: list[tuple[float | None, int | None]] = [(ratio, None) for ratio in ratios]
    budgets += [(None, count) for count in tokens]
    return budgets or [(None, None)]
