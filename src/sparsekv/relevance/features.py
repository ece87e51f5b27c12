"""What a predictor may know of an entry besides its token's hidden state: attention statistics, handcrafted features.

Shape letters: B rows, H kv heads, T tokens, n entries, D head size, F features.

    group         per entry and kv head
    hidden        the hidden state itself (`predictor.py`)
    attention     4: what the newest queries looked at (`attention_statistics.py`)
    handcrafted   10: place (2), kind of token (5), frequency (1), norms of key and value (2)

No gradient flows through features: they are inputs. Every value is near 1 in size, whatever the context's length and
the scale of keys and values.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sparsekv.errors import ConfigError, unknown
from sparsekv.policies.base import LayerContext
from sparsekv.relevance.attention_statistics import WINDOW, AttentionStatistics, of_group
from sparsekv.relevance.token_types import KINDS, token_types

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sparsekv.relevance.predictor import RelevanceConfig

__all__ = [
    "GROUPS",
    "WINDOW",
    "AttentionStatistics",
    "HandcraftedFeatures",
    "checked_groups",
    "extra_features",
    "extra_groups",
    "n_features",
    "of_group",
    "side_by_side",
]

GROUPS = ("hidden", "attention", "handcrafted")
"""The groups of features, in the order in which a predictor takes them."""

_REMEMBERED = 8
"""Contexts per tokenizer whose text features are remembered: every layer of a forward asks for the same."""


@dataclass(frozen=True)
class HandcraftedFeatures:
    """What can be said of an entry without the model: where it stands, what it spells, how long key and value are.

        position    c / (T - 1): 0 for the first token, 1 for the last
        distance    log(1 + T - 1 - c) / 10
        kind        one-hot of special, punctuation, stop word, number, content (`token_types.KINDS`)
        frequency   log(times its token occurs in the text) / log(T)
        key, value  log(norm / mean norm over the head's entries), cut to [-4, 4]

    of an entry of column c, of T tokens seen. Nothing depends on the scale of keys and values.
    """

    NAMES: ClassVar[tuple[str, ...]] = (
        "position",
        "distance",
        *KINDS,
        "frequency",
        "key_norm",
        "value_norm",
    )

    def __call__(
        self,
        keys: Tensor,
        values: Tensor,
        ids: Tensor,
        tokenizer: PreTrainedTokenizerBase,
        columns: Tensor | None = None,
    ) -> Tensor:
        """FloatTensor [B, H, n, 10], fp32, in the order of `NAMES`.

        Parameters
        ----------
        keys, values : FloatTensor [B, H, n, D]
        ids : LongTensor [B, T]
            The text that was seen, without padding; T >= n.
        tokenizer : what made the ids
        columns : LongTensor [n], optional
            Where the entries stand in the text; default: entry i is token i.
        """
        n, device = keys.shape[2], keys.device
        rows = [text_features(row, tokenizer) for row in ids]
        text = (rows[0][None] if len(rows) == 1 else torch.stack(rows)).to(device)
        text = text[..., :n] if columns is None else text[..., columns.to(device)]
        # feature by feature in memory, so that each is written in one run
        out = torch.empty(*keys.shape[:2], len(self.NAMES), n, dtype=torch.float32, device=device)
        out[:, :, :-2] = text[:, None]
        out[:, :, -2:] = _relative_norms(keys, values)
        return out.mT

    @staticmethod
    def places(columns: Tensor, total: int) -> Tensor:
        """FloatTensor [n, 2]: position and distance of `columns` [n] in `total` tokens."""
        place = columns.float()
        return torch.stack([place / max(total - 1, 1), torch.log1p(total - 1 - place) / 10], dim=-1)


def _relative_norms(keys: Tensor, values: Tensor) -> Tensor:
    """FloatTensor [B, H, 2, n]: log(norm / mean norm) of keys and values [B, H, n, D]."""
    # bfloat16 sums in fp32 by itself, without a copy; a float16 norm might overflow
    dtype = None if keys.dtype == torch.bfloat16 else torch.float32
    norms = [torch.linalg.vector_norm(entries, dim=-1, dtype=dtype) for entries in (keys, values)]
    norm = torch.stack(norms, dim=2).float()
    mean = norm.mean(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return (norm / mean).clamp(math.exp(-4), math.exp(4)).log()


def text_features(ids: Tensor, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """FloatTensor [8, T] on the CPU: place (2), kind (one-hot of 5) and frequency of each of `ids` [T].

    They depend on the text alone, so they are computed once per context and found again by the other layers.
    """
    ids = ids.detach().to("cpu", torch.int32)
    key = ids.numpy().tobytes()
    known = _TEXTS.setdefault(tokenizer, OrderedDict())
    if key not in known:
        known[key] = torch.cat(
            [
                HandcraftedFeatures.places(torch.arange(len(ids)), len(ids)),
                nn.functional.one_hot(token_types(ids, tokenizer), len(KINDS)).float(),
                token_frequency(ids)[:, None],
            ],
            dim=-1,
        ).T.contiguous()
        while len(known) > _REMEMBERED:
            known.popitem(last=False)
    known.move_to_end(key)
    return known[key]


def token_frequency(ids: Tensor) -> Tensor:
    """FloatTensor [T] in [0, 1]: log(count of the token in `ids` [T]) / log(T); 0 where it occurs once."""
    _, place, counts = ids.unique(return_inverse=True, return_counts=True)
    return counts.float().log()[place] / max(math.log(ids.numel()), 1.0)


_TEXTS: WeakKeyDictionary[Any, OrderedDict[bytes, Tensor]] = WeakKeyDictionary()

_SIZES = {"attention": len(AttentionStatistics.NAMES), "handcrafted": len(HandcraftedFeatures.NAMES)}


def checked_groups(features: Iterable[str]) -> tuple[str, ...]:
    """The groups in the order of `GROUPS`.

    Raises
    ------
    ConfigError
        For an unknown group, one that is named twice, or none at all.
    """
    if isinstance(features, str) or not isinstance(features, (list, tuple)) or not features:
        raise ConfigError(
            f"relevance features must be a list of groups of {', '.join(GROUPS)}, got {features!r}"
        )
    for group in features:
        if group not in GROUPS:
            raise unknown("group of relevance features", group, GROUPS)
    if len(set(features)) < len(features):
        raise ConfigError(f"relevance features name a group twice: {', '.join(features)}")
    return tuple(group for group in GROUPS if group in features)


def extra_groups(features: Iterable[str]) -> tuple[str, ...]:
    """The groups of `features` beyond the hidden state, in the order in which `extra_features` has them."""
    return tuple(group for group in GROUPS if group in features and group in _SIZES)


def n_features(features: Iterable[str]) -> int:
    """F: numbers per entry and kv head beyond the hidden state."""
    return sum(_SIZES[group] for group in extra_groups(features))


@torch.no_grad()
def extra_features(ctx: LayerContext, config: RelevanceConfig) -> Tensor | None:
    """The features of every stored entry that a predictor of `config` takes beside the hidden state.

    Parameters
    ----------
    ctx : LayerContext
        Of rows without padding. "handcrafted" needs `ids` and `tokenizer`.
    config : RelevanceConfig

    Returns
    -------
    FloatTensor [B, H, T, F], fp32, without gradient; None where the config asks for the hidden state only.

    Raises
    ------
    ConfigError
        If the token ids or the tokenizer are not known.
    """
    groups = extra_groups(config.features)
    if not groups:
        return None
    parts = []
    if "attention" in groups:
        parts.append(AttentionStatistics.of_window(ctx).features())
    if "handcrafted" in groups:
        if ctx.ids is None or ctx.tokenizer is None:
            raise no_text()
        parts.append(HandcraftedFeatures()(ctx.keys, ctx.values, ctx.ids, ctx.tokenizer))
    return side_by_side(parts)


def side_by_side(groups: Sequence[Tensor]) -> Tensor:
    """The features [..., n, F] of several groups, in the order of `extra_groups`."""
    return groups[0] if len(groups) == 1 else torch.cat(list(groups), dim=-1)


def no_text() -> ConfigError:
    """The error where a predictor reads the text and there is none."""
    return ConfigError(
        "these relevance predictors take handcrafted features, which read the text: give tokenizer=..., and token ids "
        "rather than embeddings"
    )
