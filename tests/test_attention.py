"""`prepare`, the one attention function, and what its `selection=` argument refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from oracle import masked_logits, stepped_logits
from sample_policies import Ends, Scatter, SmallKeys
from sparsekv import make_cache
from sparsekv.attention import prepare
from sparsekv.cache.tiered import TieredCache
from sparsekv.errors import ConfigError
from sparsekv.generation import compress
from sparsekv.masked import selection_bias
from sparsekv.plan import SelectionPlan
from sparsekv.policies.budget import Budget
from sparsekv.selection import NEVER, Selection
from toy import tiny_model

T, Q = 40, 7

ADAKV = """
import sys
sys.path[:0] = {paths!r}
{imports}
import torch
torch.set_num_threads(1)
import kvpress
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from oracle import masked_logits
from toy import tiny_model
from sparsekv.attention import prepare, sparsekv_attention
from sparsekv.selection import Selection

model = prepare(prepare(tiny_model("llama")))
wrapper = ALL_ATTENTION_FUNCTIONS["sparsekv"]
inner = [cell.cell_contents for cell in wrapper.__closure__]
assert inner == [sparsekv_attention], inner
assert wrapper.__module__ == "kvpress.attention_patch"
ids = torch.randint(3, 250, (1, 47), generator=torch.Generator().manual_seed(3))
press, cache = kvpress.AdaKVPress(kvpress.KnormPress(0.5)), DynamicCache()
with torch.no_grad(), press(model):
    model.model(input_ids=ids[:, :40], past_key_values=cache)
kept = torch.ones(1, 3, 2, 40, dtype=torch.bool)
for index, layer in enumerate(model.model.layers):
    _, heads, columns = layer.self_attn.masked_key_indices
    kept[0, index, heads, columns] = False
assert int((~kept).sum()) == 3 * 2 * 20
with torch.no_grad():
    answer = model(input_ids=ids[:, 40:], past_key_values=cache).logits
for layer in model.model.layers:
    layer.self_attn.masked_key_indices = None
masked = masked_logits(model, ids, None, Selection.from_kept(kept).extend(47), 7)
plain = masked_logits(model, ids, None, None, 7)
print(float((answer - masked).abs().max()), float((answer - plain).abs().max()))
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import kvpress",
        "from sparsekv.attention import prepare\nfrom toy import tiny_model\nprepare(tiny_model())",
    ],
    ids=["kvpress first", "prepare first"],
)
def test_a_head_wise_press_of_kvpress_works_on_a_prepared_model(imports):
    """AdaKV hides entries by the attention patch of kvpress; without the patch it would silently change nothing."""
    here = Path(__file__).parent
    code = ADAKV.format(paths=[str(here), str(here.parent / "src")], imports=imports)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    to_masked, to_plain = map(float, done.stdout.split())
    assert to_masked <= 1e-4
    assert to_plain > 1e-2


def test_other_models_are_untouched():
    other, same = tiny_model("qwen3"), tiny_model("qwen3", seed=0)
    prepare(
        tiny_model("llama")
    )  # the first call imports kvpress, which wraps every function registered by then
    stock = dict(ALL_ATTENTION_FUNCTIONS.items())
    ids = torch.randint(3, 250, (1, T), generator=torch.Generator().manual_seed(1))
    before = other(input_ids=ids).logits
    prepared = prepare(same)
    assert same is prepared and same.config._attn_implementation == "sparsekv"
    assert other.config._attn_implementation == "sdpa"
    assert not any(module._forward_pre_hooks for module in other.modules())
    assert torch.equal(other(input_ids=ids).logits, before)
    now = dict(ALL_ATTENTION_FUNCTIONS.items())
    assert {n for n in now if n not in stock or now[n] is not stock[n]} == {"sparsekv"}


def test_preparing_again_adds_no_hook():
    model = prepare(tiny_model("llama"))
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    assert hooks == 3 + 1
    prepare(model)
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == hooks


def test_a_selection_and_a_compacted_cache_contradict_each_other():
    model = prepare(tiny_model("llama"))
    ids = torch.randint(3, 250, (1, T + Q), generator=torch.Generator().manual_seed(1))
    cache = compress(model, ids[:, :T], Ends(), 0.5)
    with pytest.raises(ConfigError, match="can't be given with a cache that has been compacted"):
        model(input_ids=ids[:, T:], past_key_values=cache, selection=Selection.full(torch.ones(1, T + Q)))


def test_a_selection_and_a_cache_that_reads_a_part_contradict_each_other():
    """Both caches still hold every entry; their readers would go by the unmasked cache in silence."""
    model = prepare(tiny_model("llama"))
    ids = torch.randint(3, 250, (1, T + Q), generator=torch.Generator().manual_seed(1))
    everything = Selection.full(torch.ones(1, T + Q))
    over_its_size = TieredCache(model, T + Q - 1)
    within_its_size = TieredCache(model, T + Q)
    for cache in (over_its_size, within_its_size, quest := make_cache("quest", model, 16)):
        with torch.no_grad():
            model(input_ids=ids[:, :T], past_key_values=cache)
        assert cache.intact
    for cache in (over_its_size, quest):
        with pytest.raises(ConfigError, match="or that reads a part of what it stores"):
            model(input_ids=ids[:, T:], past_key_values=cache, selection=everything)
    hides = Selection.from_kept(torch.arange(T)[None, None, None] % 3 > 0).extend(T + Q)
    with torch.no_grad():
        logits = model(input_ids=ids[:, T:], past_key_values=within_its_size, selection=hides).logits
    assert (logits - masked_logits(model, ids, None, hides, Q)).abs().max() <= 1e-4


def test_selection_errors():
    model = prepare(tiny_model("llama"))
    ids = torch.randint(3, 250, (1, T), generator=torch.Generator().manual_seed(1))
    longer = Selection.from_kept(torch.arange(T + 1)[None, None, None] > 5)
    with pytest.raises(ConfigError, match="covers 41 columns, the model sees 40"):
        model(input_ids=ids, selection=longer)
    with pytest.raises(ValueError, match="selection"):
        model.generate(ids, selection=Selection.full(torch.ones(1, T)), max_new_tokens=2)
    unhooked = tiny_model("llama")
    unhooked.set_attn_implementation("sparsekv")
    with pytest.raises(ConfigError, match=r"went through sparsekv\.prepare"):
        unhooked(input_ids=ids, selection=SelectionPlan(SmallKeys(), Budget(0.5), boundary=T))
    with pytest.raises(ConfigError, match="not supported"):
        from transformers import GPT2Config, GPT2LMHeadModel

        prepare(GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=9)))


def test_selection_bias_is_the_rule_entry_by_entry():
    """bias(q, k) = -inf if q < k or k is a pad; 0 if q < evicted_at[k]; else log_weight[k]. Q = 3 of T = 5."""
    at = torch.tensor([0, 3, 4, NEVER, NEVER], dtype=torch.int32)[None, None]
    query = torch.zeros(1, 2, 3, 4)
    hard = selection_bias(at, None, None, query, 5)
    assert hard[0, 0].int().tolist() == [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
    weight = torch.tensor([9.0, -1.0, -2.0, -3.0, -4.0])[None, None]
    soft = selection_bias(at, weight, None, query, 5)
    no = float("-inf")
    assert soft[0, 0].tolist() == [[no, 0, 0, no, no], [no, -1, 0, 0, no], [no, -1, -2, 0, 0]]
    gone = torch.full((1, 1, 3, 5), True).tril(2)
    gone[..., 1] = False
    both = selection_bias(at, None, gone, query, 5)
    assert both[0, 0].int().tolist() == [[0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]


def test_bias_is_none_exactly_where_nothing_is_hidden():
    query = torch.zeros(1, 2, 4, 4)
    pads = Selection.full(torch.tensor([[0, 0, 1, 1]])).evicted_at[:, 0]
    mask = torch.tensor([False, False, True, True])[None, None, None].expand(1, 1, 4, 4)
    assert selection_bias(pads, None, mask, query, 4) is None, "the mask hides the pads already"
    assert selection_bias(pads, None, None, query, 4)[0, 0, 3].tolist() == [False, False, True, True]
    later = torch.tensor([4, NEVER, NEVER, NEVER], dtype=torch.int32)[None, None]
    assert selection_bias(later, None, None, query, 4) is None, "evicted only after the last query"
    assert selection_bias(later, None, None, query, 5)[0, 0, -1].tolist() == [False, True, True, True, True]


def test_a_plan_reads_right_padding_after_the_boundary_as_no_offset():
    """Padding behind the boundary must not shift what the policy sees of the context."""
    model = prepare(tiny_model("llama"))
    ids = torch.randint(3, 250, (2, T + Q), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, T + 4 :] = 0
    plan = SelectionPlan(SmallKeys(), Budget(0.5), boundary=T, attention_mask=mask)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask, selection=plan, use_cache=False)
    alone = compress(model, ids[:, :T], SmallKeys(), 0.5).selection()
    for layer in range(3):
        assert torch.equal(plan.selected[layer][..., :T] > T, alone.layer(layer) > T)


def test_stored_and_masked_attention_agree_for_a_single_layer_call():
    """The attention function alone, without a model's mask: grouped queries over per-head counts."""
    model = prepare(tiny_model("llama", num_hidden_layers=1))
    ids = torch.randint(3, 250, (1, T + Q), generator=torch.Generator().manual_seed(1))
    cache = compress(model, ids[:, :T], Scatter(), 0.5)
    masked = masked_logits(model, ids, None, cache.selection().extend(T + Q), Q)
    for steps in ([Q], [1] * Q, [2, 5]):
        state = cache.snapshot()
        assert (stepped_logits(model, cache, ids, None, steps) - masked).abs().max() <= 1e-4
        cache.restore(state)
