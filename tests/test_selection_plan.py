"""SelectionPlan: what one forward hides, per row, and what it leaves behind."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from kvpress import SnapKVPress

from oracle import positions
from sample_policies import SmallKeys
from sparsekv.attention import prepare
from sparsekv.errors import ConfigError
from sparsekv.plan import SelectionPlan, budget_for
from sparsekv.policies import make_policy
from sparsekv.policies.anchors import Anchors, DynamicAnchors, PlaceAnchorConfig
from sparsekv.policies.augment import EvictionAug
from sparsekv.policies.base import LayerPolicy
from sparsekv.policies.budget import Budget
from sparsekv.selection import NEVER, Selection
from sparsekv.training.dropping import DroppingConfig, make_plan
from toy import tiny_model

T = 20


def run(plan, mask=None, family="llama"):
    model = prepare(tiny_model(family))
    ids = torch.randint(3, 250, (2, T), generator=torch.Generator().manual_seed(7))
    padding = {} if mask is None else {"attention_mask": mask.long(), "position_ids": positions(mask)}
    with torch.no_grad():
        return model(input_ids=ids, selection=plan, use_cache=False, **padding).logits


def padded():
    mask = torch.ones(2, T, dtype=torch.bool)
    mask[1, :6] = False
    return mask


def test_prefill_hides_from_each_rows_boundary_on():
    plan = SelectionPlan(
        SmallKeys(), Budget(compression_ratio=0.5), boundary=(12, 14), attention_mask=padded()
    )
    run(plan, padded())
    assert set(plan.selected) == {0, 1, 2}
    for at in plan.selected.values():
        assert at.shape == (2, 2, T)
        assert ((at[0, :, :12] == 12).sum(-1) == 6).all() and (at[0, :, 12:] == NEVER).all()
        assert (at[1, :, :6] == 0).all() and ((at[1, :, 6:14] == 14).sum(-1) == 4).all()
        assert (at[1, :, 14:] == NEVER).all() and (
            at[0, :, :12].masked_fill(at[0, :, :12] == 12, NEVER) == NEVER
        ).all()


def test_streaming_hides_a_window_later():
    plan = SelectionPlan(SmallKeys(), Budget(compression_ratio=0.5), window=5, attention_mask=padded())
    run(plan, padded())
    for at in plan.selected.values():
        for row, start in ((0, 0), (1, 6)):
            left = at[row, :, start:] < NEVER
            assert (left.sum(-1) == (T - start) - (T - start) // 2).all()
            column = torch.arange(start, T).expand(2, -1)
            assert torch.equal(at[row, :, start:][left], (column + 5)[left].int())


def test_rows_are_decided_alone():
    together = SelectionPlan(SmallKeys(), Budget(compression_ratio=0.5), boundary=14, attention_mask=padded())
    logits = run(together, padded())
    model = prepare(tiny_model("llama"))
    ids = torch.randint(3, 250, (2, T), generator=torch.Generator().manual_seed(7))[1:, 6:]
    alone = SelectionPlan(SmallKeys(), Budget(compression_ratio=0.5), boundary=14 - 6)
    with torch.no_grad():
        own = model(input_ids=ids, selection=alone, use_cache=False).logits
    torch.testing.assert_close(own[0], logits[1, 6:], rtol=1e-4, atol=1e-4)
    for layer, at in alone.selected.items():
        assert torch.equal(at[0] == 8, together.selected[layer][1, :, 6:] == 14)


@dataclass(frozen=True)
class Half(LayerPolicy):
    """Soft: every entry at weight `weight`; hard: keeps the first."""

    weight: float = 0.25
    name = "half"
    soft = True

    def weigh_layer(self, ctx, budget):
        return torch.full(ctx.keys.shape[:3], self.weight).log()

    def score_layer(self, ctx, budget):
        return -torch.arange(ctx.keys.shape[2]).float().expand(ctx.keys.shape[:3])


def test_soft_plans_leave_the_mean_weight_of_every_row():
    plan = SelectionPlan(Half(), Budget(compression_ratio=0.5), boundary=(12, 6), attention_mask=padded())
    plan.keep_scores = True
    run(plan, padded())
    assert plan.soft_kept[1][0] == pytest.approx(0.25)
    assert plan.soft_kept[1][1].isnan(), "row 1 has no context before its boundary"
    assert [scores.shape for scores in plan.scores[1]] == [(2, 12)]
    hard = SelectionPlan(Half(), Budget(compression_ratio=0.5), boundary=12, hard=True)
    run(hard)
    assert not hard.soft_kept and (hard.selected[0][:, :, :6] == NEVER).all()
    assert (hard.selected[0][:, :, 6:12] == 12).all()


def test_a_weight_is_what_attention_is_multiplied_by():
    """Soft weight w before the softmax normalises: exactly a log weight added to the logits."""
    model = prepare(tiny_model("llama"))
    ids = torch.randint(3, 250, (2, T), generator=torch.Generator().manual_seed(7))
    at = torch.full((2, 3, 2, T), NEVER, dtype=torch.int32)
    at[..., :12] = 12
    weight = torch.zeros(2, 3, 2, T)
    weight[..., :12] = torch.tensor(0.25).log()
    with torch.no_grad():
        wanted = model(input_ids=ids, selection=Selection(at, weight), use_cache=False).logits
    torch.testing.assert_close(run(SelectionPlan(Half(), boundary=12)), wanted, rtol=1e-5, atol=1e-5)


def test_a_short_context_loses_what_it_can():
    policy = make_policy("block_dropout", n_sink=4, n_recent=16)
    half = Budget(compression_ratio=0.5)
    assert budget_for(policy, half, 100) is half
    assert budget_for(policy, half, 40) is half
    assert budget_for(policy, half, 39).n_kept(39) == 20, "19 would be under 4 + 16"
    assert budget_for(policy, half, 24).n_kept(24) == 20
    assert budget_for(policy, half, 15).n_kept(15) == 15, "nothing leaves"
    unsized = make_policy("block_dropout", n_sink=4)
    assert budget_for(unsized, half, 6).n_kept(6) == 4
    assert not budget_for(policy, Budget(), 15).given
    with pytest.raises(ConfigError, match="under n_sink=4"):
        run(SelectionPlan(make_policy("adaptive_block_dropout", n_recent=64), Budget(tokens=8), boundary=4))


def test_a_layer_policy_gets_the_rows_own_budget():
    policy = make_policy("adaptive_block_dropout", block_size=2, n_sink=2, n_recent=8)
    plan = SelectionPlan(policy, Budget(compression_ratio=0.6), boundary=(18, 14), attention_mask=padded())
    run(plan, padded())
    for at in plan.selected.values():
        assert ((at[0] == 18).sum(-1) == 18 - 10).all(), "7 would be under 2 + 8"
        assert not (at[1] == 14).any(), "a context of 8"


@pytest.mark.parametrize("name", ["anchors", "dynamic_anchors"])
def test_the_sinks_of_anchors_are_never_short_of_room(name):
    policy, budget = make_policy(name, sink_size=8, recent_size=4), Budget(compression_ratio=0.7)
    assert budget_for(policy, budget, 16).n_kept(16) == 8, "5 would be under the sinks"
    assert budget_for(policy, budget, 5).n_kept(5) == 5
    assert budget_for(policy, budget, 40) is budget, "12 hold them; recent ones give way"
    assert budget_for(make_policy(name, sink_size=8, use_sink=False), budget, 16) is budget


def test_a_training_step_of_anchors_keeps_the_sinks_of_a_short_context():
    config = PlaceAnchorConfig(sink_size=8, recent_size=4)
    token, budget = Anchors(config), Budget(compression_ratio=0.7)
    ids = torch.randint(3, 250, (1, T), generator=torch.Generator().manual_seed(7))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    plan = make_plan(
        tiny_model("llama"), batch, token, budget, DroppingConfig(), boundaries=(16,), seeds=(0,)
    )
    wanted = torch.full((T,), NEVER, dtype=torch.int32)
    wanted[8:16] = 16
    assert torch.equal(plan.selection.layer(0)[0, 0], wanted)
    within = SelectionPlan(DynamicAnchors(config, "knorm"), budget, boundary=(16, 4))
    run(within)
    for at in within.selected.values():
        assert torch.equal(at[0], wanted.expand(2, -1))
        assert (at[1] == NEVER).all()


@pytest.mark.parametrize("hard", [False, True])
def test_a_context_no_longer_than_a_press_window_stays_whole(hard):
    """kvpress refuses to score it; the other row is scored as ever, softly or by a choice."""
    (policy,) = EvictionAug(policies=(SnapKVPress(window_size=4),), soft_scores=True).policies
    plan = SelectionPlan(policy, Budget(compression_ratio=0.5), boundary=(12, 4), hard=hard)
    run(plan)
    for layer, at in plan.selected.items():
        assert ((at[0] == 12).sum(-1) == (6 if hard else 12)).all()
        if hard:
            assert (at[1] == NEVER).all()
        else:
            kept = plan.soft_kept[layer]
            assert kept[0] == pytest.approx(0.5, abs=1e-3) and kept[1] == 1
    alone = SelectionPlan(policy.inner, Budget(compression_ratio=0.5), boundary=(12, 4))
    run(alone)
    assert all((at[1] == NEVER).all() and (at[0] == 12).any() for at in alone.selected.values())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "either a layer policy or a ready selection"),
        ({"policy": SmallKeys()}, "either a boundary .prefill. or a window"),
        ({"policy": SmallKeys(), "boundary": 3, "window": 4}, "either a boundary .prefill. or a window"),
    ],
)
def test_mistakes_are_told(given, message):
    with pytest.raises(ConfigError, match=message):
        SelectionPlan(**given)


def test_an_unprepared_model_is_told():
    model = tiny_model("llama")
    model.set_attn_implementation("sdpa")
    plan = SelectionPlan(SmallKeys(), Budget(compression_ratio=0.5), boundary=4)
    with pytest.raises(ConfigError, match=r"sparsekv\.prepare"):
        plan.decide(
            model.model.layers[0].self_attn, 0, torch.zeros(1, 2, 8, 16), torch.zeros(1, 2, 8, 16), None
        )
