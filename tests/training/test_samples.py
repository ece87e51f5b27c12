"""What a user hands to the trainer, as samples."""

from __future__ import annotations

from itertools import islice

import datasets
import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import default_data_collator

from sparsekv import BlockDropoutPress
from sparsekv.errors import ConfigError
from sparsekv.training.samples import Samples, StreamedSamples, as_sample
from toy import toy_tokenizer
from training.toy_trainer import first_step, trainer_for


def test_texts_are_cut_and_numbered():
    tokenizer = toy_tokenizer()
    made = Samples.of(datasets.Dataset.from_dict({"text": ["abcdefgh", "xy"], "id": [7, 8]}), tokenizer, 5)
    ids = tokenizer("abcde")["input_ids"]
    assert made[0] == {
        "input_ids": ids,
        "labels": ids,
        "attention_mask": [1] * len(ids),
        "boundary": 0,
        "sample_index": 0,
    }
    assert made[1]["input_ids"] == tokenizer("xy")["input_ids"] and made[1]["sample_index"] == 1
    assert len(made) == 2 and Samples.of(made, None, 1) is made and Samples.of(None, None, 1) is None


def test_what_an_item_says_itself_wins():
    item = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "boundary": 2, "sample_index": 40}
    assert as_sample(item, 3, None, 2) == item | {"attention_mask": [1, 1, 1]}, "ids are not cut"
    assert as_sample({"input_ids": [5, 6], "boundary": None}, 3, None, 9) == {
        "input_ids": [5, 6],
        "labels": [5, 6],
        "attention_mask": [1, 1],
        "boundary": 0,
        "sample_index": 3,
    }


@pytest.mark.parametrize("lead", [0, 2])
def test_padding_in_a_row_is_no_part_of_its_sample(lead):
    """As of tokenizer(padding="max_length"), whose labels are often its input_ids, pads and all."""
    before, after = [0] * lead, [0] * (3 - lead)
    row = {
        "input_ids": [*before, 5, 6, 7, *after],
        "labels": [*before, -100, 6, 7, *after],
        "attention_mask": [*before, 1, 1, 1, *after],
        "boundary": lead + 2,
    }
    assert as_sample(row, 4, None, 9) == {
        "input_ids": [5, 6, 7],
        "labels": [-100, 6, 7],
        "attention_mask": [1, 1, 1],
        "boundary": 2,
        "sample_index": 4,
    }
    assert as_sample(row | {"attention_mask": [0] * 6}, 4, None, 9) is None, "an empty text, padded"
    assert as_sample(row | {"boundary": 0}, 4, None, 9)["boundary"] == 0


def test_padded_rows_train_as_the_rows_without_their_padding(tmp_path):
    rows = [{"input_ids": [10 + i + j for j in range(12)]} for i in range(4)]
    padded = [
        {"input_ids": [*row["input_ids"], *[1] * 8], "attention_mask": [1] * 12 + [0] * 8} for row in rows
    ]
    press = BlockDropoutPress(block_size=2, compression_ratio=0.5, n_sink=1, recent=2)
    found = []
    for given in (rows, padded):
        for collator in (None, default_data_collator):  # the latter pads nothing
            trainer = trainer_for(tmp_path, press=press, train_dataset=given, data_collator=collator)
            batch, items = first_step(trainer)
            found.append((batch, int(items)))
    for batch, items in found:
        assert items == 4 * 11
        assert all(torch.equal(batch[key], value) for key, value in found[0][0].items())


def test_empty_texts_give_their_place_to_the_next():
    """Web text and wiki dumps have empty rows; they must not end a run in its middle."""
    tokenizer = toy_tokenizer()
    rows = [{"text": text} for text in ("ab", "", "c", "def", "")]
    made = Samples.of(rows, tokenizer, 16)
    assert [made[i]["sample_index"] for i in range(5)] == [0, 3, 3, 3, 0]
    assert [sample["sample_index"] for sample in made] == [0, 3, 3, 3, 0], "it ends when it is iterated"
    assert made[-1] == made[4]
    for outside in (5, -6):
        with pytest.raises(IndexError, match=f"sample {outside} of 5"):
            made[outside]
    streamed = Samples.of(iter(rows), tokenizer, 16)
    assert isinstance(streamed, StreamedSamples)
    assert [sample["sample_index"] for sample in streamed] == [0, 3]


def test_rows_may_be_grouped_by_their_length(tmp_path):
    """Trainer iterates the data set for that, and hands out the longest of some rows first."""
    lengths = [20, 4, 19, 5, 18, 6]
    trainer = trainer_for(
        tmp_path,
        {"train_sampling_strategy": "group_by_length", "per_device_train_batch_size": 6},
        press=BlockDropoutPress(block_size=2, compression_ratio=0.5, n_sink=1, recent=2),
        train_dataset=[{"input_ids": list(range(5, 5 + n))} for n in lengths],
    )
    (batch,) = trainer.get_train_dataloader()
    assert batch["attention_mask"].sum(1).tolist() == sorted(lengths, reverse=True)


class Anew(IterableDataset):
    """A stream that starts over each time it is iterated."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def test_a_training_stream_starts_over_with_other_numbers():
    """Without the shortness of a stream, resuming would skip past its end; a number decides what is dropped."""
    stream = Anew([{"text": text} for text in ("ab", "", "def")])
    made = Samples.of(stream, toy_tokenizer(), 16, endless=True)
    found = list(islice(made, 6))
    assert [sample["input_ids"] for sample in found] == 3 * [sample["input_ids"] for sample in found[:2]]
    numbers = [sample["sample_index"] for sample in found]
    assert numbers[:2] == [0, 2] and len(set(numbers)) == 6 and max(numbers) < 2**63
    assert list(islice(made, 6)) == found, "the same again"
    assert [sample["sample_index"] for sample in Samples.of(made, None, 1)] == [0, 2], "what is judged ends"
    once = Samples.of(iter([{"text": "ab"}]), toy_tokenizer(), 16, endless=True)
    assert len(list(once)) == 1, "an iterator can't start over"
    assert not list(Samples.of(Anew([{"text": ""}]), toy_tokenizer(), 16, endless=True))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": ""}, {"text": "a"}], "no usable row: 2 rows"),
        ([], "no usable row: 0 rows"),
        ([{"content": "abc", "url": "u"}], "item 0 has neither input_ids nor text.*it has content, url"),
        ([{"text": None}], "item 0 has neither input_ids nor text"),
        ([{"input_ids": [1, 2, 3], "labels": [1, 2]}], "item 0 has 3 input_ids and 2 labels"),
        ([{"input_ids": [1, 2, 3], "boundary": 4}], r"boundary must be in \[0, 3\], got 4"),
        ([{"input_ids": [1, 2, 3], "boundary": -1}], r"boundary must be in \[0, 3\], got -1"),
        ([{"input_ids": [1, 2, 3], "attention_mask": [1, 1]}], "3 input_ids and an attention_mask of 2"),
        ([{"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}], "attention_mask must be 1 for the tokens"),
        ([{"input_ids": [1, 2, 3], "attention_mask": [1, 2, 2]}], "attention_mask must be 1 for the tokens"),
        (
            [{"input_ids": [0, 1, 2], "attention_mask": [0, 1, 1], "boundary": 1}],
            r"boundary must be 0, or in \[2, 3\], got 1",
        ),
    ],
)
def test_what_is_no_data_set_is_told_before_training(rows, message):
    with pytest.raises(ConfigError, match=message):
        Samples.of(rows, toy_tokenizer(), 16)
