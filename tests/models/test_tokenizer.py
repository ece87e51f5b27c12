"""The tokenizer that is built from GGUF metadata, on a tiny vocabulary."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekv.errors import ConfigError
from sparsekv.models.tokenizer import build_tokenizer

from .tiny import CHAT_TEMPLATE, CONTROL, MERGES, TOKENS

METADATA = {
    "general.architecture": "llama",
    "llama.context_length": 128,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3] * len(CONTROL) + [1] * (len(TOKENS) - len(CONTROL)),
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.padding_token_id": 2,
    "tokenizer.chat_template": CHAT_TEMPLATE,
}
TOKENIZER = build_tokenizer(METADATA)


def test_merges_spaces_and_digits():
    assert TOKENIZER.tokenize("hello world") == ["hello", "Ġw", "o", "r", "l", "d"]
    # "1 2" is a merge of the vocabulary, but digits are split off before merges are tried
    assert TOKENIZER.tokenize("a12 3") == ["a", "1", "2", "Ġ", "3"]


def test_nothing_is_added_to_a_text_or_to_the_vocabulary():
    assert len(TOKENIZER) == len(TOKENS) == TOKENIZER.vocab_size
    assert TOKENIZER("hello").input_ids == [TOKENS.index("hello")]
    assert TOKENIZER("").input_ids == []


def test_special_tokens():
    assert TOKENIZER("<|im_start|>hello<|im_end|>").input_ids == [1, TOKENS.index("hello"), 2]
    assert TOKENIZER.decode([1, TOKENS.index("hello"), 2], skip_special_tokens=True) == "hello"
    assert sorted(TOKENIZER.all_special_ids) == [0, 1, 2]
    assert (
        TOKENIZER.bos_token_id,
        TOKENIZER.eos_token_id,
        TOKENIZER.pad_token_id,
        TOKENIZER.unk_token_id,
    ) == (1, 2, 2, 0)
    assert TOKENIZER.model_max_length == 128


def test_chat_template():
    text = TOKENIZER.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n"


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
def test_every_text_round_trips(text):
    assert TOKENIZER.decode(TOKENIZER(text).input_ids) == text


@pytest.mark.parametrize(("model", "pre"), [("llama", "default"), ("gpt2", "qwen2")])
def test_other_kinds_are_refused(model, pre):
    with pytest.raises(ConfigError, match=f"{model!r} with pre-tokenizer {pre!r} cannot be converted"):
        build_tokenizer({**METADATA, "tokenizer.ggml.model": model, "tokenizer.ggml.pre": pre})
