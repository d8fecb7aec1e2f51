# SPDX-License-Identifier: Apache-2.0
"""Routers whose last half, all that follows the softmax, is one pass of the C core (``fused_router`` of ``shard``).

The product and the softmax stay torch's, so that logits and probabilities keep every bit; the choice of the best expert
is then the same, and so is the count of its capacity. A router is fused by giving it another class: it stays the same
module, with its hooks and parameters, and is called as before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from . import _core

Routed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class FusedTop1:
    """Comes before ``SwitchTransformersTop1Router`` in the class of a fused router."""

    def forward(self: Any, hidden_states: torch.Tensor) -> Routed:
        """Mask [B, S, E], best probability [B, S, 1] and logits [B, S, E], as its own class returns them."""
        elsewhere = torch.compiler.is_compiling() or torch.is_grad_enabled() or hidden_states.device.type != "cpu"
        if elsewhere or self.training or hidden_states.dtype not in _DTYPES or not hidden_states.numel():
            own: Routed = super().forward(hidden_states)  # type: ignore[misc]
            return own
        self.input_dtype = hidden_states.dtype
        self.classifier = self.classifier.to(self.dtype)
        logits = self.classifier(hidden_states.to(self.dtype))
        probabilities = nn.functional.softmax(logits, dim=-1, dtype=self.dtype).to(self.input_dtype)
        mask = torch.empty(probabilities.shape, dtype=torch.int64)
        best = probabilities.new_empty((*probabilities.shape[:-1], 1))
        sequence, experts = probabilities.shape[-2:]
        rows = probabilities.view(-1, experts)
        _core.route_top1(rows, sequence, self.expert_capacity, mask.view(-1, experts), best.view(-1))
        return mask, best, logits

    def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:
        """How to make one: its class has no name under which pickle would find it."""
        return _bare, (type(self).__mro__[2],), self.__dict__


def fuse(router: nn.Module) -> None:
    """Fuse a router of Switch, if what it returns is known; else leave it alone."""
    if _is_known(router):
        _put_before(router)


def unfuse(router: nn.Module) -> None:
    """Give a router its own class back. Legal on one that is not fused."""
    if isinstance(router, FusedTop1):
        router.__class__ = type(router).__mro__[2]


def _put_before(router: nn.Module) -> None:
    router.__class__ = _fused_class(type(router))


_fused_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _fused_class(own: type[nn.Module]) -> type[nn.Module]:
    names = {"__module__": own.__module__, "__doc__": own.__doc__}
    return _fused_classes.setdefault(own, type(own.__name__, (FusedTop1, own), names))


def _bare(own: type[nn.Module]) -> object:
    """A fused router in which nothing is yet, to be filled by ``copy`` or ``pickle``."""
    cls: Any = _fused_class(own)
    return cls.__new__(cls)


def _is_known(router: Any) -> bool:
    """Whether a fused router returns the same as this version's own, bit for bit: tried on small ones."""
    some = torch.linspace(-9, 9, 2 * 7 * 4).sin().view(2, 7, 4)
    some[1] *= 1e-3  # so that experts are equal once they are rounded
    try:
        pair = [_small(router), _small(router)]
        _put_before(pair[1])
        with torch.inference_mode():
            own, fused = ([out for dtype in _DTYPES for out in small(some.to(dtype))] for small in pair)
    except Exception:  # a version whose routers are made of other things
        return False
    return len(own) == len(fused) and all(
        mine.dtype == theirs.dtype and torch.equal(mine, theirs) for mine, theirs in zip(fused, own, strict=True)
    )


def _small(router: Any) -> Any:
    """A router of the same class and settings with little work; no hook sees what it does."""
    cls: Any = type(router)
    small = cls.__new__(cls)
    nn.Module.__init__(small)
    for name, value in vars(router).items():
        if not name.startswith("_"):
            setattr(small, name, value)
    small.classifier = nn.Linear(4, 3, bias=False)
    small.classifier.weight = nn.Parameter(torch.linspace(-1, 2, 12).view(3, 4), requires_grad=False)
    small.num_experts, small.expert_capacity = 3, 2
    return small
