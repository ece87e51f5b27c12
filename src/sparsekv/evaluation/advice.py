"""What can be done about a mistake, in the words of the place where it was made: a config's keys, or options."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Advice:
    """Parts of error messages.

    Parameters
    ----------
    example, task : how messages call an example or a task; "{}" is its name
    too_long : against a context that is longer than the model allows
    full_in_chunks : against the full cache of such a context
    no_chunk : against reading in chunks
    budget : how a budget is given
    shorter_window : against a context that is shorter than the window by which a method scores
    """

    example: str
    task: str
    too_long: str
    full_in_chunks: str
    no_chunk: str
    budget: str
    shorter_window: str


CONFIG = Advice(
    example="example {}",
    task="task {}",
    too_long="set truncate: true to cut the context, or chunk to read it in pieces",
    full_in_chunks="remove it, or set truncate: true without chunk",
    no_chunk="remove chunk",
    budget="compression_ratios or budget_tokens",
    shorter_window="give another method, or smaller sizes in its args",
)
OPTIONS = Advice(
    example="--file",
    task="--file",
    too_long="add --truncate to cut the text, or --chunk to read it in pieces",
    full_in_chunks="give another --method, or --truncate without --chunk",
    no_chunk="leave out --chunk",
    budget="--ratio or --budget-tokens",
    shorter_window="give another --method, such as h2o or knorm",
)
