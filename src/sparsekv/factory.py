"""Every cache there is, by the name of its method.

    make_cache("full", model)                                    everything stays
    make_cache("sink_recent", model, 512)                        evicts while tokens are generated
    make_cache("snapkv", model, 512, passive="cpu")              what leaves goes to a second tier
    make_cache("full", model, active=512, passive="disk:tier2")  two tiers, the weakest leave

Give it to `model.generate(ids, past_key_values=cache)` of a model that was `prepare`d.
"""

from __future__ import annotations

from typing import Any

import torch

from sparsekv import architecture
from sparsekv.cache.decode import DecodeEviction
from sparsekv.cache.pages import PAGE_SIZE
from sparsekv.cache.rope import inverse_frequencies
from sparsekv.cache.sparse import SparseCache
from sparsekv.cache.steps import install_steps
from sparsekv.cache.tiered import TieredCache
from sparsekv.errors import ConfigError
from sparsekv.policies import make_policy
from sparsekv.policies.base import LayerPolicy, Policy, PositionPolicy, TokenContext, TokenPolicy, TokenRow
from sparsekv.policies.budget import Budget, as_budget
from sparsekv.policies.learned_scores import predictor_of
from sparsekv.policies.positional import Full
from sparsekv.relevance.atskv import ATSKV
from sparsekv.relevance.predictor import reads_text
from sparsekv.remembered import Rounds


def make_cache(
    method: str | Policy,
    model: Any,
    budget: Budget | float | int | None = None,
    *,
    active: int | str | None = None,
    passive: str | None = None,
    recall_tokens: int | None = None,
    page_size: int | None = None,
    every: int = 64,
    tokenizer: Any = None,
    **args: Any,
) -> SparseCache:
    """An empty cache that evicts by `method` in plain `generate`: after the prompt, and while tokens are generated.

    Parameters
    ----------
    method : str or Policy
        "full", "sliding_window", "sink_recent", any other of `sparsekv ls methods` that can evict while decoding, or a
        policy.
    model : a model, or its config
        With a config, methods that re-rotate keys or read predictors can't be made, and a two-tier cache can't be
        saved before `compress` has been given it.
    budget : Budget, float (compression_ratio: the fraction removed), int (entries per head) or None (own sizes)
    active, passive, recall_tokens, page_size
        With `active` or `passive` a `TieredCache`, see there. `active` is by default what the budget and `every` need
        together (a budget in tokens), `passive` "cpu". Without two tiers, `page_size` is the method's.
    every : int >= 1
        Evict once per that many tokens.
    tokenizer : optional
        For methods that look at the text.
    **args
        Parameters of the method.

    Returns
    -------
    SparseCache
        A `TieredCache` with two tiers.

    Raises
    ------
    ConfigError
        For an unknown method or argument, a method that needs the whole context at once (use `compress`), a budget that
        is missing or that the method does not take, or a size that is not allowed.
    """
    tiered = active is not None or passive is not None
    if page_size is not None and not tiered:
        args["page_size"] = page_size
    policy = _policy(method, args).for_model(architecture.unwrap(model))
    chosen = as_budget(budget)
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ConfigError(f"every must be a whole number of tokens >= 1, got {every!r}")
    _check(policy, chosen, model, tiered=tiered)
    if tiered and policy.why_one_tier is not None:
        raise ConfigError(f"method {policy.name!r} {policy.why_one_tier}; give no active and no passive")
    if not tiered:
        if recall_tokens is not None:
            raise ConfigError(
                f"recall_tokens={recall_tokens} needs a second tier: give passive='cpu' or 'disk:<folder>'"
            )
        cache = SparseCache(architecture.text_config(model))
    else:
        cache = TieredCache(
            model,
            _default_active(policy, chosen, every) if active is None else active,
            passive or "cpu",
            recall_tokens=recall_tokens,
            page_size=PAGE_SIZE if page_size is None else page_size,
        )
    try:
        cache.tokenizer = tokenizer
        _evict_by(cache, policy, chosen, every, model)
    except BaseException:
        if isinstance(cache, TieredCache):
            cache.close()
        raise
    return cache


def _evict_by(cache: SparseCache, policy: Policy, budget: Budget, every: int, model: Any) -> None:
    if policy.rerotate:
        cache.rotary = inverse_frequencies(_decoder(policy, model))
    if policy.by_step:
        install_steps(cache, policy, budget)
        return
    if isinstance(policy, Full):
        return
    needs_ids = policy.needs_ids
    rounds: Rounds | None = None
    if isinstance(policy, ATSKV):
        plain = _with_weights(policy, model)
        for module in architecture.attention_modules(plain):
            if int(module.layer_idx) in cache.compressible:  # type: ignore[arg-type]
                predictor_of(module)  # says so now if there is none
        rounds, needs_ids = Rounds(policy, budget, every), reads_text(plain)
    cache.decode = DecodeEviction(policy, budget, every, rounds)
    if needs_ids:
        # Filled by the attention's hook; a flat empty tensor joins rows of any number.
        cache.ids = torch.zeros(0, dtype=torch.int32)


def _policy(method: str | Policy, args: dict[str, Any]) -> Policy:
    if isinstance(method, str):
        return make_policy(method, **args)
    if args:
        raise ConfigError(
            f"{next(iter(args))} is for a method's name; the policy given has its parameters already"
        )
    return method


def _check(policy: Policy, budget: Budget, model: Any, *, tiered: bool) -> None:
    """Raise a ConfigError for what would fail at the first eviction."""
    if not isinstance(policy, (TokenPolicy, LayerPolicy)):
        raise ConfigError(f"method {policy.name!r} can't evict while decoding; use compress")
    if isinstance(policy, LayerPolicy):
        policy.check_scope(budget)
        if policy.needs_whole_context(budget):
            raise ConfigError(
                f"method {policy.name!r} with budget scope {budget.scope!r} needs the whole context at once; "
                "use compress"
            )
        if policy.evicts_once(budget):
            raise ConfigError(
                f"method {policy.name!r} with budget scope {budget.scope!r} evicts once, from a context that was read: "
                "what it leaves can't be scored again; use compress"
            )
        needed = policy.needs_budget or (policy.scored and not policy.own_sizes)
        if needed and not budget.given:
            raise ConfigError(f"{policy.name}: give a budget, a ratio to remove or a number of entries")
    if isinstance(policy, Full) and budget.given and not tiered:
        raise ConfigError("method 'full' evicts nothing: give no budget, or a second tier (passive=...)")
    if isinstance(policy, PositionPolicy):
        ids = torch.zeros(1, 1, dtype=torch.int64)
        policy.keep_row(TokenRow(ids[0], TokenContext.of_model(model, ids)), budget)


def _default_active(policy: Policy, budget: Budget, every: int) -> int:
    """Room for the budget and for the tokens until the next eviction."""
    if budget.tokens is None:
        raise ConfigError("give active, the size of the fast tier; only a budget in tokens says it by itself")
    return budget.tokens if isinstance(policy, Full) else budget.tokens + every


def _decoder(policy: Policy, model: Any) -> Any:
    return architecture.text_model(_with_weights(policy, model))


def _with_weights(policy: Policy, model: Any) -> Any:
    plain = architecture.unwrap(model)
    if not hasattr(plain, "named_parameters"):
        why = "re-rotates keys" if policy.rerotate else "reads predictors"
        raise ConfigError(f"method {policy.name!r} {why}: give the model itself, not its config")
    return plain
