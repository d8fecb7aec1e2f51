# SPDX-License-Identifier: Apache-2.0
"""Whole Switch models, sharded, against HuggingFace's own: run under transformers 5 and under 4.57."""

import sys

import pytest
import torch
import transformers
from switch_models import batch, compare, routers, run, switch_model
from workers import on_ranks

import moeshard
from moeshard.adapters.switch import ShardedSwitch

RANKS = pytest.mark.parametrize("ranks", [1, 2, 3, 4])
BATCHES = ((1, 19, False), (32, 11, True))  # size, length, padded


def parity(group, kind, settings, capacity, batches):
    """Largest difference between HF and moeshard over the batches of this rank, the flips, and the tokens dropped."""
    worst, flips, dropped = 0.0, [], 0
    model = switch_model(kind, **settings)
    limits = [router.expert_capacity for router in routers(model)]
    for router in routers(model):
        if capacity != "model":
            router.expert_capacity = sys.maxsize if capacity is None else capacity
    inputs = [batch(size, length, padded=padded, seed=group.rank) for size, length, padded in batches]
    if kind == "seq2seq":
        inputs = [{**given, "labels": batch(len(given["input_ids"]), 7, seed=9)["input_ids"]} for given in inputs]
    expected = [run(model, given) for given in inputs]
    for router, limit in zip(routers(model), limits, strict=True):
        router.expert_capacity = limit
    moeshard.shard(model, group=group, capacity=capacity, progress=False)
    for given, before in zip(inputs, expected, strict=True):
        after = run(model, given)
        difference, found = compare(before, after)
        worst, flips = max(worst, difference), flips + found
        dropped += sum(int((chosen < 0).sum()) for chosen in after.chosen)
    return worst, flips, dropped


def check(workers, ranks, kind="encoder", capacity="model", batches=BATCHES, **settings):
    """Parity on every rank; returns the number of dropped tokens."""
    arguments = (kind, settings, capacity, batches)
    results = [parity(moeshard.init("one"), *arguments)] if ranks == 1 else on_ranks(workers, ranks, parity, *arguments)
    for worst, flips, _ in results:
        assert worst <= 1e-5
        # A near-tie may go either way; anything else is a wrong hidden state.
        assert len(flips) <= 2 and all(margin < 1e-4 for *_, margin in flips), flips
    return sum(dropped for *_, dropped in results)


@RANKS
@pytest.mark.parametrize("experts", [1, 5, 8, 64])
def test_encoder_equals_huggingface(workers, ranks, experts):
    check(workers, ranks, num_experts=experts)


@RANKS
def test_encoder_decoder_equals_huggingface_in_logits_and_loss(workers, ranks):
    check(workers, ranks, "seq2seq")


@RANKS
@pytest.mark.parametrize("kind", ["encoder", "seq2seq"])
def test_an_expert_that_gets_everything(workers, ranks, kind):
    check(workers, ranks, kind, hot_expert=3, expert_capacity=1000)


@RANKS
@pytest.mark.parametrize("capacity", ["model", None, 2], ids=str)
def test_every_capacity_policy_drops_what_huggingface_drops(workers, ranks, capacity):
    dropped = check(workers, ranks, capacity=capacity, expert_capacity=3, hot_expert=1)
    assert (dropped == 0) == (capacity is None)


@pytest.mark.parametrize("ranks", [1, 2])
def test_encoder_of_the_real_width_equals_huggingface(workers, ranks):
    real = {"d_model": 768, "d_ff": 3072, "d_kv": 64, "num_heads": 12, "num_layers": 2, "num_sparse_encoder_layers": 1}
    check(workers, ranks, batches=((2, 40, True),), **real)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "silu"])
def test_other_activations_equal_huggingface(workers, activation):
    check(workers, 1, dense_act_fn=activation)


def generated(group):
    model = switch_model("seq2seq")
    given = batch(3, 9, seed=group.rank)
    options = {"min_new_tokens": 5, "max_new_tokens": 5, "do_sample": False}
    expected = model.generate(**given, **options)
    moeshard.shard(model, group=group, progress=False)
    return bool((model.generate(**given, **options) == expected).all())


@pytest.mark.parametrize("ranks", [1, 2])
def test_greedy_generation_gives_the_same_tokens(workers, ranks):
    results = [generated(moeshard.init("one"))] if ranks == 1 else on_ranks(workers, ranks, generated)
    assert all(results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_layers_are_as_close_to_float64_as_huggingfaces(dtype):
    """The block alone, so that both see the same routing."""
    model = switch_model(num_experts=5)
    block = model.encoder.block[1].layer[-1].mlp.to(dtype)
    hidden = torch.randn(4, 50, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        expected = block(hidden)
        mask, probability, _ = block.router(hidden)
        exact = torch.zeros(4, 50, 48, dtype=torch.float64)
        for expert in range(5):
            weights = block.experts[f"expert_{expert}"]
            h = torch.relu(hidden.double() @ weights.wi.weight.double().T)
            exact += mask[..., expert, None] * (h @ weights.wo.weight.double().T) * probability.double()
        found = moeshard.shard(block, progress=False)(hidden)
    if isinstance(expected, tuple):
        expected, found = expected[0], found[0]
    assert found.dtype == dtype
    error, huggingface = ((x.double() - exact).abs().max() for x in (found, expected))
    assert error <= 1.5 * huggingface


def test_router_logits_are_recorded_as_before():
    model = switch_model("seq2seq")
    inputs = {**batch(2, 9), "labels": batch(2, 7, seed=9)["input_ids"], "output_router_logits": True}
    with torch.no_grad():
        before, after = model(**inputs), moeshard.shard(model, progress=False)(**inputs)
    for name in ("encoder_router_logits", "decoder_router_logits"):
        flat = [
            [t for item in run[name] for t in (item if isinstance(item, tuple) else (item,))] for run in (before, after)
        ]
        assert len(flat[0]) == len(flat[1]) >= 2
        for expected, found in zip(*flat, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(after.loss, before.loss)


def test_the_block_returns_what_the_installed_version_returns():
    block = switch_model(expert_capacity=2).encoder.block[1].layer[-1].mlp
    hidden = torch.randn(2, 9, 48)
    with torch.no_grad():
        expected, found = block(hidden), moeshard.shard(block, progress=False)(hidden)
    assert isinstance(expected, tuple) == transformers.__version__.startswith("4.")
    if isinstance(expected, tuple):
        (expected, (logits, index)), (found, (found_logits, found_index)) = expected, found
        assert (found_logits == logits).all() and (found_index == index).all()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert ((found == 0).all(-1) == (expected == 0).all(-1)).all(), "a dropped token is exactly zero"
    assert (expected == 0).all(-1).any()


def test_hidden_states_need_not_be_contiguous():
    block = moeshard.shard(switch_model().encoder.block[1].layer[-1].mlp, progress=False)
    hidden = torch.randn(9, 2, 48).transpose(0, 1)
    with torch.no_grad():
        found, expected = block(hidden), block(hidden.contiguous())
    found, expected = (x[0] if isinstance(x, tuple) else x for x in (found, expected))
    assert (found == expected).all()


def test_all_sparse_layers_are_replaced_and_nothing_else():
    for kind, layers in (("encoder", 2), ("seq2seq", 4)):
        model = switch_model(kind)
        dense = (
            sum(type(module).__name__ == "SwitchTransformersDenseActDense" for module in model.modules()) - layers * 8
        )
        moeshard.shard(model, progress=False)
        classes = [type(module).__name__ for module in model.modules()]
        assert sum(isinstance(module, ShardedSwitch) for module in model.modules()) == layers
        assert "SwitchTransformersSparseMLP" not in classes
        assert classes.count("SwitchTransformersDenseActDense") == dense


def test_training_mode_is_refused_when_called():
    model = moeshard.shard(switch_model(), progress=False)
    with pytest.raises(moeshard.ArgumentError, match=r"training mode.*model\.eval"), torch.no_grad():
        model.train()(**batch(1, 5))


def test_autograd_is_refused_when_called():
    with pytest.raises(moeshard.ArgumentError, match="requires grad.*no_grad"):
        moeshard.shard(switch_model(), progress=False)(**batch(1, 5))


def test_an_activation_the_kernels_lack_is_named():
    with pytest.raises(moeshard.ArgumentError, match=r"encoder\.block\.1\.layer\.1\.mlp.*Tanh computes none of .*relu"):
        moeshard.shard(switch_model(dense_act_fn="tanh"))
