"""The embedded SmolLM2-135M-Instruct itself: fetched once, right tokenizer, right weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekv.architecture import check_supported, compressible_layers, head_dim, max_context, num_kv_heads
from sparsekv.models import fetch_model, load_model, load_tokenizer

pytestmark = pytest.mark.real_model

ENGLISH = (
    "The water cycle describes the continuous movement of water on, above and below the surface of the Earth."
    " Heat from the Sun evaporates water from oceans and lakes. The vapour rises into the air, cools and "
    "condenses into clouds, and later falls as rain or snow. Some of this water sinks into the ground and "
    "becomes groundwater, while the rest runs off into rivers, which carry it back to the sea."
)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("smollm2")


@pytest.fixture(scope="module")
def model():
    return load_model("smollm2", dtype="float32", device="cpu")[0]


def test_folder_is_whole():
    assert {p.name for p in fetch_model("smollm2").iterdir()} >= {
        "model.safetensors",
        "tokenizer.json",
        "config.json",
    }


def test_vocabulary_and_special_tokens(tokenizer):
    assert len(tokenizer) == tokenizer.vocab_size == 49152
    assert sorted(tokenizer.all_special_ids) == list(range(17))
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == special
    assert (tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token) == tuple(special)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    assert tokenizer.model_max_length == 8192
    assert (
        tokenizer("<|im_start|>user").input_ids[0] == 1
        and len(tokenizer("<|im_start|><|im_end|>").input_ids) == 2
    )


def test_nothing_is_prepended_and_digits_are_single(tokenizer):
    assert tokenizer.tokenize("Hello world 2024") == ["Hello", "Ġworld", "Ġ", "2", "0", "2", "4"]
    assert len(tokenizer("Hello world").input_ids) == 2


# The published vocabulary lacks the bytes of six control characters and of the unassigned planes 4 to 11.
CHARACTERS = st.characters(
    max_codepoint=0x3FFFF, exclude_categories=["Cs"], exclude_characters="\x04\x06\x13\x14\x16\x1d"
)


@settings(max_examples=200, deadline=None)
@given(text=st.text(CHARACTERS, max_size=60))
def test_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_chat_template_adds_the_system_prompt(tokenizer):
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_architecture(model):
    check_supported(model)
    assert compressible_layers(model) == list(range(30))
    assert (num_kv_heads(model), head_dim(model), max_context(model)) == (3, 64, 8192)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.generation_config.eos_token_id == 2


def test_perplexity_of_plain_english(model, tokenizer):
    ids = tokenizer(ENGLISH, return_tensors="pt").input_ids
    with torch.no_grad():
        perplexity = model(ids, labels=ids).loss.exp().item()
    assert 5 < perplexity < 25  # wrong tokenizer, or rows of q and k in another order: hundreds and more


def test_answers_a_question_and_stops(model, tokenizer):
    messages = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt.input_ids.shape[1] :]
    assert "Paris" in tokenizer.decode(out) and out[-1] == 2
