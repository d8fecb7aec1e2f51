# SPDX-License-Identifier: Apache-2.0
"""nomic-embed-text-v2-moe: top-2 routing, exact GELU, one output bias that all experts share.

The model's code lives on the hub (nomic-bert-2048, modeling_hf_nomic_bert.py) and could not be had where this was
written: the adapter follows its published module tree and parameter names, and is tested with a model of that tree.

    encoder.layers.{i}.mlp.router.layer.weight     [E, D]
    encoder.layers.{i}.mlp.experts.mlp.w1, w2      [E * F, D]      w2 is not transposed: hidden @ w2
    encoder.layers.{i}.mlp.experts.bias            [D]

The router calls ``experts(x, weights, top_weights, top_experts)``; only the last two are used.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..experts import ExpertWeights
from ..layer import ShardedExperts
from . import Capacity, Family, activation_of, refuse_training

FAMILY = Family(
    name="nomic-embed-text-v2-moe",
    replaces="`NomicExperts`",
    transformers="hub code",
    experts="exact GELU, one bias after all experts",
    routing="top-2, weights not normalised; nothing is dropped",
    quirks=(
        "The bias is added once a token, not once an expert.",
        "The hub's own code was not run: a model of the same module tree and names was.",
    ),
)


class ShardedNomic(nn.Module):
    """Takes the place of ``NomicExperts``."""

    def __init__(self, experts: ShardedExperts, bias: nn.Parameter) -> None:
        """Take the bias, which stays the model's parameter."""
        super().__init__()
        self.experts = experts
        self.bias = bias

    def forward(self, hidden_states: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
        """Send [.., D] through the experts ``routing[-1]`` [N, K] with the weights ``routing[-2]`` [N, K]."""
        refuse_training(self, self.experts)
        weights, index = routing[-2:]
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        output: torch.Tensor = self.experts(rows, index, weights) + self.bias
        return output.view(hidden_states.shape)


class NomicAdapter:
    """Adapter of ``NomicExperts``; see :class:`moeshard.Adapter`."""

    def weights(self, block: nn.Module) -> ExpertWeights:
        """The rows of ``w1`` and ``w2``, expert by expert."""
        mlp: Any = block.mlp
        experts = mlp.moe_num_experts
        return ExpertWeights(
            w_in=mlp.w1.unflatten(0, (experts, -1)),
            w_out=mlp.w2.unflatten(0, (experts, -1)).mT,
            activation=activation_of(mlp.activation_fn),
        )

    def parameters(self, block: nn.Module) -> Sequence[nn.Parameter]:
        """``w1`` and ``w2``."""
        mlp: Any = block.mlp
        return [mlp.w1, mlp.w2]

    def build(self, block: nn.Module, experts: ShardedExperts, capacity: Capacity) -> nn.Module:
        """Nothing is ever dropped: there is no capacity to set."""
        bias: Any = block.bias
        return ShardedNomic(experts, bias)

    def restore(self, block: nn.Module) -> None:
        """Nothing was changed."""


ADAPTER = NomicAdapter()
