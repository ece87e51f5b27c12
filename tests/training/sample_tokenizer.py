"""A small byte-level BPE with single digits and a chat template, trained in a second on the packaged book."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from toy import CHAT_TEMPLATE, SPECIALS


@lru_cache(maxsize=1)
def bpe_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from sparsekv.benchmarks.data import packaged

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIALS),
        show_progress=False,
    )
    core.train_from_iterator([packaged("book_train.txt")], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=SPECIALS[0],
        bos_token=SPECIALS[1],
        pad_token=SPECIALS[2],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
