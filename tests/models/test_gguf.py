"""Conversion of a GGUF file: against the model it was written from, and against transformers' own reader."""

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from sparsekv.errors import ConfigError
from sparsekv.models.gguf import convert_gguf, read_weights, transformers_name, unpermute

from .tiny import N_HEAD, N_KV_HEAD, llama_cpp_rows, tiny_llama, write_gguf

IDS = torch.randint(3, 260, (2, 20), generator=torch.Generator().manual_seed(1))


def converted(path, folder):
    folder.mkdir()
    convert_gguf(path, folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()


def test_unpermute_by_hand():
    # one head of 8: llama.cpp stores the pairs (0, 4), (1, 5), (2, 6), (3, 7) side by side
    stored = np.array([0, 4, 1, 5, 2, 6, 3, 7])[:, None]
    assert unpermute(stored, 1)[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    # two heads of 4 in the same rows
    stored = np.array([0, 2, 1, 3, 4, 6, 5, 7])[:, None]
    assert unpermute(stored, 2)[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("tied", [True, False])
def test_converted_model_is_the_original(tmp_path, tied):
    original = tiny_llama(tie_word_embeddings=tied)
    model = converted(write_gguf(tmp_path / "m.gguf", original), tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, original(IDS).logits)
    for key in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_parameters",
        "tie_word_embeddings",
        "eos_token_id",
    ):
        assert getattr(model.config, key) == getattr(original.config, key), key
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == 2


def test_rows_left_in_llama_cpp_order_give_another_model(tmp_path, monkeypatch):
    original = tiny_llama()
    monkeypatch.setattr("sparsekv.models.gguf.unpermute", lambda weight, n_head: weight)
    model = converted(write_gguf(tmp_path / "m.gguf", original), tmp_path / "out")
    with torch.no_grad():
        assert (model(IDS).logits - original(IDS).logits).abs().max() > 0.1


def test_quantized_weights_equal_transformers_own_reader(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny_llama(), quantized=True)
    ours = read_weights(gguf.GGUFReader(path), n_head=N_HEAD, n_kv_head=N_KV_HEAD)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    ).state_dict()
    assert set(theirs) - set(ours) == {"lm_head.weight"}  # tied
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name].bfloat16()), name
    original = tiny_llama().state_dict()
    quantized = ours["model.layers.0.self_attn.q_proj.weight"].float()
    error = (quantized - original["model.layers.0.self_attn.q_proj.weight"]).abs().max()
    assert 0 < error < 0.02  # 8 bits of weights up to about 1


def test_written_files(tmp_path):
    converted(write_gguf(tmp_path / "m.gguf", tiny_llama()), tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_llama_cpp_rows_of_this_test_are_those_of_its_converter():
    # llama.cpp, convert_hf_to_gguf.py: reshape(n_head, 2, dim / 2, …).swapaxes(1, 2)
    weight = np.arange(32 * 3).reshape(32, 3)
    expected = weight.reshape(4, 2, 4, 3).swapaxes(1, 2).reshape(weight.shape)
    assert (llama_cpp_rows(weight, 4) == expected).all()


def test_other_files_are_refused_in_one_line(tmp_path):
    junk = tmp_path / "junk.gguf"
    junk.write_bytes(b"not a gguf file" * 10)
    with pytest.raises(ConfigError, match=r"junk\.gguf is not a readable GGUF file"):
        convert_gguf(junk, tmp_path)
    other = write_gguf(tmp_path / "other.gguf", tiny_llama(), architecture="mamba")
    with pytest.raises(ConfigError, match="architecture 'mamba' cannot be converted; supported: 'llama'"):
        convert_gguf(other, tmp_path)


def test_tensor_names():
    assert transformers_name("token_embd.weight") == "model.embed_tokens.weight"
    assert transformers_name("blk.12.ffn_down.weight") == "model.layers.12.mlp.down_proj.weight"
    with pytest.raises(ConfigError, match=r"'rope_freqs\.weight' has no place"):
        transformers_name("rope_freqs.weight")
