"""Documents are cut so that every token is predicted once, and no sequence holds two documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekv.errors import ConfigError
from sparsekv.training.data import make_dataset
from sparsekv.training.data_layout import IGNORED
from sparsekv.training.data_spec import DataConfig
from sparsekv.training.packing import Piece, pieces


def test_by_hand() -> None:
    assert pieces(10, 4) == [Piece(0, 4, 1), Piece(3, 7, 4), Piece(6, 10, 7)]
    assert pieces(9, 4) == [Piece(0, 4, 1), Piece(3, 7, 4), Piece(5, 9, 7)]
    assert pieces(4, 4) == [Piece(0, 4, 1)]
    assert pieces(3, 4) == [Piece(0, 3, 1)]
    assert pieces(1, 4) == pieces(0, 4) == []


@settings(deadline=None)
@given(n_tokens=st.integers(2, 400), seq_len=st.integers(2, 60))
def test_every_token_but_the_first_is_labelled_once(n_tokens: int, seq_len: int) -> None:
    found = pieces(n_tokens, seq_len)
    labelled = [column for piece in found for column in range(piece.labelled, piece.stop)]
    assert labelled == list(range(1, n_tokens))
    for piece in found:
        assert piece.stop - piece.start == min(seq_len, n_tokens)  # full wherever the document is long enough
        assert piece.start < piece.labelled < piece.stop  # something precedes what is predicted


@settings(deadline=None, max_examples=50)
@given(lengths=st.lists(st.integers(0, 90), min_size=1, max_size=8))
def test_no_sequence_crosses_documents(lengths: list[int], tmp_path_factory: Any) -> None:
    import toy

    # Each document is one letter repeated, so a mixture would show.
    texts = [chr(ord("a") + i) * length for i, length in enumerate(lengths)]
    path = tmp_path_factory.mktemp("packing") / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    usable = [text for text in texts if len(text) >= 5]
    config = DataConfig(kind="text", path=str(path), seq_len=32, min_tokens=5)
    tokenizer = toy.toy_tokenizer()
    if not usable:
        with pytest.raises(ConfigError, match="no usable row"):
            make_dataset(config, tokenizer)
        return
    data = make_dataset(config, tokenizer)
    learned = ""
    for sample in data:
        text = tokenizer.decode(sample["input_ids"], skip_special_tokens=True)
        assert len(set(text)) <= 1 and len(sample["input_ids"]) <= 32
        kept = [i for i, label in zip(sample["input_ids"], sample["labels"], strict=True) if label != IGNORED]
        assert kept == [label for label in sample["labels"] if label != IGNORED]
        learned += tokenizer.decode(kept)
        assert sample["boundary"] == 0 and len(sample["input_ids"]) == len(sample["labels"])
    assert learned == "".join(text[1:] + tokenizer.eos_token for text in usable)


def test_layout_of_text_token_by_token(tmp_path: Path, toy_tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("abcdefghijklmnopqrstuvwxyz0123456789")
    config = DataConfig(kind="text", path=str(tmp_path), seq_len=32, min_tokens=4)
    data = make_dataset(config, toy_tokenizer)
    bos, eos = toy_tokenizer.bos_token_id, toy_tokenizer.eos_token_id
    ids = toy_tokenizer("abcdefghijklmnopqrstuvwxyz0123456789", add_special_tokens=False)["input_ids"]
    assert [sample["sample_index"] for sample in data] == [0, 1]
    assert data[0]["input_ids"] == [bos, *ids[:31]]
    assert data[0]["labels"] == [IGNORED, IGNORED, *ids[1:31]]
    assert data[1]["input_ids"] == [bos, *ids[6:], eos]
    assert data[1]["labels"] == [IGNORED] * 26 + [*ids[31:], eos]
    with pytest.raises(IndexError):
        data[2]
