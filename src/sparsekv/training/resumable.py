"""The part of training that outlives a process: checkpoints that are whole, and going on from them exactly."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

from sparsekv.errors import ConfigError
from sparsekv.files import write_atomically
from sparsekv.policies.base import Policy
from sparsekv.relevance.files import load_relevance, save_relevance
from sparsekv.relevance.predictor import NAME, Served, has_relevance, relevance_modules, serve_as
from sparsekv.training.averaging import Weights, averaged, measured_quantiles
from sparsekv.training.checkpoints import (
    check_config,
    checkpoint_folder,
    clear,
    damage,
    latest_whole,
    rotate,
    seal,
    step_of,
)
from sparsekv.training.config import TrainConfig
from sparsekv.training.curriculum import Curriculum
from sparsekv.training.described import check_setup, write_setup
from sparsekv.training.given import relevance_press, served_after
from sparsekv.training.output import (
    load_curriculum,
    write_curriculum,
    write_training_config,
)
from sparsekv.training.relaxation import Relaxation, ScoreQuantiles
from sparsekv.training.setup import moves_without_adapters
from sparsekv.training.sharded import fill_optimizer, is_sharded, whole_optimizer_state, whole_state
from sparsekv.training.weights import has_adapter, save_weights, serving_config, tidy, without_predictors

logger = logging.getLogger(__name__)

QUANTILES_FILE = "score_quantiles.json"
NAMED_OPTIMIZER = "optimizer_by_name.pt"
"""The optimizer's whole state, by names of parameters, where the weights are sharded."""


class ResumableTrainer(Trainer):
    """A Trainer whose checkpoints are sealed when they are whole, and hold all that a run needs to go on.

    Attributes
    ----------
    curriculum, quantiles, relaxation : whose state is saved
    policy, press_share : Policy or None, float
        The press's.
    config, setup : TrainConfig or None, dict
        Written into checkpoints, and compared when one is resumed: the config, or else what the trainer was given.
    n_checkpoints : int or None
        How many whole ones stay.
    relevance_start_share, relevance_start : float, Weights
        How much of the predictors' first weights is in what is served, and these (`averaging`).
    """

    control: TrainerControl
    curriculum: Curriculum
    quantiles: ScoreQuantiles
    relaxation: Relaxation | None
    policy: Policy | None
    press_share: float
    config: TrainConfig | None
    setup: dict[str, Any]
    n_checkpoints: int | None
    relevance_start_share: float
    relevance_start: Weights

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's. True goes on from the latest whole checkpoint of output_dir.

        Raises
        ------
        ConfigError
            For a checkpoint that is broken or missing, and for a fresh start where output_dir has whole ones.
        """
        output = Path(self.args.output_dir)
        checkpoint = resume_from_checkpoint or None
        latest = latest_whole(output)
        if checkpoint is True:
            if latest.path is None:
                raise ConfigError(f"output_dir '{output}' has no whole checkpoint to go on from")
            for path, reason in latest.skipped.items():
                logger.warning("%s is passed over: %s", path, reason)
            checkpoint = str(latest.path)
        elif checkpoint:
            self._check_resumable(Path(checkpoint), latest.path)
        elif self.state.global_step == 0 and latest.path is not None:
            raise ConfigError(
                f"output_dir '{output}' holds checkpoints of an earlier run; use another output_dir, or go on from "
                "them: train(resume_from_checkpoint=True)"
            )
        if checkpoint and self.config is not None:
            check_config(Path(checkpoint), self.config)
        elif checkpoint:
            check_setup(Path(checkpoint), self.setup)
        if checkpoint and self.is_fsdp_enabled:
            self._load_before_sharding(checkpoint)
        if checkpoint and 0 < self.args.max_steps <= step_of(Path(checkpoint)):
            return self._finished(checkpoint)
        return super().train(checkpoint, *args, **kwargs)

    def _check_resumable(self, checkpoint: Path, latest: Path | None) -> None:
        problem = damage(checkpoint)
        if problem is not None:
            raise ConfigError(f"checkpoint '{checkpoint}' can't be resumed from: {problem}")
        if (
            latest is not None
            and latest.parent == checkpoint.parent
            and step_of(latest) > step_of(checkpoint)
        ):
            raise ConfigError(
                f"output_dir '{latest.parent}' holds the later {latest.name}, which going on from {checkpoint.name} "
                "would write again; remove it, or use another output_dir"
            )

    def _finished(self, checkpoint: str) -> TrainOutput:
        """All steps were made: take them over. Trainer itself would make one more."""
        if not self.is_fsdp_enabled:  # else it is loaded by now
            self._load_from_checkpoint(checkpoint)
        self.state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        return TrainOutput(self.state.global_step, float("nan"), {})

    # ---- FSDP ---------------------------------------------------------------------------------------------------

    def _load_before_sharding(self, checkpoint: str) -> None:
        """A checkpoint's weights, into a model that every process still has whole."""
        if is_sharded(self.model):
            raise ConfigError(
                "under FSDP a checkpoint can't be loaded once the model has been trained; make a new trainer"
            )
        self.is_fsdp_enabled = False  # else Trainer looks for files of FSDP's own
        try:
            self._load_from_checkpoint(checkpoint)
        finally:
            self.is_fsdp_enabled = True

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer's. Every process has to call it; the first one writes, whole weights."""
        if not is_sharded(self.model):
            super().save_model(output_dir, _internal_call)
            return
        state = self._gathered()
        if self.is_world_process_zero():
            self._save(output_dir, state_dict=state)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def _gathered(self) -> dict[str, Tensor]:
        """What files hold of a sharded model: of one with an adapter only what was trained, and the predictors."""
        predictors = [getattr(module, NAME) for module in relevance_modules(self.model).values()]
        return whole_state(self.model, predictors, frozen=not has_adapter(self.model))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_sharded(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = whole_optimizer_state(self.model, self.optimizer)
        if self.is_world_process_zero():
            torch.save(state, Path(output_dir) / NAMED_OPTIMIZER)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        if (Path(checkpoint) / NAMED_OPTIMIZER).is_file():  # whether the weights are sharded now or not
            fill_optimizer(self.model, self.optimizer, _loaded(Path(checkpoint) / NAMED_OPTIMIZER))
            self.lr_scheduler.load_state_dict(_loaded(Path(checkpoint) / SCHEDULER_NAME))
        elif is_sharded(self.model) and (Path(checkpoint) / OPTIMIZER_NAME).is_file():
            raise ConfigError(
                f"checkpoint '{checkpoint}' was saved without FSDP: its optimizer's state can't be sharded; go on "
                "without FSDP, or start anew from its weights"
            )
        else:
            super()._load_optimizer_and_scheduler(checkpoint)

    # ---- weights ------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = output_dir if output_dir is not None else self.args.output_dir
        written = state_dict
        if has_relevance(self.model) and not has_adapter(self.model):
            written = without_predictors(self.model.state_dict() if state_dict is None else state_dict)
        with serving_config(self.model):
            super()._save(folder, written)
        tidy(self.model, folder)
        if has_relevance(self.model):
            self.say_how_to_serve()
            save_relevance(self.model, folder, state_dict)

    def save_weights(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """What `final/` holds of the model: adapter, model, or predictors alone where nothing else was trained.

        `dtype`: of an adapter's or model's files; default: as it was trained. Under FSDP every process has to call it,
        and the first one writes.
        """
        plain: Any = self.accelerator.unwrap_model(self.model)
        trained = has_adapter(plain) or moves_without_adapters(plain)
        sharded = is_sharded(plain)
        with self.served_predictors(plain):
            state = self._gathered() if sharded else None
            if self.is_world_process_zero() or not sharded:
                save_weights(plain, folder, only_predictors=not trained, dtype=dtype, state=state)

    @contextmanager
    def served_predictors(self, plain: Any) -> Iterator[None]:
        """Within the context the model's predictors are those that are to be served, and know how."""
        if not self.relevance_start_share:
            self.say_how_to_serve()
            yield
            return
        try:
            with averaged(plain, self.relevance_start, self.relevance_start_share):
                found = measured_quantiles(self, self.train_dataset)
                if found is None:
                    logger.warning(
                        "averaged predictors are served with the threshold of the trained ones: training left no "
                        "sample to measure theirs on. Give a compression ratio where they are used."
                    )
                self.say_how_to_serve(found)
                yield
        finally:
            self.say_how_to_serve()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = checkpoint_folder(Path(self._get_output_dir(trial=trial)), self.state.global_step)
        if self.args.should_save:
            clear(folder)
        self.accelerator.wait_for_everyone()
        self.fold_scores()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save and folder.is_dir():
            write_curriculum(folder, self.curriculum)
            write_atomically(folder / QUANTILES_FILE, json.dumps(self.quantiles.state_dict()) + "\n")
            if self.config is not None:
                write_training_config(folder, self.config)
            else:
                write_setup(folder, self.setup)
            seal(folder)
            if self.n_checkpoints is not None:
                rotate(folder.parent, self.n_checkpoints, best=self.state.best_global_step)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if is_sharded(self.model):
            return  # loaded before it was sharded
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        folder = Path(resume_from_checkpoint)
        self._load_predictors(folder)
        load_curriculum(folder, self.curriculum)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        best = Path(str(self.state.best_model_checkpoint))
        if best.is_dir():  # else Trainer has warned that the last step's model stays
            self._load_predictors(best)

    def _load_predictors(self, folder: Path) -> None:
        """The predictors of a checkpoint, which Trainer knows nothing of, and the quantiles that go with them."""
        if has_relevance(self.model):
            load_relevance(self.model, folder)
        if (folder / QUANTILES_FILE).exists():
            self.quantiles.load_state_dict(json.loads((folder / QUANTILES_FILE).read_text(encoding="utf-8")))

    def fold_scores(self) -> None:
        """Whatever a step left to be taken into the state."""

    def say_how_to_serve(self, quantiles: ScoreQuantiles | None = None) -> None:
        """Tell the predictors what they were trained with, so that their file says it: the relaxation's sizes, or those
        of the press where it alone has steps.

        `quantiles`: of their scores; default: the running ones.
        """
        if not has_relevance(self.model):
            return
        if self.relaxation is None or self.press_share == 1:
            press = relevance_press(self.policy)
            if press is not None:
                serve_as(self.model, served_after(press))
            return
        threshold = 0.0
        if self.relaxation.threshold == "quantile":
            last = self.curriculum.ratio(self.state.global_step, max(self.state.max_steps, 1))
            threshold = (quantiles or self.quantiles).threshold(
                getattr(self.curriculum, "end_ratio", last), _HARD
            )
        serve_as(self.model, Served(self.relaxation.n_sink, self.relaxation.n_recent, threshold))


_HARD = 1e-3
"""A temperature at which a soft threshold is the quantile."""


class LogWithCheckpoints(TrainerCallback):
    """Logs before every checkpoint: no sum is pending then, so a resumed run logs the same rows."""

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Called after Trainer's own decision to save."""
        if control.should_save:
            control.should_log = True


class TodaysIntervals(TrainerCallback):
    """Steps between logs, checkpoints and evaluations are those of the arguments, not those that a checkpoint had."""

    def on_train_begin(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Called after Trainer took over a checkpoint's state, which has them too."""
        state.compute_steps(args, state.max_steps)


def _loaded(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)
