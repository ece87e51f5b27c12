"""Answers of many methods to some prompts: one prefill per prompt, compacted copies, one batch for all.

What can't share the prefill (methods that change it, chunked reading, eviction while decoding, two tiers) reads its
context itself; two-tier caches then decode side by side too, all others alone.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch

from sparsekv.cache.join import join_key
from sparsekv.cache.layer import SparseLayer
from sparsekv.cache.sparse import SparseCache
from sparsekv.cache.step_report import attended_fractions
from sparsekv.cache.steps import step_bytes
from sparsekv.errors import ConfigError
from sparsekv.evaluation.cells import Setting
from sparsekv.evaluation.native import native_reply
from sparsekv.evaluation.perplexity import continuation_perplexity
from sparsekv.evaluation.prompts import Prompt
from sparsekv.evaluation.reply import Reply
from sparsekv.evaluation.tier import passive_bytes
from sparsekv.generation import Asked, compress, decode_together
from sparsekv.policies.base import NativePolicy, Policy
from sparsekv.probe import Prefilled, Request, evicts_after_prefill, prefill
from sparsekv.selection import SelectionTrace

Sizes: TypeAlias = tuple[float, int, int]
"""Achieved compression, bytes, bytes of the full cache."""

BATCH_BYTES = 2 * 2**30
"""Caches that wait to decode side by side take at most this much (twice that while they are put together); a longer
context decodes in more batches."""


def example_seed(seed: int, example_id: str) -> int:
    """The seed of one example's random methods: the same in any batch, order or resumed run."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{example_id}".encode()).digest()[:4], "big") >> 1


def end_ids(model: Any) -> set[int]:
    """Token ids that end an answer, by the model's generation config (kvpress's rule)."""
    ids = model.generation_config.eos_token_id
    if ids is None:
        return set()
    return set(ids) if isinstance(ids, (list, tuple)) else {int(ids)}


@dataclass
class Answerer:
    """A model that answers prompts under many settings.

    Parameters
    ----------
    model, tokenizer : from `load_model`
    seed : the run's seed
    longest : tokens the model can read; keys are re-rotated where a chunked context is longer
    batch_cells : decode the settings that share a prefill as one batch, and two-tier caches of several prompts
    """

    model: Any
    tokenizer: Any
    seed: int
    longest: int
    batch_cells: bool = True
    _policies: dict[str, Policy] = field(default_factory=dict)

    def policy(self, setting: Setting) -> Policy:
        """The policy of a setting; all budgets of one method share it, so that one scoring serves them."""
        key = f"{setting.method} {sorted(setting.args.items())!r}"
        if key not in self._policies:
            self._policies[key] = setting.policy()
        return self._policies[key]

    def shares_prefill(self, setting: Setting) -> bool:
        """Whether eviction after an ordinary prefill, which then serves all such settings, is all there is to it."""
        policy = self.policy(setting)
        alone = not evicts_after_prefill(policy) or policy.rerotate or policy.by_step
        return not alone and setting.phase == "prefill" and setting.chunk is None and setting.tier is None

    def answer(self, prompt: Prompt, settings: Sequence[Setting]) -> list[Reply]:
        """One reply per setting, in order."""
        return self.answer_many([(prompt, settings)])[0]

    def answer_many(self, asked: Sequence[tuple[Prompt, Sequence[Setting]]]) -> list[list[Reply]]:
        """Replies to several prompts, one per setting of each; what can share a batch decodes side by side."""
        replies: list[dict[int, Reply]] = [{} for _ in asked]
        queues: defaultdict[Hashable, list[_Batch]] = defaultdict(list)
        for batch in self._batches(asked):
            kind = join_key(batch.cache)
            if batch.prompt.is_scored_text or not self.batch_cells or kind is None:
                self._respond_to([batch], replies)
                continue
            waiting = [one for queue in queues.values() for one in queue]
            if sum(one.n_bytes for one in [*waiting, batch]) > BATCH_BYTES:
                self._respond_to_all(queues, replies)
            queues[kind].append(batch)
        self._respond_to_all(queues, replies)
        for (prompt, settings), found in zip(asked, replies, strict=True):
            for index, setting in enumerate(settings):
                if index not in found:
                    found[index] = self._answer_alone(prompt, setting)
        return [
            [found[i] for i in range(len(settings))]
            for (_, settings), found in zip(asked, replies, strict=True)
        ]

    def traces(self, prompt: Prompt, settings: Sequence[Setting]) -> Iterator[tuple[Setting, SelectionTrace]]:
        """What each setting keeps once the context was read and, where it evicts while decoding, after its answer.

        Nothing of native methods, whose entries can't be told.
        """
        shared = {i: setting for i, setting in enumerate(settings) if self.shares_prefill(setting)}
        if shared:
            read = self.read(prompt, shared)
            for index, setting in shared.items():
                yield setting, trace_of(read.cache.fork([read.selections[index]]))
        for index, setting in enumerate(settings):
            if index not in shared and not isinstance(self.policy(setting), NativePolicy):
                yield setting, self._trace_alone(prompt, setting)

    def _trace_alone(self, prompt: Prompt, setting: Setting) -> SelectionTrace:
        cache = self.compress(prompt, setting)
        read = trace_of(cache)
        if setting.phase == "prefill":
            cache.close()
            return read
        self._respond([(prompt, cache)])
        answered = trace_of(cache)
        return SelectionTrace(
            steps=read.steps + answered.steps, kept=read.kept + answered.kept, length=answered.length
        )

    def read(self, prompt: Prompt, settings: dict[int, Setting]) -> Prefilled:
        """One prefill for all `settings`, keyed by their index."""
        requests = [Request(i, self.policy(s), s.budget) for i, s in settings.items()]
        ids = prompt.context_ids.to(self.model.device)
        seed = example_seed(self.seed, prompt.example.example_id)
        return prefill(self.model, ids, requests, tokenizer=self.tokenizer, seed=seed)

    def compress(self, prompt: Prompt, setting: Setting) -> SparseCache:
        """The compacted cache of a setting that needs its own prefill (not a native one); `close` it after use."""
        tiered: SparseCache | None = None
        try:
            if setting.tier is not None:
                active = setting.budget.n_kept(prompt.context_tokens)
                tiered = setting.tier.empty_cache(self.model, active)
            return self._compressed(prompt, setting, tiered)
        except BaseException:
            if tiered is not None:
                tiered.close()
            raise

    def _compressed(self, prompt: Prompt, setting: Setting, cache: SparseCache | None) -> SparseCache:
        too_long = prompt.total_tokens > self.longest
        try:
            return compress(
                self.model,
                prompt.context_ids.to(self.model.device),
                self.policy(setting),
                setting.budget,
                chunk=setting.chunk,
                phase=setting.phase,  # type: ignore[arg-type]
                cache=cache,
                rerotate=True if too_long else None,
                tokenizer=self.tokenizer,
                seeds=(example_seed(self.seed, prompt.example.example_id),),
            )
        except ConfigError as error:
            message = str(error)
            raise ConfigError(
                message if setting.method in message else f"method '{setting.method}': {message}"
            ) from None

    def _batches(self, asked: Sequence[tuple[Prompt, Sequence[Setting]]]) -> Iterator[_Batch]:
        """What shares a prefill or may share a batch, prompt by prompt; each is read when it is asked for."""
        for place, (prompt, settings) in enumerate(asked):
            shared = {i: setting for i, setting in enumerate(settings) if self.shares_prefill(setting)}
            if shared:
                yield from self._forks(place, prompt, shared)
            for index, setting in enumerate(settings):
                if setting.tier is not None and setting.tier.in_memory and self.batch_cells:
                    cache = self.compress(prompt, setting)
                    yield _Batch(place, prompt, cache, {index: self._sizes(cache)}, passive_bytes(cache))

    def _forks(self, place: int, prompt: Prompt, settings: dict[int, Setting]) -> Iterator[_Batch]:
        """The caches of the settings of one prompt, which share its prefill: as few as memory allows."""
        read = self.read(prompt, settings)
        sizes: dict[int, Sizes] = {}
        for index in settings:
            sizes[index] = self._sizes(read.cache.fork([read.selections[index]]))
        # Neighbours with equal counts share one attention call, so rows are sorted by how much they keep.
        order = sorted(settings, key=lambda index: sizes[index][1])
        batches = pack(order, sizes) if self.batch_cells else [[index] for index in order]
        for batch in batches:
            cache = read.cache.fork([read.selections[index] for index in batch])
            if batch is batches[-1]:
                read.cache.reset()
            yield _Batch(place, prompt, cache, {index: sizes[index] for index in batch})

    def _respond_to_all(
        self, queues: dict[Hashable, list[_Batch]], replies: Sequence[dict[int, Reply]]
    ) -> None:
        while queues:
            self._respond_to(queues.popitem()[1], replies)

    def _respond_to(self, batches: Sequence[_Batch], replies: Sequence[dict[int, Reply]]) -> None:
        """Decode batches side by side and put down each setting's reply under its prompt's place."""
        answers = self._respond([(batch.prompt, batch.cache) for batch in batches]) if batches else []
        for batch, rows in zip(batches, answers, strict=True):
            for (index, sizes), said in zip(batch.sizes.items(), rows, strict=True):
                replies[batch.place][index] = said.reply(sizes, batch.passive_bytes)

    def _answer_alone(self, prompt: Prompt, setting: Setting) -> Reply:
        policy = self.policy(setting)
        if isinstance(policy, NativePolicy):
            if prompt.is_scored_text:
                raise ConfigError(
                    f"method '{setting.method}' runs only in kvpress's own generation, which can't score a "
                    "text; remove it, or the perplexity benchmark"
                )
            return native_reply(
                self.model, self.tokenizer, prompt, policy, setting.budget, end_ids(self.model)
            )
        cache = self.compress(prompt, setting)
        try:
            return self._reply_of(cache, prompt, setting)
        finally:
            cache.close()

    def _reply_of(self, cache: SparseCache, prompt: Prompt, setting: Setting) -> Reply:
        sizes, passive = self._sizes(cache), passive_bytes(cache)
        ((said,),) = self._respond([(prompt, cache)])
        if setting.phase != "prefill":
            sizes = self._sizes(cache)
        achieved, n_bytes, full_bytes = sizes
        return said.reply((achieved, n_bytes + step_bytes(cache), full_bytes), passive)

    @staticmethod
    def _sizes(cache: SparseCache) -> Sizes:
        return cache.achieved_compression[0], cache.nbytes, cache.full_nbytes

    def _respond(self, asked: Sequence[tuple[Prompt, SparseCache]]) -> list[list[_Said]]:
        """What every row of each cache says; the caches are used up."""
        device = self.model.device
        if any(prompt.is_scored_text for prompt, _ in asked):
            scored = []
            for prompt, cache in asked:
                values = continuation_perplexity(self.model, cache, prompt.question_ids.to(device))
                rows = zip(values, attended_fractions(cache), strict=True)
                scored.append([_Said("", "scored", value, attended) for value, attended in rows])
            return scored
        questions = [Asked(cache, p.question_ids.to(device), p.max_new_tokens) for p, cache in asked]
        return [
            [
                _Said(
                    str(self.tokenizer.decode(a.token_ids, skip_special_tokens=True)),
                    a.finish_reason,
                    None,
                    1.0 if a.attended_fraction is None else a.attended_fraction,
                )
                for a in rows
            ]
            for rows in decode_together(self.model, questions, end_ids(self.model), with_attended=True)
        ]


class _Said(NamedTuple):
    """What one row of a cache gave, as in `Reply`."""

    prediction: str
    finish_reason: str
    perplexity: float | None
    attended_fraction: float

    def reply(self, sizes: Sizes, passive: int) -> Reply:
        """With what the cache held."""
        return Reply(
            self.prediction,
            self.finish_reason,
            *sizes,
            perplexity=self.perplexity,
            attended_fraction=self.attended_fraction,
            passive_bytes=passive,
        )


@dataclass(frozen=True)
class _Batch:
    """Settings of one prompt that are to decode as one batch.

    Parameters
    ----------
    place : of the prompt among those that are asked
    cache : a row per setting
    sizes : setting's index -> (achieved compression, bytes, bytes of the full cache), in the rows' order
    passive_bytes : the part of a one-row cache's bytes that lies in a second tier
    """

    place: int
    prompt: Prompt
    cache: SparseCache
    sizes: dict[int, Sizes]
    passive_bytes: int = 0

    @property
    def n_bytes(self) -> int:
        """Of all rows."""
        return sum(n_bytes for _, n_bytes, _ in self.sizes.values())


def pack(order: Sequence[int], sizes: Mapping[int, Sizes]) -> list[list[int]]:
    """`order` cut into batches whose caches take at most BATCH_BYTES together (or that are a single cell)."""
    batches: list[list[int]] = []
    room = 0
    for index in order:
        n_bytes = sizes[index][1]
        if not batches or n_bytes > room:
            batches.append([])
            room = BATCH_BYTES
        batches[-1].append(index)
        room -= n_bytes
    return batches


def trace_of(cache: SparseCache) -> SelectionTrace:
    """What a one-row cache stores now, as a trace of one step; windowed layers count as whole."""
    everything = torch.arange(cache.seen, dtype=torch.int32)
    kept = []
    for layer in cache.layers:
        if isinstance(layer, SparseLayer):
            kept.append([columns.to("cpu", torch.int32) for columns in layer.columns()])
        else:
            kept.append([everything] * len(cache.sparse_layers()[0][1].columns()))
    return SelectionTrace(steps=[cache.seen], kept=[kept], length=cache.seen)
