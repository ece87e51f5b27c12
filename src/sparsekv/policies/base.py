"""What a policy is. Shape letters: B batch, L layers or 1, H kv heads or 1, T tokens, Q queries, D head size.

    TokenPolicy   sees token ids and positions, before the forward      -> Selection
    LayerPolicy   sees one layer's keys, values and hidden states       -> kept [B, H, T]
    ModelPolicy   runs the model itself (several passes)                -> kept [B, L, H, T]
    NativePolicy  cannot be told as "which entries stay": kvpress's own hooks run

A policy is a frozen dataclass of its parameters and never changes when it is called.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from sparsekv import architecture
from sparsekv.errors import ConfigError
from sparsekv.policies.budget import SCOPES, Budget, Scope
from sparsekv.policies.choosing import AcrossLayers, TopOfAllLayers, check_numbers, keep_across, keep_top
from sparsekv.policies.step_rules import StepRule
from sparsekv.selection import NEVER, Selection

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Route = Literal["tokens", "scores", "masked", "native"]


@dataclass(frozen=True)
class TokenContext:
    """What a token policy may look at.

    Parameters
    ----------
    input_ids : LongTensor [B, T]
    attention_mask : BoolTensor [B, T]
        False for padding (on the left).
    n_layers, n_kv_heads : int
        Of the model. A policy that treats all alike returns 1 for either.
    compressible : tuple of int, optional
        The layers that may be compressed (sliding-window layers may not); all by default. A policy that varies
        with depth counts depth among these.
    tokenizer : optional
        For policies that look at the text (anchors).
    seeds : tuple of int, optional
        One seed per row, for random policies: a row draws the same in any batching. Default: 0 for every row.
    """

    input_ids: Tensor
    attention_mask: Tensor
    n_layers: int = 1
    n_kv_heads: int = 1
    compressible: tuple[int, ...] | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    seeds: tuple[int, ...] | None = None

    @classmethod
    def of_model(
        cls,
        model_or_config: Any,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        seeds: tuple[int, ...] | None = None,
    ) -> TokenContext:
        """The context of a model's input; without a mask nothing is padding."""
        real = (
            torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        )
        return cls(
            input_ids=input_ids,
            attention_mask=real,
            n_layers=architecture.num_layers(model_or_config),
            n_kv_heads=architecture.num_kv_heads(model_or_config),
            compressible=tuple(architecture.compressible_layers(model_or_config)),
            tokenizer=tokenizer,
            seeds=seeds,
        )

    @property
    def depth(self) -> tuple[int, ...]:
        """The compressible layers, ascending."""
        return tuple(range(self.n_layers)) if self.compressible is None else self.compressible

    def rows(self) -> list[TokenRow]:
        """Each row alone, without its padding."""
        seeds: Sequence[int] = self.seeds or (0,) * self.input_ids.shape[0]
        mask = self.attention_mask.bool()
        return [
            TokenRow(ids[real], self, seed)
            for ids, real, seed in zip(self.input_ids, mask, seeds, strict=True)
        ]


@dataclass(frozen=True)
class TokenRow:
    """One sequence without padding: `ids` LongTensor [n], the context it came from, and its seed."""

    ids: Tensor
    context: TokenContext
    seed: int = 0

    @property
    def n(self) -> int:
        """Number of tokens."""
        return int(self.ids.shape[0])


@dataclass
class LayerContext:
    """One attention layer's tensors, of rows without padding, after (or while) it attends.

    Parameters
    ----------
    module : the attention module
    layer_idx : int
    hidden_states : FloatTensor [B, Q, hidden]
        Input to the attention layer, of the tokens of this forward (Q <= T: fewer where the cache already holds
        earlier ones).
    keys, values : FloatTensor [B, H, T, D]
        All stored entries, RoPE applied, the newest Q last.
    position_embeddings : (cos, sin), each [B, Q, rotary size]
    cache_position : LongTensor [Q]
        0..Q-1 counted from the first stored entry: T - Q .. T - 1.
    seed : int
        The row's seed, for policies that draw: with the policy's own seed and the layer it fixes the draw.
    ids : LongTensor [B, T], optional
        Token ids of the stored entries, for policies that look at the text.
    tokenizer : optional
        For the same.
    n_aligned : int in [0, Q], optional
        How many of the newest hidden states are, one to one, those of the newest entries. Default: Q. Fewer where an
        entry between them was taken out: then older hidden states still say what queries look like, but neither whose
        entry it is nor what they could see.
    """

    module: nn.Module
    layer_idx: int
    hidden_states: Tensor
    keys: Tensor
    values: Tensor
    position_embeddings: tuple[Tensor, Tensor]
    cache_position: Tensor
    seed: int = 0
    ids: Tensor | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    n_aligned: int | None = None

    def observing(self, most: int | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Hidden states [B, W, hidden] and (cos, sin) [B, W, ...] of the newest tokens that can observe the entries.

        W <= `most`. Token j of them sees the first T - W + j + 1 entries; the newest sees all, so it is always there.
        """
        n_query = self.hidden_states.shape[1]
        first = n_query - min(n_query if most is None else most, max(1, self._n_aligned()), n_query)
        cos, sin = self.position_embeddings
        return self.hidden_states[:, first:], (cos[:, first:], sin[:, first:])

    @property
    def covers_entries(self) -> bool:
        """True if every entry's own hidden state is here."""
        total = self.keys.shape[2]
        return self.hidden_states.shape[1] == total == self._n_aligned()

    def _n_aligned(self) -> int:
        return self.hidden_states.shape[1] if self.n_aligned is None else self.n_aligned

    def hook_kwargs(self) -> dict[str, Any]:
        """The keyword arguments that a kvpress forward hook would have received."""
        return {
            "hidden_states": self.hidden_states,
            "position_embeddings": self.position_embeddings,
            "cache_position": self.cache_position,
        }


class Policy(ABC):
    """Decides which KV entries later queries can still see."""

    route: ClassVar[Route]
    name: str = ""

    own_prefill: ClassVar[bool] = False
    """True if the prefill itself differs (it is masked, or takes more passes), so it can't be shared."""

    rerotate: bool = False
    """True if kept keys are to be re-rotated to consecutive positions."""

    by_step: ClassVar[bool] = False
    """True if a decoding step attends to a part of what is stored (`step_rule`)."""

    def for_model(self, model: Any) -> Policy:
        """This policy, with what it has to know of a model; by default as it is."""
        return self

    def step_rule(self, budget: Budget, place: int) -> StepRule | None:
        """Which stored entries a decoding step attends to in one layer; None: all of them.

        `place` counts the compressible layers from 0.
        """
        return None

    def check_budget(self, budget: Budget) -> None:
        """Raise a `ConfigError` for a budget that it refuses whatever the context."""
        return None

    @property
    def why_one_tier(self) -> str | None:
        """Why what it evicts can't be kept in a second tier, as the end of a sentence; None: it can."""
        if self.by_step:
            return "chooses at every step what to read, as a second tier does by itself"
        if self.rerotate:
            return "re-rotates keys, and a recalled key has the position that it was computed with"
        return None

    @property
    def always_kept(self) -> int:
        """Entries that must stay whatever the budget: a smaller one is an error."""
        sizes = (getattr(self, name, None) for name in ("n_sink", "n_recent"))
        return sum(size for size in sizes if isinstance(size, int))

    @property
    def reads_text(self) -> bool:
        """True if a tokenizer is needed."""
        return False

    def needs_tokenizer(self, model: Any) -> bool:
        """True if choosing for this model needs a tokenizer: `reads_text`, or what the model carries reads the text."""
        return self.reads_text

    @property
    def needs_ids(self) -> bool:
        """True if token ids must be remembered while decoding."""
        return self.reads_text


class TokenPolicy(Policy):
    """A policy that needs no scores: it reads positions and token ids only, before the forward."""

    route = "tokens"

    needs_ids = True

    @abstractmethod
    def keep_row(self, row: TokenRow, budget: Budget) -> Tensor:
        """BoolTensor [L or 1, H or 1, n]: what stays of a row once it has been read.

        Raises ConfigError if the budget contradicts the policy's own sizes or is smaller than what must stay.
        """

    def evicted_at_row(self, row: TokenRow, budget: Budget) -> Tensor:
        """IntTensor [L or 1, H or 1, n] in the row's own columns; by default what is not kept leaves at n."""
        kept = self.keep_row(row, budget)
        return torch.full(kept.shape, NEVER, dtype=torch.int32, device=kept.device).masked_fill(~kept, row.n)

    def select(self, ctx: TokenContext, budget: Budget | None = None) -> Selection:
        """Selection over the padded columns of `ctx`; each row gets what it would get alone."""
        budget = budget or Budget()
        mask = ctx.attention_mask.bool()
        per_row = [self.evicted_at_row(row, budget) for row in ctx.rows()]
        n_layers = max(at.shape[0] for at in per_row)
        n_heads = max(at.shape[1] for at in per_row)
        total = ctx.input_ids.shape[1]
        out = torch.zeros(len(per_row), n_layers, n_heads, total, dtype=torch.int32, device=mask.device)
        for i, at in enumerate(per_row):
            columns = mask[i].nonzero().flatten()
            offset = int(columns[0]) if columns.numel() else 0
            shifted = torch.where(at == NEVER, at, at + offset)
            out[i, :, :, columns] = shifted.to(mask.device).expand(n_layers, n_heads, -1)
        return Selection(out)


class PositionPolicy(TokenPolicy):
    """A token policy that looks at positions alone."""

    needs_ids = False


class LayerPolicy(Policy):
    """A policy that decides inside each layer, from its keys, values and hidden states."""

    route: ClassVar[Route] = "scores"

    scored: ClassVar[bool] = True
    """True if `score_layer` exists: then budgets over a layer or the whole model are possible."""

    own_sizes: ClassVar[bool] = False
    """True if the policy decides without a budget too, by a threshold of its own."""

    ratio_free: bool = True
    """True if the scores do not depend on the budget, so one scoring serves all ratios."""

    needs_budget: ClassVar[bool] = False
    """True if it can't decide without a budget although it has no `score_layer` (scores without own sizes imply it)."""

    scopes: ClassVar[tuple[Scope, ...]] = SCOPES
    """The budget scopes that mean something to it."""

    joint: ClassVar[bool] = False
    """True if the choice needs the scores of every layer whatever the budget's scope (see `across_layers`)."""

    leaves_unequal: ClassVar[bool] = False
    """True if the heads of a layer keep different numbers under any budget."""

    whole_context: ClassVar[bool] = False
    """True if it compresses a context once, as a whole: no chunks, no later turns, not while decoding."""

    positive_scores: ClassVar[bool] = False
    """True if its scores are positive by nature, as attention is, so that ratios of them mean something."""

    window: int | None = None
    """Newest tokens that observe the others; None: those of this forward, or it observes nothing."""

    too_short: int = 0
    """Contexts of at most so many entries can't be scored, for these are the queries that score, or never leave;
    training leaves such a context whole."""

    def too_short_for(self, context: str) -> str:
        """Why a context can't be scored, in words; `context` says which it is, and how long."""
        least = f"its window_size of {self.too_short}" if self.too_short == self.window else self.too_short
        return f"{context}, method {self.name} needs more than {least}"

    soft: ClassVar[bool] = False
    """True if `weigh_layer` exists: training hides by weights through which gradients flow, not by a choice."""

    def weigh_layer(self, ctx: LayerContext, budget: Budget) -> Tensor:
        """FloatTensor [B, H, T] <= 0, differentiable: added to the attention logits of entries that may leave."""
        raise ConfigError(f"{self.name or type(self).__name__} has no soft weights; it keeps or evicts")

    def score_layer(self, ctx: LayerContext, budget: Budget) -> Tensor:
        """FloatTensor [B, H, T]; higher = keep."""
        raise ConfigError(f"{self.name or type(self).__name__} has no scores; it decides by itself")

    def keep_layer(self, ctx: LayerContext, budget: Budget) -> Tensor:
        """BoolTensor [B, H, T]: the entries of this layer that stay."""
        if self.spans_layers(budget):
            what = f"method {self.name!r}" if self.joint else "budget scope 'model'"
            raise ConfigError(f"{what} needs the scores of every layer; use keep_layers over all of them")
        scores = check_numbers(self.score_layer(ctx, budget), self.name, ctx.layer_idx)
        return keep_top(scores[:, None], budget)[:, 0]

    # ---- over all layers --------------------------------------------------------------------------------------

    def spans_layers(self, budget: Budget) -> bool:
        """True if the entries of all layers are chosen together: then `across_layers` decides, not `keep_layer`."""
        return self.joint or budget.scope == "model"

    def needs_whole_context(self, budget: Budget) -> bool:
        """True if a context must be read at once, in the first turn, and nothing leaves while decoding."""
        return self.whole_context or self.spans_layers(budget)

    def evicts_once(self, budget: Budget) -> bool:
        """True if the heads of a layer are left unequal, which can't be scored again; so nothing leaves in decoding."""
        return self.leaves_unequal or budget.scope == "layer" or self.needs_whole_context(budget)

    def across_layers(self, n_layers: int, budget: Budget) -> AcrossLayers:
        """A fresh choice over the `n_layers` compressible layers of one row; by default the top of all scores."""
        return TopOfAllLayers(n_layers, replace(budget, scope="model"))

    def keep_layers(self, scores: Tensor, budget: Budget) -> Tensor:
        """BoolTensor [B, L, H, T]: what stays by the scores [B, L, H, T] of all compressible layers together."""
        rows = [keep_across(self.across_layers(scores.shape[1], budget), row) for row in scores]
        return torch.stack(rows)

    def may_keep_all(self, budget: Budget, n: int) -> bool:
        """True if nothing of `n` entries can leave: then scoring is skipped (some methods can't score few)."""
        return n == 0 or (budget.given and budget.n_kept(n) >= n)

    def check_scope(self, budget: Budget) -> None:
        """Raise a `ConfigError` if the budget's scope means nothing to this policy."""
        if budget.scope not in self.scopes:
            allowed = " or ".join(self.scopes)
            raise ConfigError(
                f"method {self.name!r} shares its budget in its own way; scope must be {allowed}, got {budget.scope}"
            )


class ModelPolicy(Policy):
    """A policy that runs the model itself, for example to reconstruct the context."""

    route = "masked"
    own_prefill = True

    @abstractmethod
    def keep_model(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        budget: Budget,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> Tensor:
        """BoolTensor [1, L, H, T] for one unpadded row `input_ids` [1, T]."""


class NativePolicy(Policy):
    """A kvpress press that changes more than which entries stay; its own hooks and prefill run."""

    route = "native"
    own_prefill = True

    decoding: bool = False
    """True if the press works while decoding, so that only kvpress's own generation loop can run it."""

    @abstractmethod
    def press(self, budget: Budget) -> Any:
        """A fresh kvpress press with the budget's ratio set."""
