"""The runs of `ddp_worker` under FSDP2 on the CPU.

torchrun --nproc_per_node=2 fsdp_worker.py FOLDER CASE ...
torchrun --nproc_per_node=2 fsdp_worker.py sparsekv ARGUMENT ...     the command, with what `accelerate launch` sets

accelerate takes FSDP up only where there are accelerators; what it would do then is done here for the CPU. Everything
after that (accelerate's sharding, Trainer, ours) runs as it is.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from sparsekv import BlockDropoutPress
from sparsekv.cli.main import app, call
from sparsekv.relevance import RelevanceConfig, attach_relevance
from toy import tiny_model
from training import ddp_worker

FSDP = {
    "fsdp": "full_shard auto_wrap",
    "fsdp_config": {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
}
ADAM = {"optim": "adamw_torch", "learning_rate": 0.01, "max_grad_norm": 0.5}


def take_up_fsdp() -> None:
    """Let accelerate do on a CPU what it does on GPUs."""
    start = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **given: Any) -> None:
        start(self, *args, fsdp_plugin=fsdp_plugin, **given)
        if fsdp_plugin is not None and self.distributed_type != DistributedType.FSDP:
            self.distributed_type = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init  # type: ignore[method-assign]


def run_averaged(folder: Path, **how: Any) -> dict[str, torch.Tensor]:
    """Predictors that start from given ones and are served as a mean with them; a file of what is served."""
    model = attach_relevance(tiny_model("llama", num_hidden_layers=2), RelevanceConfig(bias=1.0), seed=7)
    return ddp_worker.run_case("quantile", folder, **how, model=model, relevance_start_share=0.5, final=True)


def run_full(folder: Path, **how: Any) -> dict[str, torch.Tensor]:
    """No LoRA: the teacher is a copy of the model, and checkpoints hold all of its weights, tied ones once."""
    model = tiny_model("llama", num_hidden_layers=2, tie_word_embeddings=True)
    return ddp_worker.run_case("layer", folder, **how, save_steps=2, lora=None, model=model)


def run_alternating(folder: Path, **how: Any) -> dict[str, torch.Tensor]:
    """Steps of a press and of predictors: some weights have no gradient, and no optimizer's state, for a while."""
    return ddp_worker.run_case(
        "relevance",
        folder,
        **how,
        press=BlockDropoutPress(block_size=4, n_sink=1, n_recent=3),
        press_share=0.5,
    )


def main() -> None:
    """One process of torchrun: every case, and what only some runs do; saved by the first process."""
    torch.set_num_threads(1)
    take_up_fsdp()
    if sys.argv[1] == "sparsekv":
        sys.exit(call(app, "sparsekv", sys.argv[2:]))
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    how: dict[str, Any] = {"batch_size": 1, "accumulation": 2}
    found = {name: ddp_worker.run_case(name, folder / name, **how, arguments=FSDP) for name in names}
    found["averaged"] = run_averaged(folder / "averaged", **how, arguments=FSDP)
    found["bf16"] = ddp_worker.run_case("token", folder / "bf16", **how, arguments={**FSDP, "bf16": True})
    half = tiny_model("llama", num_hidden_layers=2).to(torch.bfloat16)
    found["half"] = ddp_worker.run_case("relevance", folder / "half", **how, arguments=FSDP, model=half)
    found["full"] = run_full(folder / "full", **how, arguments=FSDP)
    found["full resumed"] = run_full(
        folder / "full resumed", **how, arguments=FSDP, resume=folder / "full" / "checkpoint-2"
    )
    checkpoint = folder / "full resumed" / "checkpoint-4"
    again = {**FSDP, "max_steps": 4, "output_dir": str(folder / "again")}
    found["finished"] = run_full(folder / "again", **how, arguments=again, resume=checkpoint)
    adam: dict[str, Any] = {**how, "arguments": {**FSDP, **ADAM}, "checkpointing": True}
    found["adam"] = ddp_worker.run_case(
        "relevance", folder / "adam", **adam, save_steps=2, judged=ddp_worker.JUDGED, final=True
    )
    found["resumed"] = ddp_worker.run_case(
        "relevance", folder / "resumed", **adam, resume=folder / "adam" / "checkpoint-2"
    )
    alternating: dict[str, Any] = {**how, "arguments": {**FSDP, **ADAM}}
    found["alternating"] = run_alternating(folder / "alternating", **alternating, save_steps=1)
    found["alternating resumed"] = run_alternating(
        folder / "alternating resumed", **alternating, resume=folder / "alternating" / "checkpoint-1"
    )
    if torch.distributed.get_rank() == 0:
        torch.save(found, folder / "found.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
