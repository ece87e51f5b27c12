"""Texts and token ids to a sample: context, question, answer, laid out as the evaluation lays out its prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparsekv.benchmarks.chat import next_turn, split_template
from sparsekv.errors import ConfigError

IGNORED = -100
"""The label of a token that no loss is taken of."""

Sample = dict[str, Any]
"""input_ids, labels: lists of the same length; boundary: first column after the context, 0 if there is none;
sample_index."""


@dataclass(frozen=True)
class Turn:
    """A question, the start of the answer that is given, and the rest of it, which is learned.

    `values` are what a right answer must hold, for tests and for metrics.
    """

    question: str
    answer_prefix: str
    answer: str
    values: tuple[str, ...] = ()


class Layout:
    """How a tokenizer's samples look.

        context_ids                 question + template end + answer prefix    answer  eos
        ignored                     question and prefix: `loss_on`             learned
                                    ^ boundary

    Further questions follow the eos after the template's turn.

    Parameters
    ----------
    tokenizer : with an eos token, so that answers end; its bos token, if it has one, starts plain text (as the
        evaluation reads plain text)
    loss_on : "question_and_answer", or "answer" alone
    """

    def __init__(self, tokenizer: Any, loss_on: str = "question_and_answer") -> None:
        if tokenizer.eos_token_id is None:
            raise ConfigError("the tokenizer has no eos token, so a trained answer would never end; set one")
        self.tokenizer = tokenizer
        self.learn_question = loss_on == "question_and_answer"
        self.eos = int(tokenizer.eos_token_id)
        self.bos = [int(tokenizer.bos_token_id)] if tokenizer.bos_token else []
        probe = "x"
        before, self.suffix = split_template(tokenizer, probe)
        self.head = before[: -len(probe)]
        self.turn = next_turn(tokenizer).removeprefix(tokenizer.eos_token)

    def ids(self, text: str) -> list[int]:
        """Tokens of a text, none added."""
        if not text:
            return []
        encoded = self.tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return list(encoded["input_ids"])

    def many_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of each of several texts."""
        if not texts:
            return []
        encoded = self.tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        return [list(ids) for ids in encoded["input_ids"]]

    def context(self, pieces: Sequence[str | list[int]]) -> list[int]:
        """Tokens of a context, with the start of the template. Texts that meet are tokenised as one."""
        found: list[int] = []
        text = self.head
        for piece in pieces:
            if isinstance(piece, str):
                text += piece
            else:
                found += self.ids(text) + piece
                text = ""
        return found + self.ids(text)

    def sample(self, context_ids: list[int], turns: Sequence[Turn], index: int) -> Sample:
        """A sample of what was asked about a context."""
        input_ids = list(context_ids)
        labels = [IGNORED] * len(context_ids)
        lead = ""
        for turn in turns:
            asked = self.ids(lead + turn.question + self.suffix + turn.answer_prefix)
            answer = [*self.ids(turn.answer), self.eos]
            input_ids += asked + answer
            labels += (asked if self.learn_question else [IGNORED] * len(asked)) + answer
            lead = self.turn
        return {
            "input_ids": input_ids,
            "labels": labels,
            "boundary": len(context_ids),
            "sample_index": index,
        }

    def text_sample(self, context_ids: list[int], next_ids: list[int], index: int) -> Sample:
        """A sample of plain text, outside the template: how does it go on?"""
        context_ids = self.bos + context_ids
        return {
            "input_ids": context_ids + next_ids,
            "labels": [IGNORED] * len(context_ids) + next_ids,
            "boundary": len(context_ids),
            "sample_index": index,
        }
