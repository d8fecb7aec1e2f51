# SPDX-License-Identifier: Apache-2.0
"""Plans of whole models are carried out by shard, and those for other models are refused before anything is changed."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from switch_models import batch, switch_model
from workers import on_ranks

import moeshard
from moeshard import ModelPlan
from moeshard.planner import model_shape
from moeshard.planner.machines import CPU


def sharded_by_plan(group, layout):
    """Largest difference from the unsharded model, and the columns that each layer of this rank got."""
    model, inputs = switch_model(num_experts=6, expert_capacity=100), batch(2, 9, seed=group.rank)
    histogram = [10, 1, 1, 1, 1, 2]
    found = moeshard.plan(model, ranks=group.size, tokens=18, histogram=histogram, devices=CPU, layout=layout)
    found = ModelPlan.from_json(found.to_json())
    with torch.no_grad():
        before = model(**inputs).last_hidden_state
        moeshard.shard(model, group=group, plan=found, progress=False)
        after = model(**inputs).last_hidden_state
    layers = [module for module in model.modules() if isinstance(module, moeshard.ShardedExperts)]
    same = [layer.plan == entry.plan for layer, entry in zip(layers, found.layers, strict=True)]
    mask = inputs["attention_mask"].bool()
    return float((after - before)[mask].abs().max() / before[mask].abs().max()), all(same) and len(same) == 2


@pytest.mark.parametrize("layout", ["auto", "expert_parallel", "balanced", "hot_sharded"])
def test_shard_carries_out_a_plan(workers, layout):
    for difference, same in on_ranks(workers, 2, sharded_by_plan, layout):
        assert same and difference < 1e-5


def test_a_model_gives_its_shape_before_and_after_it_is_sharded():
    model = switch_model(num_experts=6)
    shape = model_shape(model)
    assert [(layer.num_experts, layer.d_model, layer.d_ff, layer.top_k) for layer in shape.layers] == [
        (6, 48, 37, 1)
    ] * 2
    assert [layer.name for layer in shape.layers] == [layer.name for layer in model_shape(model.config).layers]
    moeshard.shard(model, group=moeshard.init("one"), progress=False)
    assert model_shape(model).layers == shape.layers
    with pytest.raises(moeshard.ArgumentError, match="Linear has no MoE layer"):
        model_shape(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        pytest.param({"d_ff": 36}, moeshard.ShapeError, r"block.1.*\(1, 8, 37\).*\(1, 8, 36\)", id="width"),
        pytest.param({"num_experts": 4}, moeshard.ShapeError, r"\(1, 4, 37\)", id="experts"),
        pytest.param({"name": "decoder"}, moeshard.ArgumentError, "no layer 'encoder.block.1.layer.1.mlp'", id="name"),
    ],
)
def test_a_plan_for_another_model_is_refused_before_anything_is_changed(changes, error, message):
    model = switch_model()
    shape = model_shape(model)
    other = replace(shape, layers=(replace(shape.layers[0], **changes), *shape.layers[1:]))
    found = moeshard.plan(other, ranks=1, tokens=10, devices=CPU)
    with pytest.raises(error, match=message):
        moeshard.shard(model, group=moeshard.init("one"), plan=found, progress=False)
    assert not any(isinstance(module, moeshard.ShardedExperts) for module in model.modules())


def test_a_plan_with_more_layers_than_the_model_is_refused():
    model = switch_model()
    shape = model_shape(model)
    extra = replace(shape, layers=(*shape.layers, replace(shape.layers[0], name="decoder.block.1.layer.2.mlp")))
    with pytest.raises(moeshard.ArgumentError, match="the model has no decoder.block.1.layer.2.mlp"):
        moeshard.shard(model, group=moeshard.init("one"), plan=moeshard.plan(extra, ranks=1, tokens=10), progress=False)


def test_a_plan_of_one_layer_serves_a_layer_without_a_name():
    found = moeshard.plan(replace(model_shape("switch-base-8").layers[0], d_model=8, d_ff=12), ranks=1, tokens=10)
    w_in, w_out = torch.randn(8, 12, 8), torch.randn(8, 8, 12)
    layer = moeshard.ShardedExperts.from_weights(w_in, w_out, plan=found, group=moeshard.init("one"))
    assert layer.plan is found.layers[0].plan


def test_a_report_is_a_histogram():
    model = switch_model(hot_expert=3)
    moeshard.shard(model, group=moeshard.init("one"), capacity=None, progress=False)
    with torch.no_grad():
        model(**batch(2, 9, padded=False))
    found = moeshard.plan(model, ranks=2, tokens=18, histogram=moeshard.report(model), devices=CPU)
    alone = np.zeros(8)
    alone[3] = 1
    assert (
        found.layers[0].times == moeshard.plan(model, ranks=2, tokens=18, histogram=alone, devices=CPU).layers[0].times
    )
