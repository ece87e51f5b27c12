"""What a user's data_collator has to give, and what a trainer makes of one that knows nothing of boundaries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DataCollatorForSeq2Seq

from sparsekv import BlockDropoutPress
from sparsekv.errors import ConfigError
from sparsekv.training import Collator
from toy import toy_tokenizer
from training.toy_trainer import first_step, trainer_for


def first_batch(folder: Any, collator: Any) -> dict[str, torch.Tensor]:
    press = BlockDropoutPress(block_size=4, compression_ratio=0.5, n_sink=1, recent=3)
    return first_step(trainer_for(folder, press=press, data_collator=collator))[0]


def test_transformers_own_collator_makes_the_same_batch(tmp_path):
    """It pads labels, and hands boundary and sample_index on as they are in the samples."""
    found = first_batch(tmp_path, DataCollatorForSeq2Seq(toy_tokenizer()))
    wanted = first_batch(tmp_path, None)
    assert len({int(row.sum()) for row in wanted["attention_mask"]}) > 1, "rows must be padded"
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


class Changed(Collator):
    """A collator that leaves a key out, or sets it."""

    def __init__(self, **changes: Any) -> None:
        super().__init__(toy_tokenizer())
        self.changes = changes

    def __call__(self, given: Any) -> dict[str, Any]:
        batch = super().__call__(given) | self.changes
        return {key: value for key, value in batch.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_index": None}, "the batch has no sample_index; it has attention_mask, boundary, input_ids"),
        ({"labels": None}, "the batch has no labels"),
        ({"boundary": torch.tensor([0, 1, 1, 1])}, "row [123], which starts after [1-9][0-9]* of padding"),
        ({"boundary": torch.tensor([0, 0, 0, 99])}, "boundary is a column of the padded batch, .*got 99"),
    ],
)
def test_batches_that_lack_something_are_refused(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=f"data_collator: .*{message}"):
        first_batch(tmp_path, Changed(**changes))
