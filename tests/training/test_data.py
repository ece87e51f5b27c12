"""Samples are laid out as the evaluation lays out its prompts, and do not depend on order or batching."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sample_tokenizer import bpe_tokenizer

from sparsekv.benchmarks.base import Example
from sparsekv.benchmarks.chat import next_turn, split_template
from sparsekv.errors import ConfigError
from sparsekv.evaluation import prompts
from sparsekv.training.collate import Collator
from sparsekv.training.data import MixedDataset, StreamedDataset, make_dataset
from sparsekv.training.data_layout import IGNORED, Layout, Turn
from sparsekv.training.data_spec import DataConfig

ROWS = [
    {"context": "  Snow fell on the tower. ", "question": "What fell?", "answer": ["Snow", "snow"]},
    {
        "context": "The key — “Oak” — is 7421.\n\n",
        "question": "Which key? ",
        "answer_prefix": "The key is",
        "answer": 7421,
    },
    {"context": "A fox.", "question": "Who?", "answers": {"text": ["a fox"], "answer_start": [0]}},
]
NO_BOS = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}{% endfor %}[assistant]"


@pytest.fixture(params=["template", "trimming template", "no template"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    import toy

    made = toy.toy_tokenizer()
    if request.param != "template":
        made.chat_template = NO_BOS if request.param == "trimming template" else None
    return made


def write_rows(folder: Path, rows: list[Any]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def as_example(row: dict[str, Any]) -> Example:
    prefix = row.get("answer_prefix", "")
    return Example(
        "r", "b", "t", row["context"], row["question"], prefix, ("x",), 8, "string_match_all", None
    )


def test_a_row_is_served_and_trained_alike(tokenizer: Any, tmp_path: Path) -> None:
    data = make_dataset(DataConfig(kind="qa", path=write_rows(tmp_path, ROWS)), tokenizer)
    assert len(data) == 3
    for index, (row, answer) in enumerate(zip(ROWS, ("Snow", " 7421", "a fox"), strict=True)):
        sample, prompt = data[index], prompts.assemble(as_example(row), tokenizer)
        context, question = prompt.context_ids[0].tolist(), prompt.question_ids[0].tolist()
        learned = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        assert sample["boundary"] == prompt.context_tokens == len(context)
        assert sample["input_ids"] == context + question + learned
        assert sample["labels"] == [IGNORED] * len(context) + question + learned
        assert sample["sample_index"] == index


def test_loss_on_the_answer_alone(tokenizer: Any, tmp_path: Path) -> None:
    config = DataConfig(kind="qa", path=write_rows(tmp_path, ROWS), loss_on="answer")
    labels = make_dataset(config, tokenizer)[1]["labels"]
    assert tokenizer.decode([label for label in labels if label != IGNORED]) == " 7421" + tokenizer.eos_token


def test_the_template_is_split_in_one_way(tokenizer: Any) -> None:
    for content in ("x", "  two words ", ""):
        assert split_template(tokenizer, content) == prompts.split_template(tokenizer, content)


def test_a_second_question_follows_as_the_template_writes_it(tokenizer: Any) -> None:
    layout = Layout(tokenizer)
    turns = [Turn("Q1?", "", "one"), Turn("Q2?", "It is", " two")]
    sample = layout.sample(layout.context(["Some text."]), turns, 3)
    text = tokenizer.decode(sample["input_ids"])
    if tokenizer.chat_template is None:
        assert text == "<|start|>Some text.Q1?\none<|end|>\n\nQ2?\nIt is two<|end|>"
        return
    said = [("user", "Some text.Q1?"), ("assistant", "one"), ("user", "Q2?")]
    rendered = tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in said],
        tokenize=False,
        add_generation_prompt=True,
    )
    answered = rendered + "It is two<|end|>"
    # a template without an end mark leaves it to the eos that every answer has
    assert text.replace("one<|end|>", "one") == answered.replace("one<|end|>", "one")
    assert next_turn(tokenizer) in rendered


def test_rows_that_cannot_be_used_are_counted(tmp_path: Path, toy_tokenizer: Any) -> None:
    bad = [{"question": "Q"}, {"question": "Q"}, {"context": "c", "question": "Q", "answer": []}, [1]]
    data = make_dataset(DataConfig(kind="qa", path=write_rows(tmp_path, [*bad, ROWS[2]])), toy_tokenizer)
    assert len(data) == 1 and data[0]["sample_index"] == 0
    with pytest.raises(ConfigError) as caught:
        make_dataset(DataConfig(kind="qa", path=write_rows(tmp_path, bad)), toy_tokenizer)
    message = str(caught.value)
    assert "2 x field 'context' is missing" in message and "1 x field 'answer' is missing" in message
    assert "1 x the row is not an object" in message and "\n" not in message
    with pytest.raises(ConfigError, match="3 x longer than seq_len, 32"):
        config = DataConfig(kind="qa", path=write_rows(tmp_path, ROWS), seq_len=32)
        make_dataset(config, toy_tokenizer)


def test_parquet_rows_are_those_of_jsonl(tmp_path: Path, toy_tokenizer: Any) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.Table.from_pylist(ROWS[1:2]), tmp_path / "rows.parquet")
    from_parquet = make_dataset(DataConfig(kind="qa", path=str(tmp_path / "rows.parquet")), toy_tokenizer)
    from_jsonl = make_dataset(DataConfig(kind="qa", path=write_rows(tmp_path, ROWS[1:2])), toy_tokenizer)
    assert from_parquet[0] == from_jsonl[0]


def mixture(tmp_path: Path, **settings: Any) -> DataConfig:
    parts = [
        DataConfig(kind="qa", path=write_rows(tmp_path, ROWS), weight=1),
        DataConfig(context_tokens=160, n_samples=10, weight=3),
    ]
    return DataConfig(kind="mix", mix=parts, **settings)


def test_a_mix_keeps_weights_and_starts_parts_over(tmp_path: Path) -> None:
    data = make_dataset(mixture(tmp_path, n_samples=200), bpe_tokenizer(), seed=5)
    qa = [bpe_tokenizer().decode(sample["input_ids"]) for sample in data if len(sample["input_ids"]) < 60]
    rows = [text for text in qa if "tower" in text or "7421" in text or "A fox." in text]
    assert 30 <= len(rows) <= 70  # a quarter of 200, standard deviation 6
    for first in range(0, 9, 3):  # each round of three holds every row once
        assert len(set(rows[first : first + 3])) == 3
    assert [data[i]["sample_index"] for i in (0, 7, 199)] == [0, 7, 199]
    assert len(make_dataset(mixture(tmp_path), bpe_tokenizer())) == 13


def test_samples_do_not_depend_on_order_or_batching(tmp_path: Path) -> None:
    from torch.utils.data import DataLoader

    config = mixture(tmp_path, n_samples=24)
    data = make_dataset(config, bpe_tokenizer(), seed=1)
    forward = [data[i] for i in range(24)]
    again = make_dataset(config, bpe_tokenizer(), seed=1)
    assert [again[i] for i in reversed(range(24))] == forward[::-1]
    other = make_dataset(config, bpe_tokenizer(), seed=2)
    assert [other[i] for i in range(24)] != forward
    longer = make_dataset(mixture(tmp_path, n_samples=48), bpe_tokenizer(), seed=1)
    assert [longer[i] for i in range(24)] == forward
    collate = Collator(bpe_tokenizer())
    for batch in DataLoader(data, batch_size=5, collate_fn=collate, num_workers=2):
        for row, index in enumerate(batch["sample_index"].tolist()):
            real = batch["attention_mask"][row].bool()
            assert batch["input_ids"][row][real].tolist() == forward[index]["input_ids"]
            start = int((~real).sum())
            assert batch["boundary"][row].item() == forward[index]["boundary"] + start


def test_a_mix_of_streams_is_refused(toy_tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="streaming is not possible in a mix"):
        DataConfig(kind="mix", mix=[DataConfig(streaming=True)])
    assert isinstance(make_dataset(mixture(tmp_path), bpe_tokenizer()), MixedDataset)
    assert isinstance(make_dataset(DataConfig(streaming=True), toy_tokenizer), StreamedDataset)


def test_an_answer_needs_an_end(tmp_path: Path) -> None:
    import toy

    tokenizer = toy.toy_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no eos token"):
        make_dataset(DataConfig(kind="qa", path=write_rows(tmp_path, ROWS)), tokenizer)
