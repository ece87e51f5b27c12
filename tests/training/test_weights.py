"""What a trained model leaves on the disk."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sparsekv import BlockDropoutPress
from sparsekv.errors import ConfigError
from toy import tiny_model
from training.toy_trainer import trainer_for

PRESS = BlockDropoutPress(block_size=4, compression_ratio=0.5, n_sink=1, recent=3)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_written_once_in_any_dtype(tied, tmp_path):
    model = tiny_model("llama", num_hidden_layers=2, tie_word_embeddings=tied)
    trainer = trainer_for(tmp_path, model=model, lora=None, press=PRESS)
    files = {}
    for dtype in (torch.float32, torch.bfloat16):
        trainer.save_weights(tmp_path / str(dtype), dtype=dtype)
        files[dtype] = load_file(tmp_path / str(dtype) / "model.safetensors")
    exact, rounded = files.values()
    assert exact.keys() == rounded.keys() and ("lm_head.weight" in rounded) is not tied
    assert all(torch.equal(rounded[name], value.to(torch.bfloat16)) for name, value in exact.items())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / str(torch.bfloat16))
    for name, value in model.to(torch.bfloat16).state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_an_adapter_of_another_name_is_refused(tmp_path):
    """PEFT would write it into a folder of its name, where nothing looks for it."""
    options = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model("llama", num_hidden_layers=2), options, adapter_name="mine")
    with pytest.raises(ConfigError, match=r"adapters 'mine': .* one named 'default'"):
        trainer_for(tmp_path, model=model, press=PRESS)
    model.add_adapter("default", options)
    with pytest.raises(ConfigError, match="adapters 'mine', 'default'"):
        trainer_for(tmp_path, model=model, press=PRESS)
    model.set_adapter("default")
    model.delete_adapter("mine")
    trainer_for(tmp_path, model=model, press=PRESS).save_weights(tmp_path / "final")
    assert (tmp_path / "final" / "adapter_model.safetensors").exists()
