"""Data sets of samples for training, from a `DataConfig`.

A map-style data set gives the same sample for the same number, in any order, batching or process. A streamed
one gives the same samples in the same order.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from sparsekv.benchmarks.base import row_rng
from sparsekv.errors import ConfigError
from sparsekv.training.data_layout import Layout, Sample
from sparsekv.training.data_rows import TextFormat, qa_samples
from sparsekv.training.data_sources import Refusals, documents, rows
from sparsekv.training.data_spec import DEFAULT_SAMPLES, DataConfig
from sparsekv.training.selfsup import SelfSupervision, from_config

CHARACTERS_PER_CONTEXT_TOKEN = 16
"""Text that is gathered from a stream before questions are made from it: about four contexts."""


class SampleDataset(Dataset[Sample]):
    """A map-style data set: `len`, and samples 0 to len - 1."""

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return self.sample(int(index))

    def sample(self, index: int) -> Sample:
        """Sample `index`, whose `sample_index` it is."""
        raise NotImplementedError


class TextDataset(SampleDataset):
    """Sequences of documents, none of which holds parts of two (`training.packing`). Each document is
    tokenised once, at the start."""

    def __init__(self, config: DataConfig, layout: Layout) -> None:
        refused = Refusals()
        self._format = TextFormat(layout, config.seq_len, config.min_tokens)
        self._documents: list[np.ndarray] = []
        self._ends: list[int] = []
        for text in documents(config, refused):
            ids = self._format.document(text, refused)
            if ids is not None:
                self._documents.append(np.asarray(ids, dtype=np.int32))
                self._ends.append((self._ends[-1] if self._ends else 0) + len(self._format.pieces(len(ids))))
        if not self._ends:
            raise refused.error(config)
        refused.warn(config)
        self._length = min(self._ends[-1], config.n_samples or self._ends[-1])

    def __len__(self) -> int:
        return self._length

    def sample(self, index: int) -> Sample:
        number = bisect_right(self._ends, index)
        document = self._documents[number]
        found = self._format.pieces(len(document))
        piece = found[index - self._ends[number]]  # from the end of the document's own
        return self._format.sample(document, piece, index)


class QaDataset(SampleDataset):
    """Rows of context, question and answer; tokenised at the start, since long ones are left out."""

    def __init__(self, config: DataConfig, layout: Layout) -> None:
        refused = Refusals()
        samples = qa_samples(rows(config, refused), layout, config, refused)
        self._samples = list(islice(samples, config.n_samples))
        if not self._samples:
            raise refused.error(config)
        refused.warn(config)

    def __len__(self) -> int:
        return len(self._samples)

    def sample(self, index: int) -> Sample:
        return dict(self._samples[index])


def all_documents(config: DataConfig) -> list[str]:
    """The documents of a "selfsup" configuration; a ConfigError says why there is none."""
    refused = Refusals()
    texts = list(documents(config, refused))
    if not texts:
        raise refused.error(config)
    refused.warn(config)
    return texts


class SelfSupervisedDataset(SampleDataset):
    """Questions made from texts (`training.selfsup`). `sample` takes any number from 0; `len` is what one
    epoch draws. `texts`: those to read instead of the config's."""

    def __init__(
        self, config: DataConfig, layout: Layout, seed: int, texts: Sequence[str] | None = None
    ) -> None:
        read = all_documents(config) if texts is None else texts
        self.generator: SelfSupervision = from_config(read, layout, config, seed)
        self._length = config.n_samples or DEFAULT_SAMPLES

    def __len__(self) -> int:
        return self._length

    def sample(self, index: int) -> Sample:
        return self.generator.sample(index)


class MixedDataset(SampleDataset):
    """Samples of several data sets, each drawn in proportion to its weight.

    A part that runs out starts over, in another order. Every sample's `sample_index` is its number in the
    mix.

    Parameters
    ----------
    parts : the data sets
    weights : as many, above 0
    n_samples : how many there are; None: as many as all parts together have
    seed : of the draws
    """

    def __init__(
        self, parts: Sequence[SampleDataset], weights: Sequence[float], n_samples: int | None, seed: int
    ) -> None:
        self._parts, self._seed = list(parts), seed
        n = n_samples or sum(map(len, parts))
        drawn = row_rng(seed, "mix").choices(range(len(parts)), weights=weights, k=n)
        self._part = np.asarray(drawn, dtype=np.int16)
        self._rank = np.empty(n, dtype=np.int64)
        for part in range(len(parts)):
            chosen = self._part == part
            self._rank[chosen] = np.arange(int(chosen.sum()))
        self._orders: dict[tuple[int, int], list[int]] = {}

    def __len__(self) -> int:
        return len(self._part)

    def sample(self, index: int) -> Sample:
        number, rank = int(self._part[index]), int(self._rank[index])
        part = self._parts[number]
        if not isinstance(part, SelfSupervisedDataset):  # which never runs out and has no order
            rank = self._order(number, rank // len(part))[rank % len(part)]
        return {**part.sample(rank), "sample_index": index}

    def _order(self, number: int, epoch: int) -> list[int]:
        key = (number, epoch)
        if key not in self._orders:
            order = list(range(len(self._parts[number])))
            row_rng(self._seed, "order", number, epoch).shuffle(order)
            self._orders[key] = order
        return self._orders[key]


class StreamedDataset(IterableDataset[Sample]):
    """Samples as their text arrives. `sample_index` counts them; the workers of a DataLoader share them out
    by number, so that each comes once.

    Parameters
    ----------
    samples : starts the stream and counts the rows it leaves out
    config : for the error if there is no usable row
    """

    def __init__(self, samples: Callable[[Refusals], Iterator[Sample]], config: DataConfig) -> None:
        self._samples, self._config, self._warned = samples, config, False

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        mine, n_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        refused, empty = Refusals(), True
        for sample in islice(self._samples(refused), self._config.n_samples):
            empty = False
            if sample["sample_index"] % n_workers == mine:
                yield sample
        if empty:
            raise refused.error(self._config)
        if mine == 0 and not self._warned:
            self._warned = True
            refused.warn(self._config)


def _streamed_text(layout: Layout, config: DataConfig, refused: Refusals) -> Iterator[Sample]:
    form = TextFormat(layout, config.seq_len, config.min_tokens)
    return form.samples(documents(config, refused), refused)


def _streamed_qa(layout: Layout, config: DataConfig, refused: Refusals) -> Iterator[Sample]:
    return qa_samples(rows(config, refused), layout, config, refused)


def _streamed_selfsup(layout: Layout, config: DataConfig, seed: int, refused: Refusals) -> Iterator[Sample]:
    """Questions about groups of documents, as many for each group as it has contexts."""
    index = 0
    for group in _groups(documents(config, refused), CHARACTERS_PER_CONTEXT_TOKEN * config.context_tokens):
        generator = from_config(group, layout, config, seed)
        for _ in range(max(1, generator.corpus.n_tokens // config.context_tokens)):
            yield generator.sample(index)
            index += 1


def _groups(texts: Iterator[str], characters: int) -> Iterator[list[str]]:
    """Texts in groups of at least so many characters together; the last one may have fewer."""
    group: list[str] = []
    for text in texts:
        group.append(text)
        if sum(map(len, group)) >= characters:
            yield group
            group = []
    if group:
        yield group


def part_seed(seed: int, number: int) -> int:
    """The seed of part `number` of a mix."""
    return row_rng(seed, "part", number).getrandbits(31)


def make_dataset(spec: DataConfig, tokenizer: Any, seed: int = 0) -> SampleDataset | StreamedDataset:
    """The data set that a configuration describes.

    Parameters
    ----------
    spec : what is read
    tokenizer : the model's; it needs an eos token
    seed : of everything that is drawn

    Returns
    -------
    A map-style data set, or, with `streaming`, an iterable one. Samples hold input_ids and labels (lists of
    the same length, -100 where no loss is taken), boundary (the first column after the context, 0 where the
    trainer is to draw one) and sample_index.

    Raises
    ------
    ConfigError
        A missing file, no usable row (with the reasons), a length that leaves no room for the text, a
        tokenizer without an eos token.
    """
    if spec.kind == "mix":
        parts = []
        for number, part in enumerate(spec.mix):
            made = make_dataset(part, tokenizer, part_seed(seed, number))
            if isinstance(made, StreamedDataset):
                raise ConfigError("mix: a streamed data set has no length and can't be mixed")
            parts.append(made)
        return MixedDataset(parts, [part.weight for part in spec.mix], spec.n_samples, seed)
    layout = Layout(tokenizer, spec.loss_on)
    if spec.kind == "text":
        if spec.streaming:
            return StreamedDataset(partial(_streamed_text, layout, spec), spec)
        return TextDataset(spec, layout)
    if spec.kind == "qa":
        if spec.streaming:
            return StreamedDataset(partial(_streamed_qa, layout, spec), spec)
        return QaDataset(spec, layout)
    if spec.streaming:
        return StreamedDataset(partial(_streamed_selfsup, layout, spec, seed), spec)
    return SelfSupervisedDataset(spec, layout, seed)
