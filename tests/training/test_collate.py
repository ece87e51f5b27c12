"""A batch is padded on the left, and boundaries move with the padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparsekv.errors import ConfigError
from sparsekv.training.collate import Collator, Placed, collator_for

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


def padded(samples: list[dict[str, Any]], *keys: str) -> dict[str, Any]:
    """A user's own collator, which hands on `keys` of the samples as they are."""
    width = max(len(sample["input_ids"]) for sample in samples)
    rows = [(width - len(sample["input_ids"]), sample) for sample in samples]
    made = {
        "input_ids": torch.tensor([[0] * pads + sample["input_ids"] for pads, sample in rows]),
        "attention_mask": torch.tensor([[0] * pads + [1] * (width - pads) for pads, _ in rows]),
        "labels": torch.tensor([[-100] * pads + sample["labels"] for pads, sample in rows]),
    }
    return made | {key: torch.tensor([sample[key] for sample in samples]) for key in keys}


@pytest.mark.parametrize("keys", [(), ("boundary",), ("boundary", "sample_index")])
def test_a_users_collator_need_not_know_of_boundaries(keys: tuple[str, ...]) -> None:
    batch = Placed(lambda samples: padded(samples, *keys))([LONG, SHORT, WITHOUT])
    assert batch["boundary"].tolist() == [2, 3, 0], "moved by the padding, as Collator moves them"
    assert batch["sample_index"].tolist() == [11, 4, 0]


def test_a_users_own_boundaries_stay() -> None:
    own = {"boundary": torch.tensor([3, 4, 0]), "sample_index": torch.tensor([1, 2, 3])}
    assert Placed(lambda samples: padded(samples) | own)([LONG, SHORT, WITHOUT]).items() >= own.items()
    packed = {"input_ids": torch.ones(1, 10), "attention_mask": torch.ones(1, 10)}
    batch = Placed(lambda samples: packed)([LONG, SHORT, WITHOUT])
    assert batch.keys() == packed.keys(), "a row that is no sample has no boundary to know"


def test_which_collator(toy_tokenizer: Any) -> None:
    own = Collator(toy_tokenizer, multiple_of=4)
    assert collator_for(own, None) is own and isinstance(collator_for(None, toy_tokenizer), Collator)
    assert isinstance(collator_for(padded, toy_tokenizer), Placed)
    with pytest.raises(ConfigError, match="batches need padding"):
        collator_for(None, None)
