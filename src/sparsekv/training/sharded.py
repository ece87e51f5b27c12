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
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from sparsekv.errors import ConfigError

Batch = TypeVar("Batch")

FSDP_VERSION = 2
"""That of accelerate: version 1 flattens weights, and gathers none that is read outside of its module."""


def is_sharded(model: nn.Module) -> bool:
    """Some weight of a model is here in part."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def check_plugin(plugin: Any, *, loads_best: bool) -> None:
    """Whether a model can be trained under accelerate's FSDP as it is set up.

    Raises
    ------
    ConfigError
        For version 1, its own activation checkpointing, and where the best checkpoint would have to be loaded in the
        end.
    """
    version = getattr(plugin, "fsdp_version", 1)
    if version != FSDP_VERSION:
        raise ConfigError(
            f"FSDP version {version} is not supported: the loss reads the output layer's weight, which it flattens; "
            f"use version {FSDP_VERSION} (fsdp_config={{'fsdp_version': 2}}, or accelerate launch --fsdp_version 2)"
        )
    if getattr(plugin, "activation_checkpointing", False):
        raise ConfigError("FSDP's activation_checkpointing is not supported: use gradient_checkpointing")
    if loads_best:
        raise ConfigError(
            "load_best_model_at_end is not supported under FSDP: load its checkpoint afterwards"
        )


def shard_exactly(modules: Iterable[nn.Module], plugin: Any) -> None:
    """Shard modules that compute in the dtype of their weights, whatever mixed precision does to the others.

    Call it before accelerate shards the rest and before an optimizer is made of their weights.
    """
    policy = getattr(plugin, "mixed_precision_policy", None)
    if getattr(policy, "param_dtype", None) is None:
        return
    for module in modules:
        fully_shard(module)


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


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """A sharded model's state dict, whole and on the CPU, in the first process; in the others nothing."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(dict[str, Tensor], get_model_state_dict(model, options=options))


def whole_optimizer_state(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """As `whole_state`, of an optimizer, by names of parameters."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_optimizer_state_dict(model, getattr(optimizer, "optimizer", optimizer), options=options)


def fill_optimizer(model: nn.Module, optimizer: Any, state: dict[str, Any]) -> None:
    """Load what `whole_optimizer_state` gave, which every process has to have."""
    if not state["state"]:  # plain SGD remembers nothing, and torch can't load that
        return
    options = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(model, getattr(optimizer, "optimizer", optimizer), state, options=options)


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
        counts = found is not None
        last = [found] if found is not None else last
        yield last[0], counts


def _votes(accelerator: Any, left: bool, ready: bool) -> tuple[bool, bool]:
    """(some process says `left`, all say `ready`)."""
    votes = torch.tensor([[left, ready]], dtype=torch.int64, device=accelerator.device)
    gathered = accelerator.gather(votes)
    return bool(gathered[:, 0].any()), bool(gathered[:, 1].all())
