"""What is held out is text that training never reads, whatever the kind of data."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from sample_tokenizer import bpe_tokenizer

from sparsekv.config import parse_config
from sparsekv.errors import ConfigError
from sparsekv.training.data import make_dataset
from sparsekv.training.data_layout import IGNORED
from sparsekv.training.data_spec import DataConfig
from sparsekv.training.data_split import set_aside, shares, split_data
from sparsekv.training.eit import EITConfig


def write_text(path: Path, first: int, n_words: int = 2000) -> Path:
    """Sentences of nine words, of which eight are there once and in no other file."""
    numbers = range(first, first + n_words)
    words = [("There " if n % 8 == 0 else "") + f"w{n}q" + ("." if n % 8 == 7 else "") for n in numbers]
    path.write_text(json.dumps({"text": " ".join(words)}) + "\n")
    return path


def words_of(data: Any) -> set[str]:
    """The words of texts that samples hold."""
    tokenizer = bpe_tokenizer()
    text = " ".join(tokenizer.decode(data[i]["input_ids"]) for i in range(len(data)))
    return {
        word.rstrip(".") for word in text.split() if word.startswith("w") and word.rstrip(".").endswith("q")
    }


def selfsup(path: Path, **changes: Any) -> dict[str, Any]:
    families = {"onward": 1, "repeat": 1, "continue": 1}
    return {"path": str(path), "context_tokens": 120, "families": families, "n_samples": 300, **changes}


def split(tmp_path: Path, spec: dict[str, Any], held_out: int, **more: Any) -> tuple[Any, Any]:
    return split_data(parse_config(DataConfig, spec), None, held_out, 3, bpe_tokenizer(), **more)


def test_held_out_questions_are_about_text_that_is_never_read(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.jsonl", 1000)
    train, judged = split(tmp_path, selfsup(path), 20)
    assert (len(train), len(judged)) == (300, 20)
    read, asked = words_of(train), words_of(judged)
    assert len(asked) > 100 and len(read) > 1000
    assert not read & asked
    assert min(asked) > max(read), "the end of the text"
    again = split(tmp_path, selfsup(path), 20)[1]
    assert [again[i] for i in range(20)] == [judged[i] for i in range(20)]
    before, after = split(tmp_path, selfsup(path), 20, same_text=True)
    assert (len(before), len(after)) == (280, 20) and words_of(before) & words_of(after)


def test_a_mix_sets_some_of_each_part_aside(tmp_path: Path) -> None:
    first, second = write_text(tmp_path / "a.jsonl", 1000), write_text(tmp_path / "b.jsonl", 5000)
    parts = [selfsup(first, weight=3), {"kind": "text", "path": str(second), "seq_len": 64, "weight": 1}]
    train, judged = split(tmp_path, {"mix": parts, "n_samples": 300}, 8)
    assert (len(train), len(judged)) == (292, 8)
    read, asked = words_of(train), words_of(judged)
    assert {word for word in asked if word >= "w5000q"} and {word for word in asked if word < "w5000q"}
    assert not {word for word in read & asked if word < "w5000q"}
    assert [judged[i]["sample_index"] for i in range(8)] == list(range(8))
    learned = {tuple(token for token in train[i]["labels"] if token != IGNORED) for i in range(292)}
    assert not learned & {tuple(t for t in judged[i]["labels"] if t != IGNORED) for i in range(8)}
    whole = make_dataset(parse_config(DataConfig, parts[1]), bpe_tokenizer())
    assert [judged[i]["input_ids"] for i in (6, 7)] == [whole[len(whole) - i]["input_ids"] for i in (2, 1)]


def test_the_default_of_eit_is_held_out() -> None:
    made = EITConfig("smollm2").to_train_config()
    assert made.data.kind == "selfsup" and made.held_out == 32
    spec = made.data.model_copy(update={"context_tokens": 400, "families": {"onward": 1.0}})
    train, judged = split_data(spec, None, made.held_out, made.seed, bpe_tokenizer())
    read = "\n".join(document.text for document in train.generator.corpus.documents)
    aside = "\n".join(document.text for document in judged.generator.corpus.documents)
    assert len(judged) == 32 and len(aside) > 20_000
    assert all(line not in read for line in aside.split("\n") if len(line) > 40)


def test_what_can_not_be_held_out_says_why(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.jsonl", 1000, n_words=200)
    for spec, held_out, message in (
        (
            selfsup(path),
            4,
            "held_out sets text aside .* 1920 characters .* there are 1[0-9]+; give eval_data",
        ),
        (selfsup(path, streaming=True), 4, "which a stream can't; give eval_data"),
        ({"kind": "text", "path": str(path), "seq_len": 64}, 90, "held_out 90 leaves nothing"),
        (
            {"mix": [selfsup(path), {"kind": "text", "path": str(path)}]},
            2,
            "text of '.*a.jsonl' aside, which two parts of the mix read; give eval_data",
        ),
        ({"mix": [selfsup(path)], "n_samples": 3}, 3, "held_out 3 leaves nothing of the data's 3 samples"),
        ({"mix": [selfsup(path)]}, 3, r"mix\[0\]: held_out sets text aside"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            split(tmp_path, spec, held_out)
        assert "\n" not in str(caught.value)


def test_where_text_is_cut() -> None:
    sentences = [f"Sentence number {i} is here." for i in range(400)]
    book = " ".join(sentences)
    read, aside = set_aside([book], 16)
    assert len(aside[0]) == pytest.approx(len(book) / 10, rel=0.03) and aside[0].startswith("Sentence")
    assert "".join(read + aside) == book
    read, aside = set_aside(["x" * 900, "y" * 300, "z" * 40], 10)
    assert (read, aside) == (["x" * 900, "y" * 180], ["y" * 120, "z" * 40])
    assert set_aside(["a" * 500, "b" * 160], 10) == (["a" * 500], ["b" * 160])


def test_shares_are_whole_and_add_up() -> None:
    assert shares(8, [3, 1]) == [6, 2]
    assert shares(1, [0.2, 0.5, 0.3]) == [0, 1, 0]
    rng = random.Random(0)
    for _ in range(200):
        weights = [rng.random() + 1e-3 for _ in range(rng.randint(1, 6))]
        total = rng.randint(0, 40)
        found = shares(total, weights)
        assert sum(found) == total
        assert all(abs(one - total * w / sum(weights)) < 1 for one, w in zip(found, weights, strict=True))
