"""Sessions: saved in one process, opened in another; whole, or refused in one line."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from oracle import masked_logits, stepped_logits
from sample_policies import Ends, Ragged, SmallKeys
from sparsekv.attention import prepare
from sparsekv.cache.join import join
from sparsekv.cache.tiered import TieredCache
from sparsekv.errors import ConfigError
from sparsekv.generation import compress
from sparsekv.relevance import attach_relevance
from toy import tiny_model

T, Q, N = 60, 9, 6
TESTS = Path(__file__).parents[1]
OTHER_PROCESS = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from oracle import stepped_logits
from sparsekv.attention import prepare
from sparsekv.cache.tiered import TieredCache
from toy import tiny_model
torch.set_num_threads(1)
model = prepare(tiny_model("qwen3"))
cache = TieredCache.load(sys.argv[2], model)
torch.save(stepped_logits(model, cache, torch.load(sys.argv[3]), None, [9] + [1] * 6), sys.argv[4])
"""


def some_ids(rows: int = 1) -> torch.Tensor:
    return torch.randint(3, 250, (rows, T + Q + N), generator=torch.Generator().manual_seed(3))


def go_on(model, cache, ids, mask=None):
    return stepped_logits(model, cache, ids, mask, [Q] + [1] * N)


def saved(folder: Path, family: str = "llama", **options):
    model = prepare(tiny_model(family))
    cache = TieredCache(model, 12, **options)
    compress(model, some_ids()[:, :T], Ragged(), 0.8, cache=cache)
    cache.save(folder)
    return model, cache


def test_a_session_goes_on_in_another_process_as_in_this_one(tmp_path):
    model, cache = saved(tmp_path / "session", "qwen3")
    ids = some_ids()
    torch.save(ids, tmp_path / "ids.pt")
    arguments = [TESTS, tmp_path / "session", tmp_path / "ids.pt", tmp_path / "logits.pt"]
    subprocess.run([sys.executable, "-c", OTHER_PROCESS, *map(str, arguments)], check=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), go_on(model, cache, ids))


@pytest.mark.parametrize("passive", ["cpu", "disk"])
def test_a_session_that_was_decoded_from_for_long_goes_on_as_the_cache_itself(tmp_path, passive):
    """Its pages have holes by then, and which entries share a page decides what is recalled."""
    model, ids = prepare(tiny_model("llama")), torch.randint(3, 250, (2, 170))
    store = "cpu" if passive == "cpu" else f"disk:{tmp_path / 'tier'}"
    cache = compress(model, ids[:, :100], SmallKeys(), 0.7, cache=TieredCache(model, 30, passive=store))
    with torch.no_grad():
        for at in range(100, 120):
            model(ids[:, at : at + 1], past_key_values=cache)
        cache.save(tmp_path / "session")
        opened = TieredCache.load(tmp_path / "session", model)
        for at in range(120, 170):
            logits = [model(ids[:, at : at + 1], past_key_values=one).logits for one in (cache, opened)]
            assert torch.equal(*logits), f"token {at}"
    cache.close()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_session_opens_again_and_again_also_on_disk(tmp_path, family):
    model, cache = saved(
        tmp_path / "session", family, recall_tokens=10_000, passive=f"disk:{tmp_path / 'tier'}"
    )
    ids = some_ids()
    expected = go_on(model, cache, ids)
    assert (expected - masked_logits(model, ids, None, None, Q + N)).abs().max() <= 1e-4
    for passive in ("cpu", f"disk:{tmp_path / 'other'}"):
        opened = TieredCache.load(tmp_path / "session", model, passive=passive)
        assert opened.tiers.recall_tokens == 10_000
        assert torch.equal(
            opened.stored_counts(), TieredCache.load(tmp_path / "session", model).stored_counts()
        )
        assert torch.equal(go_on(model, opened, ids), expected)
        opened.close()


def test_padding_seeds_and_a_cache_that_lost_nothing_come_back(tmp_path):
    model = prepare(tiny_model("llama"))
    ids, mask = some_ids(2), torch.ones(2, T + Q + N, dtype=torch.int64)
    mask[1, :9] = 0
    for policy, ratio in ((Ends(), 0.8), (Ends(), 0.0)):
        cache = TieredCache(model, 100)
        compress(model, ids[:, :T], policy, ratio, cache=cache, attention_mask=mask[:, :T], seeds=(4, 5))
        cache.save(tmp_path / "session")
        opened = TieredCache.load(tmp_path / "session", model)
        assert opened.seeds == (4, 5) and opened.intact == cache.intact
        assert torch.equal(opened.kept_columns(), cache.kept_columns())
        assert torch.equal(go_on(model, opened, ids, mask), go_on(model, cache, ids, mask))


def test_a_later_save_replaces_the_session_as_one(tmp_path, monkeypatch):
    model, cache = saved(tmp_path)
    first = sorted(path.name for path in tmp_path.iterdir())
    go_on(model, cache, some_ids())
    import sparsekv.cache.session_files as files

    real = files.write_atomically

    def dies(path, content):
        if path.name == "manifest.json":
            raise OSError(28, "No space left on device")
        real(path, content)

    monkeypatch.setattr(files, "write_atomically", dies)
    with pytest.raises(ConfigError, match="No space left"):
        cache.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == first
    assert TieredCache.load(tmp_path, model).seen == T
    monkeypatch.undo()
    (tmp_path / "layer-000-0123abcd.safetensors.tmp").write_bytes(b"left by a killed process")
    cache.save(tmp_path)
    assert TieredCache.load(tmp_path, model).seen == T + Q + N
    assert len(list(tmp_path.iterdir())) == len(first)


def test_damaged_sessions_are_refused(tmp_path):
    model, _ = saved(tmp_path)
    victim = sorted(tmp_path.glob("layer-001-*"))[0]
    whole, manifest = victim.read_bytes(), (tmp_path / "manifest.json").read_text()

    def refused(match: str) -> None:
        with pytest.raises(ConfigError, match=match) as caught:
            TieredCache.load(tmp_path, model)
        assert "\n" not in str(caught.value)

    victim.write_bytes(whole[:-100])
    refused("layer-001.*is damaged: [0-9]+ bytes, not [0-9]+")
    victim.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    refused("layer-001.*checksum is wrong")
    victim.unlink()
    refused("layer-001.*is missing")
    victim.write_bytes(whole)
    (tmp_path / "manifest.json").write_text(manifest.replace(f'"seen": {T}', f'"seen": {T + 1}'))
    refused("manifest.json' is damaged: its checksum is wrong")
    (tmp_path / "manifest.json").write_text(manifest[: len(manifest) // 2])
    refused("is damaged: it is no JSON")
    (tmp_path / "manifest.json").write_text(json.dumps({"format": "something"}))
    refused("was not written by sparsekv")
    (tmp_path / "manifest.json").unlink()
    refused("no session was saved there")
    (tmp_path / "manifest.json").write_text(manifest)
    assert TieredCache.load(tmp_path, model).seen == T


def test_another_model_s_session_is_refused(tmp_path):
    saved(tmp_path)
    for other, field in (
        (tiny_model("llama", seed=1), "weights"),
        (tiny_model("qwen3"), "model_type"),
        (tiny_model("llama", num_hidden_layers=2), "num_hidden_layers"),
        (
            tiny_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 5.0}),
            "weights",
        ),
        (tiny_model("llama").to(torch.bfloat16), "dtype is 'float32', this one has 'bfloat16'"),
    ):
        with pytest.raises(ConfigError, match=f"is of another model: its {field}"):
            TieredCache.load(tmp_path, prepare(other))


def test_predictors_that_look_on_change_nothing_of_a_session(tmp_path):
    _, cache = saved(tmp_path)
    other = prepare(tiny_model("llama"))
    attach_relevance(other)
    assert torch.equal(TieredCache.load(tmp_path, other).kept_columns(), cache.kept_columns())


def test_what_can_not_be_saved(tmp_path):
    model = prepare(tiny_model("llama"))
    with pytest.raises(ConfigError, match="the cache is empty"):
        TieredCache(model, 8).save(tmp_path)
    unknown = TieredCache(model.config, 8)
    model.generate(some_ids(), past_key_values=unknown, max_new_tokens=1)
    with pytest.raises(ConfigError, match="doesn't know its model"):
        unknown.save(tmp_path)
    cache = compress(model, some_ids(), Ends(), 0.5, cache=TieredCache(model.config, 8))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds other files \('notes.txt'\)"):
        cache.save(tmp_path)
    file = tmp_path / "notes.txt"
    with pytest.raises(ConfigError, match="cannot be written"):
        cache.save(file)
    cache.save(tmp_path / "session")
    with pytest.raises(ConfigError, match="with the model itself"):
        TieredCache.load(tmp_path / "session", model.config)


def test_one_writes_a_session_at_a_time(tmp_path):
    model, cache = saved(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    with FileLock(str(tmp_path / ".lock")), pytest.raises(ConfigError, match="being written by another"):
        cache.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    cache.save(tmp_path)
    assert TieredCache.load(tmp_path, model).seen == T


@pytest.mark.parametrize("error", [ConfigError("damaged"), KeyboardInterrupt(), MemoryError()])
def test_whatever_ends_a_writing_leaves_no_files_of_it(tmp_path, monkeypatch, error):
    model, cache = saved(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    real, asked = cache.tiers.store.all_entries, []

    def fails(*arguments):
        asked.append(arguments)
        if len(asked) == 2:
            raise error
        return real(*arguments)

    monkeypatch.setattr(cache.tiers.store, "all_entries", fails)
    with pytest.raises(type(error)):
        cache.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert TieredCache.load(tmp_path, model).seen == T


def test_rows_of_a_joined_session_keep_their_active_sizes(tmp_path):
    model, ids = prepare(tiny_model("llama")), some_ids()
    parts = [
        compress(model, ids[:, :T], Ends(), 0.5, cache=TieredCache(model, active)) for active in (10, 25)
    ]
    joined = join(parts)
    joined.save(tmp_path)
    for cache in (joined, TieredCache.load(tmp_path, model)):
        with pytest.raises(ConfigError, match="rows whose active sizes differ, so it can't be compressed"):
            compress(model, ids.expand(2, -1), Ends(), 0.5, cache=cache)


def test_files_of_a_cache_that_is_dropped_are_closed(tmp_path):
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("needs /proc")
    model = prepare(tiny_model("llama"))

    def opened() -> int:
        gc.collect()
        return sum(str(tmp_path) in os.readlink(path) for path in descriptors.iterdir() if path.is_symlink())

    for number in range(3):
        compress(
            model,
            some_ids()[:, :T],
            Ends(),
            0.8,
            cache=TieredCache(model, 8, f"disk:{tmp_path / str(number)}"),
        )
    assert opened() == 0
    with TieredCache(model, 8, f"disk:{tmp_path / 'again'}") as cache:
        compress(model, some_ids()[:, :T], Ends(), 0.8, cache=cache)
        assert opened() > 0
    assert opened() == 0
