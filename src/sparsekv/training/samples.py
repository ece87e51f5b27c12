"""Whatever a user's data set yields, as samples: ids, labels, a boundary, and a stable index."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils.data import Dataset, IterableDataset

from sparsekv.errors import ConfigError


def as_sample(item: Mapping[str, Any], index: int, tokenizer: Any, seq_len: int) -> dict[str, Any]:
    """One item with every key of a sample.

    Parameters
    ----------
    item : with input_ids, or with text (then a tokenizer is needed)
    index : its place in the data set; an own sample_index wins
    seq_len : text is cut to so many tokens

    Raises
    ------
    ConfigError
        If it has neither, or fewer than two tokens.
    """
    ids = item.get("input_ids")
    if ids is None:
        if tokenizer is None or "text" not in item:
            raise ConfigError(
                f"train_dataset item {index} has neither input_ids nor text (with a tokenizer); it has "
                f"{', '.join(sorted(item))}"
            )
        ids = tokenizer(item["text"], truncation=True, max_length=seq_len)["input_ids"]
    ids = [int(token) for token in ids]
    if len(ids) < 2:
        raise ConfigError(f"train_dataset item {index} has {len(ids)} tokens; nothing can be learned from it")
    labels = item.get("labels")
    return {
        "input_ids": ids,
        "labels": ids if labels is None else [int(token) for token in labels],
        "boundary": int(item.get("boundary", 0)),
        "sample_index": int(item.get("sample_index", index)),
    }


class Samples(Dataset):
    """A map-style data set whose items are samples."""

    def __init__(self, inner: Any, tokenizer: Any, seq_len: int) -> None:
        self.inner, self.tokenizer, self.seq_len = inner, tokenizer, seq_len

    @classmethod
    def of(cls, dataset: Any, tokenizer: Any, seq_len: int) -> Any:
        """`dataset` as samples; None, and what is samples already, as it is."""
        if dataset is None or isinstance(dataset, (Samples, StreamedSamples, str)):
            return dataset
        if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
            return cls(dataset, tokenizer, seq_len)
        return StreamedSamples(dataset, tokenizer, seq_len)

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return as_sample(self.inner[index], index, self.tokenizer, self.seq_len)


class StreamedSamples(IterableDataset):
    """A stream whose items are samples, numbered as they come."""

    def __init__(self, inner: Any, tokenizer: Any, seq_len: int) -> None:
        self.inner, self.tokenizer, self.seq_len = inner, tokenizer, seq_len

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for index, item in enumerate(self.inner):
            yield as_sample(item, index, self.tokenizer, self.seq_len)
