"""One prefill, many methods: eviction after the prefill does not change the prefill.

`prefill` runs the model once on one context and computes, layer by layer, what every requested method would keep. The
returned cache is whole; `cache.fork([selection, …])` makes the compacted copies.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsekv import architecture
from sparsekv.attention import prepare
from sparsekv.cache.layer import SparseLayer
from sparsekv.cache.sparse import SparseCache
from sparsekv.errors import ConfigError
from sparsekv.eviction import row_contexts
from sparsekv.policies.base import LayerPolicy, ModelPolicy, Policy, TokenContext, TokenPolicy, keep_top
from sparsekv.policies.budget import Budget
from sparsekv.policies.choosing import check_numbers
from sparsekv.selection import Selection

AfterLayer = Callable[[nn.Module, int, Tensor, tuple[Tensor, Tensor]], None]


@contextmanager
def after_each_layer(model: Any, callback: AfterLayer) -> Iterator[None]:
    """Call `callback(module, layer_idx, hidden_states, (cos, sin))` after every compressible attention layer."""
    modules = architecture.attention_modules(model)
    handles = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        rotary = kwargs["position_embeddings"] if "position_embeddings" in kwargs else args[1]
        callback(module, int(module.layer_idx), hidden, rotary)  # type: ignore[arg-type]

    decoder = architecture.text_model(model)
    try:
        for index in architecture.compressible_layers(model):
            modules[
                index
            ].rotary_emb = decoder.rotary_emb  # kvpress presses read it from the attention module
            handles.append(modules[index].register_forward_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def run_decoder(
    model: Any, input_ids: Tensor, cache: SparseCache, attention_mask: Tensor | None, **kwargs: Any
) -> Tensor:
    """Run the decoder stack (no vocabulary head) on new tokens [B, Q]; `attention_mask` covers [B, seen + Q].

    Raises ConfigError for a model that would leave out the cache.
    """
    decoder = architecture.text_model(model)
    if decoder.training and decoder.is_gradient_checkpointing:
        raise ConfigError(
            "the model is in training mode with gradient checkpointing, in which transformers fills no cache; call "
            "model.eval() first, and model.train() after"
        )
    arguments = dict(kwargs)
    if attention_mask is not None and not bool(attention_mask.all()):
        arguments["attention_mask"] = attention_mask.long()  # positions follow from it: `prepare`
    return decoder(input_ids=input_ids, past_key_values=cache, use_cache=True, **arguments).last_hidden_state


def evicts_after_prefill(policy: Policy) -> bool:
    """Whether a policy evicts from what an ordinary prefill left, so that one prefill serves many such policies.

    True also of those that run the model to choose (KVzip): they do so beside that prefill.
    """
    if isinstance(policy, ModelPolicy):
        return True
    return isinstance(policy, (TokenPolicy, LayerPolicy)) and not policy.own_prefill


@dataclass(frozen=True)
class Request:
    """One method at one budget; `key` names it in the result.

    Raises ConfigError for policies that don't evict after an ordinary prefill.
    """

    key: Hashable
    policy: Policy
    budget: Budget

    def __post_init__(self) -> None:
        if not evicts_after_prefill(self.policy):
            raise ConfigError(f"method {self.policy.name!r} needs a prefill of its own; use compress")
        if isinstance(self.policy, LayerPolicy):
            self.policy.check_scope(self.budget)


@dataclass
class Prefilled:
    """A whole cache and what each request would keep of it.

    `selections[key]` is [1, L, H, T] (L and H 1 where shared), on the CPU. `select_s[key]` is the seconds spent on
    scoring and choosing (a scoring that several requests share is counted for each of them).
    """

    cache: SparseCache
    selections: dict[Hashable, Selection]
    prefill_s: float
    select_s: dict[Hashable, float] = field(default_factory=dict)


@torch.no_grad()
def prefill(
    model: Any, input_ids: Tensor, requests: Sequence[Request], *, tokenizer: Any = None, seed: int = 0
) -> Prefilled:
    """Read one context [1, T] once for all `requests`.

    `prefill_s` is the forward without the time that scoring took.
    """
    if input_ids.shape[0] != 1:
        raise ConfigError(f"prefill reads one context, got a batch of {input_ids.shape[0]}")
    prepare(model)
    config = architecture.text_config(model)
    requests = [replace(each, policy=each.policy.for_model(architecture.unwrap(model))) for each in requests]
    cache = SparseCache(config)
    cache.tokenizer, cache.seeds, cache.ids = tokenizer, (seed,), input_ids.to(torch.int32)
    by_layer = [r for r in requests if isinstance(r.policy, LayerPolicy)]
    n_layers, length = architecture.num_layers(model), input_ids.shape[1]
    heads = architecture.num_kv_heads(model)
    kept = {r.key: torch.ones(1, n_layers, heads, length, dtype=torch.bool) for r in by_layer}
    scores: dict[Hashable, list[Tensor]] = {}
    spent: dict[Hashable, float] = {r.key: 0.0 for r in requests}
    overhead = 0.0

    def score(module: nn.Module, index: int, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> None:
        nonlocal overhead
        layer = cache.layers[index]
        if not isinstance(layer, SparseLayer):
            return
        start = time.perf_counter()
        ((ctx, _),) = row_contexts(module, index, cache, layer, hidden, rotary)
        shared: dict[int, tuple[Tensor, float]] = {}
        for request in by_layer:
            policy, begin = request.policy, time.perf_counter()
            if not isinstance(policy, LayerPolicy) or policy.may_keep_all(request.budget, length):
                continue
            if not policy.scored or not (request.budget.given or policy.spans_layers(request.budget)):
                kept[request.key][0, index] = policy.keep_layer(ctx, request.budget)[0].cpu()
                spent[request.key] += time.perf_counter() - begin
                continue
            if policy.ratio_free and id(policy) in shared:
                value, cost = shared[id(policy)]
                spent[request.key] += cost
            else:
                value = check_numbers(policy.score_layer(ctx, request.budget), policy.name, index)
                cost = time.perf_counter() - begin
                shared[id(policy)] = value, cost
                spent[request.key] += cost
            if policy.spans_layers(request.budget):
                scores.setdefault(request.key, []).append(value)
                continue
            begin = time.perf_counter()
            kept[request.key][0, index] = keep_top(value[:, None], request.budget)[0, 0].cpu()
            spent[request.key] += time.perf_counter() - begin
        overhead += time.perf_counter() - start

    begin = time.perf_counter()
    with after_each_layer(model, score):
        run_decoder(model, input_ids, cache, None)
    elapsed = time.perf_counter() - begin - overhead
    cache.ids = None

    selections: dict[Hashable, Selection] = {}
    context = TokenContext.of_model(config, input_ids, tokenizer=tokenizer, seeds=(seed,))
    for request in requests:
        begin = time.perf_counter()
        if isinstance(request.policy, TokenPolicy):
            selections[request.key] = request.policy.select(context, request.budget).to("cpu")
        elif isinstance(request.policy, ModelPolicy):
            chosen = request.policy.keep_model(model, input_ids, request.budget, tokenizer)
            selections[request.key] = Selection.from_kept(chosen.cpu())
        else:
            if request.key in scores and isinstance(request.policy, LayerPolicy):
                chosen = request.policy.keep_layers(torch.stack(scores[request.key], dim=1), request.budget)
                kept[request.key][:, cache.compressible] = chosen.cpu()
            selections[request.key] = Selection.from_kept(kept[request.key])
        spent[request.key] += time.perf_counter() - begin
    return Prefilled(cache, selections, elapsed, spent)
