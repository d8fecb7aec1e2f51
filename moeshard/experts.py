# SPDX-License-Identifier: Apache-2.0
"""The weights of a layer's experts: their shapes, checked, and packing a rank's columns of them. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from . import _core
from .threads import use_threads

if TYPE_CHECKING:
    from . import _cuda
    from ._core import Activation, DType, Storage

DTYPES = ("float32", "bfloat16", "float16")
STORAGES = (*DTYPES, "int8")
KINDS = {1: "cpu", 3: "cpu", 11: "cpu", 2: "cuda", 13: "cuda"}  # DLPack device types; 3, 11: pinned, 13: managed
ACTIVATIONS = ("identity", "relu", "gelu", "gelu_tanh", "silu", "clamped_swiglu")


PackedColumns: TypeAlias = "_core.PackedExperts | _cuda.PackedExperts"


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
        activation: ``"identity"``, ``"relu"``, ``"gelu"`` (erf), ``"gelu_tanh"``, ``"silu"``; ``"clamped_swiglu"``:
            gpt-oss's, gated only: ``g sigmoid(1.702 g) (u + 1)``, gate g at most 7, u in [-7, 7].
        gated: ``y = act(x W_gate^T) * (x W_up^T)`` instead of ``act(x W_in^T)``.
        interleaved: the rows of ``w_in`` and ``b_in`` alternate, gate 0, up 0, gate 1, ... (gpt-oss).
    """

    w_in: Stack
    w_out: Stack
    b_in: Stack | None = None
    b_out: Stack | None = None
    activation: Activation = "relu"
    gated: bool = False
    interleaved: bool = False

    def sizes(self) -> Sizes:
        """Check every shape and dtype.

        Returns:
            The sizes of the layer.

        Raises:
            ShapeError: a tensor that does not fit the first expert's; both shapes are named.
            DTypeError: a dtype that is not accepted, or experts of different dtypes.
            ArgumentError: an unknown activation, or tensors on different devices.
        """
        if self.activation not in ACTIVATIONS:
            raise _core.ArgumentError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        if not len(self.w_in):
            raise _core.ShapeError("w_in: expected at least one expert, got none")
        shape, dtype, _, device = describe("w_in[0]", self.w_in[0], "cpu", "cuda")
        rows_per_column = 2 if self.gated else 1
        if len(shape) != 2 or shape[0] % rows_per_column or 0 in shape:
            raise _core.ShapeError(
                f"w_in[0]: expected {'[2F, D] (gated)' if self.gated else '[F, D]'}, got {list(shape)}"
            )
        if dtype not in DTYPES:
            raise _core.DTypeError(f"w_in[0]: expected {', '.join(DTYPES)}, got {dtype}")
        sizes = Sizes(len(self.w_in), shape[1], shape[0] // rows_per_column, cast("DType", dtype), device)
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
                found, kind, _, place = describe(f"{name}[{expert}]", stack[expert], "cpu", "cuda")
                if found != expected:
                    raise _core.ShapeError(
                        f"{name}[{expert}]: expected {list(expected)}, got {list(found)} (w_in[0] is {list(shape)})"
                    )
                if kind != dtype:
                    raise _core.DTypeError(f"{name}[{expert}]: expected {dtype} as in w_in[0], got {kind}")
                if place != device:
                    raise _core.ArgumentError(f"{name}[{expert}]: expected it on {device} as w_in[0], it is on {place}")
        return sizes

    def reserve(self, columns: NDArray[np.int64], sizes: Sizes, dtype: Storage) -> PackedColumns:
        """Room for one rank's columns where the weights are, nothing packed yet.

        On the CPU a page gets memory when its first weight is packed.

        Args:
            columns: ``[E, 2]``, this rank's row of the plan.
            sizes: what :meth:`sizes` returned.
            dtype: storage of the packed weights.

        Returns:
            Experts that must not be called before each has been packed.

        Raises:
            DTypeError: int8 on CUDA.
        """
        if dtype == "int8" and sizes.device_type == "cuda":
            raise _core.DTypeError(
                "dtype: int8 weights are for CPUs so far; expected float32, bfloat16 or float16 on CUDA"
            )
        use_threads()
        return engine_of(sizes.device)(
            columns=columns,
            d_model=sizes.d_model,
            d_ff=sizes.d_ff,
            dtype=dtype,
            activation=self.activation,
            gated=self.gated,
            b_in=self.b_in is not None,
            b_out=self.b_out is not None,
            interleaved=self.interleaved,
        )

    def of(self, expert: int) -> Tensors:
        """One expert's tensors, without autograd: what ``PackedExperts.pack`` takes."""
        w_in, w_out, b_in, b_out = (
            None if stack is None else _plain(stack[expert]) for stack in (self.w_in, self.w_out, self.b_in, self.b_out)
        )
        return w_in, w_out, b_in, b_out

    def pack(self, columns: NDArray[np.int64], sizes: Sizes, dtype: Storage) -> PackedColumns:
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
    """The sizes of a layer's experts, the dtype of their weights, and where they are: ``"cpu"``, ``"cuda:0"`` ..."""

    num_experts: int
    d_model: int
    d_ff: int
    dtype: DType
    device: str = field(default="cpu", repr=False)  # each rank has its own

    @property
    def device_type(self) -> str:
        """``"cpu"`` or ``"cuda"``."""
        return self.device.partition(":")[0]


def engine_of(device: str) -> Callable[..., PackedColumns]:
    """What packs columns for a device."""
    kind, _, number = device.partition(":")
    if kind == "cpu":
        return _core.PackedExperts
    from .cuda import extension

    packed: Callable[..., PackedColumns] = partial(extension().PackedExperts, device=int(number))
    return packed


def storage_name(dtype: object) -> Storage:
    """The name of a storage given as ``"bfloat16"``, ``torch.bfloat16`` or ``numpy.int8``."""
    name = str(getattr(dtype, "__name__", dtype)).removeprefix("torch.")
    if name not in STORAGES:
        raise _core.DTypeError(f"dtype: expected {', '.join(STORAGES)}, got {dtype!r}")
    return cast("Storage", name)


def _plain(tensor: Any) -> Any:
    """Without autograd, which DLPack refuses to export."""
    return tensor.detach() if hasattr(tensor, "detach") else tensor


def describe(name: str, tensor: Any, *devices: str) -> tuple[tuple[int, ...], str, bool, str]:
    """Shape, dtype, whether it is contiguous and device of any tensor; errors name the argument.

    Args:
        name: what errors call it.
        tensor: what speaks DLPack.
        devices: where it may be; nothing: ``"cpu"``.
    """
    try:
        shape, dtype, (kind, number), contiguous = _core.tensor_info(_plain(tensor))
    except _core.MoeshardError as error:
        raise type(error)(f"{name}: {error}") from error
    except (RuntimeError, BufferError, ValueError) as error:  # the tensor's own library refuses
        raise _core.ArgumentError(f"{name}: cannot be read through DLPack: {str(error).splitlines()[0]}") from error
    known, allowed = KINDS.get(kind, f"DLPack device type {kind}"), devices or ("cpu",)
    device = f"cuda:{number}" if known == "cuda" else known
    if known not in allowed and device not in allowed:
        places = {"cpu": "CPU memory", "cuda": "CUDA memory"}
        where = " or ".join(places.get(place, place) for place in allowed)
        raise _core.ArgumentError(f"{name}: got a tensor in {places.get(device, device)}, expected it in {where}")
    return shape, dtype, contiguous, device
