"""Files, folders, the packaged book and data sets of the Hub, whole and streamed."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from sparsekv.errors import ConfigError
from sparsekv.training.data import make_dataset
from sparsekv.training.data_sources import Refusals, documents
from sparsekv.training.data_spec import DataConfig


def found(**settings: Any) -> list[str]:
    return list(documents(DataConfig(kind="text", **settings), Refusals()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("book b")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"body": "x"}\nnot json\n{"text": "two"}\n')
    (tmp_path / "sub" / "c.txt").write_text("book c")
    (tmp_path / "ignored.csv").write_text("x")
    return tmp_path


def test_a_folder_is_read_in_order(folder: Path) -> None:
    assert found(path=str(folder)) == ["one", "two", "book b", "book c"]
    assert found(path=[str(folder / "b.txt"), str(folder / "a.jsonl")]) == ["book b", "one", "two"]
    assert found(path=str(folder), max_documents=3) == ["one", "two", "book b"]
    assert found(path=str(folder / "a.jsonl"), text_field="body") == ["x"]


def test_wikitext_is_read_as_it_was_written(tmp_path: Path) -> None:
    spaced = (
        " = = Career = = \n \n A two @-@ part film , made for $ 1 @,@ 200 @.@ 50 ( all told ) . \n"
        ' He said , " I ca n\'t go , it \'s the boys \' turn ! " in " The End " . \n'
        " They 'd seen the songs ' Foo ' and the sisters ' , at 3 : 04 in 1861 – 65 , for £ 9 . \n"
    )
    written = (
        "Career\n\nA two-part film, made for $1,200.50 (all told).\n"
        'He said, "I can\'t go, it\'s the boys\' turn!" in "The End".\n'
        "They'd seen the songs ' Foo ' and the sisters', at 3:04 in 1861–65, for £9.\n"
    )
    rows = [
        " = Valkyria = \n",
        ' As " Connor Price " . ',
        "A film, 3 to - 4, which nobody spaced apart. It's so!\n",
    ]
    (tmp_path / "a.txt").write_text(spaced)
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    assert found(path=str(tmp_path), detokenize="wikitext") == [
        written,
        "Valkyria\n",
        'As "Connor Price".',
        rows[2],
    ]
    assert found(path=str(tmp_path)) == [spaced, *rows]


def test_the_packaged_book_is_the_half_no_benchmark_reads() -> None:
    from sparsekv.benchmarks.data import packaged

    assert found(path="book_train") == [packaged("book_train.txt")]
    assert found(path="book_train") != [packaged("book_eval.txt")]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.txt", "no such file: nowhere.txt"),
        ("book_trian", r"no such file: book_trian \(did you mean 'book_train'\?\); allowed: 'book_train'"),
        ("a/b/c", "no such file"),
        ("{}/ignored.csv", "ends in '.csv'; allowed for kind 'text': .txt, .jsonl"),
        ("{}/empty", "holds no file that ends in .txt or .jsonl"),
        ("{}/binary.jsonl", "not UTF-8 text"),
    ],
)
def test_what_is_not_there_is_named(folder: Path, path: str, message: str) -> None:
    (folder / "empty").mkdir()
    (folder / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=message):
        found(path=path.format(folder))


def test_no_usable_document_says_why(folder: Path, toy_tokenizer: Any) -> None:
    config = DataConfig(kind="text", path=str(folder / "a.jsonl"), text_field="body", min_tokens=50)
    with pytest.raises(ConfigError) as caught:
        make_dataset(config, toy_tokenizer)
    message = str(caught.value)
    assert "2 x no field 'body' (the row has: text)" in message
    assert "1 x the line is not JSON" in message and "1 x shorter than min_tokens, 50" in message
    with pytest.raises(ConfigError, match="'book_train' is a text and has no questions"):
        make_dataset(DataConfig(kind="qa"), toy_tokenizer)


def test_half_a_surrogate_pair_is_left_out(tmp_path: Path, toy_tokenizer: Any) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "a \\ud83d b"}\n')
    assert found(path=str(path)) == ["one"]
    row = {"context": "a", "question": "b", "answer": "c", "answer_prefix": ""}
    for field in row:
        path.write_text(json.dumps(row | {field: "x \ud800"}))
        with pytest.raises(ConfigError, match=f"1 x field '{field}' is not (valid )?text"):
            make_dataset(DataConfig(kind="qa", path=str(path)), toy_tokenizer)


@pytest.mark.parametrize("kind", ["text", "qa", "selfsup"])
def test_rows_that_are_left_out_are_told_once(
    tmp_path: Path, toy_tokenizer: Any, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    text = "The old tower stood by the sea. Nobody had climbed it for a hundred years, but one did. " * 20
    row = {"text": text, "context": "The tower is old.", "question": "What is old?", "answer": "The tower."}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + '\n{"text": "abc"\n[1]\n{"te\n')
    config = DataConfig(kind=kind, path=str(path), seq_len=512, context_tokens=128)  # type: ignore[arg-type]
    make_dataset(config, toy_tokenizer)
    (record,) = caplog.records
    assert record.getMessage() == (
        f"{path}: 3 rows are left out: 2 x the line is not JSON (first: {path} line 2); "
        f"1 x the row is not an object with fields (first: {path} line 3)"
    )
    caplog.clear()
    path.write_text(json.dumps(row))
    make_dataset(config, toy_tokenizer)
    assert not caplog.records


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A Hub with one data set, owner/endless, that never ends; the list holds what was asked for."""
    import datasets

    asked: list[Any] = []

    def load_dataset(path: str, subset: str | None, *, split: str, streaming: bool) -> Any:
        asked.append((path, subset, split, streaming))
        if path != "owner/endless":
            raise FileNotFoundError(f"Dataset '{path}' doesn't exist\non the Hub")
        return ({"text": f"document {i}: " + "tower and sea. " * 20} for i in itertools.count())

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize("kind", ["text", "selfsup"])
def test_a_hub_data_set_streams(hub: list[Any], toy_tokenizer: Any, kind: str) -> None:
    settings: dict[str, Any] = {"subset": "s", "split": "val", "seq_len": 128, "context_tokens": 256}
    config = DataConfig(kind=kind, path="owner/endless", streaming=True, **settings)
    data = make_dataset(config, toy_tokenizer)
    first = list(itertools.islice(data, 7))
    assert hub == [("owner/endless", "s", "val", True)]
    assert [sample["sample_index"] for sample in first] == list(range(7))
    assert first == list(itertools.islice(data, 7))
    limited = make_dataset(config.model_copy(update={"n_samples": 5}), toy_tokenizer)
    assert list(limited) == first[:5]
    with pytest.raises(ConfigError, match=r"cannot read data set 'owner/other'.*doesn't exist$"):
        next(iter(make_dataset(config.model_copy(update={"path": ["owner/other"]}), toy_tokenizer)))


def test_streamed_and_whole_text_are_the_same(hub: list[Any], toy_tokenizer: Any) -> None:
    config = DataConfig(kind="text", path="owner/endless", seq_len=128, max_documents=4)
    whole = make_dataset(config, toy_tokenizer)
    streamed = make_dataset(config.model_copy(update={"streaming": True}), toy_tokenizer)
    assert list(streamed) == [whole[i] for i in range(len(whole))]
    assert len(whole) > 8


def test_workers_share_a_stream_out(folder: Path, toy_tokenizer: Any) -> None:
    from torch.utils.data import DataLoader

    lines = [json.dumps({"text": chr(97 + i) * 40}) for i in range(9)]
    (folder / "many.jsonl").write_text("\n".join(lines))
    config = DataConfig(
        kind="text", path=str(folder / "many.jsonl"), min_tokens=8, seq_len=64, streaming=True
    )
    data = make_dataset(config, toy_tokenizer)
    loaded = list(DataLoader(data, batch_size=None, num_workers=2))
    assert sorted(sample["sample_index"] for sample in loaded) == list(range(9))


def test_a_stream_without_a_usable_row_says_why(folder: Path, toy_tokenizer: Any) -> None:
    config = DataConfig(kind="text", path=str(folder / "a.jsonl"), streaming=True)
    with pytest.raises(ConfigError, match="2 x shorter than min_tokens, 64"):
        list(make_dataset(config, toy_tokenizer))
