"""The part of a training configuration that says what is read. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from sparsekv.benchmarks.data import BOOKS
from sparsekv.config import Strict
from sparsekv.errors import unknown

TRAIN_BOOK = BOOKS[1]
"""The packaged half of a book that training may read; evaluation reads the other one."""

FAMILIES: dict[str, float] = {
    "onward": 0.15,
    "continue": 0.12,
    "repeat": 0.05,
    "recall": 0.17,
    "several": 0.11,
    "values": 0.09,
    "chain": 0.10,
    "records": 0.10,
    "common": 0.05,
    "duplicates": 0.02,
    "cloze": 0.03,
    "name": 0.01,
    "detail": 0.0,
}
"""Families of self-supervised questions (`training.selfsup`) and how often each is drawn by default.

`detail` is drawn where a configuration asks for it: what was made by default before it came stays as it was.
"""

DEFAULT_SAMPLES = 10_000
"""Length of a self-supervised data set where the configuration gives no `n_samples`."""

LEAST_SEQUENCE = 32
LEAST_CONTEXT = 64


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class DataConfig(Strict):
    """What a model is trained on.

    Parameters
    ----------
    kind : "text", documents in pieces of `seq_len`; "qa", rows of context, question and answer; "selfsup",
        questions made from documents; "mix", several of these
    path : one or several of: a .txt, .jsonl or (rows only) .parquet file, a folder of .txt and .jsonl files,
        "book_train" (the packaged half of a book that no benchmark reads), the id of a data set on the Hub
    text_field : the column of a document in .jsonl rows and Hub data sets
    detokenize : "wikitext": documents that are spaced as WikiText is ("a two @-@ part film , made by") are read as
        they were written. Only for "text" and "selfsup"
    split, subset : of a data set on the Hub
    streaming : read a Hub data set while training, never all of it; only by itself, not in a mix
    max_documents : read at most so many documents or rows
    seq_len : "text": tokens of a sequence; "qa": most tokens of context, question and answer, longer rows are
        left out. At least 32.
    min_tokens : "text": documents shorter than this are left out, since nothing in them could be evicted
    context_tokens : "selfsup": tokens of the context, about, the template's included. At least 64.
    min_context_tokens : draw each context's length from here to `context_tokens`; None: all are as long
    n_samples : "selfsup": how many there are (default 10000); "mix": how many are drawn (default: the sum of
        its parts); "text" and "qa": use only the first so many
    families : "selfsup": weights of the kinds of question, e.g. {recall: 2, cloze: 1}; others are not drawn.
        Empty: the default weights.
    questions : "selfsup": questions asked one after the other about one context, at least 1
    loss_on : "question_and_answer", or "answer" alone
    weight : share of this part in a mix, relative to the others'
    mix : "mix": the parts
    """

    kind: Literal["text", "qa", "selfsup", "mix"] = "selfsup"
    path: Annotated[list[str], BeforeValidator(_as_list)] = Field(default=[TRAIN_BOOK])
    text_field: str = "text"
    detokenize: Literal["wikitext"] | None = None
    split: str = "train"
    subset: str | None = None
    streaming: bool = False
    max_documents: int | None = Field(default=None, ge=1)
    seq_len: int = Field(default=1024, ge=LEAST_SEQUENCE)
    min_tokens: int = Field(default=64, ge=2)
    context_tokens: int = Field(default=1024, ge=LEAST_CONTEXT)
    min_context_tokens: int | None = Field(default=None, ge=LEAST_CONTEXT)
    n_samples: int | None = Field(default=None, ge=1)
    families: dict[str, float] = Field(default={})
    questions: int = Field(default=1, ge=1)
    loss_on: Literal["question_and_answer", "answer"] = "question_and_answer"
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    mix: list[DataConfig] = Field(default=[])

    @model_validator(mode="before")
    @classmethod
    def _parts_make_a_mix(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("mix") and "kind" not in values:
            return {**values, "kind": "mix"}
        return values

    @field_validator("path")
    @classmethod
    def _not_what_is_evaluated(cls, value: list[str]) -> list[str]:
        if not value:
            raise ValueError("the list is empty; give at least one file, folder or data set")
        if BOOKS[0] in value:
            raise ValueError(f"'{BOOKS[0]}' is what the benchmarks read; train on '{TRAIN_BOOK}'")
        return value

    @field_validator("families")
    @classmethod
    def _known_families(cls, value: dict[str, float]) -> dict[str, float]:
        for name, weight in value.items():
            if name not in FAMILIES:
                raise unknown("family", name, FAMILIES)
            if not 0 <= weight < float("inf"):
                raise ValueError(f"the weight of '{name}' must be 0 or more, got {weight}")
        if value and not sum(value.values()):
            raise ValueError("all weights are 0; give at least one that is more")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> DataConfig:
        if (self.kind == "mix") != bool(self.mix):
            raise ValueError(
                f"kind is '{self.kind}' and mix has {len(self.mix)} parts; parts belong to kind 'mix' alone"
            )
        if self.detokenize and self.kind not in ("text", "selfsup"):
            raise ValueError(
                f"detokenize is for kind 'text' or 'selfsup' (also as parts of a mix), not '{self.kind}'"
            )
        least, most = self.min_context_tokens, self.context_tokens
        if least is not None and least > most:
            raise ValueError(f"min_context_tokens must be at most context_tokens {most}, got {least}")
        for part in self.mix:
            if part.streaming:
                raise ValueError("streaming is not possible in a mix; give max_documents instead")
        return self

    @property
    def length_field(self) -> str:
        """The field that says how long a sequence is; a self-supervised one's context."""
        return "context_tokens" if self.kind == "selfsup" else "seq_len"

    @property
    def length(self) -> int:
        """Tokens of a sequence, or of its context, as `length_field` says; of a mix see its parts."""
        return int(getattr(self, self.length_field))

    def family_weights(self) -> dict[str, float]:
        """The families that are drawn, with weights above 0."""
        return {name: weight for name, weight in (self.families or FAMILIES).items() if weight > 0}
