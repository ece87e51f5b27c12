"""A model whose weights lie in parts on several processes (FSDP2): to and from whole ones, as files hold them.

Gathering is work of all processes: each has to call what gathers, at the same place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from sparsekv.errors import ConfigError

Batch = TypeVar("Batch")

FSDP_VERSION = 2
"""That of accelerate: version 1 flattens weights, and gathers none that is read outside of its module."""


def is_sharded(model: nn.Module) -> bool:
    """FSDP keeps a model's weights in parts; between two uses of one it may be whole for a while."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def check_plugin(plugin: Any, *, loads_best: bool, predictors: bool) -> None:
    """Whether a model, with or without relevance predictors, can be trained under accelerate's FSDP as it is set up.

    Raises
    ------
    ConfigError
        For version 1, for what the model as it is here could not go through, for predictors beside mixed precision, and
        where the best checkpoint would have to be loaded in the end.
    """
    version = getattr(plugin, "fsdp_version", 1)
    if version != FSDP_VERSION:
        raise ConfigError(
            f"FSDP version {version} is not supported: the loss reads the output layer's weight, which it flattens; "
            f"use version {FSDP_VERSION} (fsdp_config={{'fsdp_version': 2}}, or accelerate launch --fsdp_version 2)"
        )
    if getattr(plugin, "activation_checkpointing", False):
        raise ConfigError("FSDP's activation_checkpointing is not supported: use gradient_checkpointing")
    if getattr(plugin, "cpu_ram_efficient_loading", False):
        raise ConfigError(
            "FSDP's cpu_ram_efficient_loading is not supported: adapters and teachers are made of weights that it "
            "leaves empty at first (accelerate launch --fsdp_cpu_ram_efficient_loading false)"
        )
    policy = getattr(plugin, "mixed_precision_policy", None)
    if predictors and getattr(policy, "param_dtype", None) is not None:
        raise ConfigError(
            "bf16 is not supported under FSDP with relevance predictors, which compute in float32 and which it would "
            "cast; load the model in bfloat16 instead (dtype: bfloat16, bf16: false)"
        )
    if loads_best:
        raise ConfigError(
            "load_best_model_at_end is not supported under FSDP: load its checkpoint afterwards"
        )


def check_dtypes(model: nn.Module) -> None:
    """Raise a ConfigError unless all that is trained has one dtype, as FSDP needs."""
    found = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad}
    if len(found) > 1:
        raise ConfigError(
            f"FSDP needs one dtype of all trainable weights, these are {', '.join(sorted(found))}: train a float32 "
            "model (dtype: float32), or adapters"
        )


def expect_idle(model: nn.Module, idle: bool) -> None:
    """Whether weights that one process trains in a step may be idle in another, as predictors are without a context.

    Where all processes leave them out they should have no gradient, as with one process, rather than 0.
    """
    expect = getattr(model, "set_reduce_scatter_unused_params", None)
    if callable(expect):
        expect(idle)
    elif idle:
        raise ConfigError(f"FSDP of torch {torch.__version__} can't train relevance predictors; 2.13 can")


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of it, gathered."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fill(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load whole tensors into a module, or this process's part of each."""
    own = module.state_dict()
    for name, value in state.items():
        there = own[name]
        if isinstance(there, DTensor):
            value = distribute_tensor(value.to(there.device), there.device_mesh, there.placements)
        with torch.no_grad():
            there.copy_(value)


def whole_state(
    model: nn.Module, modules: Iterable[nn.Module] = (), *, frozen: bool = True
) -> dict[str, Tensor]:
    """A sharded model's state dict, whole and on the CPU, in the first process; in the others nothing of worth.

    Parameters
    ----------
    modules : whose weights are in it in any case
    frozen : bool
        All that is not trained is in it, too.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=not frozen)
    state = cast(dict[str, Tensor], get_model_state_dict(model, options=options))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for module in modules:
        for parameter in module.parameters():
            state.setdefault(names[id(parameter)], whole(parameter.detach()).cpu())
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = names[id(parameter)]
        if first != name and first in state and name in state:
            state[name] = state[first]  # tied: one tensor, which is written once
    return state


def whole_optimizer_state(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """As `whole_state`, of an optimizer, by names of parameters."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_optimizer_state_dict(model, _plain(optimizer), options=options)


def fill_optimizer(model: nn.Module, optimizer: Any, state: dict[str, Any]) -> None:
    """Load what `whole_optimizer_state` gave, which every process has to have."""
    own = _plain(optimizer)
    if not state["state"]:  # plain SGD remembers nothing, which torch can't load
        for group, saved in zip(own.param_groups, state["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
        return
    # Not strict: weights that no step has trained yet have no state. torch makes them one, of a step that never was.
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_optimizer_state_dict(model, own, state, options=options)
    for name, parameter in model.named_parameters():
        if name not in state["state"]:
            own.state.pop(parameter, None)


def _plain(optimizer: Any) -> torch.optim.Optimizer:
    return cast(torch.optim.Optimizer, getattr(optimizer, "optimizer", optimizer))


def in_step(batches: Iterable[Batch], accelerator: Any) -> Iterator[tuple[Batch, bool]]:
    """Batches of this process, and whether each counts: where others have more, the last one comes again.

    A forward of a sharded model is work of all processes, so each has to make as many.

    Raises
    ------
    ConfigError
        In every process, if one has no batch at all while another has.
    """
    own = iter(batches)
    last: list[Batch] = []
    while True:
        found = next(own, None)
        any_left, all_ready = _votes(accelerator, found is not None, found is not None or bool(last))
        if not any_left:
            return
        if not all_ready:
            raise ConfigError(
                "eval_dataset has fewer samples than there are processes; FSDP needs one for each"
            )
        if found is not None:
            last = [found]
        yield last[0], found is not None


def _votes(accelerator: Any, left: bool, ready: bool) -> tuple[bool, bool]:
    """(some process says `left`, all say `ready`)."""
    votes = torch.tensor([[left, ready]], dtype=torch.int64, device=accelerator.device)
    gathered = accelerator.gather(votes)
    return bool(gathered[:, 0].any()), bool(gathered[:, 1].all())
