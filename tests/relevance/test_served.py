"""What was trained is what is served: the final folder, the policy, and kvpress's own pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import pipeline

from oracle import masked_logits, stepped_logits
from sparsekv import PolicyPress, compress
from sparsekv.errors import ConfigError
from sparsekv.models import load_model
from sparsekv.models.merge import merge_adapter
from sparsekv.policies import make_policy
from sparsekv.policies.base import keep_top
from sparsekv.policies.budget import Budget
from sparsekv.relevance import (
    Relevance,
    RelevanceConfig,
    RelevancePress,
    attach_relevance,
    has_relevance,
    relevance_modules,
)
from sparsekv.relevance.files import save_relevance
from sparsekv.training.build import run_training
from sparsekv.training.config import TrainConfig
from toy import save_toy_model, tiny_model

T, Q, SINK, RECENT = 60, 5, 2, 5
TEXT = (
    "The quick fox {i} jumps over {j} lazy dogs. Then it sleeps, and dreams of hens; there were {k} of them. "
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy_model(
        tmp_path_factory.mktemp("models") / "toy-base",
        head_dim=128,  # kvpress hides keys in directions that no query has
    )


@pytest.fixture(scope="module")
def final(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The final folder of a short run with LoRA and gates."""
    folder = tmp_path_factory.mktemp("run")
    lines = [{"text": TEXT.format(i=i, j=i * i, k=7 * i + 3)} for i in range(12)]
    (folder / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {
        "model": str(base),
        "dtype": "float32",
        "device": "cpu",
        "output_dir": str(folder / "out"),
        "data": {"kind": "text", "path": str(folder / "text.jsonl"), "seq_len": 64, "min_tokens": 16},
        "relevance": {"enabled": True, "bias": 0.1, "lr": 0.1, "n_sink": SINK, "n_recent": RECENT},
        "objective": "eit",
        "curriculum": {"name": "fixed", "args": {"ratio": 0.5}},
        "steps": 6,
        "lr": 0.02,
        "lora": {"r": 4, "alpha": 8},
        "progress": False,
    }
    return run_training(TrainConfig(**settings))


@pytest.fixture(scope="module")
def served(base: Path, final: Path) -> Any:
    model, _ = load_model(str(base), adapter=final, dtype="float32", device="cpu")
    return model


@pytest.fixture(scope="module")
def merged(base: Path, final: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return merge_adapter(final, tmp_path_factory.mktemp("merged") / "model", model=str(base))


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    """No token twice: the first layer's scores of equal tokens are equal."""
    return 3 + torch.randperm(247, generator=torch.Generator().manual_seed(7))[None, : T + Q]


def gates_by_hand(plain: Any, file: Path, ids: torch.Tensor) -> torch.Tensor:
    """g [L, H, T] from the file's numbers and the states that a plain model has before each layer."""
    tensors = load_file(file)
    with torch.no_grad():
        states = plain(ids, output_hidden_states=True).hidden_states
        found = []
        for index, layer in enumerate(plain.model.layers):
            h = layer.input_layernorm(states[index])[0]
            h = h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt()
            name = f"layers.{index}.score"
            found.append((h @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]).T)
    return torch.stack(found)


def with_protected(g: torch.Tensor) -> torch.Tensor:
    column = torch.arange(g.shape[-1])
    return g.masked_fill((column < SINK) | (column >= g.shape[-1] - RECENT), torch.inf)


def test_the_final_folder_serves_exactly_what_its_gates_say(served, merged, ids):
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    g = with_protected(gates_by_hand(plain, merged / "relevance.safetensors", ids[:, :T]))
    policy = make_policy("relevance", n_sink=SINK, n_recent=RECENT)

    def kept(budget):
        return compress(served, ids[:, :T], policy, budget).selection().evicted_at[0] > T

    threshold = kept(None)
    assert torch.equal(threshold, g > 0) and 0.2 < threshold.float().mean() < 0.9
    counts = threshold.sum(-1)
    assert len(counts.unique()) > 1, "heads keep different numbers"
    higher = make_policy("relevance", n_sink=SINK, n_recent=RECENT, threshold=0.3)
    assert torch.equal(compress(served, ids[:, :T], higher).selection().evicted_at[0] > T, g > 0.3)

    n_kept = int(T * 0.3)
    for scope, groups in (
        ("model", [g.flatten()]),
        ("layer", list(g.flatten(1))),
        ("head", list(g.flatten(0, 1))),
    ):
        chosen = kept(Budget(0.7, scope=scope))
        heads = {"model": 6, "layer": 2, "head": 1}[scope]
        lowest = [group.sort(descending=True).values[n_kept * heads - 1] for group in groups]
        shape = {"model": (1, 1, 1), "layer": (3, 1, 1), "head": (3, 2, 1)}[scope]
        assert torch.equal(chosen, g >= torch.stack(lowest).view(shape))
        assert int(chosen.sum()) == n_kept * 6
        assert chosen[..., :SINK].all() and chosen[..., -RECENT:].all()


@pytest.mark.parametrize("scope", ["head", "layer", "model"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_a_compressed_cache_equals_the_masked_forward(family, scope, ids):
    """Ragged heads and all, with gates whose scores differ widely."""
    from sparsekv import prepare
    from sparsekv.relevance import attach_relevance, relevance_modules

    model = attach_relevance(prepare(tiny_model(family)))
    for module in relevance_modules(model).values():
        torch.nn.init.normal_(
            module.relevance.score.weight, std=0.3, generator=torch.Generator().manual_seed(2)
        )
    cache = compress(model, ids[:, :T], "relevance", Budget(0.6, scope=scope))
    selection = cache.selection()
    masked = masked_logits(model, ids, None, selection.extend(T + Q), Q)
    stored = stepped_logits(model, cache, ids, None, [2, 1, 2])
    assert (masked - stored).abs().max() <= 1e-4
    plain = masked_logits(model, ids, None, None, Q)
    assert (masked - plain).abs().max() > 1e-2
    full = 2 if family == "gemma3" else 3
    layers = [0, 2] if family == "gemma3" else [0, 1, 2]
    kept = (selection.evicted_at[0] > T)[layers]
    assert int(kept.sum()) == int(T * 0.4) * 2 * full
    assert (len(kept.sum(-1).unique()) > 1) == (scope != "head")


def test_the_served_compression_is_real(served, ids):
    """Nothing is hidden only: the entries are gone."""
    cache = compress(served, ids[:, :T], "relevance", Budget(0.7, scope="model"))
    assert max(cache.achieved_compression) == pytest.approx(1 - int(T * 0.3) / T)


def test_the_press_from_a_folder_runs_in_kvpress(merged, ids):
    """kvpress's own pipeline on the merged folder, nothing of ours attached to the model beforehand."""
    pipe = pipeline("kv-press-text-generation", model=str(merged), dtype=torch.float32, device="cpu")
    assert not has_relevance(pipe.model)
    press = RelevancePress.from_pretrained(merged, compression_ratio=0.7, n_sink=SINK, n_recent=RECENT)
    context, question = (
        "The cat sat. It slept, and then: it woke! 7 mice (all grey) ran off... End.",
        "Who ran off?",
    )
    answer = pipe(context, question=question, press=press, max_new_tokens=6)["answer"]
    full = pipe(context, question=question, max_new_tokens=6)["answer"]
    assert isinstance(answer, str) and answer != full
    achieved = sum(press.achieved_compression.values()) / 3
    n = len(pipe.tokenizer(context)["input_ids"])
    assert achieved == pytest.approx(0.7, abs=1.5 / n) and len(set(press.achieved_compression.values())) > 1

    # the entries are those of the hand computation
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    g = with_protected(gates_by_hand(model, merged / "relevance.safetensors", ids[:, :T]))
    wanted = keep_top(g[None], Budget(0.7, scope="model"))[0]
    with press(model), torch.no_grad():
        from transformers import DynamicCache

        model(ids[:, :T], past_key_values=DynamicCache(config=model.config))
    for index, layer in enumerate(model.model.layers):
        _, heads, columns = layer.self_attn.masked_key_indices
        hidden = torch.zeros(2, T, dtype=torch.bool)
        hidden[heads, columns] = True
        assert torch.equal(hidden, ~wanted[index])
    threshold = RelevancePress.from_pretrained(merged, n_sink=SINK, n_recent=RECENT)
    with threshold(model), torch.no_grad():
        model(ids[:, :T], past_key_values=DynamicCache(config=model.config))
    for index, layer in enumerate(model.model.layers):
        assert threshold.achieved_compression[index] == pytest.approx(float((g[index] <= 0).float().mean()))
        hidden = torch.zeros(2, T, dtype=torch.bool)
        _, heads, columns = layer.self_attn.masked_key_indices
        hidden[heads, columns] = True
        assert torch.equal(hidden, g[index] <= 0)


def test_the_press_finds_the_tokenizer_that_its_predictors_need(merged, tmp_path):
    """Handcrafted features read the text: nothing has to be given for it, in kvpress's pipeline or without."""
    from transformers import AutoModelForCausalLM, DynamicCache

    source = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    attach_relevance(source, RelevanceConfig(features=("hidden", "handcrafted")))
    for module in relevance_modules(source).values():
        torch.nn.init.normal_(module.relevance.extra.weight, std=3.0)
    folder = tmp_path / "handcrafted"
    folder.mkdir()
    save_relevance(source, folder)
    pipe = pipeline("kv-press-text-generation", model=str(merged), dtype=torch.float32, device="cpu")
    press = RelevancePress.from_pretrained(folder, compression_ratio=0.6)
    text = (
        "The cat sat. It slept, and then: it woke! 7 mice (all grey) ran off... The end of 12 days is near."
    )
    assert isinstance(pipe(text, question="Who ran off?", press=press, max_new_tokens=4)["answer"], str)
    n = len(pipe.tokenizer(text)["input_ids"])
    assert sum(press.achieved_compression.values()) / 3 == pytest.approx(0.6, abs=1.5 / n)

    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    context = pipe.tokenizer(text, return_tensors="pt").input_ids
    with press(model), torch.no_grad():
        model(context, past_key_values=DynamicCache(config=model.config))
    budget = Budget(0.6, scope="model")
    kept = compress(source, context, "relevance", budget, tokenizer=pipe.tokenizer).kept_columns()[0]
    for index, layer in enumerate(model.model.layers):
        _, heads, columns = layer.self_attn.masked_key_indices
        hidden = torch.zeros(2, context.shape[1], dtype=torch.bool)
        hidden[heads, columns] = True
        assert torch.equal(hidden, ~kept[index])
    with pytest.raises(ConfigError, match="handcrafted features, which read the text"):
        compress(source, context, "relevance", budget)
    by_policy = PolicyPress(
        make_policy("atskv"), 0.6, scope="model"
    )  # any press of a policy that asks predictors
    with by_policy(source), torch.no_grad():
        source(context, past_key_values=DynamicCache(config=source.config))
    assert sum(by_policy.achieved_compression.values()) / 3 == pytest.approx(0.6, abs=1.5 / n)


def test_no_head_is_emptied_by_the_threshold(served, ids):
    nothing = Relevance(n_sink=0, n_recent=0, threshold=1e9)
    kept = compress(served, ids[:, :T], nothing).selection().evicted_at[0] > T
    assert kept.sum(-1).unique().tolist() == [1]


def test_what_cannot_be_served_is_told(served, ids, tmp_path):
    with pytest.raises(ConfigError, match="has no relevance predictors"):
        compress(tiny_model("llama"), ids[:, :T], "relevance", 0.5)
    for options in ({"chunk": 16}, {"phase": "both"}):
        with pytest.raises(ConfigError):
            compress(served, ids[:, :T], "relevance", Budget(0.5, scope="model"), **options)
    with pytest.raises(ConfigError, match=r"has no relevance\.safetensors"):
        RelevancePress.from_pretrained(tmp_path, compression_ratio=0.5)
    with pytest.raises(ConfigError, match="n_sink must be a whole number"):
        make_policy("relevance", n_sink=-1)
