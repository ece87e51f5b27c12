"""What SparseKVTrainer refuses of what it is given, because it would be ignored or train nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from sparsekv import BlockDropoutPress
from sparsekv.errors import ConfigError
from sparsekv.training.relaxation import Relaxation
from toy import tiny_model
from training.toy_trainer import trainer_for

PRESS = BlockDropoutPress(block_size=4, compression_ratio=0.5, n_sink=1, recent=3)


def with_adapter() -> Any:
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    return get_peft_model(tiny_model("llama", num_hidden_layers=2), config)


@pytest.mark.parametrize(
    ("given", "held"),
    [({"press": PRESS}, "0 of 16"), ({"lora": None, "relaxation": Relaxation()}, "21 of 25")],
    ids=["adapter", "predictors"],
)
def test_an_optimizer_made_before_what_is_trained_is_refused(given, held, tmp_path):
    model = tiny_model("llama", num_hidden_layers=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=f"optimizers: .* holds {held} .*optimizer_cls_and_kwargs"):
        trainer_for(tmp_path, model=model, optimizers=(optimizer, None), **given)


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_optimizer_of_all_that_is_trained_is_used(wrapped, tmp_path):
    model = with_adapter() if wrapped else tiny_model("llama", num_hidden_layers=2)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    trainer = trainer_for(tmp_path, model=model, lora=None, press=PRESS, optimizers=(optimizer, None))
    trainer.train()
    after = dict(model.named_parameters())
    assert before and all(not torch.equal(after[name], value) for name, value in before.items())
