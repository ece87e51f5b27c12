"""Anchors: sinks, recent and special tokens and punctuation in any script stay: the text's structure.

text      <s> The cat sat . It slept ...
anchor     ■   ⬚   ⬚   ⬚  ■  ⬚   ■    ■      (sink_size 1, recent_size 2)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from sparsekv.errors import ConfigError, unknown
from sparsekv.policies.base import LayerContext, LayerPolicy, TokenPolicy, TokenRow
from sparsekv.policies.budget import Budget
from sparsekv.policies.picks import drawn, evenly, row_generator
from sparsekv.policies.sizes import check_size, check_switches, require_budget, total_beside
from sparsekv.policies.vocabulary import vocabulary_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Fill = Literal["recent", "uniform", "random"]
FILLS: tuple[Fill, ...] = ("recent", "uniform", "random")

KINDS = ("sink", "recent", "special", "punctuation")
"""The order in which anchors are kept when there are more of them than the budget allows."""


@dataclass(frozen=True)
class AnchorConfig:
    """What counts as an anchor.

    Parameters
    ----------
    use_special : bool
        Special tokens of the tokenizer (begin and end of text, chat turns, ...).
    use_punctuation : bool
        Tokens whose text, stripped of white space, consists of Unicode punctuation (categories P*, any
        script). A punctuation mark split over several tokens counts with all its pieces. Symbols (+ = $ < ^
        and the like, S*) and newlines are not punctuation; name them in `extra_punctuation` to count them.
    use_sink, use_recent : bool
        The first `sink_size` and the last `recent_size` tokens.
    sink_size, recent_size : int >= 0
        In tokens.
    extra_punctuation : tuple of str
        Further strings that count as punctuation, for example ("\\n", "+"). Found where one token, or the
        pieces of one character, consist of them.

    Raises
    ------
    ConfigError
        For a switch that is not true or false, a size that is no whole number, an empty string.
    """

    use_special: bool = True
    use_punctuation: bool = True
    use_sink: bool = True
    use_recent: bool = True
    sink_size: int = 4
    recent_size: int = 64
    extra_punctuation: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_switches(
            "anchors",
            use_special=self.use_special,
            use_punctuation=self.use_punctuation,
            use_sink=self.use_sink,
            use_recent=self.use_recent,
        )
        check_size("anchors", "sink_size", self.sink_size)
        check_size("anchors", "recent_size", self.recent_size)
        extra = self.extra_punctuation
        if isinstance(extra, str) or not all(isinstance(text, str) and text for text in extra):
            raise ConfigError(
                f"anchors: extra_punctuation must be a list of non-empty strings, got {extra!r}"
            )
        object.__setattr__(self, "extra_punctuation", tuple(extra))  # a YAML list, made hashable

    @property
    def n_sink(self) -> int:
        """Sinks that count: 0 where they are switched off."""
        return self.sink_size if self.use_sink else 0

    @property
    def n_recent(self) -> int:
        """Recent tokens that count: 0 where they are switched off."""
        return self.recent_size if self.use_recent else 0

    @property
    def reads_text(self) -> bool:
        """True if a tokenizer is needed."""
        return self.use_special or self.use_punctuation


@dataclass(frozen=True)
class PlaceAnchorConfig(AnchorConfig):
    """An AnchorConfig that looks at places alone unless told otherwise: sinks and recent tokens."""

    use_special: bool = False
    use_punctuation: bool = False


class AnchorSelector:
    """Finds the anchors of token sequences.

    What a token says is looked up once per tokenizer and kept for all later selectors.

    Parameters
    ----------
    config : AnchorConfig, optional
    tokenizer : a transformers tokenizer
        Not needed if neither special tokens nor punctuation are used.

    Raises
    ------
    ConfigError
        If the tokenizer is missing.
    """

    def __init__(
        self, config: AnchorConfig | None = None, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        self.config = config or AnchorConfig()
        if self.config.reads_text and tokenizer is None:
            raise ConfigError(
                "anchors need a tokenizer to find special tokens and punctuation: pass tokenizer=..., "
                "or set use_special=False and use_punctuation=False"
            )
        self.tokenizer = tokenizer

    def kinds(self, ids: Tensor) -> dict[str, Tensor]:
        """BoolTensor [n] per kind of anchor (a token may be several) of `ids` [n], a row without padding."""
        config, n = self.config, int(ids.shape[0])
        rank = torch.arange(n)
        found = {"sink": rank < config.n_sink, "recent": rank >= n - config.n_recent}
        nothing = torch.zeros(n, dtype=torch.bool)
        found["special"] = found["punctuation"] = nothing
        if self.tokenizer is not None and config.reads_text:
            words = vocabulary_of(self.tokenizer, config.extra_punctuation)
            if config.use_special:
                found["special"] = words.special(ids)
            if config.use_punctuation:
                found["punctuation"] = words.punctuation(ids, self.tokenizer) & ~words.special(ids)
        return {kind: found[kind].to(ids.device) for kind in KINDS}

    def select(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """BoolTensor [B, T]: True where `input_ids` [B, T] is an anchor.

        Padding (`attention_mask` [B, T] 0) is never one, and sinks and recent tokens are counted without it.
        Without a mask every token is real.
        """
        if input_ids.ndim != 2:
            raise ConfigError(f"input_ids must be [batch, tokens], got shape {tuple(input_ids.shape)}")
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ConfigError(
                f"attention_mask must have the shape of input_ids {tuple(input_ids.shape)}, "
                f"got {tuple(attention_mask.shape)}"
            )
        kept = torch.zeros(input_ids.shape, dtype=torch.bool, device=input_ids.device)
        mask = torch.ones_like(kept) if attention_mask is None else attention_mask.bool().to(input_ids.device)
        for i, (ids, real) in enumerate(zip(input_ids, mask, strict=True)):
            kept[i, real] = torch.stack(list(self.kinds(ids[real]).values())).any(dim=0)
        return kept


def build_kv_mask_from_anchors(
    input_ids: Tensor,
    tokenizer: PreTrainedTokenizerBase | None,
    config: AnchorConfig | None = None,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """BoolTensor [B, T]: the KV entries to keep, True for anchors (`AnchorSelector.select` as a function)."""
    return AnchorSelector(config, tokenizer).select(input_ids, attention_mask)


def most_important(kinds: dict[str, Tensor], limit: int) -> Tensor:
    """BoolTensor [n]: the anchors, at most `limit`, in the order of KINDS, the latest first within a kind.

    `kinds` are those of `AnchorSelector.kinds`.
    """
    kept = torch.zeros_like(kinds[KINDS[0]])
    for kind in KINDS:
        latest = (kinds[kind] & ~kept).nonzero().flatten().flip(0)[:limit]
        kept[latest] = True
        limit -= latest.numel()
    return kept


@dataclass(frozen=True)
class Anchors(TokenPolicy):
    """Keeps the anchors of the text (AnchorConfig) in every layer and head.

    Without a budget: the anchors, however many. With one: if there are more anchors than that, they are kept
    in the order sink, recent, special, punctuation, the latest first within a kind (sinks must fit); if
    fewer, other tokens fill the rest.

    Parameters
    ----------
    config : AnchorConfig
    fill : "recent", "uniform" or "random"
        Which other tokens fill a budget: the latest, evenly spread ones, or drawn ones.
    random_fraction : float in [0, 1]
        Without a budget: how many of the tokens that are no anchors stay too, drawn at random (at least one if over
        0). With one: how many of those that fill it are drawn at random, from what `fill` leaves out.
    seed : int
        For what is drawn, together with the row's own seed.
    """

    config: AnchorConfig = field(default_factory=AnchorConfig)
    fill: Fill = "recent"
    random_fraction: float = 0.0
    seed: int = 0
    name = "anchors"

    def __post_init__(self) -> None:
        if self.fill not in FILLS:
            raise unknown("fill", self.fill, FILLS)
        fraction = self.random_fraction
        if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 <= fraction <= 1:
            raise ConfigError(f"anchors: random_fraction must be in [0, 1], got {fraction!r}")

    @property
    def always_kept(self) -> int:
        """The sinks; other anchors give way to a smaller budget."""
        return self.config.n_sink

    @property
    def reads_text(self) -> bool:
        """True if special tokens or punctuation count."""
        return self.config.reads_text

    def keep_row(self, row: TokenRow, budget: Budget) -> Tensor:
        """BoolTensor [1, 1, n]."""
        kinds = AnchorSelector(self.config, row.context.tokenizer).kinds(row.ids)
        if not budget.given:
            kept = torch.stack(list(kinds.values())).any(dim=0)
            others = (~kept).nonzero().flatten()
            kept[others[self._others(int(others.numel()), row.seed).to(others.device)]] = True
            return kept[None, None]
        total = total_beside("anchors", budget, row.n, sink_size=self.config.n_sink)
        kept = most_important(kinds, total)
        free = (~kept).nonzero().flatten()
        left = total - int(kept.sum())
        kept[free[self._filling(int(free.numel()), left, row.seed).to(free.device)]] = True
        return kept[None, None]

    def _others(self, n: int, row_seed: int) -> Tensor:
        """LongTensor: which of the n tokens that are no anchors stay beside them, without a budget."""
        if not self.random_fraction:
            return torch.zeros(0, dtype=torch.long)
        return drawn((n,), self._n_drawn(n), row_generator(self.seed, row_seed))

    def _n_drawn(self, n: int) -> int:
        """The fraction of n that is drawn at random, at least one."""
        return min(n, max(1, int(self.random_fraction * n + 1e-9))) if self.random_fraction else 0

    def _filling(self, n: int, k: int, row_seed: int) -> Tensor:
        """LongTensor [k]: which of the n tokens that are no anchors fill the budget."""
        generator = row_generator(self.seed, row_seed)
        if self.fill == "random":
            return drawn((n,), k, generator)
        n_drawn = self._n_drawn(k)
        by_rule = evenly(k - n_drawn, n) if self.fill == "uniform" else torch.arange(n - k + n_drawn, n)
        left = torch.ones(n, dtype=torch.bool)
        left[by_rule] = False
        others = left.nonzero().flatten()
        return torch.cat([by_rule, others[drawn((len(others),), n_drawn, generator)]])


@dataclass(frozen=True)
class DynamicAnchors(LayerPolicy):
    """Keeps fixed anchors, and fills the budget with the entries that a scoring method likes best.

    If there are more anchors than the budget, they are kept as in `Anchors`, and nothing else. Anchors are the same in
    every head; under a budget of scope "layer" or "model" heads differ in the rest.

    Parameters
    ----------
    config : AnchorConfig
        By default sinks and recent tokens only. Special tokens and punctuation need the text of the entries, which a
        layer is given where the framework passes it on (`LayerContext.ids` and `tokenizer`).
    method : str
        A method that scores entries inside a layer: "h2o", "snapkv", "knorm", "relevance", ...

    Raises
    ------
    ConfigError
        When it is checked or asked, if there is no such method, it has no scores, or the text is missing.
    """

    config: AnchorConfig = field(
        default_factory=lambda: AnchorConfig(use_special=False, use_punctuation=False)
    )
    method: str = "h2o"
    name = "dynamic_anchors"
    ratio_free = False

    def __post_init__(self) -> None:
        if not isinstance(self.method, str):
            raise ConfigError(f"{self.name}: method must be the name of a method, got {self.method!r}")

    def check_budget(self, budget: Budget) -> None:
        """Refuse a method without scores: looked up here and not when made, since it may load kvpress."""
        _scorer(self.method)

    @property
    def always_kept(self) -> int:
        """The sinks; other anchors give way to a smaller budget."""
        return self.config.n_sink

    @property
    def reads_text(self) -> bool:
        """True if special tokens or punctuation count."""
        return self.config.reads_text

    def score_layer(self, ctx: LayerContext, budget: Budget) -> Tensor:
        """The method's scores, FloatTensor [B, H, T]; inf for anchors."""
        require_budget(self.name, budget)
        total = total_beside(self.name, budget, ctx.keys.shape[2], sink_size=self.config.n_sink)
        scores = _scorer(self.method).score_layer(ctx, budget)
        anchors = torch.stack([most_important(kinds, total) for kinds in self._kinds(ctx)])
        return scores.masked_fill(anchors[:, None].to(scores.device), torch.inf)

    def _kinds(self, ctx: LayerContext) -> list[dict[str, Tensor]]:
        """`AnchorSelector.kinds` of every row."""
        ids = ctx.ids
        if ids is None:
            if self.config.reads_text:
                raise ConfigError(
                    f"{self.name}: special tokens and punctuation need the text of the entries, and this layer was "
                    "given none; set use_special=False and use_punctuation=False"
                )
            ids = torch.zeros(ctx.keys.shape[0], ctx.keys.shape[2], dtype=torch.long)
        selector = AnchorSelector(self.config, ctx.tokenizer)
        return [selector.kinds(row) for row in ids]


@lru_cache(maxsize=16)
def _scorer(method: str) -> LayerPolicy:
    """The scoring method of that name."""
    from sparsekv.policies import make_policy

    policy = make_policy(method)
    if not isinstance(policy, LayerPolicy) or not policy.scored:
        raise ConfigError(
            f"dynamic_anchors: method {method!r} has no scores; give one that has, such as 'h2o'"
        )
    return policy
