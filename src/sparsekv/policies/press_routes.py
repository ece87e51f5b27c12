"""kvpress presses that decide inside a layer, as layer policies; `press_classify` says which.

    PressScores    a scorer with kvpress's own top-k; one scoring serves several budgets
    PressLayer     decides by itself: which rows it left is found by comparing them bit for bit
    PressMasked    the same, hiding entries per head (`masked_key_indices`)

Every row of a batch is handed to the press alone: several presses decide for row 0 and apply it to all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from kvpress import (
    BasePress,
    BlockPress,
    CapPress,
    ChunkPress,
    CompactorPress,
    ComposedPress,
    CriticalKVPress,
    CURPress,
    DMSPress,
    ExpectedAttentionPress,
    PerLayerCompressionPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)
from torch import Tensor, nn

from sparsekv.errors import ConfigError, SparseKVError
from sparsekv.policies.base import LayerContext, LayerPolicy, Route
from sparsekv.policies.budget import Budget
from sparsekv.policies.choosing import check_numbers
from sparsekv.policies.press_copies import (
    drawing,
    exact_ratio,
    given_arguments,
    load,
    nested,
    own_ratio,
    own_sizes,
    readable_by_presses,
    with_ratio,
)
from sparsekv.policies.press_rows import kept_rows

_WORDS = (AssertionError, ValueError, NotImplementedError)
"""How kvpress refuses an input: a context shorter than its window, eager attention, ..."""

_REFUSALS = (*_WORDS, TypeError, RuntimeError, ArithmeticError, IndexError)
"""The same, and what arguments that it doesn't check end in."""

_MACHINE = ("out of memory", "can't allocate memory", "CUDA error")
"""In the words of a RuntimeError that no argument is to blame for."""

_WHOLE_CONTEXT = (BlockPress, ChunkPress, DMSPress)
"""They index the hidden states by the keys' positions, so they need those of the whole context."""

_POSITIVE = (SnapKVPress, TOVAPress, ExpectedAttentionPress, CriticalKVPress, CURPress, CapPress)
"""Their scores are sums and products of what is never negative (0 only by underflow)."""


def reason(error: BaseException) -> str:
    """The first line of an error."""
    return (str(error) or type(error).__name__).strip().splitlines()[0]


def window_size(press: BasePress) -> int:
    """Newest tokens that a press, or one inside it, takes for those of the last entries; 0: none."""
    return max(getattr(part, "window_size", None) or 0 for part in nested(press))


@contextmanager
def refusing(
    press: BasePress, name: str, row: LayerContext | None = None, *, alone: bool = True
) -> Iterator[None]:
    """Run a press inside: what it raises becomes a ConfigError that names the method and its arguments.

    `alone`: nothing but the press runs; else a model does too, whose failures aren't the press's. With `row`, what it
    reads, a part of a context that is no longer than its window is told so. Errors of this package stay as they are,
    and so do those of the machine: no memory left, a GPU that fails.
    """
    try:
        yield
    except SparseKVError:
        raise
    except _REFUSALS as error:
        if not (alone or isinstance(error, _WORDS)):
            raise
        if isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _MACHINE):
            raise
        short = row is not None and row.hidden_states.shape[1] <= window_size(press)
        if row is not None and short and isinstance(error, AssertionError):
            raise ConfigError(
                f"the last part of the context has {row.hidden_states.shape[1]} tokens, method {name} needs more than "
                f"its window_size of {window_size(press)}; give another method or a smaller window_size"
            ) from error
        given = ", ".join(f"{key}={value!r}" for key, value in given_arguments(press).items())
        raise ConfigError(f"method {name}{f' with {given}' if given else ''}: {reason(error)}") from error


def decided_ratio(
    press: BasePress, name: str, budget: Budget, n: int, *, counts_evicted: bool = False
) -> float:
    """The compression ratio that a press gets: the budget's, or its own.

    Raises
    ------
    ConfigError
        If both say something, or neither does.
    """
    argument, given = own_sizes(press), own_ratio(press)
    if argument is not None:
        if getattr(press, argument) is None:
            raise ConfigError(f"method {name} needs its argument {argument}")
        if budget.given and budget.compression_ratio != 0:
            raise ConfigError(
                f"method {name} takes no compression ratio or budget; its argument {argument} decides"
            )
        return 0.0
    if not budget.given:
        if given == 0.0:
            raise ConfigError(f"method {name} needs a budget: compression_ratio or tokens")
        return given
    if given:
        raise ConfigError(
            f"method {name}: compression_ratio={given} of the press and a budget are both given"
        )
    return exact_ratio(budget, n, counts_evicted=counts_evicted)


def check_own_sizes(press: BasePress, name: str, budget: Budget) -> None:
    """Raise a ConfigError for a budget that a press with sizes of its own never takes (see `decided_ratio`)."""
    if budget.given and budget.compression_ratio != 0 and own_sizes(press) is not None:
        decided_ratio(press, name, budget, 1)


def _untouched(press: BasePress) -> int:
    """How many entries a press leaves out of what it scores without asking whether there are more."""
    if isinstance(press, (StreamingLLMPress, ExpectedAttentionPress, CapPress)):
        return press.n_sink
    if isinstance(press, CompactorPress):
        return press.sink_size_start + press.sink_size_end
    return 1 if isinstance(press, TOVAPress) else 0  # its only query is the last token's


def keeps_all(budget: Budget, n: int) -> bool:
    """True if the budget itself evicts nothing: then no press is asked, as in kvpress."""
    if budget.tokens is not None:
        return budget.tokens >= n
    return budget.compression_ratio == 0


def _rows(ctx: LayerContext) -> list[LayerContext]:
    """One context per batch row."""
    cos, sin = ctx.position_embeddings
    parts = []
    for row in range(ctx.keys.shape[0]):
        at, spot = slice(row, row + 1), slice(min(row, cos.shape[0] - 1), min(row, cos.shape[0] - 1) + 1)
        parts.append(
            replace(
                ctx,
                hidden_states=ctx.hidden_states[at],
                keys=ctx.keys[at],
                values=ctx.values[at],
                position_embeddings=(cos[spot], sin[spot]),
            )
        )
    return parts


@dataclass(frozen=True, eq=False)
class _InLayer(LayerPolicy):
    """What PressScores and PressLayer share.

    Parameters
    ----------
    template : kvpress press
        Never changed; every use takes a fresh copy.
    name : str
    seed : int
        For the few presses that draw (random, leverage, compactor): together with the layer's index.
    rerotate : bool
        Kept keys are to be re-rotated (key_rerotation).
    ratio_free : bool
        The scores do not depend on the budget.
    """

    template: BasePress
    name: str = "press"
    seed: int = 0
    rerotate: bool = False
    ratio_free: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "_loaded", {})  # what was downloaded, per model

    @property
    def window(self) -> int:  # type: ignore[override]
        """Newest tokens that the press takes for those of the last entries, to observe the others; 0: none."""
        return window_size(self.template)

    @property
    def too_short(self) -> int:  # type: ignore[override]
        """Its window, or what else it never drops: kvpress fails on a context that is not longer."""
        return max(self.window, *(_untouched(press) for press in nested(self.template)))

    def _check_length(self, n: int) -> None:
        if n <= self.too_short:
            told = self.too_short_for(f"the context has {n} tokens")
            raise ConfigError(f"{told}; give another method, or sizes that it is longer than")

    def check_budget(self, budget: Budget) -> None:
        """Refuse a ratio or a number of tokens beside sizes of the press's own."""
        check_own_sizes(self.template, self.name, budget)

    def _ready(self, module: nn.Module, ratio: float) -> BasePress:
        """A fresh copy with its ratio set and its weights loaded."""
        config: Any = module.config
        memo: dict[int, tuple[Any, BasePress]] = self._loaded  # type: ignore[attr-defined]
        if id(config) not in memo:
            weight = next(module.parameters())
            model = SimpleNamespace(config=config, dtype=weight.dtype, device=weight.device)
            memo[id(config)] = config, load(self.template, model, self.name)
        return with_ratio(memo[id(config)][1], ratio)


@dataclass(frozen=True, eq=False)
class PressScores(_InLayer):
    """A kvpress scorer: its scores, and the same `topk` on them as kvpress's."""

    @property
    def positive_scores(self) -> bool:  # type: ignore[override]
        """True for presses that score by attention, or by norms and leverage times it."""
        return isinstance(self.template, _POSITIVE)

    def score_layer(self, ctx: LayerContext, budget: Budget) -> Tensor:
        """The press's scores [B, H, T].

        Raises
        ------
        ConfigError
            Where kvpress refuses the input, e.g. a context shorter than the observation window.
        """
        with torch.no_grad():
            return self.scores_with_gradient(ctx, budget)

    def scores_with_gradient(self, ctx: LayerContext, budget: Budget) -> Tensor:
        """As `score_layer`; gradients flow to whatever the press computes its scores from."""
        self._check_length(ctx.keys.shape[2])
        if self.ratio_free and not budget.given:
            ratio = 0.0
        else:
            ratio = decided_ratio(self.template, self.name, budget, ctx.keys.shape[2])
        press = self._ready(ctx.module, ratio)
        scores = []
        with readable_by_presses(ctx.module):
            for row in _rows(ctx):
                with drawing(press, self.seed + ctx.layer_idx, row.keys.device):
                    scores.append(_score(press, row, self.name))
        return torch.cat(scores)

    def keep_layer(self, ctx: LayerContext, budget: Budget) -> Tensor:
        """BoolTensor [B, H, T]."""
        if keeps_all(budget, ctx.keys.shape[2]):
            return torch.ones(ctx.keys.shape[:3], dtype=torch.bool, device=ctx.keys.device)
        return super().keep_layer(ctx, budget)


def _score(press: BasePress, row: LayerContext, name: str) -> Tensor:
    with refusing(press, name, row):
        scores: Tensor = press.score(
            row.module, row.hidden_states, row.keys, row.values, None, row.hook_kwargs()
        )
    return scores


@dataclass(frozen=True, eq=False)
class PressLayer(_InLayer):
    """A press whose `compress` decides by itself, by taking rows out or by masking them."""

    scored: ClassVar[bool] = False

    def keep_layer(self, ctx: LayerContext, budget: Budget) -> Tensor:
        """BoolTensor [B, H, T]: the rows that the press left.

        Raises
        ------
        ConfigError
            If the press changes entries, or refuses the input, or the budget spans the whole model.
        """
        if budget.scope == "model":
            raise ConfigError(
                f"method {self.name} decides layer by layer; budget scope 'model' is not possible"
            )
        n = ctx.keys.shape[2]
        if keeps_all(budget, n):
            return torch.ones(ctx.keys.shape[:3], dtype=torch.bool, device=ctx.keys.device)
        self._check_length(n)
        ratio = decided_ratio(self.template, self.name, budget, n)
        if not ctx.covers_entries and any(isinstance(p, _WHOLE_CONTEXT) for p in nested(self.template)):
            raise ConfigError(
                f"method {self.name} needs the whole context at once: no chunks, no later turns"
            )
        kept = []
        with torch.no_grad(), readable_by_presses(ctx.module):
            for row in _rows(ctx):
                press = self._ready(ctx.module, ratio)
                with drawing(press, self.seed + ctx.layer_idx, row.keys.device):
                    kept.append(self._kept_in_row(press, row))
        return torch.stack(kept)

    def _kept_in_row(self, press: BasePress, row: LayerContext) -> Tensor:
        module: Any = row.module
        before = check_numbers(row.keys, self.name, row.layer_idx, "keys")[0], row.values[0]
        had, earlier = hasattr(module, "masked_key_indices"), getattr(module, "masked_key_indices", None)
        module.masked_key_indices = None
        try:
            # a copy of the keys and values: a press may write in place
            with refusing(press, self.name, row):
                keys, values = run_compress(press, row, row.keys.clone(), row.values.clone())
            masked = module.masked_key_indices
        finally:
            if had:
                module.masked_key_indices = earlier
            else:
                del module.masked_key_indices
        kept = kept_rows(before, (keys[0], values[0]), self.name)
        if masked is not None:
            kept &= unmasked(masked, row.keys)[0]
        return kept


@dataclass(frozen=True, eq=False)
class PressMasked(PressLayer):
    """A press that hides entries per head inside a layer (AdaKV, CriticalAdaKV, DMS, LU-KV)."""

    route: ClassVar[Route] = "masked"
    leaves_unequal: ClassVar[bool] = True


def unmasked(indices: Any, keys: Tensor) -> Tensor:
    """BoolTensor [B, H, T]: what kvpress's `masked_key_indices` (batch, head, entry) leave visible."""
    kept = torch.ones(keys.shape[:3], dtype=torch.bool, device=keys.device)
    kept[tuple(index.to(keys.device) for index in indices)] = False
    return kept


def run_compress(press: BasePress, row: LayerContext, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """What the press's forward hook would leave in the cache of this layer."""
    if isinstance(press, ComposedPress):
        for part in press.presses:
            keys, values = run_compress(part, row, keys, values)
        return keys, values
    if isinstance(press, PerLayerCompressionPress):
        ratios = press.compression_ratios
        if row.layer_idx >= len(ratios):
            raise ConfigError(
                f"compression_ratios has {len(ratios)} values, but the model has a layer {row.layer_idx}"
            )
        return run_compress(with_ratio(press.press, ratios[row.layer_idx]), row, keys, values)
    if type(press).forward_hook is not BasePress.forward_hook:
        stored = SimpleNamespace(keys=keys, values=values)
        kwargs = row.hook_kwargs() | {"past_key_values": SimpleNamespace(layers={row.layer_idx: stored})}
        press.forward_hook(row.module, [], kwargs, [None, None])
        return stored.keys, stored.values
    left: tuple[Tensor, Tensor] = press.compress(
        row.module, row.hidden_states, keys, values, None, row.hook_kwargs()
    )
    return left
