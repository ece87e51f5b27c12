"""Held-out data: samples of text that training never reads.

"text", "qa"   the last samples
"selfsup"      samples made from the end of the text, which no training sample is made from
"mix"          some of each part, by the parts' weights
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, cast

from sparsekv.benchmarks.base import row_rng
from sparsekv.errors import ConfigError
from sparsekv.training.data import (
    CHARACTERS_PER_CONTEXT_TOKEN,
    MixedDataset,
    SampleDataset,
    SelfSupervisedDataset,
    all_documents,
    make_dataset,
    part_seed,
)
from sparsekv.training.data_layout import Layout, Sample
from sparsekv.training.data_spec import DataConfig

SHARE = 10
"""One part in so many of a text is set aside; more where that is less than about four contexts."""

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def split_data(
    data: DataConfig,
    eval_data: DataConfig | None,
    held_out: int,
    seed: int,
    tokenizer: Any,
    *,
    same_text: bool = False,
) -> tuple[Any, Any]:
    """(training data, held-out data or None): those of `eval_data`, or `held_out` samples set aside from `data`.

    Parameters
    ----------
    same_text : self-supervised samples are set aside as others are, so that they are new questions about text that was
        read

    Raises
    ------
    ConfigError
        If samples are to be set aside of a stream, of too few, of too short a text, or of a mix whose parts read the
        same text.
    """
    if eval_data is not None or not held_out:
        judged = None if eval_data is None else make_dataset(eval_data, tokenizer, seed + 1)
        return make_dataset(data, tokenizer, seed), judged
    if data.streaming:
        raise ConfigError("held_out sets samples aside, which a stream can't; give eval_data instead")
    if same_text:
        return _last_set_aside(_whole(data, seed, tokenizer), held_out)
    return _split(data, held_out, seed, tokenizer)


class Stretch(SampleDataset):
    """Samples [first, first + length) of a data set."""

    def __init__(self, inner: SampleDataset, first: int, length: int) -> None:
        self._inner, self._first, self._length = inner, first, length

    def __len__(self) -> int:
        return self._length

    def sample(self, index: int) -> Sample:
        """That of the whole, with its `sample_index`."""
        return self._inner.sample(self._first + index)


class Joined(SampleDataset):
    """All samples of several data sets, one after the other, numbered anew."""

    def __init__(self, parts: Sequence[SampleDataset]) -> None:
        self._places = [(part, index) for part in parts for index in range(len(part))]

    def __len__(self) -> int:
        return len(self._places)

    def sample(self, index: int) -> Sample:
        """Sample `index` of all of them."""
        part, place = self._places[index]
        return {**part.sample(place), "sample_index": index}


def _split(spec: DataConfig, held_out: int, seed: int, tokenizer: Any) -> tuple[SampleDataset, SampleDataset]:
    if spec.kind == "mix":
        return _split_mix(spec, held_out, seed, tokenizer)
    if spec.kind != "selfsup":
        return _last_set_aside(_whole(spec, seed, tokenizer), held_out)
    layout = Layout(tokenizer, spec.loss_on)
    read, aside = set_aside(all_documents(spec), spec.context_tokens)
    judged = spec.model_copy(update={"n_samples": held_out})
    other = row_rng(seed, "held out").getrandbits(31)
    return (
        SelfSupervisedDataset(spec, layout, seed, read),
        SelfSupervisedDataset(judged, layout, other, aside),
    )


def _whole(spec: DataConfig, seed: int, tokenizer: Any) -> SampleDataset:
    """The data set of a configuration that does not stream: `split_data` refuses streams, and a mix has none."""
    return cast(SampleDataset, make_dataset(spec, tokenizer, seed))


def _left(size: int, held_out: int) -> int:
    """How many samples are left to train on, at least one."""
    if size <= held_out:
        raise ConfigError(f"held_out {held_out} leaves nothing of the data's {size} samples to train on")
    return size - held_out


def _last_set_aside(data: SampleDataset, held_out: int) -> tuple[SampleDataset, SampleDataset]:
    left = _left(len(data), held_out)
    return Stretch(data, 0, left), Stretch(data, left, held_out)


def _split_mix(
    spec: DataConfig, held_out: int, seed: int, tokenizer: Any
) -> tuple[SampleDataset, SampleDataset]:
    _check_that_parts_read_different_text(spec)
    left = None if spec.n_samples is None else _left(spec.n_samples, held_out)
    weights = [part.weight for part in spec.mix]
    trained: list[SampleDataset] = []
    judged: list[SampleDataset] = []
    for number, (part, count) in enumerate(zip(spec.mix, shares(held_out, weights), strict=True)):
        own = part_seed(seed, number)
        try:
            if count:
                train, held = _split(part, count, own, tokenizer)
                judged.append(held)
            else:
                train = _whole(part, own, tokenizer)
        except ConfigError as error:
            raise ConfigError(f"mix[{number}]: {error}") from error
        trained.append(train)
    return MixedDataset(trained, weights, left, seed), Joined(judged)


def _check_that_parts_read_different_text(spec: DataConfig) -> None:
    seen: set[tuple[str, str | None, str]] = set()
    for part in spec.mix:
        own = {(path, part.subset, part.split) for path in part.path if part.kind != "mix"}
        for path, _, _ in sorted(own & seen, key=str):
            raise ConfigError(
                f"held_out can't set text of '{path}' aside, which two parts of the mix read; give eval_data instead"
            )
        seen |= own


def shares(total: int, weights: Sequence[float]) -> list[int]:
    """`total` in whole shares by weights: those whose fractions are largest get one more (Hamilton's method)."""
    exact = [total * weight / sum(weights) for weight in weights]
    found = [int(each) for each in exact]
    order = sorted(range(len(exact)), key=lambda i: found[i] - exact[i])
    for place in order[: total - sum(found)]:
        found[place] += 1
    return found


def set_aside(texts: Sequence[str], context_tokens: int) -> tuple[list[str], list[str]]:
    """(documents to train on, documents set aside): the end of the last ones, from the end of a sentence on.

    Parameters
    ----------
    texts : the documents
    context_tokens : of a sample; about four contexts are set aside at least

    Raises
    ------
    ConfigError
        If that were more than half of the text.
    """
    total = sum(map(len, texts))
    size = max(total // SHARE, CHARACTERS_PER_CONTEXT_TOKEN * context_tokens)
    if 2 * size > total:
        raise ConfigError(
            f"held_out sets text aside that training never reads, {size} characters for contexts of {context_tokens} "
            f"tokens, and there are {total}; give eval_data, more text or shorter contexts"
        )
    read, aside = list(texts), list[str]()
    while size > 0:
        text = read.pop()
        if len(text) > size:
            start = len(text) - size
            found = _SENTENCE_END.search(text, start, start + size // 2)
            cut = start if found is None else found.end()
            return [*read, text[:cut]], [text[cut:], *aside]
        aside.insert(0, text)
        size -= len(text)
    return read, aside
