"""What an objective is: per-token weights on cross-entropy and KL, and a sparsity weight; and its losses.

Shape letters: B rows, T columns, C hidden size.

CE and KL are sums over tokens that have a label, divided by `num_items`: the number of such tokens in the whole step,
over all micro-batches and processes. So accumulation and data parallelism change nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sparsekv.errors import ConfigError
from sparsekv.plan import SelectionPlan
from sparsekv.training.data_layout import IGNORED
from sparsekv.training.linear_loss import Head, token_losses

REPEATED = "repeated"
"""Batch key: BoolTensor [B, T], True at the tokens that a ReconstructionObjective appended and scores."""


@dataclass(frozen=True)
class Output:
    """A model's last hidden states [B, T, C] and its output layer."""

    states: Tensor
    head: Head


@dataclass(frozen=True)
class Losses:
    """`total` is what backward starts from; `parts` are detached sums (per label token where `counts` has the name)."""

    total: Tensor
    parts: Mapping[str, Tensor]
    counts: Mapping[str, int]


@dataclass(frozen=True)
class Terms:
    """Weights of one objective on one batch, at the predicted token's column.

    Parameters
    ----------
    ce, kl : fp32 [B, T]
        Of tokens that have a label.
    sparsity : float
    kl_context : fp32 [B, T], optional
        Of the KL of further tokens, which have no label; 0 leaves one out.
    """

    ce: Tensor
    kl: Tensor
    sparsity: float = 0.0
    kl_context: Tensor | None = None


class Objective(ABC):
    """Base class. Subclasses say their `terms`, and may change the batch in `prepare`."""

    name: ClassVar[str] = ""
    needs_teacher: bool = False
    temperature: float = 1.0
    sparsity_kind: Literal["entropy", "l1"] | None = None

    judges_context: bool = False
    """True if tokens before the boundary are held to the teacher, as ones that lose nothing."""

    @property
    def changes_batch(self) -> bool:
        """True if `prepare` adds to a batch."""
        return type(self).prepare is not Objective.prepare

    def prepare(self, batch: dict[str, Tensor], evicted: Tensor | None = None) -> dict[str, Tensor]:
        """The batch to train on; by default as it is.

        Parameters
        ----------
        batch : with boundaries and seeds
        evicted : FloatTensor [B, T], optional
            In how much of the cache each entry will be missing; None where only the forward can tell.
        """
        return batch

    @abstractmethod
    def terms(self, batch: Mapping[str, Tensor]) -> Terms:
        """The weights of the tokens."""

    def __call__(
        self,
        student: Output,
        teacher: Output | None,
        batch: Mapping[str, Tensor],
        selection: SelectionPlan | None,
        num_items: float,
        *,
        sparsity: float = 0.0,
    ) -> Losses:
        """The losses of one micro-batch.

        Parameters
        ----------
        student, teacher : of the same tokens; the teacher is needed if `needs_teacher`
        batch : labels LongTensor [B, T], -100 ignored
        selection : the plan of the student's forward, for side outputs
        num_items : label tokens of the whole step
        sparsity : weight of the sparsity loss that a press asks for, where the objective has none of its own

        Raises
        ------
        ConfigError
            If the objective needs a teacher and there is none.
        """
        if self.needs_teacher and teacher is None:
            raise ConfigError(f"objective {self.name} needs a teacher: the model's full cache, adapters off")
        labels = batch["labels"][:, 1:]
        labelled = labels != IGNORED
        terms = self.terms(batch)
        ce_weights, kl_weights, chosen = terms.ce[:, 1:], terms.kl[:, 1:], labelled
        if terms.kl_context is not None:
            context = torch.where(labelled, 0.0, terms.kl_context[:, 1:])
            ce_weights, kl_weights = labelled * ce_weights, torch.where(labelled, kl_weights, context)
            chosen = labelled | (context > 0)
        ce_weight, kl_weight = ce_weights[chosen], kl_weights[chosen]
        losses = token_losses(
            student.states[:, :-1][chosen],
            student.head,
            labels.clamp_min(0)[chosen],
            ce_weight / num_items,
            teacher_states=None if teacher is None else teacher.states[:, :-1][chosen],
            teacher_head=None if teacher is None else teacher.head,
            kl_weight=kl_weight / num_items if self.needs_teacher else None,
            temperature=self.temperature,
        )
        total = losses.total
        repeated = batch.get(REPEATED)
        again = torch.zeros_like(chosen) if repeated is None else repeated[:, 1:]
        own = labelled[chosen]
        plain = own & ~again[chosen]
        parts = {"ce": losses.ce[plain].sum()}
        counts = {"ce": int(plain.sum())}
        if self.needs_teacher:
            parts["kl"], counts["kl"] = losses.kl[plain].sum(), counts["ce"]
        if terms.kl_context is not None:
            parts["kl_context"], counts["kl_context"] = losses.kl[~own].sum(), int((~own).sum())
        if repeated is not None:
            more = own & ~plain
            parts["reconstruction"], counts["reconstruction"] = losses.ce[more].sum(), int(more.sum())
        share = float(labelled.sum()) / num_items  # of this micro-batch in the step
        weight = terms.sparsity or sparsity
        if weight and selection is not None and selection.collected.get("sparsity"):
            spread = torch.stack(list(selection.collected["sparsity"].values())).mean()
            total = total + weight * share * spread
            parts["sparsity"], counts["sparsity"] = spread.detach() * counts["ce"], counts["ce"]
        return Losses(total, parts, counts)
