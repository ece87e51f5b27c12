"""The full-cache teacher under adapters of the user's own: it is the model that they were put on, and stays it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from sparsekv import BlockDropoutPress
from sparsekv.errors import ConfigError
from sparsekv.training import EITObjective, StandardLMObjective
from sparsekv.training.setup import moves_without_adapters
from sparsekv.training.student import teacher_output
from toy import tiny_model
from training.toy_trainer import trainer_for

PRESS = BlockDropoutPress(block_size=4, compression_ratio=0.5, n_sink=1, recent=3)
IDS = torch.arange(3, 33)[None]


def adapted(**changes: Any) -> Any:
    given = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **changes}
    return get_peft_model(tiny_model("qwen2", num_hidden_layers=2), LoraConfig(**given))


def with_norms() -> Any:
    model = adapted()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.requires_grad_(True)
    return model


def teacher(trainer: Any) -> Tensor:
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    return teacher_output(trainer.model, batch, trainer.frozen_teacher).states


@pytest.mark.parametrize(
    ("make", "copied"),
    [
        (adapted, False),
        (lambda: adapted(use_dora=True), False),
        (lambda: adapted(modules_to_save=["mlp"]), False),
        (lambda: adapted(trainable_token_indices=[5, 6]), False),
        (lambda: adapted(bias="lora_only"), True),
        (lambda: adapted(bias="all"), True),
        (with_norms, True),
    ],
    ids=["lora", "dora", "modules_to_save", "tokens", "biases of its layers", "all biases", "norms"],
)
def test_the_teacher_is_the_base_and_stays_it(make, copied, tmp_path):
    model = make()
    assert moves_without_adapters(model) == copied
    trainer = trainer_for(tmp_path, model=model, press=PRESS, objective=EITObjective())
    assert (trainer.frozen_teacher is not None) == copied, "a copy costs the weights once more"
    before = teacher(trainer)
    with torch.no_grad():
        wanted = tiny_model("qwen2", num_hidden_layers=2).model(IDS).last_hidden_state
    torch.testing.assert_close(before, wanted, rtol=1e-5, atol=1e-5)
    trainer.train()
    assert torch.equal(teacher(trainer), before)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_that_rewrote_the_base_can_have_no_teacher(init, tmp_path):
    with pytest.raises(ConfigError, match=f"init_lora_weights '{init}' changes the base's weights"):
        trainer_for(tmp_path, model=adapted(init_lora_weights=init), press=PRESS, objective=EITObjective())
    trainer_for(tmp_path, model=adapted(init_lora_weights=init), press=PRESS, objective=StandardLMObjective())
