"""Loading by name: local folders, LoRA adapters, and every way in which a name can be wrong. No network."""

import json
import shutil

import httpx
import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from sparsekv.errors import ConfigError, one_line
from sparsekv.models import MODELS, load_model, load_tokenizer, locate
from sparsekv.models.fetch import fetch_embedded
from sparsekv.models.load import add_adapter, load_config
from sparsekv.models.locate import cached_folder, locate_model, locate_on_hub

from .tiny import tiny_llama

IDS = torch.arange(3, 60)[None]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture
def base(tmp_path, tiny_embedded, downloads):
    """The tiny model as a Hugging Face folder."""
    return fetch_embedded(tiny_embedded.spec, tmp_path / "home", lambda message: None)


@pytest.fixture
def embedded(monkeypatch, tmp_path, tiny_embedded, base):
    """The tiny model under its embedded name, "tiny", in the cache of this test."""
    monkeypatch.setenv("SPARSEKV_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(MODELS._values, "tiny", tiny_embedded.spec)
    return base


def offline(monkeypatch, error: Exception | None = None) -> None:
    def refuse(*args, **kwargs):
        raise error or httpx.ConnectError("Name or service not known")

    monkeypatch.setattr(HfApi, "model_info", refuse)


def save_adapter(folder, model=None, base_name="Some-Owner/Tiny-Llama", **changes):
    """Write a LoRA adapter with random, non-zero weights; returns the logits of model and adapter."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    torch.manual_seed(3)
    config = LoraConfig(**{**options, **changes}, init_lora_weights=False)
    wrapped = get_peft_model(model or tiny_llama(), config).eval()
    wrapped.peft_config["default"].base_model_name_or_path = base_name
    wrapped.save_pretrained(folder, save_embedding_layers=False)  # else it asks the Hub
    return logits(wrapped)


def test_local_folder(base, tiny_embedded):
    model, tokenizer = load_model(str(base), dtype="float32", device="cpu")
    assert torch.equal(logits(model), logits(tiny_embedded.original))
    assert not model.training and model.dtype == torch.float32
    assert tokenizer.padding_side == "left" and tokenizer.pad_token_id == 2
    padded = tokenizer(["hello", "hello w"], padding=True).input_ids
    assert padded[0][0] == 2 and padded[0][1] == padded[1][0] == tokenizer.convert_tokens_to_ids("hello")
    assert load_model(str(base), dtype="bf16")[0].dtype == torch.bfloat16


def test_embedded_name_and_attention_implementation(embedded, tiny_embedded):
    model, _ = load_model("tiny", dtype="fp32", attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    assert torch.allclose(logits(model), logits(tiny_embedded.original), atol=1e-4)


def test_embedded_model_is_fetched_on_first_use_and_says_so(
    monkeypatch, tmp_path, tiny_embedded, downloads, capsys
):
    monkeypatch.setenv("SPARSEKV_HOME", str(tmp_path))
    monkeypatch.setitem(MODELS._values, "tiny", tiny_embedded.spec)
    load_tokenizer("tiny")
    load_tokenizer("tiny")
    out, err = capsys.readouterr()
    assert err.count("downloading tiny-weights==0.1") == 1 and out == ""


def test_device_map(base, tiny_embedded):
    model, _ = load_model(str(base), dtype="float32", device_map="cpu")
    assert torch.equal(logits(model), logits(tiny_embedded.original))
    with pytest.raises(ConfigError, match="device 'cpu' and device_map 'auto' are both given"):
        load_model(str(base), device="cpu", device_map="auto")


@pytest.mark.parametrize("merge", [True, False])
def test_adapter_gives_the_logits_it_had_when_saved(base, tmp_path, tiny_embedded, merge):
    expected = save_adapter(tmp_path / "adapter")
    model, _ = load_model(str(base), adapter=tmp_path / "adapter", dtype="float32", merge_adapter=merge)
    assert torch.allclose(logits(model), expected, atol=1e-4)
    assert (expected - logits(tiny_embedded.original)).abs().max() > 0.1
    assert type(model) is LlamaForCausalLM if merge else isinstance(model, PeftModel)
    assert not model.training


def test_an_adapter_to_train_on_is_as_it_was_saved(base, tmp_path):
    expected = save_adapter(tmp_path / "adapter")
    plain, _ = load_model(str(base), dtype="float32")
    model = add_adapter(plain, tmp_path / "adapter", name="tiny", trainable=True)
    assert torch.allclose(logits(model.eval()), expected, atol=1e-4)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and trained == {name for name, _ in model.named_parameters() if "lora_" in name}


def test_adapter_folder_as_name_finds_its_embedded_base(embedded, tmp_path, capsys):
    expected = save_adapter(tmp_path / "adapter")
    model, tokenizer = load_model(str(tmp_path / "adapter"), dtype="float32")
    assert torch.allclose(logits(model), expected, atol=1e-4)
    assert tokenizer.tokenize("hello") == ["hello"]
    said = capsys.readouterr().err
    assert "its base Some-Owner/Tiny-Llama is not cached; using 'tiny' (float32, stored as bfloat16)" in said


def test_adapter_folder_as_name_with_a_local_base(base, tmp_path):
    expected = save_adapter(tmp_path / "adapter", base_name=str(base))
    model, _ = load_model(str(tmp_path / "adapter"), dtype="float32")
    assert torch.allclose(logits(model), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (tiny_llama(hidden_size=48, intermediate_size=64), {}, "size mismatch"),
        (tiny_llama(num_hidden_layers=3), {}, "has weights for 4 modules that do not match"),
        (tiny_llama(num_hidden_layers=1), {}, "lacks weights for 4 modules that do not match"),
        (
            GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=32)),
            {"target_modules": ["c_attn"]},
            "Target modules .*c_attn.* not found",
        ),
    ],
    ids=["other_width", "more_layers", "fewer_layers", "other_modules"],
)
def test_adapter_of_another_model_is_refused(base, tmp_path, model, changes, message):
    torch.manual_seed(0)
    options = {"r": 4, "target_modules": ["q_proj", "v_proj"], **changes}
    get_peft_model(model, LoraConfig(**options)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match=rf"adapter .* does not fit model .*{message}") as caught:
        load_model(str(base), adapter=tmp_path / "adapter")
    assert "\n" not in str(caught.value)


def test_broken_adapter_folders(base, tmp_path):
    save_adapter(tmp_path / "adapter")

    def refuse(adapter, message):
        with pytest.raises(ConfigError, match=message):
            load_model(str(base), adapter=adapter)

    refuse(tmp_path / "adaptor", r"does not exist \(did you mean 'adapter'\?\)")
    refuse(base, "has no adapter_config.json")
    with pytest.raises(ConfigError, match=r"is a LoRA adapter itself; adapter .* cannot be added"):
        load_model(str(tmp_path / "adapter"), adapter=tmp_path / "adapter")

    other = get_peft_model(tiny_llama(), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    other.save_pretrained(tmp_path / "ia3")
    refuse(tmp_path / "ia3", "is of type 'IA3'; allowed: 'LORA'")

    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    refuse(tmp_path / "adapter", r"has no adapter_model\.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{")
    refuse(tmp_path / "adapter", r"adapter_config\.json is not valid JSON")


def test_adapter_folder_whose_base_cannot_be_had(tmp_path, monkeypatch):
    offline(monkeypatch)
    save_adapter(tmp_path / "adapter", base_name="Some-Owner/Unknown")
    with pytest.raises(
        ConfigError, match=r"base of adapter .*: model 'Some-Owner/Unknown' is not a local folder"
    ):
        locate_model(str(tmp_path / "adapter"))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": None})
    )
    with pytest.raises(ConfigError, match="does not name its base model"):
        locate_model(str(tmp_path / "adapter"))


def test_incomplete_and_unsafe_folders(base, tmp_path):
    def refuse(message):
        with pytest.raises(ConfigError, match=message) as caught:
            load_model(str(folder))
        assert "\n" not in str(caught.value)

    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    weights = load_file(folder / "model.safetensors")
    dropped = "model.layers.1.self_attn.k_proj.weight"
    save_file(
        {k: v for k, v in weights.items() if k != dropped}, folder / "model.safetensors", {"format": "pt"}
    )
    refuse(rf"is incomplete: 1 weights are missing, first '{dropped}'")

    (folder / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-100])
    refuse("cannot be loaded")

    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    refuse("cannot be loaded: .*safetensors")

    (folder / "config.json").write_text("{")
    refuse("config.json cannot be read")
    (folder / "config.json").unlink()
    refuse(r"has no config\.json and no adapter_config\.json")


def test_a_config_is_read_without_weights(embedded, base, tmp_path):
    assert load_config(str(base)).num_hidden_layers == tiny_llama().config.num_hidden_layers
    save_adapter(tmp_path / "adapter")
    assert load_config(str(tmp_path / "adapter")).to_dict() == load_config("tiny").to_dict()
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((base / "config.json").read_bytes())
    assert load_config(str(bare)).hidden_size == load_config(str(base)).hidden_size
    (bare / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"bare': its config\.json cannot be read") as caught:
        load_config(str(bare))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_unsupported_architecture(tmp_path):
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=32)).save_pretrained(
        tmp_path / "gpt2"
    )
    with pytest.raises(ConfigError, match="model type 'gpt2' is not supported; supported model types: llama"):
        load_model(str(tmp_path / "gpt2"))


def test_folder_without_tokenizer(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"model folder .* has no tokenizer: none of tokenizer\.json"):
        load_model(str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smolm2", r"unknown model 'smolm2' \(did you mean 'smollm2'\?\); allowed: smollm2, a Hub id"),
        ("./models/tinny", r"model folder '\./models/tinny' does not exist \(did you mean 'tiny'\?\)"),
        ("./nowhere/tiny", r"model folder '\./nowhere/tiny' does not exist$"),
        ("./models/file", "is a file; expected a folder"),
        ("a/b/c", "model folder 'a/b/c' does not exist"),
    ],
)
def test_wrong_names(tmp_path, monkeypatch, name, message):
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "models" / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        load_model(name)


def response(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "https://hub.invalid/x"))


def test_hub_id_offline(monkeypatch):
    offline(monkeypatch)
    with pytest.raises(ConfigError) as caught:
        load_model("HuggingFaceTB/SmolLM2-135M-Instrukt")
    assert str(caught.value) == (
        "model 'HuggingFaceTB/SmolLM2-135M-Instrukt' is not a local folder, not in the Hub cache, and the"
        " Hub cannot be reached (did you mean 'HuggingFaceTB/SmolLM2-135M-Instruct'?)"
    )
    with pytest.raises(ConfigError, match="the embedded 'smollm2' is this model in 4-bit weights"):
        load_model("HuggingFaceTB/SmolLM2-135M-Instruct")


def test_hub_answers(monkeypatch):
    offline(monkeypatch, RepositoryNotFoundError("404", response=response(404)))
    with pytest.raises(
        ConfigError, match="'Owner/Model' is not a local folder, and not on the Hub or private"
    ):
        locate_on_hub("Owner/Model")
    offline(monkeypatch, GatedRepoError("403", response=response(403)))
    with pytest.raises(ConfigError, match="'Owner/Model' is gated"):
        locate_on_hub("Owner/Model")
    monkeypatch.setattr(HfApi, "model_info", lambda *args, **kwargs: None)
    assert locate_on_hub("Owner/Model") == "Owner/Model"


def test_cached_hub_model_is_used_offline(monkeypatch, tmp_path, base, tiny_embedded):
    """A Hub cache as huggingface_hub lays it out: refs/main names the snapshot."""
    repository = tmp_path / "hub" / "models--Owner--Model"
    snapshot = repository / "snapshots" / ("a" * 40)
    shutil.copytree(base, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    offline(monkeypatch)
    assert cached_folder("Owner/Model") == snapshot and cached_folder("Owner/Other") is None
    assert locate_on_hub("Owner/Model") == str(snapshot)
    assert "Owner/Model" in locate._known_hub_ids()
    model, _ = load_model("Owner/Model", dtype="float32")
    assert torch.equal(logits(model), logits(tiny_embedded.original))


def test_one_line():
    assert one_line(ValueError("a\n  b\tc")) == "a b c"
    assert one_line(KeyError()) == "KeyError"
    assert one_line(ValueError("x" * 50), limit=10) == "x" * 9 + "…"
