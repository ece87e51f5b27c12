"""Whatever a user's data set yields, as samples: ids, labels, a boundary, and a stable index."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any

from torch.utils.data import Dataset, IterableDataset

from sparsekv.errors import ConfigError
from sparsekv.training.data_layout import IGNORED

LEAST_TOKENS = 2
"""Fewer predict nothing."""

_ROUND = 2**32
"""Added to the numbers of a stream's samples each time it starts over: more than it has samples."""


def as_sample(
    item: Mapping[str, Any], index: int, tokenizer: Any, seq_len: int, *, labelled: bool = True
) -> dict[str, Any] | None:
    """One item with every key of a sample; None if nothing is learned from it: fewer than two tokens, or no label after
    the first.

    Parameters
    ----------
    item : with input_ids, or with text (then a tokenizer is needed)
        Columns that its attention_mask hides are padding: they, and their labels, are left out. The boundary counts
        them; None is 0.
    index : its place in the data set; an own sample_index wins
    seq_len : text is cut to so many tokens
    labelled : False where something is learned without labels, too

    Raises
    ------
    ConfigError
        If it has neither, or labels, a boundary or an attention_mask that do not fit its tokens.
    """
    ids = item.get("input_ids")
    if ids is None:
        if tokenizer is None or not isinstance(item.get("text"), str):
            raise ConfigError(
                f"data set item {index} has neither input_ids nor text (with a tokenizer); it has "
                f"{', '.join(sorted(item)) or 'nothing'}"
            )
        ids = tokenizer(item["text"], truncation=True, max_length=seq_len)["input_ids"]
    ids = [int(token) for token in ids]
    start, end = _tokens(item.get("attention_mask") if "input_ids" in item else None, len(ids), index)
    if end - start < LEAST_TOKENS:
        return None
    labels, boundary = item.get("labels"), int(item.get("boundary") or 0)
    labels = ids if labels is None else [int(token) for token in labels]
    if len(labels) != len(ids):
        raise ConfigError(f"data set item {index} has {len(ids)} input_ids and {len(labels)} labels")
    if boundary and not start < boundary <= end:
        allowed = f"0, or in [{start + 1}, {end}]" if start else f"in [0, {end}]"
        raise ConfigError(f"data set item {index}: boundary must be {allowed}, got {boundary}")
    if labelled and all(label == IGNORED for label in labels[start + 1 : end]):
        return None
    return {
        "input_ids": ids[start:end],
        "labels": labels[start:end],
        "attention_mask": [1] * (end - start),
        "boundary": boundary - start if boundary else 0,
        "sample_index": int(item.get("sample_index", index)),
    }


def _tokens(mask: Sequence[Any] | None, n: int, index: int) -> tuple[int, int]:
    """The columns [start, end) of a row of n that its attention_mask shows; all without one."""
    if mask is None:
        return 0, n
    shown = [int(each) for each in mask]
    if len(shown) != n:
        raise ConfigError(f"data set item {index} has {n} input_ids and an attention_mask of {len(shown)}")
    start, total = shown.index(1) if 1 in shown else 0, shown.count(1)
    if shown != [0] * start + [1] * total + [0] * (n - start - total):
        raise ConfigError(
            f"data set item {index}: attention_mask must be 1 for the tokens of a row, which lie side by side, and 0 "
            "for padding before and after them"
        )
    return start, start + total


class Samples(Dataset):
    """A map-style data set whose items are samples.

    An item that nothing is learned from (an empty text, no label) gives its place to the next one that is not so.

    Raises
    ------
    ConfigError
        If the first item is no sample, or nothing is learned from any.
    """

    def __init__(self, inner: Any, tokenizer: Any, seq_len: int, *, labelled: bool = True) -> None:
        self.inner, self.tokenizer, self.seq_len, self.labelled = inner, tokenizer, seq_len, labelled
        self._usable(0)  # so that a wrong data set is told before training

    @classmethod
    def of(
        cls, dataset: Any, tokenizer: Any, seq_len: int, *, endless: bool = False, labelled: bool = True
    ) -> Any:
        """`dataset` as samples; None, and what is samples already, as it is. `endless`: of a stream."""
        if dataset is None or isinstance(dataset, (Samples, str)):
            return dataset
        if isinstance(dataset, StreamedSamples):
            return StreamedSamples(
                dataset.inner, dataset.tokenizer, dataset.seq_len, endless=endless, labelled=labelled
            )
        if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
            return cls(dataset, tokenizer, seq_len, labelled=labelled)
        return StreamedSamples(dataset, tokenizer, seq_len, endless=endless, labelled=labelled)

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):  # this ends an iteration
            raise IndexError(f"sample {index} of {len(self)}")
        return self._usable(index)

    def _usable(self, index: int) -> dict[str, Any]:
        """The first sample at or after `index`; after the last comes the first."""
        for place in range(index, index + len(self)):
            place %= len(self)
            found = as_sample(self.inner[place], place, self.tokenizer, self.seq_len, labelled=self.labelled)
            if found is not None:
                return found
        raise ConfigError(
            f"the data set has no usable row: {len(self)} rows, none of {LEAST_TOKENS} tokens with a label after the "
            f"first ({IGNORED} is none)"
        )


class StreamedSamples(IterableDataset):
    """A stream whose items are samples, numbered as they come; those that nothing is learned from are left out.

    Parameters
    ----------
    inner : what gives the items, anew each time it is iterated
    tokenizer, seq_len : see `as_sample`
    endless : start over whenever `inner` ends, with other numbers, so that other entries are dropped. Training needs
        it: Trainer takes max_steps to be one epoch of a stream, and skips as far when it resumes. An iterator, which
        can't start over, still ends.
    """

    def __init__(
        self, inner: Any, tokenizer: Any, seq_len: int, *, endless: bool = False, labelled: bool = True
    ) -> None:
        self.inner, self.tokenizer, self.seq_len = inner, tokenizer, seq_len
        self.endless, self.labelled = endless, labelled

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for first in count(step=_ROUND):
            empty = True
            for index, item in enumerate(self.inner):
                found = as_sample(item, index, self.tokenizer, self.seq_len, labelled=self.labelled)
                if found is not None:
                    empty = False
                    yield {**found, "sample_index": first + found["sample_index"]}
            if empty or not self.endless:
                return
