"""The part of a configuration that names a benchmark and says how large it is. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    field_validator,
    model_validator,
)

from sparsekv.errors import ConfigError


def _as_list(value: Any) -> Any:
    """One value where a list is expected means a list of one."""
    return [value] if isinstance(value, (str, int, float)) and not isinstance(value, bool) else value


class BenchmarkConfig(BaseModel):
    """One benchmark of an evaluation. A mistake raises pydantic's ValidationError, with one line per field.

    Attributes:
        name: a registered benchmark: ruler, needle, perplexity, local (`sparsekv ls tasks` lists them).
        tasks: which of its tasks; None means all of them.
        context_length: lengths in tokens. For ruler and needle the whole prompt plus the answer's token limit
            (RULER's max_seq_length), for perplexity the context alone. Unused by local.
        rows: examples per task and length, at least 1. None means 50 where rows are generated, all of them
            where they are read from a file.
        haystack: the text that needles hide in and perplexity reads: "book_eval", "book_train", "noise"
            (RULER's repeated sentences) or the path of a UTF-8 .txt file.
        squad: questions of ruler's qa_1: "builtin" (a part of XQuAD) or the path of a SQuAD-format .json
            file.
        path: local only: a .jsonl or .parquet file, or the id of a data set on the Hub.
        split: local only: the split of a data set on the Hub.
        subset: local only: the configuration name of a data set on the Hub, e.g. "4096".
        metric: local only: how answers are scored, a name of `benchmarks.scoring.METRICS`.
        depths: needle only: depths of the needle in percent of the haystack, 0 (start) to 100 (end).
        continuation_tokens: perplexity only: length in tokens of the text that is scored.
        max_new_tokens: replaces the tasks' own limits of the answer (RULER's are 128, 30, 120, 50 and 32, and
            scores compare only with those). The prompt grows by what the answer no longer needs.
        template_tokens: tokens to leave free for a chat template around the prompt (RULER's
            model_template_token).
        truncate: whether the runner may cut the end off a context longer than the model allows.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    tasks: Annotated[list[str] | None, BeforeValidator(_as_list)] = None
    context_length: Annotated[list[StrictInt], BeforeValidator(_as_list)] = Field(default=[4096])
    rows: StrictInt | None = None
    haystack: str = "book_eval"
    squad: str = "builtin"
    path: str | None = None
    split: str = "test"
    subset: str | None = None
    metric: str = "string_match_all"
    depths: Annotated[list[StrictFloat], BeforeValidator(_as_list)] = Field(
        default=[0.0, 25.0, 50.0, 75.0, 100.0]
    )
    continuation_tokens: StrictInt = 256
    max_new_tokens: StrictInt | None = None
    template_tokens: StrictInt = 0
    truncate: StrictBool = False

    @field_validator("tasks", "context_length", "depths")
    @classmethod
    def _some_and_no_repeats(cls, value: list[Any] | None) -> list[Any] | None:
        if value is not None and not value:
            raise ConfigError("the list is empty; give at least one value, or leave the key out")
        if value is not None and len(set(value)) != len(value):
            raise ConfigError(f"a value is given twice in {value}")
        return value

    @field_validator("context_length")
    @classmethod
    def _positive_lengths(cls, value: list[int]) -> list[int]:
        if min(value) < 1:
            raise ConfigError(f"context_length is {min(value)}; lengths are in tokens, at least 1")
        return value

    @field_validator("depths")
    @classmethod
    def _depths_in_percent(cls, value: list[float]) -> list[float]:
        outside = [depth for depth in value if not 0 <= depth <= 100]
        if outside:
            raise ConfigError(f"depth {outside[0]:g} is outside 0 to 100 (percent of the haystack)")
        return value

    @field_validator("rows", "continuation_tokens", "max_new_tokens")
    @classmethod
    def _at_least_one(cls, value: int | None) -> int | None:
        if value is not None and value < 1:
            raise ConfigError(f"must be at least 1, not {value}")
        return value

    @field_validator("template_tokens")
    @classmethod
    def _not_negative(cls, value: int) -> int:
        if value < 0:
            raise ConfigError(f"must be 0 or more tokens, not {value}")
        return value

    @model_validator(mode="after")
    def _benchmark_accepts(self) -> BenchmarkConfig:
        """Ask the benchmark itself, so that a wrong task is found before any weight is loaded."""
        from sparsekv.benchmarks import BENCHMARKS

        BENCHMARKS.get(self.name).check(self)
        return self
