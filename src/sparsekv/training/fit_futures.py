"""From a sample to a context and the futures that look back at it: what follows it, and its own reconstruction.

A future is token ids that the model reads after the context. Several futures of one context do not see each other.
Imports no model.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from sparsekv.training.data_layout import Layout, Sample
from sparsekv.training.dropping import resolve_boundaries, seed_of

WHOLE = "\n\nNow write out all of the text above again, word for word."
FROM_HERE = "\n\nNow write out the text above again, word for word, going on after:"
"""What asks for a reconstruction: of the context's start, and of a later piece (its last words before follow)."""

REMINDER_TOKENS = 8
"""Tokens before a piece that tell the model where it is to go on."""


@dataclass(frozen=True)
class Observation:
    """A context and what comes after it.

    Parameters
    ----------
    context : token ids, the chat template's start included
    futures : token ids of each future, none of them empty
    seed : the sample's, for whatever is drawn of it
    """

    context: list[int]
    futures: list[list[int]]
    seed: int


def observation_of(
    sample: Sample, layout: Layout, kinds: Collection[str], chunk_tokens: int, *, seed: int, epoch: int
) -> Observation | None:
    """The context of a sample and its futures; None if nothing that is asked for follows the context.

    A sample without a boundary (plain text) is cut at a random place between a quarter and three quarters of it, as
    training does; it is all context if nothing but its reconstruction is asked for.

    Parameters
    ----------
    sample : of `training.data`: input_ids, boundary, sample_index
    layout : the chat template, and the tokenizer
    kinds : "continuation", "reconstruction" or both
    chunk_tokens : int >= 1, of a piece that is reconstructed
    seed, epoch : of the run; with the sample's number they fix what is drawn
    """
    ids, index = list(sample["input_ids"]), int(sample["sample_index"])
    own_seed, boundary = seed_of(seed, epoch, index), int(sample["boundary"])
    if not boundary and "continuation" not in kinds:
        boundary = len(ids)
    if not boundary:
        mask = torch.ones(1, len(ids), dtype=torch.long)
        (boundary,) = resolve_boundaries(torch.tensor([0]), mask, (own_seed,), "end")
    context, rest = ids[:boundary], ids[boundary:]
    futures = [rest] if "continuation" in kinds and rest else []
    if "reconstruction" in kinds:
        futures += reconstructions(context, layout, chunk_tokens)
    return Observation(context, futures, own_seed) if futures else None


def reconstructions(context: list[int], layout: Layout, chunk_tokens: int) -> list[list[int]]:
    """One future per piece of the context: a request to repeat it, the turn's end, and the piece itself.

    After KVzip (arXiv 2505.23416, section 3.2); its wording differs, and there attention is normalised over one
    piece, here over everything that the model sees. The chat template's start is not repeated.
    """
    head, end = layout.ids(layout.head), layout.ids(layout.suffix)
    body = context[len(head) :] if head and context[: len(head)] == head else context
    found = []
    for start in range(0, len(body), chunk_tokens):
        ask = layout.ids(FROM_HERE if start else WHOLE)
        before = body[max(0, start - REMINDER_TOKENS) : start]
        found.append([*ask, *before, *end, *body[start : start + chunk_tokens]])
    return found
