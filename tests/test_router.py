# SPDX-License-Identifier: Apache-2.0
"""fused_router: what a Switch router returns keeps every bit, and can be had from the model's own code."""

import copy
import pickle
import sys

import numpy as np
import pytest
import torch
from switch_models import batch, run, switch_model
from transformers import SwitchTransformersConfig
from transformers.models.switch_transformers import modeling_switch_transformers as modeling

import moeshard
from moeshard import _core, router
from moeshard.router import FusedTop1, fuse, unfuse

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def routers(experts, dtype, capacity, seed=0, **settings):
    """HuggingFace's own and a fused one with the same weights."""
    torch.manual_seed(seed)
    config = SwitchTransformersConfig(d_model=24, num_experts=experts, expert_capacity=capacity, **settings)
    own = modeling.SwitchTransformersTop1Router(config).eval().to(dtype)
    fused = copy.deepcopy(own)
    fuse(fused)
    assert isinstance(fused, FusedTop1) and isinstance(fused, modeling.SwitchTransformersTop1Router)
    return own, fused


def same(own, fused, hidden):
    """Whether both return the same bits; NaNs are the same as NaNs."""
    with torch.inference_mode():
        expected, found = own(hidden), fused(hidden)
    return len(expected) == len(found) == 3 and all(
        a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(expected, found, strict=True)
    )


@DTYPES
@pytest.mark.parametrize("experts", [1, 2, 5, 128, 300])
@pytest.mark.parametrize("capacity", [0, 1, 3, 64, sys.maxsize])
def test_a_fused_router_returns_the_bits_of_huggingfaces(experts, dtype, capacity):
    own, fused = routers(experts, dtype, capacity, router_bias=experts == 5)
    for size, length in [(1, 1), (3, 1), (1, 33), (4, 67), (2, 130)]:
        assert same(own, fused, torch.randn(size, length, 24).to(dtype))
    assert same(own, fused, torch.randn(24, 5, 3).to(dtype).permute(2, 1, 0)), "not contiguous"
    assert same(own, fused, torch.empty(2, 0, 24, dtype=dtype))


@DTYPES
def test_ties_go_to_the_lowest_expert_as_in_huggingfaces(dtype):
    own, fused = routers(7, dtype, 4)
    for both in (own, fused):
        both.classifier.weight.data = both.classifier.weight.data.mul(0).index_fill(0, torch.tensor([2, 5]), 1.0)
    hidden = torch.randint(-1, 2, (3, 40, 24)).to(dtype)
    assert same(own, fused, hidden)
    with torch.inference_mode():
        chosen = fused(hidden)[0].nonzero()[:, -1].unique().tolist()
    assert chosen == [0, 2]  # 0: where all others lose, or all are equal


@DTYPES
def test_what_is_not_a_number_is_chosen_as_huggingfaces_does(dtype):
    own, fused = routers(6, dtype, 3)
    hidden = torch.randn(2, 20, 24).to(dtype)
    hidden[0, 3], hidden[0, 4, 1], hidden[1, 7:9] = float("nan"), float("inf"), float("-inf")
    assert same(own, fused, hidden)
    with torch.inference_mode():
        assert fused(hidden)[1].isnan().any()


@DTYPES
def test_any_probabilities_are_judged_as_torch_does(dtype):
    torch.manual_seed(0)
    values = torch.tensor([0.0, -0.0, 0.25, 0.5, -1.0, float("inf"), float("-inf"), float("nan")]).to(dtype)
    for length, experts, capacity in [(1, 1, 1), (9, 3, 2), (50, 257, 1), (200, 513, 2)]:
        given = values[torch.randint(len(values) - (experts > 9), (3, length, experts))]
        expected = torch.nn.functional.one_hot(given.argmax(-1), experts)
        expected = expected * (expected.cumsum(-2) <= capacity)
        mask, best = torch.full_like(expected, -7), torch.empty(3 * length, dtype=dtype)
        _core.route_top1(given.view(-1, experts), length, capacity, mask.view(-1, experts), best)
        assert torch.equal(mask, expected)
        assert torch.equal(best.nan_to_num(9), given.max(-1).values.view(-1).nan_to_num(9))


def test_bad_arguments_are_named():
    given, mask, best = np.zeros((6, 4), np.float32), np.zeros((6, 4), np.int64), np.zeros(6, np.float32)
    for arguments, error, said in [
        ((given, 4, 1, mask, best), moeshard.ShapeError, "sequence: got 4, which does not divide 6"),
        ((given, 0, 1, mask, best), moeshard.ShapeError, "sequence: got 0"),
        ((given[:, :0].copy(), 3, 1, mask[:, :0].copy(), best), moeshard.ArgumentError, "num_experts: got 0"),
        ((given, 3, 1, mask[:5], best), moeshard.ShapeError, "mask: got .5, 4., expected .T=6, E=4."),
        ((given, 3, 1, mask.astype(np.int32), best), moeshard.DTypeError, "mask: got int32"),
        ((given, 3, 1, mask, best[:5]), moeshard.ShapeError, "best: got .5., expected .T=6."),
        ((given, 3, 1, mask, best.astype(np.float64)), moeshard.DTypeError, "best: got float64"),
        ((given.astype(int), 3, 1, mask, best), moeshard.DTypeError, "probabilities: got int64"),
        ((given.T, 2, 1, mask, best), moeshard.ArgumentError, "probabilities"),
    ]:
        with pytest.raises(error, match=said):
            _core.route_top1(*arguments)


# ---- in a model -------------------------------------------------------------------------------------------------


def fused_in(model):
    return [module for module in model.modules() if isinstance(module, FusedTop1)]


@pytest.mark.parametrize("kind", ["encoder", "seq2seq"])
@DTYPES
def test_the_switch_turns_it_off_and_nothing_a_model_returns_changes(kind, dtype):
    inputs = batch(3, 12)
    if kind == "seq2seq":
        inputs["labels"] = batch(3, 7)["input_ids"]
    models = []
    for options in ({}, {"fused_router": False}):
        model = switch_model(kind, expert_capacity=2).to(dtype)
        models.append(moeshard.shard(model, progress=False, **options))
    assert fused_in(models[0]) and not fused_in(models[1])
    found = []
    for model in models:
        with torch.inference_mode():
            out = model(**inputs, output_router_logits=True)
        logits = [value for name, value in out.items() if "router" in name]
        assert logits
        found.append([*run(model, inputs).outputs, *flat(logits)])
    assert len(found[0]) == len(found[1]) and all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    moeshard.unshard(models[0])
    assert not fused_in(models[0])


def flat(values):
    """The tensors in nested tuples."""
    return [values] if isinstance(values, torch.Tensor) else [x for value in values or () for x in flat(value)]


def test_it_is_off_where_gradients_are_on_and_can_be_copied():
    own, fused = routers(5, torch.float32, 2)
    hidden = torch.randn(2, 9, 24)
    assert fused(hidden)[1].requires_grad == own(hidden)[1].requires_grad
    again = copy.deepcopy(fused)
    again.classifier.weight.data.neg_()
    own.classifier.weight.data.neg_()
    assert same(own, again, hidden) and not same(own, fused, hidden)
    assert same(fused, pickle.loads(pickle.dumps(fused)), hidden)
    unfuse(fused)
    assert type(fused) is modeling.SwitchTransformersTop1Router


@pytest.mark.parametrize("change", ["values", "made of"])
def test_a_router_of_another_making_is_left_alone(change):
    class Other(modeling.SwitchTransformersTop1Router):
        def forward(self, hidden_states):
            if change == "made of":
                return self.gate(hidden_states)
            mask, best, logits = super().forward(hidden_states)
            return mask, best.square(), logits

    other = Other(SwitchTransformersConfig(d_model=24, num_experts=5)).eval()
    fuse(other)
    assert type(other) is Other


def test_finding_out_runs_no_hook_and_changes_no_router():
    own = modeling.SwitchTransformersTop1Router(SwitchTransformersConfig(d_model=24)).eval().bfloat16()
    calls = []
    for module in own.modules():
        module.register_forward_hook(lambda *call: calls.append(call))
    before = {name: value for name, value in vars(own).items() if not name.startswith("_")}
    fuse(own)
    assert isinstance(own, router.FusedTop1) and not calls and own.classifier.weight.dtype == torch.bfloat16
    assert before == {name: value for name, value in vars(own).items() if not name.startswith("_")}
