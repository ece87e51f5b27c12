"""A batch is padded on the left, and boundaries move with the padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparsekv.errors import ConfigError
from sparsekv.training.collate import Collator

LONG = {"input_ids": [5, 6, 7, 8, 9], "labels": [5, -100, 7, 8, 9], "boundary": 2, "sample_index": 11}
SHORT = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "boundary": 1, "sample_index": 4}
WITHOUT = {"input_ids": [8, 9], "labels": [8, 9], "boundary": 0, "sample_index": 0}


def test_batch_by_hand(toy_tokenizer: Any) -> None:
    batch = Collator(toy_tokenizer)([LONG, SHORT, WITHOUT])
    pad = toy_tokenizer.pad_token_id
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [pad, pad, 5, 6, 7], [pad, pad, pad, 8, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 1, 1]]
    # the first column is never a label, pads neither; a first token after pads stays what the sample says
    assert batch["labels"].tolist() == [
        [-100, -100, 7, 8, 9],
        [-100, -100, -100, 6, 7],
        [-100, -100, -100, 8, 9],
    ]
    assert batch["boundary"].tolist() == [2, 3, 0]
    assert batch["sample_index"].tolist() == [11, 4, 0]
    assert all(value.dtype == torch.long for value in batch.values())


def test_width_is_a_multiple(toy_tokenizer: Any) -> None:
    batch = Collator(toy_tokenizer, multiple_of=8)([LONG, SHORT])
    assert batch["input_ids"].shape == (2, 8)
    assert batch["boundary"].tolist() == [5, 6]
    assert batch["attention_mask"].sum().item() == 8


def test_pads_with_eos_where_there_is_no_pad_token() -> None:
    class Bare:
        pad_token_id = None
        eos_token_id: int | None = 7

    assert Collator(Bare())([LONG, WITHOUT])["input_ids"][1, 0].item() == 7
    Bare.eos_token_id = None
    with pytest.raises(ConfigError, match="neither a pad token nor an eos token"):
        Collator(Bare())
