"""Eviction-invariant training in a few words of Python: a dataclass that makes a TrainConfig, and its trainer."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from sparsekv.config import parse_config
from sparsekv.errors import ConfigError, unknown
from sparsekv.training.config import TrainConfig
from sparsekv.training.data_spec import DataConfig

if TYPE_CHECKING:
    from sparsekv.policies.anchors import AnchorConfig
    from sparsekv.training.trainer import SparseKVTrainer


@dataclass
class EITConfig:
    """Eviction-invariant training: anchors and some others stay, and the model is to answer as with the full cache.

    EITConfig(model_name="smollm2", lambda_kl=0.5).build_trainer().train()

    Parameters
    ----------
    model_name : as `TrainConfig.model`
    anchor : AnchorConfig, optional
        What always stays, as far as the budget allows. The rest of the budget is filled by other tokens, drawn at
        random.
    lambda_kl : float >= 0
        Weight of the KL to the full-cache teacher, beside a cross-entropy of weight 1.
    temperature : float > 0
        Of both distributions in that KL.
    scheduler_mode : "adaptive", "linear", "cosine" or "fixed"
        How the kept fraction goes from the first to the second of the next two; "fixed" stays at the second.
    initial_keep_ratio, min_keep_ratio : float in (0, 1]
        Fractions that STAY. Everything else here counts what is removed.
    warmup_steps : int or float, optional
        Steps (a fraction: of all) from one to the other, for "linear" and "cosine"; by default 0.6 of all.
    num_train_samples : int >= 1
        Samples seen; with batch_size and accumulation they make the steps.
    data : DataConfig or its settings as a dict, optional
        By default questions made from the packaged book.
    held_out : int
        Samples set aside for "adaptive", of text that is never trained on; others need none.
    settings : dict, optional
        Further keys of TrainConfig, on top of all this. With an `adapter` among them, lora_r and lora_alpha are its
        own.
    output_dir, seed, dtype, learning_rate, lora_r, lora_alpha, batch_size, accumulation, gradient_checkpointing
        As in TrainConfig.
    """

    model_name: str
    anchor: AnchorConfig | None = None
    lambda_kl: float = 0.5
    temperature: float = 1.0
    scheduler_mode: str = "adaptive"
    initial_keep_ratio: float = 0.9
    min_keep_ratio: float = 0.3
    warmup_steps: float | None = None
    num_train_samples: int = 1600
    output_dir: str = "output/eit"
    data: DataConfig | dict[str, Any] | None = None
    held_out: int = 32
    batch_size: int = 1
    accumulation: int = 8
    learning_rate: float = 2e-4
    lora_r: int = 64
    lora_alpha: float = 128
    gradient_checkpointing: bool = False
    seed: int = 0
    dtype: str = "auto"
    settings: dict[str, Any] | None = None

    def to_train_config(self) -> TrainConfig:
        """The same as a TrainConfig.

        Raises
        ------
        ConfigError
            For a value that is not allowed.
        """
        for field in ("num_train_samples", "batch_size", "accumulation"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{field} must be a whole number >= 1, got {value!r}")
        steps = -(-self.num_train_samples // (self.batch_size * self.accumulation))
        adaptive = self.scheduler_mode == "adaptive"
        every = max(1, steps // 20)
        data = self.data.model_dump() if isinstance(self.data, DataConfig) else self.data or {}
        made: dict[str, Any] = {
            "model": self.model_name,
            "dtype": self.dtype,
            "seed": self.seed,
            "output_dir": self.output_dir,
            "data": data,
            "method": {"name": "anchors", "args": {**self._anchor_args(), "fill": "random"}},
            "objective": {"name": "eit", "lambda_kl": self.lambda_kl, "temperature": self.temperature},
            "curriculum": self._curriculum(),
            "lora": {"r": self.lora_r, "alpha": self.lora_alpha},
            "steps": steps,
            "batch_size": self.batch_size,
            "accumulation": self.accumulation,
            "lr": self.learning_rate,
            "gradient_checkpointing": self.gradient_checkpointing,
            "held_out": self.held_out if adaptive else 0,
            "eval_every": every if adaptive else 0,
        }
        if (self.settings or {}).get("adapter") is not None:
            del made["lora"]
        return parse_config(TrainConfig, {**made, **(self.settings or {})}, source="EITConfig")

    def build_trainer(self) -> SparseKVTrainer:
        """The trainer, with its model loaded; `.train()` runs it."""
        config = self.to_train_config()
        from sparsekv.training.build import build_trainer

        return build_trainer(config)

    def _anchor_args(self) -> dict[str, Any]:
        from sparsekv.policies.anchors import AnchorConfig

        anchor = self.anchor or AnchorConfig()
        args = {field.name: getattr(anchor, field.name) for field in fields(anchor)}
        return {**args, "extra_punctuation": list(anchor.extra_punctuation)}

    def _curriculum(self) -> dict[str, Any]:
        keep = {"initial_keep_ratio": self.initial_keep_ratio, "min_keep_ratio": self.min_keep_ratio}
        mode = self.scheduler_mode
        if mode == "fixed":
            return {"name": mode, "args": {"keep_ratio": self.min_keep_ratio}}
        if mode == "adaptive":
            return {"name": mode, "args": keep}
        if mode in ("linear", "cosine"):
            length = 0.6 if self.warmup_steps is None else self.warmup_steps
            return {"name": mode, "args": {**keep, "warmup_steps": length}}
        raise unknown("scheduler_mode", mode, ("adaptive", "linear", "cosine", "fixed"))
