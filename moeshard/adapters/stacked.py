# SPDX-License-Identifier: Apache-2.0
"""Every model of transformers 5 whose experts are stacked in one tensor: Mixtral, Qwen-MoE, gpt-oss, privacy-filter ...

Their classes of experts are made by ``use_experts_implementation``, are called as
``experts(hidden_states [N, D], top_k_index [N, K], top_k_weights [N, K])``, and say how their weights lie:

    has_gate          gate_up_proj [E, 2F, D], else up_proj [E, F, D];  down_proj [E, D, F]
    is_transposed     gate_up_proj [E, D, 2F], down_proj [E, F, D]
    is_concatenated   gate rows first, else gate and up rows alternate
    has_bias          gate_up_proj_bias [E, 2F], down_proj_bias [E, D]
    _apply_gate       what is computed of gate and up

Only that module is replaced: routers, shared experts and whatever else a block has stay as they are.

Source: transformers 5.23.0, integrations/moe.py.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .. import _core
from ..experts import ExpertWeights
from ..layer import ShardedExperts
from . import Capacity, Family, activation_of, gate_of, refuse_training

FAMILY = Family(
    name="every model with stacked experts: openai/privacy-filter, Mixtral, Qwen-MoE, gpt-oss, OLMoE, DeepSeek ...",
    replaces="the class decorated with `@use_experts_implementation`",
    transformers="5 (tried: 5.23, 5.14; 5.0 does not yet say how its experts lie: refused)",
    experts="with or without gate and biases; ReLU, GELU, SiLU, or gpt-oss's clamped SwiGLU",
    routing="the model's own",
    quirks=(
        "openai/privacy-filter computes its experts in float32 whatever the dtype; moeshard sums in float32 and rounds "
        "hidden columns to bfloat16 where it uses bfloat16 dot products (`docs/numerics.md`).",
        "An expert number of E or more (transformers' expert parallelism) means no expert.",
        "A gate that the kernels do not have, a limit other than 7 for example, and a norm after each expert are "
        "refused.",
    ),
)


class ShardedStack(nn.Module):
    """Takes the place of a module of stacked experts."""

    def __init__(self, experts: ShardedExperts, num_experts: int) -> None:
        """Take the sharded experts."""
        super().__init__()
        self.experts = experts
        self.num_experts = num_experts

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Send [N, D] through the experts [N, K] with the weights [N, K]."""
        refuse_training(self, self.experts)
        output: torch.Tensor = self.experts(hidden_states, no_sentinels(top_k_index, self.num_experts), top_k_weights)
        return output


class StackedAdapter:
    """Adapter of stacked experts; see :class:`moeshard.Adapter`."""

    def weights(self, block: nn.Module) -> ExpertWeights:
        """The slices of the stacks."""
        return stacked_weights(block)

    def parameters(self, block: nn.Module) -> Sequence[nn.Parameter]:
        """The stacks."""
        return stacks(block)

    def build(self, block: nn.Module, experts: ShardedExperts, capacity: Capacity) -> nn.Module:
        """These models drop nothing here: there is no capacity to set."""
        return ShardedStack(experts, experts.packed.num_experts)

    def restore(self, block: nn.Module) -> None:
        """Nothing was changed."""


def stacks(block: Any) -> list[nn.Parameter]:
    """The parameters of a module of stacked experts: both matrices, then both biases."""
    up = "gate_up_proj" if block.has_gate else "up_proj"
    names = [up, "down_proj"] + ([f"{up}_bias", "down_proj_bias"] if block.has_bias else [])
    return [getattr(block, name) for name in names]


def stacked_weights(block: Any) -> ExpertWeights:
    """Where the weights of a module of stacked experts are.

    Raises:
        ArgumentError: it computes something that the kernels cannot.
    """
    if getattr(block, "has_post_expert_norm", False):
        raise _core.ArgumentError("a norm after each expert is not supported")
    w_in, w_out, *biases = stacks(block)
    b_in, b_out = biases or (None, None)
    interleaved = block.has_gate and not block.is_concatenated
    return ExpertWeights(
        w_in=w_in.mT if block.is_transposed else w_in,
        w_out=w_out.mT if block.is_transposed else w_out,
        b_in=b_in,
        b_out=b_out,
        activation=gate_of(block._apply_gate, interleaved) if block.has_gate else activation_of(block.act_fn),
        gated=block.has_gate,
        interleaved=interleaved,
    )


def no_sentinels(top_k_index: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Expert numbers beyond the last, which transformers' expert parallelism uses for "not here", as -1."""
    return torch.where(top_k_index < num_experts, top_k_index, -1)


ADAPTER = StackedAdapter()
