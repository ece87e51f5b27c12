"""Samples to a batch, padded on the left."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsekv.errors import ConfigError
from sparsekv.training.data_layout import IGNORED


class Collator:
    """Samples of `training.data` to tensors.

    Parameters
    ----------
    tokenizer : its pad token (or else its eos token) fills the left
    multiple_of : pad to a multiple of so many columns, at least 1
    """

    def __init__(self, tokenizer: Any, multiple_of: int = 1) -> None:
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if pad is None:
            raise ConfigError("the tokenizer has neither a pad token nor an eos token; set one")
        if multiple_of < 1:
            raise ConfigError(f"multiple_of must be at least 1, got {multiple_of}")
        self.pad_token_id = int(pad)
        self.multiple_of = multiple_of

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """A batch of B samples, T columns wide.

        Returns
        -------
        dict
            input_ids, attention_mask, labels : LongTensor [B, T]; pads are masked and have label -100, and so
            has the first column, which nothing predicts.
            boundary : LongTensor [B], the column of the first token after the context, pads counted; 0 where
            the sample sets none.
            sample_index : LongTensor [B]
        """
        longest = max(len(sample["input_ids"]) for sample in samples)
        width = -(-longest // self.multiple_of) * self.multiple_of
        shape = (len(samples), width)
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.long)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, IGNORED, dtype=torch.long)
        boundary = torch.zeros(len(samples), dtype=torch.long)
        for row, sample in enumerate(samples):
            start = width - len(sample["input_ids"])
            input_ids[row, start:] = torch.as_tensor(sample["input_ids"], dtype=torch.long)
            labels[row, start:] = torch.as_tensor(sample["labels"], dtype=torch.long)
            attention_mask[row, start:] = 1
            boundary[row] = sample["boundary"] + start if sample["boundary"] else 0
        labels[:, 0] = IGNORED
        index = torch.tensor([sample["sample_index"] for sample in samples], dtype=torch.long)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "boundary": boundary,
            "sample_index": index,
        }


class Placed:
    """A user's collator, and where each sample's context ends in the batch that it makes.

    `sample_index` and `boundary` follow from the samples, so they are added where the collator gives none; a boundary
    that it handed on as it was in the sample is moved by the row's padding.

    Parameters
    ----------
    collator : from a list of samples to a batch, one row per sample
        See `SparseKVTrainer`, data_collator.
    """

    def __init__(self, collator: Callable[[list[Any]], Mapping[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch, with sample_index and boundary LongTensor [B]; rows that are no samples are left as they are."""
        given = torch.tensor([int(sample["boundary"]) for sample in samples])
        index = torch.tensor([int(sample["sample_index"]) for sample in samples])
        lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
        batch = dict(self.collator(list(samples)))
        mask = batch.get("attention_mask")
        if mask is None or mask.shape[0] != len(samples) or not torch.equal(mask.sum(1).cpu(), lengths):
            return batch
        batch.setdefault("sample_index", index)
        boundary = torch.as_tensor(batch.get("boundary", given)).cpu()
        if torch.equal(boundary, given):
            boundary = torch.where(given > 0, given + mask.shape[1] - lengths, 0)
        return batch | {"boundary": boundary}


def collator_for(given: Any, tokenizer: Any) -> Any:
    """A collator whose batches say where contexts end: a user's, or one of the tokenizer's.

    Raises
    ------
    ConfigError
        If there is neither.
    """
    if given is not None:
        return given if isinstance(given, (Collator, Placed)) else Placed(given)
    if tokenizer is None:
        raise ConfigError(
            "batches need padding: give tokenizer=..., or data_collator=... that pads on the left"
        )
    return Collator(tokenizer)
