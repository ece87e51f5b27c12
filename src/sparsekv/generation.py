"""Compress a context into a cache, then generate from it with plain `model.generate`.

    cache = compress(model, context_ids, "snapkv", 0.75)
    model.generate(torch.cat([context_ids, question_ids], dim=1), past_key_values=cache)

Shape letters: B rows, T tokens of the context, Q of the question.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from sparsekv import architecture
from sparsekv.attention import prepare
from sparsekv.cache.join import join
from sparsekv.cache.rope import inverse_frequencies
from sparsekv.cache.sparse import DecodeEviction, SparseCache, require_sparse
from sparsekv.cache.step_report import attended_fractions
from sparsekv.cache.steps import install_steps
from sparsekv.cache.tiered import TieredCache
from sparsekv.errors import ConfigError, unknown
from sparsekv.eviction import HIDDEN_TOKENS, JointEviction, TokenEviction, kept_in_layer, remember_inputs
from sparsekv.policies import make_policy
from sparsekv.policies.base import (
    LayerPolicy,
    ModelPolicy,
    NativePolicy,
    Policy,
    TokenContext,
    TokenPolicy,
)
from sparsekv.policies.budget import Budget, as_budget
from sparsekv.probe import after_each_layer, run_decoder
from sparsekv.relevance.atskv import ATSKV
from sparsekv.relevance.predictor import reads_text
from sparsekv.remembered import Rounds
from sparsekv.selection import Selection

Phase = Literal["prefill", "decode", "both"]
PHASES: tuple[Phase, ...] = ("prefill", "decode", "both")


@torch.no_grad()
def compress(
    model: Any,
    input_ids: Tensor,
    policy: Policy | str,
    budget: Budget | float | int | None = None,
    *,
    attention_mask: Tensor | None = None,
    chunk: int | None = None,
    phase: Phase = "prefill",
    cache: SparseCache | None = None,
    rerotate: bool | None = None,
    tokenizer: Any = None,
    seeds: tuple[int, ...] | None = None,
    every: int = 64,
) -> SparseCache:
    """Read a context and keep only what `policy` keeps of it.

    Parameters
    ----------
    model : a supported causal language model; it is switched to the "sparsekv" attention (`prepare`).
    input_ids : LongTensor [B, T]
        The context; with `cache`, the whole sequence so far, of which the cache has seen a prefix.
    policy : Policy or str
        A policy, or a method name (`sparsekv ls methods`).
    budget : Budget, float (compression_ratio: the fraction removed), int (entries per head) or None (own sizes)
    attention_mask : [B, T], optional
        0 for padding, on the left. Each row keeps what it would keep alone.
    chunk : int >= 1, optional
        Read at most that many tokens at a time, in pieces of equal size, and evict after each, so that at most
        budget + chunk entries are held.
    phase : "prefill", "decode" or "both"
        When to evict: once after the context, while generating, or both.
    cache : SparseCache, optional
        Continue an earlier one (later turns).
    rerotate : bool, optional
        Give kept keys consecutive positions (needed beyond the model's window). Default: what the policy says.
    tokenizer : optional
        For policies that look at the text (anchors, kvzip).
    seeds : one int per row, optional
        For random policies.
    every : int >= 1
        While generating, evict once per that many tokens.

    Returns
    -------
    SparseCache
        Pass it to `model.generate(input_ids=context + question, past_key_values=cache)`.

    Raises
    ------
    ConfigError
        For an unsupported model, cache type, budget or combination.
    """
    if phase not in PHASES:
        raise unknown("phase", phase, PHASES)
    if chunk is not None and chunk < 1:
        raise ConfigError(f"chunk must be at least 1 token, got {chunk}")
    if every < 1:
        raise ConfigError(f"every must be at least 1 token, got {every}")
    if input_ids.ndim != 2 or input_ids.shape[1] == 0:
        raise ConfigError(
            f"input_ids must be [B, T] with at least one token, got shape {tuple(input_ids.shape)}"
        )
    budget = as_budget(budget)
    prepare(model)
    plain = architecture.unwrap(model)
    policy = (make_policy(policy) if isinstance(policy, str) else policy).for_model(plain)
    cache = _cache_for(plain, input_ids, cache, attention_mask, tokenizer, seeds)
    if rerotate if rerotate is not None else policy.rerotate:
        cache.rotary = inverse_frequencies(architecture.text_model(plain))
    if phase in ("decode", "both") and not isinstance(policy, (TokenPolicy, LayerPolicy)):
        raise ConfigError(f"method {policy.name!r} can't evict while decoding; use phase='prefill'")
    if phase != "prefill" and policy.by_step:
        raise ConfigError(f"method {policy.name!r} evicts nothing while decoding; use phase='prefill'")
    if policy.by_step and isinstance(cache, TieredCache):  # rerotate is the call's own to say
        raise ConfigError(f"method {policy.name!r} {policy.why_one_tier}; give no cache")
    if isinstance(policy, LayerPolicy):
        policy.check_scope(budget)
        if phase != "prefill" and policy.needs_whole_context(budget):
            raise ConfigError(
                f"{_whole(policy, budget)} needs the whole context at once; use phase='prefill'"
            )
        if phase != "prefill" and policy.evicts_once(budget):
            raise ConfigError(
                f"{_whole(policy, budget)} evicts once, what it leaves can't be scored again; use phase='prefill'"
            )
    cache.decode = None  # an earlier turn's eviction must not run while this one reads
    remember = phase != "prefill" and isinstance(policy, LayerPolicy)
    remembers = isinstance(policy, ATSKV) and (remember or chunk is not None or cache.seen)
    rounds = Rounds(policy, budget) if isinstance(policy, ATSKV) and remembers else None
    if phase != "decode" and isinstance(policy, NativePolicy):
        raise ConfigError(
            f"method {policy.name!r} changes more than which entries stay, so it runs only by kvpress's own hooks: "
            "use it in `sparsekv eval`, or kvpress's pipeline"
        )
    deciding = None if phase == "decode" else policy
    with cache.reading(plain, decides=deciding is not None):
        _read(plain, input_ids, cache, deciding, budget, chunk, remember, rounds)
    if not remember:
        for _, layer in cache.sparse_layers():
            layer.recent_inputs = None
    needs_ids = policy.needs_ids
    if rounds is not None:
        rounds.every, needs_ids = every, reads_text(plain)
    if phase == "prefill" or not needs_ids:
        cache.ids = None
    cache.decode = DecodeEviction(policy, budget, every, rounds) if phase != "prefill" else None
    install_steps(cache, policy, budget)
    cache.check_attention()
    return cache


def _whole(policy: LayerPolicy, budget: Budget) -> str:
    """What it is that needs a whole context, for messages."""
    return f"method {policy.name!r}" if policy.evicts_once(Budget()) else f"budget scope {budget.scope!r}"


def _cache_for(
    model: Any,
    input_ids: Tensor,
    cache: SparseCache | None,
    attention_mask: Tensor | None,
    tokenizer: Any,
    seeds: tuple[int, ...] | None,
) -> SparseCache:
    if cache is None:
        cache = SparseCache(model.config)
    elif not isinstance(cache, SparseCache):
        kind = type(cache).__name__ if isinstance(cache, Cache) else type(cache)
        raise ConfigError(
            f"cache must be a SparseCache, got {kind}: static and quantized caches can't be compacted"
        )
    if cache.seen >= input_ids.shape[1]:
        raise ConfigError(
            f"the cache has seen {cache.seen} tokens, but the sequence given has {input_ids.shape[1]}"
        )
    cache.fit_rows(input_ids.shape[0])  # before it is told of these rows' text and seeds
    if attention_mask is not None:
        if attention_mask.shape != input_ids.shape:
            raise ConfigError(
                f"attention_mask must have the shape of input_ids {tuple(input_ids.shape)}, "
                f"got {tuple(attention_mask.shape)}"
            )
        if not bool(attention_mask.bool().any(dim=1).all()):
            raise ConfigError("attention_mask has a row without any real token")
        mask = attention_mask.bool().to(input_ids.device)
        if cache.seen and not torch.equal(mask[:, : cache.seen], cache.real_columns().to(mask.device)):
            raise ConfigError("attention_mask differs from that of the earlier turns in columns already seen")
        cache.real = None if bool(mask.all()) else mask
    elif cache.real is not None:
        cache.real = nn.functional.pad(cache.real_columns(), (0, input_ids.shape[1] - cache.seen), value=True)
    if cache.real is not None:
        steps = cache.real.long().diff(dim=1)
        if cache.intact and bool((steps < 0).any()):
            raise ConfigError("attention_mask has padding after real tokens; pad on the left")
    cache.ids = input_ids.to(torch.int32)
    cache.tokenizer = tokenizer if tokenizer is not None else cache.tokenizer
    cache.seeds = seeds if seeds is not None else cache.seeds
    return cache


def _read(
    model: Any,
    input_ids: Tensor,
    cache: SparseCache,
    policy: Policy | None,
    budget: Budget,
    chunk: int | None,
    remember: bool,
    rounds: Rounds | None = None,
) -> None:
    """Run the model over the tokens that the cache has not seen, evicting after each chunk.

    With `remember`, each layer keeps its newest inputs, so that the first evictions while decoding have an
    observation window; with `rounds`, these remember what they need, and cut all layers after the last.
    """
    start, total = cache.seen, input_ids.shape[1]
    n_pieces = math.ceil((total - start) / (chunk or total))
    step = math.ceil((total - start) / n_pieces)  # a short last piece might not fill an observation window
    single = n_pieces == 1
    if isinstance(policy, ModelPolicy) or (isinstance(policy, TokenPolicy) and policy.own_prefill):
        if start or not single:
            raise ConfigError(
                f"method {policy.name!r} reads the whole context at once: no chunk and no later turn"
            )
        _read_whole(model, input_ids, cache, policy, budget)
        return
    if isinstance(policy, LayerPolicy) and policy.needs_whole_context(budget) and (start or not single):
        raise ConfigError(
            f"{_whole(policy, budget)} needs the whole context at once: no chunk and no later turn"
        )
    joint: JointEviction | None = None
    if isinstance(policy, LayerPolicy) and policy.spans_layers(budget):
        joint = JointEviction(cache, policy, budget)
    by_tokens = TokenEviction(cache, policy, budget) if isinstance(policy, TokenPolicy) else None
    full_real = cache.real
    for begin in range(start, total, step):
        end = min(begin + step, total)
        cache.real = None if full_real is None else full_real[:, :end]
        if cache.real is not None and bool(cache.real.all()):
            cache.real = None
        mask = cache.real

        def evict(module: nn.Module, index: int, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> None:
            layer = require_sparse(cache.layers[index])
            if rounds is not None:
                rounds.after_layer(cache, module, index, layer, hidden, rotary, evict=policy is not None)
                return
            if remember:
                recent = remember_inputs(layer, hidden, rotary)
                if hidden.shape[1] < HIDDEN_TOKENS:
                    hidden, rotary = recent
            if policy is None:
                return
            if joint is not None:
                for known, kept in joint.after_layer(module, index, layer, hidden, rotary).items():
                    cache.keep_in_layer(known, kept)
                return
            if by_tokens is not None:
                kept = by_tokens.kept(index, layer)
            else:
                kept = kept_in_layer(cache, module, index, policy, budget, hidden, rotary)
            if not _keeps_all(kept, cache):
                cache.keep_in_layer(index, kept)

        with after_each_layer(model, evict):
            run_decoder(model, input_ids[:, begin:end], cache, mask)
    cache.real = full_real


def _keeps_all(kept: Tensor, cache: SparseCache) -> bool:
    """True if nothing real leaves a whole cache (pads alone are left where they are: ratio 0 stays bitwise)."""
    if not cache.intact:
        return False
    return bool(kept.all() if cache.real is None else (kept | ~cache.real[:, None, :].to(kept.device)).all())


def _read_whole(model: Any, input_ids: Tensor, cache: SparseCache, policy: Policy, budget: Budget) -> None:
    """Policies that mask the prefill itself, or that run the model on their own."""
    mask = cache.real if cache.real is not None else torch.ones_like(input_ids, dtype=torch.bool)
    if isinstance(policy, TokenPolicy):
        context = TokenContext.of_model(
            cache.config, input_ids, mask, tokenizer=cache.tokenizer, seeds=cache.seeds
        )
        selection = policy.select(context, budget)
        run_decoder(model, input_ids, cache, cache.real, selection=selection)
        # The entry that the next token would just miss is dropped now; nothing else leaves in this phase.
        cache.apply(selection)
        return
    if not isinstance(policy, ModelPolicy):
        raise ConfigError(f"method {policy.name!r} can't be compressed with")
    run_decoder(model, input_ids, cache, cache.real)
    heads = architecture.num_kv_heads(cache.config)
    kept = torch.zeros(input_ids.shape[0], len(cache.layers), heads, input_ids.shape[1], dtype=torch.bool)
    for row in range(input_ids.shape[0]):
        real = mask[row].cpu()
        alone = policy.keep_model(model, input_ids[row : row + 1][:, mask[row]], budget, cache.tokenizer)
        kept[row][:, :, real] = alone[0].cpu()
    cache.apply(Selection.from_kept(kept, pad=~mask.cpu()))


@dataclass(frozen=True)
class Answer:
    """Generated token ids of one row, and why it ended: "eos" or "length".

    `attended_fraction`: entries that its last step attended to over those stored, in both tiers where there are two;
    None unless it was asked for.
    """

    token_ids: list[int]
    finish_reason: Literal["eos", "length"]
    attended_fraction: float | None = None


@dataclass(frozen=True)
class Asked:
    """A question to every row of a cache.

    Parameters
    ----------
    cache : SparseCache of B rows; it is used up
    question_ids : LongTensor [1 or B, Q]
        Tokens after the context, the same number for all rows.
    max_new_tokens : int >= 1
    """

    cache: SparseCache
    question_ids: Tensor
    max_new_tokens: int

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.question_ids.shape[1] == 0:
            raise ConfigError("greedy decoding needs at least one question token and max_new_tokens >= 1")


def greedy_decode(
    model: Any, cache: SparseCache, question_ids: Tensor, max_new_tokens: int, eos_ids: Collection[int]
) -> list[Answer]:
    """Greedy answers to a question from every row of a cache at once; the cache is used up. See `decode_together`."""
    return decode_together(model, [Asked(cache, question_ids, max_new_tokens)], eos_ids)[0]


STILL_GOING = 0.75
"""Rows that have ended are taken out of the batch once no more than this share goes on: each time copies the cache."""


@torch.no_grad()
def decode_together(
    model: Any, asked: Sequence[Asked], eos_ids: Collection[int], *, with_attended: bool = False
) -> list[list[Answer]]:
    """Greedy answers to several questions; the rows of all caches decode as one batch.

    Parameters
    ----------
    asked : at least one; several need caches that can be joined (of one `cache.join.join_key`)
    eos_ids : token ids that end an answer
    with_attended : tell each answer's `attended_fraction`, which takes a while where there are two tiers

    Returns
    -------
    For each question an Answer per row of its cache.

    Notes
    -----
    The stop rule is that of kvpress's pipeline, so that answers compare token for token: an end token stops the
    generation from the second new token on.
    """
    first = [_next_tokens(model, one.cache, one.question_ids.expand(one.cache.batch, -1)) for one in asked]
    cache = asked[0].cache
    if len(asked) > 1:
        cache = join([one.cache for one in asked])
        for one in asked:  # twice in memory no longer than it takes to copy them
            one.cache.close()
    ids = torch.cat(first)
    rooms = [one.max_new_tokens for one, tokens in zip(asked, first, strict=True) for _ in tokens]
    answers: list[list[int]] = [[] for _ in rooms]
    ended: list[bool] = [False] * len(rooms)
    reasons: list[Literal["eos", "length"]] = ["length"] * len(rooms)
    attended: list[float | None] = [None] * len(rooms)
    batch = list(range(len(rooms)))  # the answer that each row of the batch belongs to
    stop = set(eos_ids)
    while True:
        fractions: list[float] = []  # of the batch, worked out where a row ends
        for place, (row, token) in enumerate(zip(batch, ids[:, 0].tolist(), strict=True)):
            if ended[row]:
                continue
            answers[row].append(token)
            if len(answers[row]) > 1 and token in stop:
                reasons[row] = "eos"
            ended[row] = reasons[row] == "eos" or len(answers[row]) == rooms[row]
            if ended[row] and with_attended:
                fractions = fractions or attended_fractions(cache)
                attended[row] = fractions[place]
        going = torch.tensor([not ended[row] for row in batch])
        if not bool(going.any()):
            break
        if int(going.sum()) <= STILL_GOING * len(batch):
            cache.batch_select_indices(going.nonzero().flatten())
            batch, ids = [row for row in batch if not ended[row]], ids[going.to(ids.device)]
        ids = _next_tokens(model, cache, ids)
    found = iter([Answer(*one) for one in zip(answers, reasons, attended, strict=True)])
    return [[next(found) for _ in tokens] for tokens in first]


def _next_tokens(model: Any, cache: SparseCache, ids: Tensor) -> Tensor:
    """Feed ids [B, Q] and return each row's most likely next one, LongTensor [B, 1]."""
    arguments: dict[str, Any] = {}
    if cache.real is not None:
        mask = nn.functional.pad(cache.real_columns(), (0, ids.shape[1]), value=True).long().to(ids.device)
        arguments = {"attention_mask": mask}
    logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **arguments).logits
    return logits[:, -1].argmax(dim=-1, keepdim=True)
