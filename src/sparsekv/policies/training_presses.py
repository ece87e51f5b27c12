"""The training presses: kvpress presses that a trainer reads its policy and ratio from.

    press = BlockDropoutPress(block_size=64, compression_ratio=0.3, n_sink=4, recent=64)
    press.compression_ratio = 0.5           # what a curriculum does
    press.policy, press.budget()            # what a training step asks for

Each also works as it is in kvpress, `with press(model): ...`: then it evicts after a prefill. kvpress's hooks run after
attention, so in a training forward a press alone changes nothing; the trainer masks by the policy's Selection instead.

    drop_ratio = compression_ratio      keep_ratio = 1 - compression_ratio
    protect_start = n_sink              protect_recent = recent = n_recent
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from sparsekv.errors import ConfigError, unknown
from sparsekv.policies.adaptive_blocks import AdaptiveBlockDropout
from sparsekv.policies.as_press import PolicyPress
from sparsekv.policies.augment import EvictionAug
from sparsekv.policies.base import Policy
from sparsekv.policies.blocks import BlockDropout, VariableBlockDropout
from sparsekv.policies.budget import Budget, Scope, removed_fraction
from sparsekv.policies.positional import Full
from sparsekv.policies.sentences import SentenceDropout
from sparsekv.policies.sizes import refuse_budget
from sparsekv.policies.soft import SoftThreshold
from sparsekv.policies.sparsity import Sparsity, SparsityKind
from sparsekv.policies.spellings import PROTECTED, RATIOS
from sparsekv.registry import Registry

PRESSES: Registry[type[PolicyPress]] = Registry("press")
"""The training presses by the name that configs give them."""

ALIASES: dict[str, str] = {**RATIOS, **PROTECTED}
"""Other spellings of what presses take, with ours."""


def one_spelling(press: str, given: dict[str, Any]) -> dict[str, Any]:
    """`given` under our names; what is None counts as not given.

    Raises
    ------
    ConfigError
        If something is given in two spellings.
    """
    ours: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for key, value in given.items():
        if value is None:
            continue
        name = ALIASES.get(key, key)
        if name in ours:
            raise ConfigError(
                f"{press}: {spelled[name]} and {key} are both given, and mean the same; give one"
            )
        if key == "keep_ratio":
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
                raise ConfigError(f"{press}: keep_ratio must be in (0, 1], got {value!r}")
            value = removed_fraction(value)
        ours[name], spelled[name] = value, key
    return ours


class DropoutPress(PolicyPress):
    """A training press over one kind of policy; the named presses are subclasses.

    Parameters
    ----------
    compression_ratio : float in [0, 1), default 0
        Fraction to remove; settable later. Also `drop_ratio`, or `keep_ratio` for its complement.
    tokens, scope, tokenizer
        See `PolicyPress`. With `tokens` there is no ratio.
    n_sink : int >= 0, default 4
        First entries that always stay. Also `protect_start`.
    recent : int >= 0, optional
        Last entries that always stay; a context whose budget is under n_sink + recent is an error. Default: 64, at
        most half of what the sinks leave of the budget. Also `n_recent`, `protect_recent`.
    seed : int, default 0
        Of the policy: with the row's seed it fixes what is drawn.
    **parameters
        The policy's other parameters.
    """

    kind: ClassVar[type[Policy]]
    own_size: ClassVar[str] = ""
    """A parameter of the policy that sets the total by itself, so that without a ratio there is no budget."""

    def __init__(
        self,
        compression_ratio: float | None = None,
        *,
        tokens: int | None = None,
        scope: Scope = "head",
        tokenizer: Any = None,
        **parameters: Any,
    ) -> None:
        title = type(self).__name__
        given = one_spelling(title, {"compression_ratio": compression_ratio, **parameters})
        ratio = given.pop("compression_ratio", None)
        names = [field.name for field in fields(self.kind)]  # type: ignore[arg-type]
        for key in given:
            if key not in names:
                raise unknown(f"argument of {title}", key, ["compression_ratio", *names, *ALIASES])
        sized = bool(self.own_size) and self.own_size in given
        if ratio is None and tokens is None and not sized:
            ratio = 0.0
        policy = self.kind(**given)
        super().__init__(policy, ratio, tokens=tokens, scope=scope, tokenizer=tokenizer)
        if sized:
            refuse_budget(policy.name, self.budget(), f"{self.own_size}={given[self.own_size]}")

    @property
    def own_sized(self) -> bool:
        """True if a parameter of the policy sets the total: then there is no budget, and no curriculum sets a ratio."""
        return bool(self.own_size) and getattr(self.policy, self.own_size) is not None

    @property
    def compression_ratio(self) -> float:
        """The ratio asked for; without one, what the last context lost. Settable unless `own_sized`."""
        return super().compression_ratio

    @compression_ratio.setter
    def compression_ratio(self, value: float | None) -> None:
        if self.own_sized and value is not None:
            own = f"{self.own_size}={getattr(self.policy, self.own_size)}"
            refuse_budget(self.policy.name, Budget(value), own)
        self._ratio = value


class _BlockPress(DropoutPress):
    """Blocks of one size leave; the size comes first."""

    reads_ids = False

    def __init__(
        self,
        block_size: int = 64,
        compression_ratio: float | None = None,
        n_sink: int | None = None,
        **more: Any,
    ) -> None:
        super().__init__(compression_ratio, block_size=block_size, n_sink=n_sink, **more)


@PRESSES.register("block_dropout")
class BlockDropoutPress(_BlockPress):
    """Random blocks of `block_size` tokens leave; see `BlockDropout` (share) and `DropoutPress`."""

    kind = BlockDropout


@PRESSES.register("adaptive_block_dropout")
class AdaptiveBlockDropoutPress(_BlockPress):
    """Blocks of low attention density or high sink share leave more often; see `AdaptiveBlockDropout` (temperature,
    sink_weight, window, samples, share) and `DropoutPress`.
    """

    kind = AdaptiveBlockDropout


@PRESSES.register("variable_block_dropout")
class VariableBlockDropoutPress(DropoutPress):
    """Random blocks of min_block to max_block tokens leave; see `VariableBlockDropout` (share) and `DropoutPress`."""

    kind = VariableBlockDropout
    reads_ids = False

    def __init__(
        self, min_block: int = 16, max_block: int = 128, compression_ratio: float | None = None, **more: Any
    ) -> None:
        super().__init__(compression_ratio, min_block=min_block, max_block=max_block, **more)


@PRESSES.register("sentence_dropout")
class SentenceDropoutPress(DropoutPress):
    """Random whole sentences leave; see `SentenceDropout` (max_tokens, share) and `DropoutPress`.

    Without `tokenizer` the model's is loaded in kvpress; a trainer has its own.
    """

    kind = SentenceDropout


@PRESSES.register("soft_threshold")
class SoftThresholdPress(DropoutPress):
    """Entries fade by sigmoid((score - threshold) / temperature) in training and leave at inference.

    See `SoftThreshold` (on, window, block_size) and `DropoutPress`. A `threshold` takes the place of a ratio; with
    both, the policy raises.
    """

    kind = SoftThreshold
    own_size = "threshold"
    reads_ids = False

    def __init__(
        self,
        temperature: float = 1.0,
        threshold: float | None = None,
        compression_ratio: float | None = None,
        **more: Any,
    ) -> None:
        super().__init__(compression_ratio, temperature=temperature, threshold=threshold, **more)

    @property
    def temperature(self) -> float:
        """In units of the score; settable, so that one can anneal it towards 0. `policy` is then replaced by one that
        has it, so read `policy` anew in every step.
        """
        return self._soft.temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        self.policy = replace(self._soft, temperature=value)

    @property
    def _soft(self) -> SoftThreshold:
        if not isinstance(self.policy, SoftThreshold):
            raise ConfigError(f"SoftThresholdPress has another policy: {self.policy!r}")
        return self.policy


@PRESSES.register("eviction_aug")
class EvictionAugPress(PolicyPress):
    """Evicts what one of several methods would, drawn anew for every context.

    A trainer asks `press.policy.draw(step)` instead, so that a resumed run draws the same.

    Parameters
    ----------
    presses : sequence of kvpress presses, policies or method names
        Without ratios of their own. Default: snapkv, h2o, knorm, tova.
    compression_ratio, tokens, scope, tokenizer
        See `PolicyPress`; the ratio is 0 by default.
    seed : int
        With the number of contexts read so far it fixes the draw.
    soft_scores, temperature
        See `EvictionAug`: for training; a press that compresses a context decides hard.
    """

    def __init__(
        self,
        presses: Sequence[Any] | None = None,
        compression_ratio: float | None = None,
        *,
        tokens: int | None = None,
        scope: Scope = "head",
        tokenizer: Any = None,
        seed: int = 0,
        soft_scores: bool = False,
        temperature: float = 1.0,
        **more: Any,
    ) -> None:
        given = one_spelling("EvictionAugPress", {"compression_ratio": compression_ratio, **more})
        ratio = given.pop("compression_ratio", 0.0 if tokens is None else None)
        for key in given:
            raise unknown(
                "argument of EvictionAugPress",
                key,
                ["presses", "compression_ratio", "tokens", "seed", "soft_scores", "temperature"],
            )
        chosen: Any = EvictionAug.policies if presses is None else presses
        policy = EvictionAug(chosen, seed, soft_scores, temperature)
        super().__init__(policy, ratio, tokens=tokens, scope=scope, tokenizer=tokenizer)
        self.drawn: Policy | None = None
        self._n_contexts = 0

    @contextmanager
    def __call__(self, model: Any) -> Iterator[None]:
        """Compress what the model reads first inside this context by a method drawn for it (then in `drawn`)."""
        if not isinstance(self.policy, EvictionAug):
            raise ConfigError(f"EvictionAugPress has another policy: {self.policy!r}")
        self.drawn = self.policy.draw(self._n_contexts)
        self._n_contexts += 1
        inner = PolicyPress(
            self.drawn, self._ratio, tokens=self.tokens, scope=self.scope, tokenizer=self.tokenizer
        )
        with inner(model):
            yield
        self._achieved = inner.achieved_compression

    def compress(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """Not called by `with press(model)`; a wrapper would, before anything was drawn."""
        raise ConfigError(
            "EvictionAugPress draws a method per context: use it alone, not inside another press"
        )


@PRESSES.register("sparse_reg")
class SparseRegPress(PolicyPress):
    """Evicts nothing, whatever its ratio; tells a trainer to add a sparsity loss on attention.

    Parameters
    ----------
    kind, weight
        See `Sparsity`; both are in `press.sparsity`.
    compression_ratio : float in [0, 1), default 0
        Taken so that a curriculum can set it; nothing leaves.
    """

    reads_ids = False

    def __init__(
        self,
        kind: SparsityKind = "entropy",
        weight: float = 0.01,
        compression_ratio: float | None = None,
        **more: Any,
    ) -> None:
        given = one_spelling("SparseRegPress", {"compression_ratio": compression_ratio, **more})
        ratio = given.pop("compression_ratio", 0.0)
        for key in given:
            raise unknown("argument of SparseRegPress", key, ["kind", "weight", "compression_ratio", *RATIOS])
        self.sparsity = Sparsity(kind, weight)
        super().__init__(Full(), ratio)
