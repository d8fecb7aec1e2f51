# SPDX-License-Identifier: Apache-2.0
"""Adapters: how a model family's MoE block gives its experts away, one file per family, and their registry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Literal, Protocol

import torch
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


@dataclass(frozen=True)
class Family:
    """What ``docs/models.md`` says of a family; its table is made from these.

    Attributes:
        name: of the models.
        replaces: the class of the modules that :func:`moeshard.shard` replaces.
        transformers: the lines of transformers that it is tested with.
        experts: what an expert computes.
        routing: how tokens choose, and what is dropped.
        quirks: of HuggingFace's code that are matched, or not, a sentence each.
    """

    name: str
    replaces: str
    transformers: str
    experts: str
    routing: str
    quirks: tuple[str, ...] = ()


_registered: dict[type[nn.Module], Adapter] = {}

# Families that moeshard knows, by the last part of the module's name and the class's own, so that none of them is
# imported for nothing and code from the hub, whose module names have a hash in them, is found too.
_BUILT_IN = {
    ("modeling_switch_transformers", "SwitchTransformersSparseMLP"): "switch",
    ("modeling_nllb_moe", "NllbMoeSparseMLP"): "nllb",
    ("modeling_hf_nomic_bert", "NomicExperts"): "nomic",
}
FAMILIES = ("switch", "nllb", "nomic", "stacked")  # files here with a FAMILY


def register_adapter(cls: type[nn.Module], adapter: Adapter) -> None:
    """Teach ``shard`` a new class of MoE blocks; also its subclasses. Replaces an earlier adapter of the class.

    Args:
        cls: the class of the block, router and experts together.
        adapter: see :class:`moeshard.Adapter`; :class:`moeshard.adapters.listed.ListedExperts` for blocks that keep
            their experts in a ``ModuleList``.

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
    adapter: Adapter
    for cls in type(block).__mro__:
        if cls in _registered:
            return _registered[cls]
        family = _BUILT_IN.get((cls.__module__.rpartition(".")[2], cls.__qualname__))
        if family is not None:
            adapter = import_module(f".{family}", __name__).ADAPTER
            return adapter
    if is_stacked(block):
        adapter = import_module(".stacked", __name__).ADAPTER
        return adapter
    return None


def is_stacked(module: nn.Module) -> bool:
    """Whether a module's class was made by transformers' ``use_experts_implementation``: what that leaves behind."""
    marks = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate", "down_proj")
    return all(hasattr(module, mark) for mark in marks)


def looks_like_moe(module: nn.Module) -> bool:
    """Whether a module of no known class may be a MoE block, for the message that says so."""
    name = type(module).__name__.lower()
    return "moe" in name or "mixtureofexperts" in name or isinstance(getattr(module, "experts", None), nn.Module)


def refuse_training(module: nn.Module, experts: ShardedExperts) -> None:
    """Raise, on every rank, if a replacement was put in training mode.

    Raises:
        ArgumentError: it was.
    """
    if module.training:
        with experts.group.refusing():
            raise _core.ArgumentError("the model is in training mode: moeshard is for inference, call model.eval()")


# ---- activations -----------------------------------------------------------------------------------------------------


def activation_of(function: Callable[[torch.Tensor], torch.Tensor]) -> Activation:
    """The name of an activation: the one with the same values, so that it does not matter what it is called.

    Args:
        function: a module or function, element by element.

    Raises:
        ArgumentError: one that the kernels do not have.
    """
    name = _same(function, *_plain_values())
    if name is None:
        raise _core.ArgumentError(
            f"activation: {_name_of(function)} computes none of {', '.join(_PLAIN)}, which the kernels have"
        )
    return name


def gate_of(function: Callable[[torch.Tensor], torch.Tensor], interleaved: bool) -> Activation:
    """The name of the activation of a function from gate and up, ``[.., 2F]``, to hidden columns, ``[.., F]``.

    Args:
        function: computes ``act(gate) * up``, or what ``"clamped_swiglu"`` does.
        interleaved: gate and up alternate; else all gates come first.

    Raises:
        ArgumentError: it computes something else.
    """
    name = _same(function, *_gate_values(interleaved))
    if name is None:
        raise _core.ArgumentError(
            f"gate: {_name_of(function)} computes neither act(gate) * up with one of {', '.join(_PLAIN)}, "
            "nor clamped_swiglu (gpt-oss's, with a limit of 7 and an alpha of 1.702), which the kernels have"
        )
    return name


_PLAIN: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "identity": lambda x: x,
    "relu": torch.relu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "silu": nn.functional.silu,
}


# Arguments, and the values of each known function there. A model asks for every expert: made once.
Values = tuple[torch.Tensor, dict["Activation", torch.Tensor]]


@cache
@torch.no_grad()
def _plain_values() -> Values:
    x = torch.linspace(-40, 40, 321, dtype=torch.float32, device="cpu")
    return x, {name: known(x) for name, known in _PLAIN.items()}


@cache
@torch.no_grad()
def _gate_values(interleaved: bool) -> Values:
    gate, plain = _plain_values()
    up = gate.roll(100)
    both = torch.stack((gate, up), -1).flatten() if interleaved else torch.cat((gate, up))
    values = {name: activated * up for name, activated in plain.items()}
    held = gate.clamp(max=7.0)
    values["clamped_swiglu"] = held * torch.sigmoid(1.702 * held) * (up.clamp(-7, 7) + 1)
    return both, values


@torch.no_grad()
def _same(
    function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, known: dict[Activation, torch.Tensor]
) -> Activation | None:
    """The name under which the function's values are found."""
    found = function(x[None])[0]
    for name, expected in known.items():
        # float32 leaves an error of an ulp of 1 in gelu's far tail, which a gate multiplies by at most 40.
        if found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-5, atol=4e-5):
            return name
    return None


def _name_of(function: object) -> str:
    return getattr(function, "__qualname__", type(function).__qualname__)
