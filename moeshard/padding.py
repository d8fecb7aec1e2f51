# SPDX-License-Identifier: Apache-2.0
"""Padding tokens, left out of the experts: where a model says what padding is, and how its MoE layers learn it.

A MoE layer sees tokens, not masks. So the nearest module round it that takes ``input_ids`` and ``attention_mask`` (an
encoder, a decoder) is watched: while its forward pass runs, its mask is known to the layers inside, and to no others.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Sequence

import torch
from torch import nn

from . import _core


class _Masks(threading.local):
    """Of the forward passes that run in a thread, the inner one last."""

    def __init__(self) -> None:
        self.masks: list[torch.Tensor | None] = []

    def __deepcopy__(self, memo: object) -> _Masks:
        return _Masks()  # nothing runs in a copy


class Padding:
    """The masks of the forward passes of one module that run now, in this thread.

    Args:
        module: whose ``forward`` is watched from now on; it takes ``attention_mask``.
        trailing: leave out only padding with no real token behind it. For models with an expert capacity: padding in
            front of a token takes part in what is dropped.
    """

    def __init__(self, module: nn.Module, *, trailing: bool) -> None:
        """Put itself around the module's forward. An object, so that a copy of the module gets one of its own."""
        self.module = module
        self.trailing = trailing
        self._running = _Masks()
        self._own = vars(module).get("forward")  # an instance may have been given one already
        self._original = module.forward
        self.__signature__ = inspect.signature(module.forward)  # transformers looks at it
        self._position = list(self.__signature__.parameters).index("attention_mask")
        module.forward = self

    def __call__(self, *args: object, **kwargs: object) -> object:
        """The module's forward."""
        if torch.compiler.is_compiling():  # nothing is left out of a compiled model
            return self._original(*args, **kwargs)
        given = args[self._position] if len(args) > self._position else kwargs.get("attention_mask")
        self._running.masks.append(self._real(given))
        try:
            return self._original(*args, **kwargs)
        finally:
            self._running.masks.pop()

    def remove(self) -> None:
        """Give the module its own forward back. Legal twice."""
        if vars(self.module).get("forward") is not self:
            return  # removed already, or wrapped by somebody else since: then it only watches on
        if self._own is None:
            del self.module.forward
        else:
            self.module.forward = self._own

    def _real(self, mask: object) -> torch.Tensor | None:
        """``[B, S]`` bool: the tokens to compute. ``None``: the mask does not say, compute all."""
        if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or mask.is_floating_point() or mask.is_complex():
            return None  # floats may be inverted: 0 for a token, a huge negative number for padding
        real = mask != 0
        if self.trailing and real.shape[1]:
            real = real.flip(1).int().cummax(1).values.flip(1).bool()
        return real

    def left_out(self, index: torch.Tensor) -> torch.Tensor:
        """The choices with those of padding replaced by -1, which is no expert.

        Args:
            index: ``[B, S, K]`` or ``[B * S, K]``.

        Returns:
            The same shape; ``index`` itself if no mask of this shape is known.
        """
        real = self._running.masks[-1] if self._running.masks else None
        if real is None or not isinstance(index, torch.Tensor) or real.device != index.device:
            return index
        tokens = index.shape[:-1]
        if tokens != real.shape and tokens != (real.numel(),):
            return index
        return torch.where(real.reshape(*tokens, 1), index, -1)


def readers(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """The module whose mask tells of the tokens of each MoE layer: the nearest that holds it and takes token ids.

    Args:
        model: the whole.
        names: of the MoE layers in it.

    Returns:
        One module a layer; layers of one encoder have the same.

    Raises:
        ArgumentError: a layer has none.
    """
    found = []
    for name in names:
        parts = name.split(".")
        around = (model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts) - 1, -1, -1))
        reader = next((module for module in around if _takes_a_mask(module)), None)
        if reader is None:
            raise _core.ArgumentError(
                f"skip_padding: no module round {name or type(model).__name__} takes input_ids and attention_mask, so "
                "nothing says which tokens are padding"
            )
        found.append(reader)
    return found


def has_capacity(block: nn.Module) -> bool:
    """Whether the choices for one token depend on the tokens in front of it in its sequence (Switch)."""
    return any(hasattr(module, "expert_capacity") for module in block.modules())


def counts_over_sequences(block: nn.Module) -> bool:
    """Whether they depend on other sequences' padding too: NLLB, whose router leaves padding out by itself if told."""
    return any(hasattr(module, "moe_eval_capacity_token_fraction") for module in block.modules())


def _takes_a_mask(module: nn.Module) -> bool:
    return {"input_ids", "attention_mask"} <= set(inspect.signature(module.forward).parameters)
