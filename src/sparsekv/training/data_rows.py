"""Documents and rows to samples, where nothing is drawn: pieces of text, and questions with their answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sparsekv.benchmarks.chat import split_template
from sparsekv.benchmarks.data import NOT_TEXT, is_text
from sparsekv.training.data_layout import IGNORED, Layout, Sample, Turn
from sparsekv.training.data_sources import Refusals, Row
from sparsekv.training.data_spec import DataConfig
from sparsekv.training.packing import Piece, pieces

NO_BOUNDARY = 0
"""The trainer draws one."""


class TextFormat:
    """How plain text is laid out: the tokenizer's bos token, if it has one, before every sequence (as the
    evaluation reads plain text), and eos at a document's end.

    Parameters
    ----------
    layout : tokenizes
    seq_len : tokens of a sequence, bos included
    min_tokens : a shorter document is refused
    """

    def __init__(self, layout: Layout, seq_len: int, min_tokens: int) -> None:
        self.layout, self.min_tokens = layout, min_tokens
        self._room = seq_len - len(layout.bos)

    def document(self, text: str, refused: Refusals) -> list[int] | None:
        """Tokens of a document with its eos, or None if it is too short."""
        ids = self.layout.ids(text)
        if len(ids) < self.min_tokens:
            refused.add(f"shorter than min_tokens, {self.min_tokens}")
            return None
        return [*ids, self.layout.eos]

    def pieces(self, n_tokens: int) -> list[Piece]:
        """How a document of so many tokens is cut."""
        return pieces(n_tokens, self._room)

    def sample(self, ids: Sequence[int] | np.ndarray, piece: Piece, index: int) -> Sample:
        """A sequence of one document."""
        held = [int(token) for token in ids[piece.start : piece.stop]]
        learned = held[piece.labelled - piece.start :]
        return {
            "input_ids": self.layout.bos + held,
            "labels": [IGNORED] * (len(self.layout.bos) + piece.labelled - piece.start) + learned,
            "boundary": NO_BOUNDARY,
            "sample_index": index,
        }

    def samples(self, texts: Iterator[str], refused: Refusals) -> Iterator[Sample]:
        """Every sequence of documents as they arrive, numbered."""
        index = 0
        for text in texts:
            ids = self.document(text, refused)
            for piece in [] if ids is None else self.pieces(len(ids)):
                yield self.sample(ids or [], piece, index)
                index += 1


def qa_sample(row: Row, layout: Layout, seq_len: int, index: int, refused: Refusals) -> Sample | None:
    """A row of context, question and answer, laid out as the evaluation lays out the same row.

    The answer is a text, a list of equally right ones (the first is learned) or SQuAD's {"text": [...]}. If
    `answer_prefix` is there, the answer continues it. None, and the reason counted, if a field is missing or
    the sample is longer than `seq_len`.
    """
    context, question = row.get("context"), row.get("question")
    answer = _first_answer(row.get("answer", row.get("answers")))
    for field, value in (("context", context), ("question", question), ("answer", answer)):
        if not isinstance(value, str) or not value.strip():
            refused.add(f"field '{field}' is missing, blank or not text (the row has: {', '.join(row)})")
            return None
        if not is_text(value):
            refused.add(f"field '{field}' {NOT_TEXT}")
            return None
    prefix = row.get("answer_prefix") or ""
    if not isinstance(prefix, str) or not is_text(prefix):
        refused.add("field 'answer_prefix' is not text")
        return None
    if prefix and not prefix[-1].isspace() and not str(answer)[0].isspace():
        answer = f" {answer}"
    before, _ = split_template(layout.tokenizer, str(context))
    sample = layout.sample(layout.ids(before), [Turn(str(question), prefix, str(answer))], index)
    if len(sample["input_ids"]) > seq_len:
        refused.add(f"longer than seq_len, {seq_len}")
        return None
    return sample


def _first_answer(value: Any) -> Any:
    if isinstance(value, dict):
        value = value.get("text")
    if isinstance(value, (list, tuple)):
        value = value[0] if value else None
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def qa_samples(
    found: Iterator[Row], layout: Layout, config: DataConfig, refused: Refusals
) -> Iterator[Sample]:
    """Every usable row as it arrives, numbered."""
    index = 0
    for row in found:
        sample = qa_sample(row, layout, config.seq_len, index, refused)
        if sample is not None:
            yield sample
            index += 1
