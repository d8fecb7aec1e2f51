# SPDX-License-Identifier: Apache-2.0
"""One MoE layer on two ranks: moeshard, DeepSpeed and HuggingFace on the same weights and the same routing."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from reference import experts_reference, relative_error
from transformers import SwitchTransformersConfig
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

import moeshard
from moeshard.bench import rival_deepspeed

D, F = 52, 101  # odd on purpose: no multiple of a vector, a panel or a rank
EPS = float(torch.finfo(torch.float32).eps)
# Rounding errors of D products, then of F, add up as a random walk; both sides have them. 4.1e-6 here.
TOLERANCE = 2 * EPS * (math.sqrt(D) + math.sqrt(F))
assert TOLERANCE <= 1e-5


@dataclass
class Case:
    """A layer's weights, the same on all ranks, and this rank's tokens."""

    w_in: torch.Tensor  # [E, F, D]
    w_out: torch.Tensor  # [E, D, F]
    router: torch.Tensor  # [E, D]
    hidden: torch.Tensor  # [1, T, D]

    def choices(self, top_k=1):
        """[T, k] experts and [T, E] probabilities. No choice is a near tie that rounding could turn."""
        logits = self.hidden[0] @ self.router.T
        best = logits.topk(min(top_k + 1, len(self.router)))
        rounding = EPS * math.sqrt(D) * float(logits.abs().max())
        assert float((best.values[:, :-1] - best.values[:, 1:]).min()) > 2 * rounding
        return best.indices[:, :top_k], logits.softmax(-1)


def make_case(experts, routing, tokens):
    """Experts by `routing`: "uniform"; "skew", 60 % to expert 0; "one", all to the last."""
    torch.manual_seed(experts)
    w_in, w_out = torch.randn(experts, F, D) / math.sqrt(D), torch.randn(experts, D, F) / math.sqrt(F)
    router = torch.linalg.qr(torch.randn(D, experts)).Q.T.contiguous()  # orthonormal: one expert per direction
    torch.manual_seed(1000 + moeshard.init().rank)
    wanted = torch.randint(experts, (tokens,))
    if routing == "skew":
        wanted[torch.rand(tokens) < 0.6] = 0
    if routing == "one":
        wanted[:] = experts - 1
    return Case(w_in, w_out, router, (0.4 * torch.randn(tokens, D) + 4 * router[wanted]).unsqueeze(0))


def switch_block(case):
    """HuggingFace's block with the case's weights, which never drops a token."""
    experts = len(case.router)
    block = SwitchTransformersSparseMLP(
        SwitchTransformersConfig(d_model=D, d_ff=F, num_experts=experts, expert_capacity=1 << 30)
    )
    block.router.classifier.weight.data = case.router
    for number in range(experts):
        expert = block.experts[f"expert_{number}"]
        expert.wi.weight.data, expert.wo.weight.data = case.w_in[number].clone(), case.w_out[number].clone()
    return block.requires_grad_(False).eval()


def deepspeed_layer(case, top_k=1, capacity_factor=None):
    return rival_deepspeed.build(
        case.w_in, case.w_out, case.router, activation="relu", top_k=top_k, capacity_factor=capacity_factor
    )


def sharded_block(case):
    """The Switch block, cut over the ranks, and its experts."""
    block = moeshard.shard(switch_block(case), capacity=None, progress=False)
    return block, block.experts


def counts_of(case, top_k=1):
    return np.bincount(case.choices(top_k)[0].flatten().numpy(), minlength=len(case.router))


def call(layer, hidden):
    with torch.inference_mode():
        return layer(hidden)[0].numpy()


# ---- equal outputs when nothing is dropped ---------------------------------------------------------------------------


def switch_outputs(experts, routing, tokens):
    case = make_case(experts, routing, tokens)
    layers = {"hf": switch_block(case), "deepspeed": deepspeed_layer(case), "moeshard": sharded_block(case)[0]}
    return {name: call(layer, case.hidden) for name, layer in layers.items()} | {"counts": counts_of(case)}


@pytest.mark.parametrize("tokens", [1, 37, 64])
@pytest.mark.parametrize("routing", ["uniform", "skew", "one"])
@pytest.mark.parametrize("experts", [4, 8])
def test_moeshard_deepspeed_and_huggingface_agree_when_nothing_is_dropped(pair, experts, routing, tokens):
    ranks = pair.run(switch_outputs, experts, routing, tokens)
    assert relative_error(ranks[0]["hf"], ranks[1]["hf"]) > 0.1  # each rank has tokens of its own
    for found in ranks:
        assert found["counts"].sum() == tokens
        assert routing != "skew" or tokens == 1 or found["counts"].argmax() == 0
        assert relative_error(found["moeshard"], found["hf"]) <= TOLERANCE
        assert relative_error(found["deepspeed"], found["hf"]) <= TOLERANCE
        assert relative_error(found["moeshard"], found["deepspeed"]) <= TOLERANCE


def top_k_outputs(top_k):
    case = make_case(8, "skew", 45)
    index, probabilities = case.choices(top_k)
    weights = probabilities.gather(1, index)
    renormalised = weights / weights.sum(-1, keepdim=True)
    layer = moeshard.ShardedExperts.from_weights(case.w_in, case.w_out)
    with torch.inference_mode():
        ours = layer(case.hidden[0], index, renormalised).numpy()
    expected = experts_reference(case.hidden[0], index, renormalised, case.w_in, case.w_out)
    return call(deepspeed_layer(case, top_k), case.hidden), ours, expected


@pytest.mark.parametrize("top_k", [2, 4])
def test_deepspeed_divides_the_weights_of_several_choices_by_their_sum(pair, top_k):
    for deepspeed, ours, expected in pair.run(top_k_outputs, top_k):
        assert relative_error(deepspeed, expected) <= TOLERANCE
        assert relative_error(ours, expected) <= TOLERANCE


def activated(activation):
    case = make_case(4, "uniform", 16)
    index, probabilities = case.choices()
    weights = probabilities.gather(1, index)
    theirs = rival_deepspeed.build(
        case.w_in, case.w_out, case.router, activation=activation, top_k=1, capacity_factor=None
    )
    ours = moeshard.ShardedExperts.from_weights(case.w_in, case.w_out, activation=activation)
    with torch.inference_mode():
        return call(theirs, case.hidden), ours(case.hidden[0], index, weights).numpy()


@pytest.mark.parametrize("activation", ["identity", "relu", "gelu", "gelu_tanh", "silu"])
def test_activations_have_the_same_names_and_values(pair, activation):
    for deepspeed, ours in pair.run(activated, activation):
        assert relative_error(deepspeed, ours) <= TOLERANCE


# ---- what a capacity factor drops, and what padding costs ------------------------------------------------------------


def zero_rows(output):
    return int((output == 0).all(axis=1).sum())


def with_capacity(routing, tokens, capacity_factor):
    case = make_case(8, routing, tokens)
    block, experts = sharded_block(case)
    layers = {"hf": switch_block(case), "deepspeed": deepspeed_layer(case, 1, capacity_factor), "moeshard": block}
    outputs = {name: call(layer, case.hidden) for name, layer in layers.items()}
    theirs, ours = outputs["deepspeed"], outputs["moeshard"]
    kept = (theirs != 0).any(axis=1)
    return {
        "counts": counts_of(case),
        "zeros": {name: zero_rows(output) for name, output in outputs.items()},
        "kept difference": relative_error(theirs[kept], ours[kept]),
        "computed by moeshard": int(experts.counts.sum()),
    }


@pytest.mark.parametrize("capacity_factor", [1.0, 1.25])
@pytest.mark.parametrize("routing", ["uniform", "skew", "one"])
def test_a_capacity_factor_drops_every_token_beyond_it_and_moeshard_none(pair, routing, capacity_factor):
    tokens, experts = 64, 8
    capacity = math.ceil(tokens / experts * capacity_factor)  # DeepSpeed's rule, on each rank's own tokens
    for found in pair.run(with_capacity, routing, tokens, capacity_factor):
        beyond = int((found["counts"] - capacity).clip(min=0).sum())
        assert beyond > (tokens // 4 if routing != "uniform" else 0)
        assert found["zeros"] == {"deepspeed": beyond, "moeshard": 0, "hf": 0}
        assert found["kept difference"] <= TOLERANCE
        assert found["computed by moeshard"] == 2 * tokens


def rows_computed(routing, tokens, capacity_factor):
    case = make_case(8, routing, tokens)
    layer = deepspeed_layer(case, 1, capacity_factor)
    rows = []
    for expert in layer.experts:
        expert.register_forward_pre_hook(lambda expert, inputs: rows.append(inputs[0][..., 0].numel()))
    call(layer, case.hidden)
    block, experts = sharded_block(case)
    call(block, case.hidden)
    return {"counts": counts_of(case), "deepspeed": sum(rows), "moeshard": int(experts.counts.sum())}


@pytest.mark.parametrize("capacity_factor", [None, 1.25])
@pytest.mark.parametrize("routing", ["uniform", "skew", "one"])
def test_deepspeed_computes_a_full_buffer_for_every_expert_and_rank_and_moeshard_each_token_once(
    pair, routing, capacity_factor
):
    tokens, experts = 64, 8
    ranks = pair.run(rows_computed, routing, tokens, capacity_factor)
    busiest = max(int(found["counts"].max()) for found in ranks)
    capacity = busiest if capacity_factor is None else math.ceil(tokens / experts * capacity_factor)
    assert sum(found["deepspeed"] for found in ranks) == len(ranks) * experts * capacity
    assert all(found["moeshard"] == len(ranks) * tokens for found in ranks)  # of all ranks, a share of columns each
    if capacity_factor is None and routing != "uniform":
        assert experts * capacity > 4 * tokens  # rows computed per row needed


# ---- how the rival is built ------------------------------------------------------------------------------------------


def addresses():
    case = make_case(8, "uniform", 4)
    layer = deepspeed_layer(case)
    first = moeshard.init().rank * 4
    return [
        (own.w_in.data_ptr(), own.w_out.data_ptr()) == (case.w_in[e].data_ptr(), case.w_out[e].data_ptr())
        for e, own in enumerate(layer.experts, first)
    ] + [layer.moe.deepspeed_moe.gate.wg.weight.data_ptr() == case.router.data_ptr()]


def test_the_rival_copies_no_weights_and_takes_its_ranks_experts(pair):
    assert pair.run(addresses) == [[True] * 5] * 2


def refusals():
    case, said = make_case(4, "uniform", 1), []
    for experts, router, activation in ((3, 3, "relu"), (4, 3, "relu"), (4, 4, "tanh")):
        try:
            rival_deepspeed.build(
                case.w_in[:experts],
                case.w_out[:experts],
                case.router[:router],
                activation=activation,
                top_k=1,
                capacity_factor=None,
            )
        except moeshard.MoeshardError as error:
            said.append(str(error))
    return said


def test_what_deepspeed_cannot_do_is_refused_by_name(pair):
    uneven, router, activation = pair.run(refusals)[0]
    assert "3 for 2 ranks" in uneven
    assert router == "router: expected [4, 52] as the experts, got [3, 52]"
    assert activation.startswith("activation: ") and "'tanh'" in activation
