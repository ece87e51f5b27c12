"""Answers of many methods to one prompt: one prefill, compacted copies, one batch.

What can't share the prefill (methods that change it, chunked reading, eviction while decoding) or the batch (methods
that choose at every step what to read, which holds for all rows of a cache) gets its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sparsekv.cache.layer import SparseLayer
from sparsekv.cache.sparse import SparseCache
from sparsekv.cache.steps import attended_fraction, step_bytes
from sparsekv.errors import ConfigError
from sparsekv.evaluation.cells import Setting
from sparsekv.evaluation.native import native_reply
from sparsekv.evaluation.perplexity import continuation_perplexity
from sparsekv.evaluation.prompts import Prompt
from sparsekv.evaluation.reply import Reply
from sparsekv.generation import compress, greedy_decode
from sparsekv.policies.base import NativePolicy, Policy
from sparsekv.probe import Prefilled, Request, prefill
from sparsekv.selection import SelectionTrace

BATCH_BYTES = 2 * 2**30
"""Caches that decode side by side take at most this much; a longer context decodes in more batches."""


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
    batch_cells : decode the settings that share a prefill as one batch
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
        alone = policy.own_prefill or policy.rerotate or policy.by_step or isinstance(policy, NativePolicy)
        return not alone and setting.phase == "prefill" and setting.chunk is None

    def answer(self, prompt: Prompt, settings: Sequence[Setting]) -> list[Reply]:
        """One reply per setting, in order."""
        replies: dict[int, Reply] = {}
        shared = [i for i, setting in enumerate(settings) if self.shares_prefill(setting)]
        if shared:
            replies |= self._answer_shared(prompt, {i: settings[i] for i in shared})
        for index, setting in enumerate(settings):
            if index not in replies:
                replies[index] = self._answer_alone(prompt, setting)
        return [replies[index] for index in range(len(settings))]

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
            return read
        self._respond(prompt, cache)
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
        """The compacted cache of a setting that needs its own prefill (not a native one)."""
        too_long = prompt.total_tokens > self.longest
        try:
            return compress(
                self.model,
                prompt.context_ids.to(self.model.device),
                self.policy(setting),
                setting.budget,
                chunk=setting.chunk,
                phase=setting.phase,  # type: ignore[arg-type]
                rerotate=True if too_long else None,
                tokenizer=self.tokenizer,
                seeds=(example_seed(self.seed, prompt.example.example_id),),
            )
        except ConfigError as error:
            message = str(error)
            raise ConfigError(
                message if setting.method in message else f"method '{setting.method}': {message}"
            ) from None

    def _answer_shared(self, prompt: Prompt, settings: dict[int, Setting]) -> dict[int, Reply]:
        read = self.read(prompt, settings)
        sizes: dict[int, tuple[float, int, int]] = {}
        for index in settings:
            sizes[index] = self._sizes(read.cache.fork([read.selections[index]]))
        # Neighbours with equal counts share one attention call, so rows are sorted by how much they keep.
        order = sorted(settings, key=lambda index: sizes[index][1])
        batches = pack(order, sizes) if self.batch_cells else [[index] for index in order]
        replies: dict[int, Reply] = {}
        for batch in batches:
            cache = read.cache.fork([read.selections[index] for index in batch])
            if batch is batches[-1]:
                read.cache.reset()
            for index, (text, reason, perplexity) in zip(batch, self._respond(prompt, cache), strict=True):
                replies[index] = Reply(text, reason, *sizes[index], perplexity=perplexity)
        return replies

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
        sizes = self._sizes(cache)
        ((text, reason, perplexity),) = self._respond(prompt, cache)
        if setting.phase != "prefill":
            sizes = self._sizes(cache)
        achieved, n_bytes, full_bytes = sizes
        return Reply(
            text,
            reason,
            achieved,
            n_bytes + step_bytes(cache),
            full_bytes,
            perplexity=perplexity,
            attended_fraction=attended_fraction(cache),
        )

    @staticmethod
    def _sizes(cache: SparseCache) -> tuple[float, int, int]:
        return cache.achieved_compression[0], cache.nbytes, cache.full_nbytes

    def _respond(self, prompt: Prompt, cache: SparseCache) -> list[tuple[str, str, float | None]]:
        """(prediction, finish reason, perplexity) of every row of a cache, which is used up."""
        ids = prompt.question_ids.to(self.model.device)
        if prompt.is_scored_text:
            return [("", "scored", value) for value in continuation_perplexity(self.model, cache, ids)]
        answers = greedy_decode(self.model, cache, ids, prompt.max_new_tokens, end_ids(self.model))
        return [
            (str(self.tokenizer.decode(a.token_ids, skip_special_tokens=True)), a.finish_reason, None)
            for a in answers
        ]


def pack(order: Sequence[int], sizes: Mapping[int, tuple[float, int, int]]) -> list[list[int]]:
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
