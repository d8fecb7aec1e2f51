# SPDX-License-Identifier: Apache-2.0
"""The layer as an operator of torch, ``moeshard::experts``: what torch.compile and torch.export see of it.

An operator takes tensors and numbers, so a layer goes by a number of its own; this table, which keeps no layer alive,
is where the number leads. The operator's result depends on its inputs alone, so torch may drop a call whose result
nobody uses: it does so on every rank alike.
"""

import itertools
import weakref
from typing import Any

import torch
from torch import nn

from . import _core

_layers: "weakref.WeakValueDictionary[int, nn.Module]" = weakref.WeakValueDictionary()
_numbers = itertools.count()


def register(layer: nn.Module) -> int:
    """Give a layer its number in this process."""
    number = next(_numbers)
    _layers[number] = layer
    return number


@torch.library.custom_op("moeshard::experts", mutates_args=())
def experts(
    hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, layer: int
) -> torch.Tensor:
    """:meth:`moeshard.ShardedExperts.forward` of the layer with this number."""
    module: Any = _layers.get(layer)
    if module is None:
        raise _core.ArgumentError(
            "the sharded layer that this compiled or exported program calls is not in this process (any more): a "
            "program holds no weights, keep the sharded model with it; to move a model, "
            "moeshard.save_pretrained(model, path)"
        )
    out: torch.Tensor = module.run(hidden_states, top_k_index, top_k_weights)
    return out


@experts.register_fake
def _(hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, layer: int) -> torch.Tensor:
    return hidden_states.new_empty(hidden_states.shape)
