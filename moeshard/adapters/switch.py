# SPDX-License-Identifier: Apache-2.0
"""Switch Transformers of transformers 4.57 and of the 5 line: top-1 routing, capacity per sequence and expert.

In both, the router returns a one-hot mask [B, S, E] with the row of a token beyond its expert's capacity all zero, the
probability of the chosen expert [B, S, 1] and the logits [B, S, E]; a dropped token's output is exactly 0. From 5.0 to
5.17 the probability came first, and the mask was [B, S, 1, E], so that no token was ever beyond capacity. The block
returns [B, S, D] in the 5 line and ([B, S, D], (logits, expert index [B, S])) in 4.57. The router is always called as a
module, because the 5 line records logits by a hook on it.

Source: transformers 5.23.0, 5.14.0, 5.0.0 and 4.57.6, modeling_switch_transformers.py.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .. import _core
from ..experts import ExpertWeights
from ..layer import ShardedExperts
from ..router import fuse, unfuse
from . import Capacity, Family, activation_of, refuse_training

FAMILY = Family(
    name="Switch Transformers (google/switch-base-8 ... switch-c-2048)",
    replaces="`SwitchTransformersSparseMLP`",
    transformers="5 (tried: 5.23, 5.14, 5.0), 4.57",
    experts="ReLU or GELU, no bias",
    routing="top-1; a token beyond `expert_capacity` of its sequence and expert is dropped",
    quirks=(
        "Capacity counts per sequence of the batch, in its order; a dropped token's output is exactly 0.",
        "Padding tokens are routed and use up capacity, whatever `router_ignore_padding_tokens` says.",
        "The router casts its classifier to float32 once and keeps it so; the best expert is chosen after the "
        "probabilities were cast back, so that near-ties in bfloat16 go to the lower number.",
        "The router module is still called, so that recorded `router_logits` appear; what follows its softmax is one "
        "pass of moeshard's core with the same bits (`fused_router=False`: the model's own code).",
        "`experts_implementation=` is accepted and ignored by transformers: call `moeshard.shard`.",
    ),
)


class ShardedSwitch(nn.Module):
    """Takes the place of ``SwitchTransformersSparseMLP``: its router, then the sharded experts."""

    def __init__(self, router: nn.Module, experts: ShardedExperts, returns_router_output: bool) -> None:
        """Take the original's router, and remember what the original returns."""
        super().__init__()
        self.router = router
        self.experts = experts
        self.returns_router_output = returns_router_output

    def forward(
        self, hidden_states: torch.Tensor
    ) -> torch.Tensor | tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Route [B, S, D] and send each token through its expert."""
        refuse_training(self, self.experts)
        mask, probability, logits = self.router(hidden_states)
        if mask.is_floating_point():  # before 5.18
            mask, probability = probability.flatten(-2), mask
        kept, choice = mask.max(dim=-1)  # of an all-zero row: 0, and index 0 as HF's argmax gives
        index = torch.where(kept.bool(), choice, -1)
        output = self.experts(hidden_states, index.unsqueeze(-1), probability)
        return (output, (logits, choice)) if self.returns_router_output else output


class SwitchAdapter:
    """Adapter of ``SwitchTransformersSparseMLP``; see :class:`moeshard.Adapter`."""

    def weights(self, block: nn.Module) -> ExpertWeights:
        """The experts' ``wi`` and ``wo``."""
        experts = _experts(block)
        activations = {activation_of(expert.act) for expert in experts}
        if len(activations) != 1:
            raise _core.ArgumentError(f"experts: expected one activation for all, got {', '.join(sorted(activations))}")
        return ExpertWeights(
            w_in=[expert.wi.weight for expert in experts],
            w_out=[expert.wo.weight for expert in experts],
            activation=activations.pop(),
        )

    def parameters(self, block: nn.Module) -> Sequence[nn.Parameter]:
        """The experts' ``wi`` and ``wo``."""
        return [linear.weight for expert in _experts(block) for linear in (expert.wi, expert.wo)]

    def build(self, block: nn.Module, experts: ShardedExperts, capacity: Capacity) -> nn.Module:
        """The router applies the capacity: only its number is set."""
        router: Any = block.router
        router.moeshard_expert_capacity = router.expert_capacity
        if capacity != "model":
            router.expert_capacity = sys.maxsize if capacity is None else capacity
        fuse(router)
        # 4.57 keeps the experts in a plain ModuleDict and returns the router's output with the block's.
        return ShardedSwitch(router, experts, returns_router_output=type(block.experts) is nn.ModuleDict)

    def restore(self, block: nn.Module) -> None:
        """Give the router its class and its capacity back."""
        router: Any = block.router
        unfuse(router)
        router.expert_capacity = router.moeshard_expert_capacity
        del router.moeshard_expert_capacity


def _experts(block: nn.Module) -> list[Any]:
    experts: Any = block.experts
    return [experts[f"expert_{number}"] for number in range(len(experts))]


ADAPTER = SwitchAdapter()
