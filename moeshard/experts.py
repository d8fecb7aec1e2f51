# SPDX-License-Identifier: Apache-2.0
"""The weights of a layer's experts: their shapes, checked, and packing a rank's columns of them. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from . import _core

if TYPE_CHECKING:
    from ._core import Activation, DType, Storage

DTYPES = ("float32", "bfloat16", "float16")
STORAGES = (*DTYPES, "int8")
ACTIVATIONS = ("identity", "relu", "gelu", "gelu_tanh", "silu")


class Stack(Protocol):
    """One tensor per expert: a sequence of tensors, or one tensor whose first dimension is the expert."""

    def __len__(self) -> int:
        """Number of experts."""

    def __getitem__(self, expert: int, /) -> Any:
        """The tensor of one expert."""


Tensors = tuple[Any, Any, Any, Any]  # w_in, w_out, b_in, b_out of one expert; a bias that does not exist is None


@dataclass(frozen=True)
class ExpertWeights:
    """Where the weights of a layer's experts are. Nothing is copied.

    Attributes:
        w_in: E tensors ``[F, D]`` (gated: ``[2F, D]``, gate rows first) of float32, bfloat16 or float16.
        w_out: E tensors ``[D, F]``.
        b_in: E tensors ``[F]`` (gated: ``[2F]``), or ``None``.
        b_out: E tensors ``[D]``, or ``None``.
        activation: ``"identity"``, ``"relu"``, ``"gelu"`` (erf), ``"gelu_tanh"`` or ``"silu"``.
        gated: ``y = act(x W_gate^T) * (x W_up^T)`` instead of ``act(x W_in^T)``.
    """

    w_in: Stack
    w_out: Stack
    b_in: Stack | None = None
    b_out: Stack | None = None
    activation: Activation = "relu"
    gated: bool = False

    def sizes(self) -> Sizes:
        """Check every shape and dtype.

        Returns:
            The sizes of the layer.

        Raises:
            ShapeError: a tensor that does not fit the first expert's; both shapes are named.
            DTypeError: a dtype that is not accepted, or experts of different dtypes.
            ArgumentError: an unknown activation.
        """
        if self.activation not in ACTIVATIONS:
            raise _core.ArgumentError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        if not len(self.w_in):
            raise _core.ShapeError("w_in: expected at least one expert, got none")
        shape, dtype, _ = describe("w_in[0]", self.w_in[0])
        rows_per_column = 2 if self.gated else 1
        if len(shape) != 2 or shape[0] % rows_per_column or 0 in shape:
            raise _core.ShapeError(
                f"w_in[0]: expected {'[2F, D] (gated)' if self.gated else '[F, D]'}, got {list(shape)}"
            )
        if dtype not in DTYPES:
            raise _core.DTypeError(f"w_in[0]: expected {', '.join(DTYPES)}, got {dtype}")
        sizes = Sizes(len(self.w_in), shape[1], shape[0] // rows_per_column, cast("DType", dtype))
        for name, stack, expected in (
            ("w_in", self.w_in, shape),
            ("w_out", self.w_out, (sizes.d_model, sizes.d_ff)),
            ("b_in", self.b_in, shape[:1]),
            ("b_out", self.b_out, shape[1:]),
        ):
            if stack is None:
                continue
            if len(stack) != sizes.num_experts:
                raise _core.ShapeError(f"{name}: expected {sizes.num_experts} experts as in w_in, got {len(stack)}")
            for expert in range(sizes.num_experts):
                found, kind, _ = describe(f"{name}[{expert}]", stack[expert])
                if found != expected:
                    raise _core.ShapeError(
                        f"{name}[{expert}]: expected {list(expected)}, got {list(found)} (w_in[0] is {list(shape)})"
                    )
                if kind != dtype:
                    raise _core.DTypeError(f"{name}[{expert}]: expected {dtype} as in w_in[0], got {kind}")
        return sizes

    def reserve(self, columns: NDArray[np.int64], sizes: Sizes, dtype: Storage) -> _core.PackedExperts:
        """Room for one rank's columns, nothing packed yet. A page gets memory when its first weight is packed.

        Args:
            columns: ``[E, 2]``, this rank's row of the plan.
            sizes: what :meth:`sizes` returned.
            dtype: storage of the packed weights.

        Returns:
            Experts that must not be called before each has been packed.
        """
        return _core.PackedExperts(
            columns=columns,
            d_model=sizes.d_model,
            d_ff=sizes.d_ff,
            dtype=dtype,
            activation=self.activation,
            gated=self.gated,
            b_in=self.b_in is not None,
            b_out=self.b_out is not None,
        )

    def of(self, expert: int) -> Tensors:
        """One expert's tensors, without autograd: what ``PackedExperts.pack`` takes."""
        w_in, w_out, b_in, b_out = (
            None if stack is None else _plain(stack[expert]) for stack in (self.w_in, self.w_out, self.b_in, self.b_out)
        )
        return w_in, w_out, b_in, b_out

    def pack(self, columns: NDArray[np.int64], sizes: Sizes, dtype: Storage) -> _core.PackedExperts:
        """Pack one rank's columns. The originals stay: this takes the memory of the columns, and nothing else.

        Args:
            columns: ``[E, 2]``, this rank's row of the plan.
            sizes: what :meth:`sizes` returned.
            dtype: storage of the packed weights.

        Returns:
            The packed experts.
        """
        packed = self.reserve(columns, sizes, dtype)
        for expert in range(sizes.num_experts):
            packed.pack(expert, *self.of(expert))
        return packed


@dataclass(frozen=True)
class Sizes:
    """The sizes of a layer's experts and the dtype of their weights."""

    num_experts: int
    d_model: int
    d_ff: int
    dtype: DType


def storage_name(dtype: object) -> Storage:
    """The name of a storage given as ``"bfloat16"``, ``torch.bfloat16`` or ``numpy.int8``."""
    name = str(getattr(dtype, "__name__", dtype)).removeprefix("torch.")
    if name not in STORAGES:
        raise _core.DTypeError(f"dtype: expected {', '.join(STORAGES)}, got {dtype!r}")
    return cast("Storage", name)


def _plain(tensor: Any) -> Any:
    """Without autograd, which DLPack refuses to export."""
    return tensor.detach() if hasattr(tensor, "detach") else tensor


def describe(name: str, tensor: Any) -> tuple[tuple[int, ...], str, bool]:
    """Shape, dtype and whether it is contiguous, of any tensor in CPU memory; errors name the argument."""
    try:
        shape, dtype, (device, _), contiguous = _core.tensor_info(_plain(tensor))
    except _core.MoeshardError as error:
        raise type(error)(f"{name}: {error}") from error
    except (RuntimeError, BufferError, ValueError) as error:  # the tensor's own library refuses
        raise _core.ArgumentError(f"{name}: cannot be read through DLPack: {str(error).splitlines()[0]}") from error
    if device != 1:  # kDLCPU
        raise _core.ArgumentError(f"{name}: expected a tensor in CPU memory, got DLPack device type {device}")
    return shape, dtype, contiguous
