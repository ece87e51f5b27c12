"""Last hidden states of a model and of its full-cache teacher, without their [T, vocabulary] logits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sparsekv import architecture
from sparsekv.errors import ConfigError
from sparsekv.plan import SelectionPlan
from sparsekv.training.linear_loss import Head
from sparsekv.training.objective import Output


def head_of(model: Any) -> Head:
    """A model's output layer.

    Raises
    ------
    ConfigError
        If it is not a plain linear layer (a LoRA on it, for example): its loss is computed from its weight.
    """
    plain = architecture.unwrap(model)
    layer = plain.get_output_embeddings()
    if not isinstance(layer, nn.Linear):
        kind = type(layer).__name__
        raise ConfigError(f"the model's output layer is a {kind}; the loss needs a plain linear layer there")
    if isinstance(layer.weight, DTensor):
        raise ConfigError(
            "FSDP of this accelerate version keeps no whole output layer after a forward; 1.15 does"
        )
    softcap = getattr(architecture.text_config(plain), "final_logit_softcapping", None)
    return Head(layer.weight, layer.bias, softcap)


def forward_inputs(batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """The model's arguments; positions count real tokens, so that padding changes nothing."""
    mask = batch["attention_mask"]
    inputs: dict[str, Any] = {"input_ids": batch["input_ids"], "use_cache": False}
    if not bool(mask.all()):
        inputs["attention_mask"] = mask
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    return inputs


def student_output(
    wrapped: nn.Module, model: Any, batch: Mapping[str, Tensor], plan: SelectionPlan | None
) -> Output:
    """One forward under `plan` (None: nothing is hidden), through what wraps the model: parallelism must see it."""
    if plan is not None:
        plan.begin()
    return _last_states(wrapped, model, batch, selection=plan)


@torch.no_grad()
def teacher_output(model: Any, batch: Mapping[str, Tensor], frozen: Any = None) -> Output:
    """The full-cache teacher of the same tokens, in eval mode: `frozen`, or the model with its adapters off."""
    teacher = frozen if frozen is not None else model
    with _evaluating(teacher), _adapters_off(teacher):
        return _last_states(teacher, teacher, batch)


def _last_states(wrapped: nn.Module, model: Any, batch: Mapping[str, Tensor], **given: Any) -> Output:
    """One forward through `wrapped`, whole: what shards a model gathers its weights there.

    The hidden states are caught on their way to the output layer, which computes one column only.
    """
    caught: list[Tensor] = []

    def catch(module: nn.Module, args: Any, output: Any) -> None:
        caught.append(output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0])

    handle = architecture.text_model(model).register_forward_hook(catch)
    try:
        wrapped(**forward_inputs(batch), logits_to_keep=1, **given)
    finally:
        handle.remove()
    return Output(caught[0], head_of(model))


@contextmanager
def _adapters_off(model: Any) -> Iterator[None]:
    """Without adapters, if there are any. What is to be trained stays marked: PEFT takes the mark off meanwhile, and
    FSDP would gather the weights as what needs no gradient, for good.
    """
    off = getattr(model, "disable_adapter", None)
    if not callable(off):
        yield
        return
    marks = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with off():
            _mark(marks)
            yield
    finally:
        _mark(marks)


def _mark(marks: Iterable[tuple[nn.Parameter, bool]]) -> None:
    for parameter, needed in marks:
        if parameter.requires_grad != needed:
            parameter.requires_grad_(needed)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
