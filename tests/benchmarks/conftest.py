"""Small tokenizers, trained in a second on the packaged book."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from sparsekv.benchmarks.data import packaged


def train_bpe(vocab_size: int = 6000, bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE with single digits, as SmolLM2's; with `bos` it adds a token by itself, as Llama's."""
    tokenizer = Tokenizer(models.BPE())
    digits, byte_level = (
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([packaged("book_train.txt")], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>", model_max_length=512
    )


@pytest.fixture(scope="session")
def bpe() -> PreTrainedTokenizerFast:
    return train_bpe()


@pytest.fixture(scope="session")
def bpe_with_bos() -> PreTrainedTokenizerFast:
    return train_bpe(bos=True)


@pytest.fixture(scope="session")
def word_level() -> PreTrainedTokenizerFast:
    """A token per word and per mark; no merges, so every count can be checked by eye."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[UNK]")
