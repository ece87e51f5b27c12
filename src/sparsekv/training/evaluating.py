"""The evaluating half of a trainer: held-out perplexity, in shares where there are several processes."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader

from sparsekv.errors import ConfigError
from sparsekv.training.held_out import by_prefix, held_out_perplexity, samples_of_each, share_of
from sparsekv.training.resumable import ResumableTrainer
from sparsekv.training.sharded import is_sharded


class EvaluatingTrainer(ResumableTrainer):
    """A `ResumableTrainer` that judges by held-out perplexity, and tells its curriculum.

    A subclass has, beside what that one needs,

    seq_len : int
        Held-out items with text are cut to so many tokens.
    """

    seq_len: int

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """As Trainer's; with several processes, each gets a share of its own of the samples (`share_of`)."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        if self.args.world_size == 1 or dataset is None:
            return super().get_eval_dataloader(eval_dataset)
        share = share_of(dataset, self.args.process_index, self.args.world_size)
        return DataLoader(share, batch_size=self.args.eval_batch_size, collate_fn=self.data_collator)

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Held-out perplexity of what follows the boundary: with the full cache, and under eviction at today's ratio.

        Of each of several data sets, by name, as `eval_<name>_perplexity`. The curriculum hears that under eviction, of
        the first one.
        """
        if self.is_fsdp_enabled and not is_sharded(self.model):
            raise ConfigError(
                "under FSDP a model can be evaluated once train() has spread it over the processes"
            )
        judged = samples_of_each(eval_dataset, self.processing_class, self.seq_len)
        found = {
            prefix: held_out_perplexity(self, self.get_eval_dataloader(one))
            for prefix, one in by_prefix(metric_key_prefix, judged, self.eval_dataset).items()
        }
        if eval_dataset is None and self.is_in_train:  # after the last one: all are judged at the same ratio
            needed = "perplexity" if self.curriculum.needs_baseline else "perplexity_evicted"
            self.curriculum.observe(next(iter(found.values()))[needed])
        metrics = {f"{prefix}_{name}": value for prefix, one in found.items() for name, value in one.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: there are no predictions to return."""
        raise ConfigError(
            "predict is not supported: the logits of a whole sequence never exist here; evaluate(dataset) measures "
            "held-out perplexity, and model.generate answers"
        )
