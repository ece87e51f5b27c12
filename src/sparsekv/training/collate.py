"""Samples to a batch, padded on the left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
