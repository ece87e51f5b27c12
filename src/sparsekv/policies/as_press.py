"""Our policies as kvpress presses, for kvpress's own `pipeline("kv-press-text-generation")`.

    pipe(context, question=..., press=SinkRecentPress(0.5, n_sink=4))
    pipe(context, question=..., press=PolicyPress(make_policy("snapkv"), 0.5))

Where every layer and kv head keeps the same number of entries, keys and values are really taken out. Where
the numbers differ, or some layers have a sliding window, the entries are hidden as kvpress's AdaKVPress does
it (`masked_key_indices`): kvpress builds its attention mask for one cache length, so layers of different
lengths would let a question see its own future there.

kvpress's hooks run after attention: a policy that also masks the prefill (sliding_window) only evicts here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from kvpress import BasePress, ScorerPress
from torch import Tensor, nn

from sparsekv import architecture
from sparsekv.errors import ConfigError
from sparsekv.policies import make_policy
from sparsekv.policies.attention_scores import BLOCK_SIZE, observed_attention
from sparsekv.policies.base import (
    LayerContext,
    LayerPolicy,
    ModelPolicy,
    NativePolicy,
    Policy,
    TokenContext,
    TokenPolicy,
)
from sparsekv.policies.budget import Budget, Scope
from sparsekv.policies.choosing import check_numbers


class PolicyPress(BasePress):
    """Any policy as a kvpress press.

    Parameters
    ----------
    policy : Policy
        Not a NativePolicy, which is a press already.
    compression_ratio : float in [0, 1), optional
        Fraction to remove; settable later, as kvpress's presses are. None: the policy's own sizes decide, and
        reading it gives what was achieved.
    tokens : int >= 1, optional
        Entries to keep, instead of a ratio.
    scope : "head", "layer" or "model"
        See `Budget`. "model" hides entries when the context manager ends.
    tokenizer : optional
        For policies that look at the text; by default loaded from the model's path.
    seed : int
        Of the row, for random policies.
    """

    reads_ids: ClassVar[bool] = True
    """False for policies that need no token ids, so that they also work inside another press."""

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __init__(
        self,
        policy: Policy,
        compression_ratio: float | None = None,
        *,
        tokens: int | None = None,
        scope: Scope = "head",
        tokenizer: Any = None,
        seed: int = 0,
    ) -> None:
        if isinstance(policy, NativePolicy):
            raise ConfigError(f"method {policy.name} is a kvpress press already: use policy.press(budget)")
        if policy.rerotate:
            raise ConfigError(f"method {policy.name} re-rotates keys; in kvpress use its KeyRerotationPress")
        if policy.by_step:
            raise ConfigError(
                f"method {policy.name} chooses at every step what to read, which kvpress can't; use compress"
            )
        self.policy = policy
        self.tokens, self.scope, self.tokenizer, self.seed = tokens, scope, tokenizer, seed
        self._ratio = compression_ratio
        self._ids: Tensor | None = None
        self._mask: Tensor | None = None
        self._cache: Any = None
        self._kept: Tensor | None = None
        self._scores: dict[int, Tensor] = {}
        self._achieved: dict[int, float] = {}
        self.budget()  # so that a wrong ratio is told now

    def __repr__(self) -> str:
        size = f"compression_ratio={self._ratio}, tokens={self.tokens}"
        return f"{type(self).__name__}(policy={self.policy!r}, {size})"

    @property
    def compression_ratio(self) -> float:
        """The ratio asked for; without one, the mean over layers of what the last context lost."""
        if self._ratio is not None:
            return self._ratio
        return sum(self._achieved.values()) / len(self._achieved) if self._achieved else 0.0

    @compression_ratio.setter
    def compression_ratio(self, value: float | None) -> None:
        self._ratio = value

    def budget(self) -> Budget:
        """What the policy is asked for."""
        return Budget(compression_ratio=self._ratio, tokens=self.tokens, scope=self.scope)

    @property
    def achieved_compression(self) -> dict[int, float]:
        """Layer -> fraction of its entries that the last context lost."""
        return dict(self._achieved)

    # ---- kvpress's side
    # ---------------------------------------------------------------------------------------

    @contextmanager
    def __call__(self, model: Any) -> Iterator[None]:
        """Compress what the model reads first inside this context; see `BasePress.__call__`."""
        plain = architecture.unwrap(model)
        self.policy = self.policy.for_model(plain)
        self._forget()
        self._achieved = {}
        capture = architecture.text_model(plain).register_forward_pre_hook(self._capture, with_kwargs=True)
        try:
            with super().__call__(plain):
                yield
            capture.remove()
            self._finish(plain)
        finally:
            capture.remove()
            self._forget()

    def post_init_from_model(self, model: Any) -> None:
        """Load the tokenizer where one is needed and none was given."""
        if self.reads_ids and self.tokenizer is None and self.policy.needs_tokenizer(model):
            from transformers import AutoTokenizer

            path = model.config.name_or_path
            try:
                self.tokenizer = AutoTokenizer.from_pretrained(path)
            except (OSError, ValueError) as error:
                raise ConfigError(
                    f"method {self.policy.name} needs a tokenizer: give tokenizer=..., {path!r} has none"
                ) from error

    def compress(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, K, D] that stay, in position order; or all, some hidden per head."""
        layer: int = int(module.layer_idx)  # type: ignore[arg-type]
        compressible = architecture.compressible_layers(module.config)
        if layer not in compressible or isinstance(self.policy, ModelPolicy):
            return keys, values
        all_layers = len(compressible) == architecture.num_layers(module.config)
        if isinstance(self.policy, TokenPolicy):
            chosen = self._chosen(self.policy, module, keys)
            counts = chosen.sum(-1)
            alike = bool((counts == counts.flatten()[0]).all())
            kept = chosen[:, min(layer, chosen.shape[1] - 1)].expand(-1, keys.shape[1], -1)
            return self._store(module, keys, values, kept, gather=all_layers and alike)
        if not isinstance(self.policy, LayerPolicy):
            raise ConfigError(f"method {self.policy.name} can't run as a press")
        ctx = LayerContext(
            module=module,
            layer_idx=layer,
            hidden_states=hidden_states,
            keys=keys,
            values=values,
            position_embeddings=kwargs["position_embeddings"],
            cache_position=kwargs["cache_position"],
            seed=self.seed,
            ids=self._ids if self._ids is not None and self._ids.shape[1] == keys.shape[2] else None,
            tokenizer=self.tokenizer,
        )
        if self.policy.spans_layers(self.budget()):
            scores = self.policy.score_layer(ctx, self.budget())
            self._scores[layer] = check_numbers(scores, self.policy.name, layer)
            return keys, values
        kept = self.policy.keep_layer(ctx, self.budget())
        alike = self.policy.scored and self.scope == "head"
        return self._store(module, keys, values, kept, gather=all_layers and alike)

    # ---- ours
    # -------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        self._ids = self._mask = self._cache = self._kept = None
        self._scores = {}

    def _capture(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember ids, mask and cache of the forward that reads the context."""
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            return
        ids = kwargs["input_ids"] if "input_ids" in kwargs else (args[0] if args else None)
        if ids is None:
            return
        mask = kwargs.get("attention_mask")
        self._forget()
        self._ids, self._cache = ids, cache
        given = isinstance(mask, Tensor) and mask.ndim == 2
        self._mask = mask.bool() if given and mask is not None else torch.ones_like(ids, dtype=torch.bool)

    def _chosen(self, policy: TokenPolicy, module: nn.Module, keys: Tensor) -> Tensor:
        """BoolTensor [B, L or 1, H or 1, T] of a token policy, computed once per context."""
        batch, n = keys.shape[0], keys.shape[2]
        if self._kept is not None and self._kept.shape[-1] == n:
            return self._kept
        ids, mask = self._ids, self._mask
        if ids is None or mask is None or ids.shape[1] != n:
            if self.reads_ids:
                raise ConfigError(
                    f"method {self.policy.name} reads the token ids: use it alone, as `with press(model):`, "
                    "not inside another press"
                )
            ids = torch.zeros(batch, n, dtype=torch.int64, device=keys.device)
            mask = torch.ones_like(ids, dtype=torch.bool)
        context = TokenContext.of_model(
            module.config, ids, mask, tokenizer=self.tokenizer, seeds=(self.seed,) * batch
        )
        kept = policy.select(context, self.budget()).kept_at(n).to(keys.device)
        if self._ids is not None:
            self._kept = kept
        return kept

    def _store(
        self, module: Any, keys: Tensor, values: Tensor, kept: Tensor, *, gather: bool
    ) -> tuple[Tensor, Tensor]:
        self._achieved[int(module.layer_idx)] = 1.0 - float(kept.float().mean())
        if bool(kept.all()):
            return keys, values
        if gather:
            batch, heads, _ = kept.shape
            index = kept.nonzero()[:, 2].view(batch, heads, -1, 1)
            return (
                keys.gather(2, index.expand(-1, -1, -1, keys.shape[-1])),
                values.gather(2, index.expand(-1, -1, -1, values.shape[-1])),
            )
        if module.config._attn_implementation == "eager":
            raise ConfigError(
                f"method {self.policy.name} hides entries per head, which kvpress can't do in eager "
                "attention; use sdpa"
            )
        module.masked_key_indices = tuple((~kept).nonzero(as_tuple=True))
        return keys, values

    def _finish(self, model: Any) -> None:
        """Apply what could only be decided after the last layer."""
        modules = architecture.attention_modules(model)
        if self._scores and isinstance(self.policy, LayerPolicy):
            layers = sorted(self._scores)
            scores = torch.stack([self._scores[layer] for layer in layers], dim=1)
            kept = self.policy.keep_layers(scores, self.budget())
            for place, layer in enumerate(layers):
                self._hide(modules[layer], kept[:, place])
        elif isinstance(self.policy, ModelPolicy) and self._ids is not None:
            if self._ids.shape[0] != 1:
                raise ConfigError(f"method {self.policy.name} reads one context at a time")
            if self._cache is None:
                raise ConfigError(f"method {self.policy.name} needs the forward to be given past_key_values")
            chosen = self.policy.keep_model(model, self._ids, self.budget(), self.tokenizer)
            for layer in architecture.compressible_layers(model):
                self._hide(modules[layer], chosen[:, layer])

    def _hide(self, module: nn.Module, kept: Tensor) -> None:
        nothing = torch.empty(0)
        self._store(module, nothing, nothing, kept, gather=False)


class _NamedPress(PolicyPress):
    """A press of one of our methods: the policy's parameters are the press's.

    Parameters
    ----------
    compression_ratio : float in [0, 1), optional
    tokens, tokenizer, seed
        See `PolicyPress`.
    **parameters
        Of the policy; see `sparsekv ls methods`.
    """

    method: ClassVar[str]
    reads_ids: ClassVar[bool] = False

    def __init__(
        self,
        compression_ratio: float | None = None,
        *,
        tokens: int | None = None,
        tokenizer: Any = None,
        seed: int = 0,
        **parameters: Any,
    ) -> None:
        policy = make_policy(self.method, **parameters)
        super().__init__(policy, compression_ratio, tokens=tokens, tokenizer=tokenizer, seed=seed)


class FullPress(_NamedPress):
    """Keeps everything (`full`)."""

    method = "full"


class RandomPositionsPress(_NamedPress):
    """Keeps a random subset (`random`). `seed` is the row's, together with the policy's own of 0."""

    method = "random"


class SinkRecentPress(_NamedPress):
    """Attention sinks and the most recent entries (`sink_recent`): n_sink, n_recent."""

    method = "sink_recent"


class UniformMiddlePress(_NamedPress):
    """Sinks, recent entries, and blocks evenly spread between (`uniform_middle`): n_sink, n_recent,
    block_size, stride."""

    method = "uniform_middle"


class SlidingWindowPress(_NamedPress):
    """The last entries only (`sliding_window`): window. The prefill itself stays whole."""

    method = "sliding_window"


class LadderPress(_NamedPress):
    """LaCache's ladder (`ladder`): span, overlap, n_sink, n_recent."""

    method = "ladder"


class AnchorPress(_NamedPress):
    """Sinks, recent and special tokens, punctuation (`anchors`): the fields of AnchorConfig, fill."""

    method = "anchors"
    reads_ids = True


@dataclass
class H2OPress(ScorerPress):
    """Observed attention without eager: kvpress's ObservedAttentionPress, summed blockwise (`h2o`).

    A scorer, so that kvpress's wrappers take it: AdaKVPress(H2OPress()).

    Parameters
    ----------
    compression_ratio : float in [0, 1)
    block_size : int >= 1
        Queries per block; the result does not depend on it.
    """

    block_size: int = BLOCK_SIZE
    ratio_free: ClassVar[bool] = True

    def score(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Mean attention received, fp32 [B, H, T]; higher = keep."""
        return observed_attention(module, hidden_states, keys, kwargs["position_embeddings"], self.block_size)
