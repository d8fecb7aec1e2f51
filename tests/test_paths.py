# SPDX-License-Identifier: Apache-2.0
"""Token paths: what is recorded of a model, what is refused, and plans for the routing that they hold."""

import json

import numpy as np
import pytest
import torch
from switch_models import batch, switch_model

import moeshard
from moeshard import ArgumentError, DTypeError, RangeError, ShapeError, TokenPaths
from moeshard.layer import sharded_layers
from moeshard.planner import LayerShape, ModelShape
from moeshard.planner.machines import CPU

MODEL = ModelShape("model", (LayerShape("encoder.0.mlp", 4, 64, 256), LayerShape("encoder.1.mlp", 4, 64, 256)))
# Expert 3 is hot in the first layer, none in the second; a token was dropped in each.
EXPERTS = [[[3], [0]], [[3], [1]], [[3], [2]], [[3], [3]], [[0], [-1]], [[-1], [0]]]
COUNTS = [[1, 0, 0, 4], [2, 1, 1, 1]]


@pytest.mark.parametrize(
    ("experts", "error", "message"),
    [
        ([[[0.5]]], DTypeError, "experts: expected integers"),
        ([[0]], ShapeError, r"experts: expected \[tokens, layers, choices\]"),
        ([[[4]]], RangeError, r"experts\[0, 0, 0\]: got 4, expected -1 to 3"),
    ],
)
def test_bad_paths_are_named(experts, error, message):
    with pytest.raises(error, match=message):
        TokenPaths(experts, 4)


def test_a_model_is_recorded_without_its_padding():
    model, inputs = switch_model(), [batch(4, 9, seed=1), batch(2, 5, seed=2)]
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    paths = moeshard.record_routing(model, inputs)
    assert paths.experts.shape == (sum(int(one["attention_mask"].sum()) for one in inputs), 2, 1)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    sharded = moeshard.shard(model, progress=False)
    with torch.no_grad():
        sharded(input_ids=inputs[0]["input_ids"][:, :3])
    assert [name for name, _ in sharded_layers(sharded)] == list(paths.layers)
    recorded = moeshard.record_routing(sharded, inputs)
    np.testing.assert_array_equal(recorded.experts, paths.experts)


def planned(histogram):
    return moeshard.plan(MODEL, ranks=2, tokens=500, histogram=histogram, devices=CPU)


@pytest.mark.parametrize("names", [("encoder.0.mlp", "encoder.1.mlp"), ("0.mlp", "model.encoder.1.mlp")])
def test_paths_are_a_histogram_of_their_layers(names):
    expected = planned(COUNTS).to_dict()
    assert planned(TokenPaths(EXPERTS, 4, names)).to_dict() == expected != planned(COUNTS[::-1]).to_dict()
    turned = TokenPaths(np.array(EXPERTS)[:, ::-1], 4, names[::-1])  # by name, not by order
    assert planned(turned).to_dict() == expected


@pytest.mark.parametrize(
    ("paths", "error", "message"),
    [
        (TokenPaths(EXPERTS, 4), ArgumentError, "histogram: it has no layer 'encoder.0.mlp', only layer 0, layer 1"),
        (TokenPaths(EXPERTS, 5, ("0.mlp", "1.mlp")), ShapeError, r"'encoder.0.mlp': expected \[4\] .*got \[5\]"),
        (TokenPaths(np.empty((0, 2, 1), int), 4, ("0.mlp", "1.mlp")), ArgumentError, "numbers are 0"),
    ],
)
def test_paths_of_another_model_are_no_histogram(paths, error, message):
    with pytest.raises(error, match=message):
        planned(paths)


def test_a_recorded_model_is_planned_for():
    model = switch_model(hot_expert=3)
    paths = moeshard.record_routing(model, [batch(2, 9)])
    found = moeshard.plan(model, ranks=2, tokens=18, histogram=paths, devices=CPU)
    assert found.to_dict() == moeshard.plan(model, ranks=2, tokens=18, histogram=paths.counts, devices=CPU).to_dict()


def test_the_command_reads_paths(capsys, tmp_path):
    from moeshard.cli import main

    TokenPaths(EXPERTS * 40, 4, ("layers.0.mlp", "layers.1.mlp")).save(tmp_path / "paths.npz")
    config = {"model_type": "openai_privacy_filter", "num_hidden_layers": 2, "num_local_experts": 4}
    config |= {"hidden_size": 64, "intermediate_size": 256, "num_experts_per_tok": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = f"plan --config {tmp_path}/config.json --layout balanced --histogram".split()
    assert main([*words, str(tmp_path / "paths.npz"), "--json", str(tmp_path / "plan.json")]) == 0
    hot, even = (layer.ffn for layer in moeshard.ModelPlan.load(tmp_path / "plan.json").layers)
    assert hot.max() / hot.mean() > 1.4 > 1.3 > even.max() / even.mean()
    np.savez(tmp_path / "other.npz", counts=np.ones(4))
    capsys.readouterr()
    assert main([*words, str(tmp_path / "other.npz")]) == 1
    assert "no token paths that moeshard has saved" in capsys.readouterr().err
