"""What training minimises: the objectives there are, by name. What an objective is: `training.objective`.

Shape letters: B rows, T columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from sparsekv.errors import ConfigError, unknown
from sparsekv.policies.sparsity import SPARSITY_KINDS
from sparsekv.registry import Registry
from sparsekv.training.data_layout import IGNORED
from sparsekv.training.dropping import BOUNDARY, SEEDS, seed_of
from sparsekv.training.objective import REPEATED, Objective, Terms


def _ones(batch: Mapping[str, Tensor]) -> Tensor:
    return torch.ones(batch["labels"].shape, dtype=torch.float32, device=batch["labels"].device)


OBJECTIVES: Registry[type[Objective]] = Registry("objective")


@OBJECTIVES.register("standard_lm")
@dataclass(frozen=True)
class StandardLMObjective(Objective):
    """Next-token cross-entropy while entries are missing."""

    name: ClassVar[str] = "standard_lm"

    def terms(self, batch: Mapping[str, Tensor]) -> Terms:
        """CE 1."""
        one = _ones(batch)
        return Terms(one, torch.zeros_like(one))


@OBJECTIVES.register("sparse_lm")
@dataclass(frozen=True)
class SparseLMObjective(Objective):
    """Cross-entropy plus a loss on how spread attention is.

    Parameters
    ----------
    sparsity_weight : float >= 0
    sparsity_kind : "entropy" or "l1"
    """

    sparsity_weight: float = 0.01
    sparsity_kind: Literal["entropy", "l1"] | None = "entropy"
    name: ClassVar[str] = "sparse_lm"

    def __post_init__(self) -> None:
        _at_least_0(self.name, "sparsity_weight", self.sparsity_weight)
        if self.sparsity_kind not in SPARSITY_KINDS:
            raise unknown("sparsity_kind", self.sparsity_kind, SPARSITY_KINDS)

    def terms(self, batch: Mapping[str, Tensor]) -> Terms:
        """CE 1, sparsity."""
        one = _ones(batch)
        return Terms(one, torch.zeros_like(one), self.sparsity_weight)


@OBJECTIVES.register("eit")
@dataclass(frozen=True)
class EITObjective(Objective):
    """Eviction-invariant training: cross-entropy plus lambda_kl · KL(full-cache teacher || student).

    The teacher is the frozen base with nothing evicted; the student sees what eviction leaves. Tokens of the context
    itself, which see all before them in the student too, can be held at the teacher as well: what trains on answers
    alone forgets how plain text goes on.

    Parameters
    ----------
    lambda_kl : float >= 0
    temperature : float > 0
    lambda_ce : float >= 0
    lambda_context : float >= 0
        Of the mean KL over `context_tokens` tokens before the boundary that have no label, drawn for every sample; a
        sample weighs as much as its labels do. For dropping "prefill".
    context_tokens : int >= 1
    """

    lambda_kl: float = 1.0
    temperature: float = 1.0
    lambda_ce: float = 1.0
    lambda_context: float = 0.0
    context_tokens: int = 128
    needs_teacher: bool = True
    name: ClassVar[str] = "eit"

    def __post_init__(self) -> None:
        _at_least_0(self.name, "lambda_kl", self.lambda_kl)
        _at_least_0(self.name, "lambda_ce", self.lambda_ce)
        if not self.temperature > 0:
            raise ConfigError(f"objective eit: temperature must be above 0, got {self.temperature!r}")
        _at_least_0(self.name, "lambda_context", self.lambda_context)
        if isinstance(self.context_tokens, bool) or not (
            isinstance(self.context_tokens, int) and self.context_tokens >= 1
        ):
            raise ConfigError(
                f"objective eit: context_tokens must be a whole number >= 1, got {self.context_tokens!r}"
            )

    @property
    def judges_context(self) -> bool:  # type: ignore[override]
        """True with a lambda_context."""
        return self.lambda_context > 0

    def terms(self, batch: Mapping[str, Tensor]) -> Terms:
        """CE lambda_ce, KL lambda_kl, and lambda_context over a draw of the context."""
        one = _ones(batch)
        context = self._context(batch) if self.lambda_context else None
        return Terms(self.lambda_ce * one, self.lambda_kl * one, kl_context=context)

    def _context(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Weights [B, T] of the drawn tokens; those of a row sum up to lambda_context times its labels."""
        labels, mask = batch["labels"], batch["attention_mask"]
        found = torch.zeros(labels.shape, dtype=torch.float32, device=labels.device)
        rows = zip(batch[BOUNDARY].tolist(), batch[SEEDS].tolist(), strict=True)
        for row, (boundary, seed) in enumerate(rows):
            first = labels.shape[1] - int(mask[row].sum()) + 1  # the row's first token follows nothing
            free = first + (labels[row, first:boundary] == IGNORED).nonzero()[:, 0]
            if not free.numel():
                continue
            generator = torch.Generator().manual_seed(seed_of(seed, 4))
            drawn = free[torch.randperm(free.numel(), generator=generator)[: self.context_tokens]]
            found[row, drawn] = self.lambda_context * float((labels[row] != IGNORED).sum()) / drawn.numel()
        return found


@OBJECTIVES.register("reconstruction")
@dataclass(frozen=True)
class ReconstructionObjective(Objective):
    """Cross-entropy, and repeat an evicted span of the context from what is left of it.

    A span from before the boundary is appended to every sample; its first `cue` tokens say which one it is, the
    rest are scored. What is appended changes nothing before it. The span is drawn among those that lose most of what
    is scored, where that is known beforehand (policies that look at tokens alone, after a boundary); else among all.

    Parameters
    ----------
    weight : float >= 0
        Of the repeated tokens' cross-entropy.
    span : int >= 2
        Tokens to repeat, the cue included.
    cue : int >= 1
    """

    weight: float = 1.0
    span: int = 48
    cue: int = 8
    name: ClassVar[str] = "reconstruction"

    def __post_init__(self) -> None:
        _at_least_0(self.name, "weight", self.weight)
        if not 1 <= self.cue < self.span:
            raise ConfigError(
                f"objective reconstruction: 1 <= cue < span, got cue {self.cue}, span {self.span}"
            )

    def prepare(self, batch: dict[str, Tensor], evicted: Tensor | None = None) -> dict[str, Tensor]:
        """Append a drawn span of every row's context; rows with a context shorter than it repeat nothing."""
        ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
        boundaries, seeds = batch[BOUNDARY].tolist(), batch[SEEDS].tolist()
        rows, total = ids.shape
        tail = torch.zeros(rows, self.span, dtype=ids.dtype, device=ids.device)
        tail_labels = torch.full_like(tail, IGNORED)
        for row, (boundary, seed) in enumerate(zip(boundaries, seeds, strict=True)):
            start = total - int(mask[row].sum())
            room = boundary - start - self.span
            if room < 0:
                continue
            begins = torch.arange(start, start + room + 1)
            if evicted is not None:
                begins = begins[self._lost(evicted[row].cpu(), begins)]
            begin = int(begins[seed_of(seed, 2) % len(begins)])
            tail[row] = ids[row, begin : begin + self.span]
            tail_labels[row, self.cue :] = tail[row, self.cue :]
        repeated = nn.functional.pad(torch.zeros_like(labels, dtype=torch.bool), (0, self.span), value=True)
        return batch | {
            "input_ids": torch.cat([ids, tail], dim=1),
            "attention_mask": nn.functional.pad(mask, (0, self.span), value=1),
            "labels": torch.cat([labels, tail_labels], dim=1),
            REPEATED: repeated & (torch.cat([labels, tail_labels], dim=1) != IGNORED),
        }

    def _lost(self, evicted: Tensor, begins: Tensor) -> Tensor:
        """Which of the spans lose most: of the entries [T] whose tokens they would score."""
        before = nn.functional.pad(evicted.double().cumsum(0), (1, 0))
        lost = before[begins + self.span] - before[begins + self.cue]
        return lost >= lost.max() - 1e-6

    def terms(self, batch: Mapping[str, Tensor]) -> Terms:
        """CE 1 on the sample, `weight` on what is repeated."""
        one = _ones(batch)
        if REPEATED in batch:
            one = torch.where(batch[REPEATED], self.weight * one, one)
        return Terms(one, torch.zeros_like(one))


@OBJECTIVES.register("mixed")
@dataclass(frozen=True)
class MixedObjective(Objective):
    """A weighted sum of objectives in one forward.

    Parameters
    ----------
    objectives : (objective, weight) pairs; at most one of them may change the batch, and temperatures must agree
    """

    objectives: Sequence[tuple[Objective, float]] = field(default_factory=tuple)
    name: ClassVar[str] = "mixed"

    def __post_init__(self) -> None:
        if not self.objectives:
            raise ConfigError("objective mixed: give at least one (objective, weight)")
        for one, weight in self.objectives:
            _at_least_0("mixed", f"weight of {one.name}", weight)
        teachers = [one for one, _ in self.objectives if one.needs_teacher]
        temperatures = {one.temperature for one in teachers}
        kinds = {one.sparsity_kind for one, _ in self.objectives} - {None}
        if len(temperatures) > 1 or len(kinds) > 1:
            raise ConfigError("objective mixed: its parts must agree on temperature and sparsity_kind")
        changing = [one for one, _ in self.objectives if one.changes_batch]
        if len(changing) > 1:
            raise ConfigError("objective mixed: only one of its parts may be a reconstruction")
        object.__setattr__(self, "needs_teacher", bool(teachers))
        object.__setattr__(self, "temperature", next(iter(temperatures), 1.0))
        object.__setattr__(self, "sparsity_kind", next(iter(kinds), None))

    @property
    def changes_batch(self) -> bool:
        """True if one of its parts does."""
        return any(one.changes_batch for one, _ in self.objectives)

    @property
    def judges_context(self) -> bool:  # type: ignore[override]
        """True if one of its parts does."""
        return any(one.judges_context for one, _ in self.objectives)

    def prepare(self, batch: dict[str, Tensor], evicted: Tensor | None = None) -> dict[str, Tensor]:
        """As the part that changes the batch does."""
        for one, _ in self.objectives:
            batch = one.prepare(batch, evicted)
        return batch

    def terms(self, batch: Mapping[str, Tensor]) -> Terms:
        """The weighted sum; on repeated tokens only the reconstruction counts."""
        ce = torch.zeros_like(_ones(batch))
        kl, sparsity = torch.zeros_like(ce), 0.0
        context: Tensor | None = None
        repeated = batch.get(REPEATED)
        for one, weight in self.objectives:
            part = one.terms(batch)
            own = torch.ones_like(ce)
            if repeated is not None and not one.changes_batch:
                own = (~repeated).float()
            ce, kl = ce + weight * own * part.ce, kl + weight * own * part.kl
            sparsity += weight * part.sparsity
            if part.kl_context is not None:
                context = weight * part.kl_context + (0.0 if context is None else context)
        return Terms(ce, kl, sparsity, context)


def make_objective(name: str, **args: object) -> Objective:
    """The objective called `name`; for "mixed", `objectives` is a list of {name, weight, …}.

    Raises
    ------
    ConfigError
        For an unknown name or parameter, or a value that is not allowed.
    """
    kind = OBJECTIVES.get(name)
    if name == "mixed":
        given = args.pop("objectives", ())
        parts: list[tuple[Objective, float]] = []
        for part in given if isinstance(given, (list, tuple)) else ():
            inner = dict(part)
            weight = float(inner.pop("weight", 1.0))
            parts.append((make_objective(str(inner.pop("name", "")), **inner), weight))
        args = {"objectives": tuple(parts), **args}
    allowed = [each.name for each in fields(kind) if each.name != "needs_teacher"]  # type: ignore[arg-type]
    for key in args:
        if key not in allowed:
            raise unknown(f"argument of objective {name}", key, allowed)
    made: Objective = kind(**args)
    return made


def _at_least_0(name: str, field: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise ConfigError(f"objective {name}: {field} must be a number >= 0, got {value!r}")
