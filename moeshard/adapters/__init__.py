# SPDX-License-Identifier: Apache-2.0
"""Adapters: how a model family's MoE block gives its experts away, one file per family, and their registry."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Literal, Protocol

from torch import nn

from .. import _core
from ..experts import ExpertWeights
from ..layer import ShardedExperts

if TYPE_CHECKING:
    from .._core import Activation

Capacity = int | Literal["model"] | None


class Adapter(Protocol):
    """What :func:`moeshard.shard` needs to know about a class of MoE blocks (``nn.Module``).

    Every method gets a block of that class; a block is never changed by ``weights`` and ``parameters``.
    """

    def weights(self, block: nn.Module) -> ExpertWeights:
        """Where the experts' weights are: views of the block's parameters."""

    def parameters(self, block: nn.Module) -> Sequence[nn.Parameter]:
        """The parameters that hold them, and nothing else: their memory is freed once they are packed."""

    def build(self, block: nn.Module, experts: ShardedExperts, capacity: Capacity) -> nn.Module:
        """The module that takes the block's place: it calls the block's router, then ``experts``.

        Args:
            block: the original.
            experts: ``forward(hidden [.., D], top_k_index [.., K], top_k_weights [.., K]) -> [.., D]``.
            capacity: ``"model"``: drop what the model drops; ``None``: nothing; an int: the model's rule with this
                number.
        """

    def restore(self, block: nn.Module) -> None:
        """Undo what ``build`` changed in the block, before it takes its place again."""


_registered: dict[type[nn.Module], Adapter] = {}

# Families that moeshard knows, by the class's own name and module, so that none of them is imported for nothing.
_BUILT_IN = {
    ("transformers.models.switch_transformers.modeling_switch_transformers", "SwitchTransformersSparseMLP"): "switch",
}


def register_adapter(cls: type[nn.Module], adapter: Adapter) -> None:
    """Teach ``shard`` a new class of MoE blocks; also its subclasses. Replaces an earlier adapter of the class.

    Args:
        cls: the class of the block, router and experts together.
        adapter: see :class:`moeshard.Adapter`.

    Raises:
        ArgumentError: ``cls`` is not an ``nn.Module`` class, or the adapter lacks a method.

    Example:
        >>> from moeshard.adapters.switch import SwitchAdapter
        >>> class MyBlock(nn.Module): ...
        >>> register_adapter(MyBlock, SwitchAdapter())
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise _core.ArgumentError(f"cls: expected a subclass of torch.nn.Module, got {cls!r}")
    missing = [name for name in ("weights", "parameters", "build", "restore") if not hasattr(adapter, name)]
    if missing:
        raise _core.ArgumentError(f"adapter: {type(adapter).__name__} lacks {', '.join(missing)} of moeshard.Adapter")
    _registered[cls] = adapter


def find_adapter(block: nn.Module) -> Adapter | None:
    """The adapter of a block's class or of its nearest base, ``None`` if there is none."""
    for cls in type(block).__mro__:
        if cls in _registered:
            return _registered[cls]
        family = _BUILT_IN.get((cls.__module__, cls.__qualname__))
        if family is not None:
            adapter: Adapter = import_module(f".{family}", __name__).ADAPTER
            return adapter
    return None


def looks_like_moe(module: nn.Module) -> bool:
    """Whether a module of no known class may be a MoE block, for the message that says so."""
    name = type(module).__name__.lower()
    return "moe" in name or "mixtureofexperts" in name or isinstance(getattr(module, "experts", None), nn.Module)


_ACTIVATIONS: dict[str, Activation] = {  # class names of torch and of transformers' ACT2FN
    "Identity": "identity",
    "LinearActivation": "identity",
    "ReLU": "relu",
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "SiLU": "silu",
    "SiLUActivation": "silu",
}


def activation_of(module: nn.Module) -> Activation:
    """The name of an activation module.

    Raises:
        ArgumentError: one that the kernels do not have.
    """
    if isinstance(module, nn.GELU):
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    name = _ACTIVATIONS.get(type(module).__name__)
    if name is None:
        raise _core.ArgumentError(
            f"activation: {type(module).__name__} is not supported, expected one of "
            f"{', '.join(sorted({'GELU', *_ACTIVATIONS}))}"
        )
    return name
