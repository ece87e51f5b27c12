"""The learned policy as a kvpress press, for kvpress's own pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparsekv import architecture
from sparsekv.errors import ConfigError
from sparsekv.policies.as_press import PolicyPress
from sparsekv.policies.budget import Scope
from sparsekv.relevance import RELEVANCE_FILE
from sparsekv.relevance.files import load_relevance
from sparsekv.relevance.policy import Relevance
from sparsekv.relevance.predictor import NAME, detach_relevance, relevance_modules


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
        Where the predictors are; they take the place of the model's own, until the context manager ends. Inside
        another press, which enters only its own context manager, they stay on the model.
    tokenizer : optional
        For predictors that read the text (handcrafted features); by default loaded from the model's path.
    **parameters
        Of the policy: n_sink, n_recent, threshold; by default what the predictors were trained with.
    """

    def __init__(
        self,
        compression_ratio: float | None = None,
        *,
        scope: Scope = "model",
        folder: str | Path | None = None,
        tokenizer: Any = None,
        **parameters: Any,
    ) -> None:
        super().__init__(Relevance(**parameters), compression_ratio, scope=scope, tokenizer=tokenizer)
        self.folder = folder
        self._predictors: dict[int, Any] = {}

    @property
    def scope(self) -> Scope:
        """As given; without a ratio each layer decides for itself, and its heads keep different numbers."""
        return "layer" if self._ratio is None else self._scope

    @scope.setter
    def scope(self, value: Scope) -> None:
        self._scope = value

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
        if not (Path(folder) / RELEVANCE_FILE).is_file():
            raise ConfigError(f"folder '{folder}' has no {RELEVANCE_FILE}")
        return cls(compression_ratio, folder=folder, **arguments)

    @contextmanager
    def __call__(self, model: Any) -> Iterator[None]:
        """As `PolicyPress`'s; afterwards the model has the predictors it had before, or none."""
        if self.folder is None:
            with super().__call__(model):
                yield
            return
        before = _predictors_of(model)
        try:
            self._attach(model)
            with super().__call__(model):
                yield
        finally:
            detach_relevance(model)
            modules = architecture.attention_modules(model)
            for index, predictor in before.items():
                setattr(modules[index], NAME, predictor)

    def post_init_from_model(self, model: Any) -> None:
        """Attach the folder's predictors, if they are not on the model yet; load the tokenizer that they may need."""
        if self.folder is not None and not (self._predictors and _predictors_of(model) == self._predictors):
            self._attach(model)
        super().post_init_from_model(model)

    def _attach(self, model: Any) -> None:
        detach_relevance(model)  # loading would otherwise fill the model's own, which come back later
        load_relevance(model, str(self.folder))
        self._predictors = _predictors_of(model)


def _predictors_of(model: Any) -> dict[int, Any]:
    return {index: getattr(module, NAME) for index, module in relevance_modules(model).items()}
