"""What a config file may say: the pydantic schemas, and errors worded for the person who wrote the file.

Everything that can be checked without a model is checked here. Imports no torch.
"""

from __future__ import annotations

import math
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    ValidationError,
    model_validator,
)

from sparsekv.benchmarks.spec import BenchmarkConfig
from sparsekv.config_files import load_settings
from sparsekv.errors import ConfigError, nearest, unknown
from sparsekv.policies.budget import Scope

Phase = Literal["prefill", "decode", "both"]
DType = Literal["auto", "float32", "bfloat16", "float16"]


def _check_ratio(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value  # pydantic words the type error
    if not (math.isfinite(value) and 0 <= value < 1):
        raise ValueError(f"a compression_ratio must be in [0, 1) (the fraction removed), got {value}")
    return float(value)


Ratio = Annotated[StrictFloat, BeforeValidator(_check_ratio)]
Tokens = Annotated[StrictInt, Field(ge=1)]


class Strict(BaseModel):
    """A schema in which an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def _check_passive(value: Any) -> Any:
    if isinstance(value, str) and value != "cpu" and not re.fullmatch("disk:.+", value):
        raise unknown("passive tier", value, ("cpu", "disk:<folder>"))
    return value


class MethodConfig(Strict):
    """One method: a name of `sparsekv ls methods` or `wrapper(inner)`, with its own parameters.

    Parameters
    ----------
    name : the method
    args : the parameters of its policy, for example {n_sink: 8}
    label : what tables call it; by default the name and the args
    compression_ratios, budget_tokens : the budgets for this method instead of the run's. Empty lists: none,
        the method's own sizes decide.
    budget_scope : over what this method's count is fixed, instead of the run's: "head", "layer" or "model"
    passive : "cpu" or "disk:<folder>": what the method evicts goes to a second tier, and may come back
    recall_tokens, page_size : of the second tier, see `TieredCache`; by default recalled entries move back, in pages
        of 16
    """

    name: str
    args: dict[str, Any] = {}
    label: str | None = None
    compression_ratios: list[Ratio] | None = None
    budget_tokens: list[Tokens] | None = None
    budget_scope: Scope | None = None
    passive: Annotated[str, BeforeValidator(_check_passive)] | None = None
    recall_tokens: StrictInt | None = Field(default=None, ge=0)
    page_size: StrictInt | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _check_tier(self) -> MethodConfig:
        for key in ("recall_tokens", "page_size"):
            if self.passive is None and getattr(self, key) is not None:
                own = f" (the method's own {key} goes into args)" if key == "page_size" else ""
                raise ValueError(
                    f"{key}={getattr(self, key)} needs a second tier: give passive, cpu or disk:<folder>{own}"
                )
        return self


def _method(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _check_variant_name(value: Any) -> Any:
    if isinstance(value, str) and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", value):
        raise ValueError(f"a variant's name is a folder's: letters, digits, _ and -, got {value!r}")
    return value


class VariantConfig(Strict):
    """One of several models that are asked the same; what it leaves out is the run's.

    Parameters
    ----------
    name : what tables call it, and its sub-folder of output_dir
    model, adapter : as in `EvalConfig`; `adapter: null` takes the run's adapter off
    methods, compression_ratios, budget_tokens, budget_scope : as in `EvalConfig`. Ratios or token budgets replace the
        run's ratios and token budgets.
    """

    name: Annotated[str, BeforeValidator(_check_variant_name)]
    model: str | None = None
    adapter: str | None = None
    methods: list[Annotated[MethodConfig, BeforeValidator(_method)]] | None = Field(
        default=None, min_length=1
    )
    compression_ratios: list[Ratio] | None = None
    budget_tokens: list[Tokens] | None = None
    budget_scope: Scope | None = None

    def changes(self) -> dict[str, Any]:
        """The keys of `EvalConfig` that this variant replaces, and their values."""
        given = {
            key: value
            for key in ("model", "methods", "budget_scope")
            if (value := getattr(self, key)) is not None
        }
        if "adapter" in self.model_fields_set:
            given["adapter"] = self.adapter
        if self.compression_ratios is not None or self.budget_tokens is not None:
            given["compression_ratios"] = self.compression_ratios or []
            given["budget_tokens"] = self.budget_tokens or []
        return given


class CompareConfig(Strict):
    """How the variants of a run are compared: each setting with one baseline, rows paired.

    Parameters
    ----------
    baseline : name of the variant that the others are compared with; the first one by default
    method : its method (or label) that all are compared with; it must have one budget
    min_baseline_score : tasks on which the baseline scores less (0 to 100) are left out of the average
    resamples : of the bootstrap
    confidence : of the intervals, in (0, 1)
    seed : of the bootstrap; the run's by default
    """

    baseline: str | None = None
    method: str = "full"
    min_baseline_score: StrictFloat = Field(default=0.0, ge=0, le=100)
    resamples: StrictInt = Field(default=2000, ge=100)
    confidence: StrictFloat = Field(default=0.95, gt=0, lt=1)
    seed: StrictInt | None = Field(default=None, ge=0)


class EvalConfig(Strict):
    """`sparsekv eval`: benchmarks × methods × budgets on one model, or on several variants of it.

    Parameters
    ----------
    model : a Hub id, a local folder, or a name of `sparsekv ls models`
    adapter : folder of a LoRA adapter
    dtype, device, device_map, attn_implementation, trust_remote_code : how the model is loaded (load_model)
    seed : of the benchmarks' generators and of the random methods
    benchmarks : what is asked; `sparsekv ls tasks`
    methods : names, or {name, args, label, …}
    compression_ratios : fractions of the context's entries to REMOVE, each in [0, 1)
    budget_tokens : entries to keep per kv head, instead of or beside the ratios. With neither, the methods'
        own sizes decide.
    budget_scope : over what the count is fixed: "head", "layer" or "model"; a method may say otherwise
    phase : evict after the "prefill", while it "decode"s, or "both"
    query_aware : the question is part of the compressed context
    chunk : tokens per chunk: the context is read in chunks and evicted between them, so that it may be longer
        than the model's window. Off by default.
    truncate : cut the end of a context that is longer than the model allows, as kvpress does; else an error
    limit : at most this many rows per task, of every benchmark
    max_new_tokens : instead of each task's own limit
    batch_cells : decode the cells of one example as one batch; two-tier cells, with those of other examples
    batch_rows : and so many examples of a task side by side, where memory allows; they are written down together
    cost_rows : rows per cell for the separate cost pass; 0 leaves the times null
    cost_tasks : measure them on the first so many tasks of each context length only (times hardly depend on the task);
        None: on all
    cost_new_tokens : tokens each of those rows decodes (no token ends an answer, so that all decode as many)
    record_selections : examples per cell whose kept entries are written to output_dir/selections
    output_dir : where results go; the same command again resumes
    progress : show a progress bar
    variants : models that are asked the same, one after the other; each may replace model, adapter, methods and budgets
    compare : how variants are compared
    """

    model: str
    adapter: str | None = None
    dtype: DType = "auto"
    device: str = "auto"
    device_map: str | None = None
    attn_implementation: str | None = None
    trust_remote_code: StrictBool = False
    seed: StrictInt = 0
    benchmarks: list[BenchmarkConfig] = Field(min_length=1)
    methods: list[Annotated[MethodConfig, BeforeValidator(_method)]] = Field(min_length=1)
    compression_ratios: list[Ratio] = []
    budget_tokens: list[Tokens] = []
    budget_scope: Scope = "head"
    phase: Phase = "prefill"
    query_aware: StrictBool = False
    chunk: StrictInt | None = Field(default=None, ge=1)
    truncate: StrictBool = False
    limit: StrictInt | None = Field(default=None, ge=1)
    max_new_tokens: StrictInt | None = Field(default=None, ge=1)
    batch_cells: StrictBool = True
    batch_rows: StrictInt = Field(default=4, ge=1)
    cost_rows: StrictInt = Field(default=0, ge=0)
    cost_tasks: StrictInt | None = Field(default=None, ge=1)
    cost_new_tokens: StrictInt = Field(default=16, ge=2)
    record_selections: StrictInt = Field(default=0, ge=0)
    output_dir: str = "results/eval"
    progress: StrictBool = True
    variants: list[VariantConfig] = []
    compare: CompareConfig | None = None

    @model_validator(mode="after")
    def _check_combinations(self) -> EvalConfig:
        if self.device_map is not None and self.device != "auto":
            raise ValueError(
                f"device '{self.device}' and device_map '{self.device_map}' are both given; give one"
            )
        for methods in (self.methods, *(variant.methods or [] for variant in self.variants)):
            labels = [m.label for m in methods if m.label is not None]
            for label in labels:
                if labels.count(label) > 1:
                    raise ValueError(f"label '{label}' is given to two methods")
        return self

    @model_validator(mode="after")
    def _check_variants(self) -> EvalConfig:
        names = [variant.name for variant in self.variants]
        folders = [name.casefold() for name in names]  # some file systems can't tell A from a
        for name in names:
            if folders.count(name.casefold()) > 1:
                raise ValueError(f"variants: the name '{name}' is given twice")
        if self.compare is not None and not names:
            raise ValueError("compare is given without variants; list the models to compare in variants")
        if self.compare is not None and self.compare.baseline not in (None, *names):
            raise unknown("compare.baseline", self.compare.baseline, names)
        return self

    def of_variant(self, variant: VariantConfig) -> EvalConfig:
        """The config of one variant alone: its keys instead of the run's, in its own sub-folder."""
        alone: dict[str, Any] = {
            "variants": [],
            "compare": None,
            "output_dir": str(Path(self.output_dir) / variant.name),
        }
        return self.model_copy(update={**variant.changes(), **alone})


def load_eval_config(path: str | Path | None, overrides: Sequence[str] = ()) -> EvalConfig:
    """A validated config from a YAML file with `key=value` overrides on top.

    Raises
    ------
    ConfigError
        With one line that names the key, the value and what is allowed.
    """
    return parse_config(
        EvalConfig, load_settings(path, overrides), source=None if path is None else str(path)
    )


ModelT = typing.TypeVar("ModelT", bound=BaseModel)


def parse_config(schema: type[ModelT], settings: dict[str, Any], source: str | None = None) -> ModelT:
    """`settings` as a `schema`; pydantic's report becomes one line that names the first mistake."""
    try:
        return schema.model_validate(settings)
    except ValidationError as error:
        raise _worded(schema, error, source) from None


def _worded(schema: type[BaseModel], error: ValidationError, source: str | None) -> ConfigError:
    # An unknown key first: it's usually the reason for a "missing" one.
    problems = sorted(error.errors(), key=lambda p: p["type"] != "extra_forbidden")
    problem = problems[0]
    where = f"{source}: " if source else ""
    loc = tuple(part for part in problem["loc"] if not str(part).startswith("function-"))
    field = _path(loc)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if problem["type"] == "extra_forbidden":
        allowed = _keys_at(schema, loc[:-1])
        guess = nearest(loc[-1], allowed)
        if guess is not None:
            inside = f" in {_path(loc[:-1])}" if len(loc) > 1 else ""
            return ConfigError(f"{where}unknown key '{loc[-1]}'{inside} (did you mean '{guess}'?){more}")
        return ConfigError(f"{where}{unknown('key', field, allowed)}{more}")
    if problem["type"] == "missing":
        return ConfigError(f"{where}key '{field}' is missing{more}")
    message = problem["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    value = problem.get("input")
    said = isinstance(value, (dict, list, BaseModel)) or "got" in message
    shown = "" if said else f", got {value!r}"
    lead = f"{field}: " if field and not message.startswith(field) else ""
    return ConfigError(f"{where}{lead}{message}{shown}{more}")


def _path(loc: Sequence[Any]) -> str:
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else (f".{part}" if text else str(part))
    return text


def _keys_at(schema: type[BaseModel], loc: Sequence[Any]) -> list[str]:
    """The keys that are allowed at a place of the config."""
    current: Any = schema
    for part in loc:
        if isinstance(part, int):
            continue  # an item of a list has the type that the list's annotation names
        fields = current.model_fields
        if part in fields:
            current = _schema_in(fields[part].annotation) or current
    return list(current.model_fields)


def _schema_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in typing.get_args(annotation):
        found = _schema_in(inner)
        if found is not None:
            return found
    return None
