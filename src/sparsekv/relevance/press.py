"""The learned policy as a kvpress press, for kvpress's own pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsekv.policies.as_press import PolicyPress
from sparsekv.policies.budget import Scope
from sparsekv.relevance import RELEVANCE_FILE
from sparsekv.relevance.files import load_relevance
from sparsekv.relevance.policy import Relevance
from sparsekv.relevance.predictor import has_relevance


class RelevancePress(PolicyPress):
    """Keeps what the model's relevance predictors score highest.

    pipe = pipeline("kv-press-text-generation", model=folder)
    pipe(context, question=..., press=RelevancePress.from_pretrained(folder, compression_ratio=0.7))

    Parameters
    ----------
    compression_ratio : float in [0, 1), optional
        Fraction to remove; None: the predictors' own threshold decides.
    scope : "model" (default), "layer" or "head"
        Over what the count is fixed; the predictors are trained for the whole model. Heads that keep different numbers
        are hidden as kvpress's AdaKVPress hides them.
    folder : str or Path, optional
        Predictors to attach to a model that has none.
    **parameters
        Of the policy: n_sink, n_recent, threshold.
    """

    def __init__(
        self,
        compression_ratio: float | None = None,
        *,
        scope: Scope = "model",
        folder: str | Path | None = None,
        **parameters: Any,
    ) -> None:
        super().__init__(
            Relevance(**parameters), compression_ratio, scope="head" if compression_ratio is None else scope
        )
        self.folder = folder

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, compression_ratio: float | None = None, **arguments: Any
    ) -> RelevancePress:
        """The press with the predictors of a folder (an adapter's, or a merged model's); no Hub id.

        Raises
        ------
        ConfigError
            If the folder has no relevance.safetensors.
        """
        from sparsekv.errors import ConfigError

        if not (Path(folder) / RELEVANCE_FILE).is_file():
            raise ConfigError(f"folder '{folder}' has no {RELEVANCE_FILE}")
        return cls(compression_ratio, folder=folder, **arguments)

    def post_init_from_model(self, model: Any) -> None:
        """Attach the folder's predictors, if the model has none."""
        super().post_init_from_model(model)
        if self.folder is not None and not has_relevance(model):
            load_relevance(model, self.folder)
