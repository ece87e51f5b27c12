"""Held-out perplexity of predictors is that of serving them: the exact top entries of the whole model."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import TrainingArguments

from sparsekv import Budget, FullPress, compress
from sparsekv.errors import ConfigError
from sparsekv.relevance.predictor import relevance_modules
from sparsekv.training import LinearCurriculum, SparseKVTrainer
from sparsekv.training.held_out import StreamShare, share_of
from sparsekv.training.relaxation import Relaxation
from toy import tiny_model, toy_tokenizer
from training.toy_trainer import trainer_for


@pytest.mark.parametrize("batch_size", [1, 3])
def test_predictors_are_judged_as_they_are_served(batch_size, tmp_path):
    generator = torch.Generator().manual_seed(0)
    data = []
    for index, (n, boundary) in enumerate([(40, 31), (52, 44), (47, 30)]):
        ids = torch.randint(3, 250, (n,), generator=generator).tolist()
        data.append({"input_ids": ids, "labels": ids, "boundary": boundary, "sample_index": index})
    trainer = SparseKVTrainer(
        tiny_model("llama", num_hidden_layers=2),
        TrainingArguments(
            str(tmp_path), per_device_eval_batch_size=batch_size, report_to="none", use_cpu=True, max_steps=10
        ),
        relaxation=Relaxation(n_sink=2, n_recent=3),
        curriculum=LinearCurriculum(0.6, 0.6, 1),
        tokenizer=toy_tokenizer(),
        train_dataset=data,
        eval_dataset=data,
    )
    for module in relevance_modules(trainer.model).values():
        torch.nn.init.normal_(module.relevance.score.weight, std=1.0)
    found = trainer.evaluate()
    trainer.say_how_to_serve()
    model = trainer.model.get_base_model().eval()
    total, count = 0.0, 0
    for sample in data:
        ids, boundary = torch.tensor([sample["input_ids"]]), sample["boundary"]
        cache = compress(model, ids[:, :boundary], "relevance", Budget(0.6, scope="model"))
        selection = cache.selection().extend(ids.shape[1])
        with torch.no_grad():
            logits = model(ids, selection=selection).logits[0, boundary:-1]
        targets = ids[0, boundary + 1 :]
        total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        count += len(targets)
    assert found["eval_perplexity_evicted"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert found["eval_perplexity_evicted"] != pytest.approx(found["eval_perplexity"], rel=1e-2)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_have_every_sample_once(count, stream):
    data = list("abcde")
    given = StreamShare(data, 0, 1) if stream else data
    shares = [list(share_of(given, index, count)) for index in range(count)]
    assert sorted(sample for share in shares for sample in share) == data
    assert max(len(share) for share in shares) == -(-5 // count)


@pytest.mark.parametrize("nothing", ["boundary at the end", "no labels"])
def test_data_without_a_label_after_the_boundary_has_no_perplexity(nothing, tmp_path):
    ids = list(range(10, 30))
    labels = ids if nothing == "boundary at the end" else ids[:10] + [-100] * 10
    row = {"input_ids": ids, "labels": labels, "boundary": 20 if labels is ids else 9}
    trainer = trainer_for(tmp_path, press=FullPress(), eval_dataset=[row] * 3)
    with pytest.raises(ConfigError, match="eval_dataset: no sample has a label after its boundary"):
        trainer.evaluate()
    # one sample that has a label, the very last one, is enough
    enough = [row, {"input_ids": ids, "boundary": 18}]
    assert trainer.evaluate(enough)["eval_loss"] > 1
