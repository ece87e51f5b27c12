"""A resumed run saves, logs and evaluates as often as it is asked to now, and drops entries as it did at first."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

from sparsekv import BlockDropoutPress
from sparsekv.errors import ConfigError
from sparsekv.training import EITObjective, LinearCurriculum, SparseKVTrainer
from sparsekv.training.dropping import DroppingConfig
from training.ddp_worker import samples
from training.toy_trainer import trainer_for


def every(steps: int, folder: Any) -> SparseKVTrainer:
    intervals = {"logging_steps": steps, "save_steps": steps, "eval_steps": steps}
    return trainer_for(
        folder,
        {**intervals, "max_steps": 7, "save_strategy": "steps", "eval_strategy": "steps"},
        press=BlockDropoutPress(block_size=4, compression_ratio=0.5, n_sink=1, recent=3),
        eval_dataset=samples(2),
    )


def steps_of(trainer: SparseKVTrainer, key: str) -> list[int]:
    return [row["step"] for row in trainer.state.log_history if key in row]


def test_intervals_may_change_when_a_run_goes_on(tmp_path):
    first = every(3, tmp_path)
    first.train()
    assert steps_of(first, "loss") == [3, 6, 7]
    for step in (6, 7):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    again = every(2, tmp_path)
    again.train(resume_from_checkpoint=True)
    assert steps_of(again, "loss") == [3, 4, 6, 7]
    assert steps_of(again, "eval_loss") == [3, 4, 6]
    saved = sorted(folder.name for folder in tmp_path.glob("checkpoint-*"))
    assert saved == [f"checkpoint-{step}" for step in (3, 4, 6, 7)]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"press": BlockDropoutPress(block_size=4, n_sink=1, recent=2)}, "press.block_size was 2, now 4"),
        ({"curriculum": LinearCurriculum(0.0, 0.9, 5)}, "curriculum.end_ratio was 0.5, now 0.9"),
        ({"objective": EITObjective()}, "objective.class was 'StandardLMObjective', now 'EITObjective'"),
        ({"dropping": DroppingConfig("streaming", window=9)}, "dropping.way was 'prefill', now 'streaming'"),
    ],
)
def test_what_drops_entries_is_the_same_after_a_resume(changes, named, tmp_path):
    """Without a config the trainer itself keeps account of what it was given."""
    given = {
        "press": BlockDropoutPress(block_size=2, n_sink=1, recent=2),
        "curriculum": LinearCurriculum(0.0, 0.5, 5),
    }
    saving = {"save_strategy": "steps", "save_steps": 1}
    trainer_for(tmp_path, {**saving, "max_steps": 1}, **given).train()
    other = trainer_for(tmp_path, {**saving, "max_steps": 2}, **{**given, **changes})
    with pytest.raises(ConfigError, match=named):
        other.train(resume_from_checkpoint=True)
    same = trainer_for(tmp_path, {**saving, "max_steps": 2}, **given)
    assert same.train(resume_from_checkpoint=True).global_step == 2
