# SPDX-License-Identifier: Apache-2.0
"""Blocks of any model that keep their experts in a ``ModuleList``, each a module of ``nn.Linear`` layers."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..experts import ExpertWeights
from ..layer import ShardedExperts
from . import Capacity, activation_of, refuse_training

Route = Callable[[Any, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class ShardedList(nn.Module):
    """Takes the place of a block: its other submodules under their names, then the sharded experts."""

    def __init__(self, block: nn.Module, list_name: str, experts: ShardedExperts, route: Route) -> None:
        """Take all submodules of the block but its experts."""
        super().__init__()
        for name, module in block.named_children():
            if name != list_name:
                self.add_module(name, module)
        self.experts = experts
        self.route = route

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Route [.., D] and send each token through its experts."""
        refuse_training(self, self.experts)
        index, weights = self.route(self, hidden_states)
        output: torch.Tensor = self.experts(hidden_states, index, weights)
        return output


class ListedExperts:
    """Adapter of a block with a list of feed-forward experts; see :class:`moeshard.Adapter`.

    Experts without a gate: with one in a layer of its own, no view of the two is the ``[2F, D]`` that is needed.
    The block's ``forward`` must return what ``experts`` returns; for anything else, write ``build`` in a subclass.

    Args:
        w_in: name of each expert's first ``nn.Linear``.
        w_out: of its second.
        activation: of the activation, a module or function of the expert.
        experts: of the list in the block, a ``ModuleList`` or ``ModuleDict``.
        route: ``route(block, hidden_states [.., D])`` returns ``top_k_index`` [.., K] (-1: no expert) and
            ``top_k_weights`` [.., K]; ``block`` has the submodules of the original, except the experts.

    Example:
        >>> def route(block, hidden_states):
        ...     weights, index = block.router(hidden_states).softmax(-1).topk(2)
        ...     return index, weights
        >>> adapter = ListedExperts(w_in="up", w_out="down", activation="act", route=route)
    """

    def __init__(
        self,
        *,
        w_in: str,
        w_out: str,
        activation: str,
        route: Route,
        experts: str = "experts",
    ) -> None:
        """Remember the names."""
        self.w_in, self.w_out, self.activation = w_in, w_out, activation
        self.route, self.experts = route, experts

    def weights(self, block: nn.Module) -> ExpertWeights:
        """The experts' layers."""
        experts = self._list(block)
        linears = [(getattr(expert, self.w_in), getattr(expert, self.w_out)) for expert in experts]
        has_b_in, has_b_out = (linears[0][i].bias is not None for i in range(2))
        return ExpertWeights(
            w_in=[first.weight for first, _ in linears],
            w_out=[second.weight for _, second in linears],
            b_in=[first.bias for first, _ in linears] if has_b_in else None,
            b_out=[second.bias for _, second in linears] if has_b_out else None,
            activation=activation_of(getattr(experts[0], self.activation)),
        )

    def parameters(self, block: nn.Module) -> Sequence[nn.Parameter]:
        """Of the experts' layers."""
        return [
            parameter
            for expert in self._list(block)
            for name in (self.w_in, self.w_out)
            for parameter in getattr(expert, name).parameters()
        ]

    def build(self, block: nn.Module, experts: ShardedExperts, capacity: Capacity) -> nn.Module:
        """Whatever the block drops is for ``route`` to say."""
        return ShardedList(block, self.experts, experts, self.route)

    def restore(self, block: nn.Module) -> None:
        """Nothing was changed."""

    def _list(self, block: nn.Module) -> list[Any]:
        experts: Any = getattr(block, self.experts)
        return list(experts.values() if isinstance(experts, nn.ModuleDict) else experts)
