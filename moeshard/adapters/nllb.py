# SPDX-License-Identifier: Apache-2.0
"""NLLB-MoE of transformers 4.57 and of the 5 line: top-2 routing, biases, capacity as a fraction of the batch.

In both, the router returns a one-hot mask of the first choice [N, E] and the gates [N, E], of which at most two a token
are not zero; the 5 line adds the logits. Gates of padding tokens and of choices beyond capacity are zero. The block
returns [B, S, D] in the 5 line and ([B, S, D], (gates, first choice [N])) in 4.57.

The 5 line's own experts are wrong (in 5.23.0 at least): they take the one-hot mask for expert numbers, so that every
token goes E - 1 times through expert 0 and once through expert 1. Here each token goes through the experts that the
router chose, as in 4.57.

Source: transformers 5.23.0 and 4.57.6, modeling_nllb_moe.py.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..experts import ExpertWeights
from ..layer import ShardedExperts
from . import Capacity, Family, activation_of, refuse_training

FAMILY = Family(
    name="NLLB-MoE (facebook/nllb-moe-54b), encoder and decoder",
    replaces="`NllbMoeSparseMLP`",
    transformers="5, 4.57",
    experts="ReLU, biases",
    routing="top-2, gates normalised; capacity is `moe_eval_capacity_token_fraction` of the tokens (1: no drops)",
    quirks=(
        "Gates are multiplied by `1 - moe_token_dropout` in evaluation too (0.8 by default).",
        "Padding tokens get no expert where the attention mask is passed on and `router_ignore_padding_tokens` is off.",
        "Capacity is counted over the tokens of one rank's call, as in HuggingFace.",
        "transformers 5 (5.23.0 at least) sends tokens to the wrong experts; moeshard computes what the router chose, "
        "as 4.57 does, and warns once that results differ from that version's.",
        "`experts_implementation=` is accepted and ignored by transformers: call `moeshard.shard`.",
    ),
)


class ShardedNllb(nn.Module):
    """Takes the place of ``NllbMoeSparseMLP``: its router, then the sharded experts."""

    def __init__(self, router: nn.Module, experts: ShardedExperts, factor: float, old: bool) -> None:
        """Take the original's router; ``old``: of transformers 4.57."""
        super().__init__()
        self.router = router
        self.experts = experts
        self.factor = factor
        self.old = old

    def forward(
        self, hidden_states: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Route [B, S, D] and send each token through its two experts."""
        refuse_training(self, self.experts)
        rows = hidden_states if self.old else hidden_states.reshape(-1, hidden_states.shape[-1])
        first, gates, *_ = self.router(rows, padding_mask)
        weights, index = gates.topk(min(2, gates.shape[-1]), dim=-1)
        index = torch.where(weights > 0, index, -1)
        output = self.experts(hidden_states.reshape(len(gates), -1), index, weights * self.factor)
        output = output.view(hidden_states.shape)
        return (output, (gates, first.argmax(-1))) if self.old else output


class NllbAdapter:
    """Adapter of ``NllbMoeSparseMLP``; see :class:`moeshard.Adapter`."""

    _settings = ("expert_capacity", "moe_eval_capacity_token_fraction")

    def weights(self, block: nn.Module) -> ExpertWeights:
        """The experts' ``fc1`` and ``fc2``."""
        experts = _experts(block)
        return ExpertWeights(
            w_in=[expert.fc1.weight for expert in experts],
            w_out=[expert.fc2.weight for expert in experts],
            b_in=[expert.fc1.bias for expert in experts],
            b_out=[expert.fc2.bias for expert in experts],
            activation=activation_of(experts[0].act),
        )

    def parameters(self, block: nn.Module) -> Sequence[nn.Parameter]:
        """The experts' ``fc1`` and ``fc2``."""
        return [
            parameter
            for expert in _experts(block)
            for linear in (expert.fc1, expert.fc2)
            for parameter in (linear.weight, linear.bias)
        ]

    def build(self, block: nn.Module, experts: ShardedExperts, capacity: Capacity) -> nn.Module:
        """The router's own code applies the capacity: only its numbers are set."""
        router: Any = block.router
        old = type(block.experts) is nn.ModuleDict
        if not old:
            warnings.warn(
                "NLLB-MoE in this version of transformers sends tokens to other experts than its router chose; "
                "sharded, they go where the router chose, as in transformers 4.57: outputs differ from the "
                "unsharded model's",
                UserWarning,
                stacklevel=2,
            )
        router.moeshard_settings = {name: getattr(router, name) for name in self._settings}
        if capacity != "model":
            # A token's two choices differ, so that no expert can get more than all tokens.
            router.moe_eval_capacity_token_fraction = 1.0 if capacity is None else 0.0
            router.expert_capacity = capacity
        dropout: Any = block if old else block.experts
        return ShardedNllb(router, experts, 1 - dropout.moe_token_dropout, old)

    def restore(self, block: nn.Module) -> None:
        """Give the router its capacity back."""
        router: Any = block.router
        for name, value in router.moeshard_settings.items():
            setattr(router, name, value)
        del router.moeshard_settings


def _experts(block: nn.Module) -> list[Any]:
    experts: Any = block.experts
    return [expert for name, expert in experts.items() if name.startswith("expert_")]  # 5: and a dropout


ADAPTER = NllbAdapter()
