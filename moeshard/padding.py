# SPDX-License-Identifier: Apache-2.0
"""Padding tokens, left out of the experts: where a model says what padding is, and how its MoE layers learn it.

A MoE layer sees tokens, not masks. So the nearest module round it that takes ``input_ids`` and ``attention_mask`` (an
encoder, a decoder) is watched: while its forward pass runs, its mask is known to the layers inside, and to no others.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from . import _core


class Padding:
    """The masks of the forward passes of one module that run now, in this thread.

    Args:
        module: whose ``forward`` is watched from now on; it takes ``attention_mask``.
        trailing: leave out only padding with no real token behind it. For models with an expert capacity: padding in
            front of a token takes part in what is dropped.
    """

    def __init__(self, module: nn.Module, *, trailing: bool) -> None:
        """Put a forward around the module's own."""
        self.module = module
        self.trailing = trailing
        self._running = threading.local()
        self._own = vars(module).get("forward")  # an instance may have been given one already
        original = module.forward
        position = list(inspect.signature(original).parameters).index("attention_mask")

        @functools.wraps(original)
        def forward(*args: object, **kwargs: object) -> object:
            if torch.compiler.is_compiling():  # nothing is left out of a compiled model
                return original(*args, **kwargs)
            given = args[position] if len(args) > position else kwargs.get("attention_mask")
            with self._during(given):
                return original(*args, **kwargs)

        self._forward = forward
        module.forward = forward

    def remove(self) -> None:
        """Give the module its own forward back. Legal twice."""
        if vars(self.module).get("forward") is not self._forward:
            return  # removed already, or wrapped by somebody else since: then it only watches on
        if self._own is None:
            del self.module.forward
        else:
            self.module.forward = self._own

    @contextmanager
    def _during(self, mask: object) -> Iterator[None]:
        masks = self._running.__dict__.setdefault("masks", [])
        masks.append(self._real(mask))
        try:
            yield
        finally:
            masks.pop()

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
        masks = self._running.__dict__.get("masks")
        real = masks[-1] if masks else None
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
    """Whether the choices for one token depend on the tokens in front of it (Switch, NLLB)."""
    return any(hasattr(module, "expert_capacity") for module in block.modules())


def _takes_a_mask(module: nn.Module) -> bool:
    return {"input_ids", "attention_mask"} <= set(inspect.signature(module.forward).parameters)
