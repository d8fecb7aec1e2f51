# SPDX-License-Identifier: Apache-2.0
"""moeshard as one of transformers' own ways to compute stacked experts: ``experts_implementation="moeshard"``."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from . import _core
from .adapters import stacked
from .functional import PackedExperts

NAME = "moeshard"


def enable_transformers() -> None:
    """Let transformers 5 compute stacked experts with moeshard, on one rank, where a model asks for it.

    Afterwards ``from_pretrained(..., experts_implementation="moeshard")`` and
    ``model.set_experts_implementation("moeshard")`` are accepted by every model whose experts are stacked (Mixtral,
    Qwen-MoE, gpt-oss, openai/privacy-filter ...). Switch and NLLB accept the argument and ignore it: shard those with
    :func:`moeshard.shard`, which does the same for stacked experts over any number of ranks.

    A layer's first call packs its weights, beside the originals, which ``state_dict`` still needs: the experts take
    twice the memory. :func:`moeshard.shard` frees them. Weights that are replaced or changed in place are packed
    again; a change through ``parameter.data``, which torch does not count, is not seen. Inference only. A second
    call does nothing; every process needs its own.

    Raises:
        ArgumentError: transformers is missing or older than 5, or another library took the name.

    Example:
        >>> enable_transformers()  # doctest: +SKIP
        >>> model = AutoModel.from_pretrained(path, experts_implementation="moeshard")  # doctest: +SKIP

    Source: transformers 5.23.0, integrations/moe.py, ``ExpertsInterface``.
    """
    interface = _interface()
    taken = interface.get(NAME)
    if taken is not None and taken is not _forward:
        raise _core.ArgumentError(
            f"experts_implementation={NAME!r} is already taken by {taken.__module__}.{taken.__qualname__}"
        )
    interface.register(NAME, _forward)


def disable_transformers() -> None:
    """Undo :func:`enable_transformers`, and free what was packed. Models that ask for moeshard fail from then on.

    Raises:
        ArgumentError: transformers is missing or older than 5.
    """
    interface = _interface()
    if interface.get(NAME) is _forward:
        type(interface)._global_mapping.pop(NAME)
    _packed.clear()


def _interface() -> Any:
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        raise _core.ArgumentError(
            "experts_implementation needs transformers 5 or newer: pip install 'transformers>=5'; with older ones, "
            "moeshard.shard(model)"
        ) from error
    return ALL_EXPERTS_FUNCTIONS


# Of each module of experts: the state of its weights when they were packed, and the packed experts.
_packed: weakref.WeakKeyDictionary[nn.Module, tuple[object, PackedExperts]] = weakref.WeakKeyDictionary()


def _forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """What transformers calls in the place of the module's own forward: [N, D], [N, K], [N, K] -> [N, D]."""
    index = stacked.no_sentinels(top_k_index, len(stacked.stacks(self)[0]))
    return _experts_of(self)(hidden_states, index, top_k_weights)


def _experts_of(module: nn.Module) -> PackedExperts:
    state = tuple((parameter.data_ptr(), _version(parameter)) for parameter in stacked.stacks(module))
    kept = _packed.get(module)
    if kept is None or kept[0] != state:
        weights = stacked.stacked_weights(module)
        kept = state, PackedExperts.of(weights)
        _packed[module] = kept
    return kept[1]


def _version(parameter: nn.Parameter) -> int:
    """Goes up with each change in place; inference tensors have none, and cannot be changed outside inference mode."""
    return -1 if parameter.is_inference() else parameter._version
