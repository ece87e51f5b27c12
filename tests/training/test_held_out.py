"""Held-out perplexity of predictors is that of serving them: the exact top entries of the whole model."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import TrainingArguments

from sparsekv import Budget, FullPress, SinkRecentPress, compress
from sparsekv.errors import ConfigError
from sparsekv.relevance.predictor import relevance_modules
from sparsekv.training import LinearCurriculum, SparseKVTrainer
from sparsekv.training.held_out import StreamShare, share_of
from sparsekv.training.relaxation import Relaxation
from toy import tiny_model, toy_tokenizer
from training.ddp_worker import samples
from training.toy_trainer import Listening, trainer_for


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


def test_several_held_out_sets_are_judged_by_name_and_the_first_is_heard(tmp_path):
    """Each as if it were alone, and all at the ratio of the step, whatever the first one makes of it."""
    sets = {"long": samples(5), "short": [{"text": "A few words, and then a few more of them."}]}
    changes = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    curriculum = Listening(start_ratio=0.4, tolerance=1e3)
    heard = curriculum.heard
    press = SinkRecentPress(n_sink=2)
    trainer = trainer_for(tmp_path, changes, press=press, curriculum=curriculum, eval_dataset=sets)
    together = trainer.evaluate()
    for name, data in sets.items():
        alone = {
            key.replace("eval_", f"eval_{name}_"): value for key, value in trainer.evaluate(data).items()
        }
        assert alone.items() <= together.items() and len(alone) == 4
    assert len(together) == 8 and together == trainer.evaluate(sets)
    assert trainer.evaluate("short")["eval_loss"] == together["eval_short_loss"]
    trainer.train()
    rows = [row for row in trainer.state.log_history if "eval_long_loss" in row and "eval_short_loss" in row]
    # three before training, then the baseline and one per step
    assert [row["eval_long_perplexity"] for row in rows[-3:-2]] == heard[:1]
    assert [row["eval_long_perplexity_evicted"] for row in rows[-2:]] == heard[1:]
    ratios = [(row["eval_long_ratio"], row["eval_short_ratio"]) for row in rows[-3:]]
    assert ratios == [(0.0, 0.0), (0.4, 0.4), (pytest.approx(0.45), pytest.approx(0.45))]


def test_no_held_out_set_by_name_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="eval_dataset is an empty mapping"):
        trainer_for(tmp_path, press=FullPress(), eval_dataset={})
