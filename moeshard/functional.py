# SPDX-License-Identifier: Apache-2.0
"""Experts as functions on one rank, for torch, NumPy and any other library with DLPack. Needs none of them."""

from __future__ import annotations

import math
import sys
import threading
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from . import _core
from .cuda import extension
from .experts import ExpertWeights, PackedColumns, Stack, describe, storage_name
from .plans import Plan
from .threads import use_threads

if TYPE_CHECKING:
    from . import _cuda
    from ._core import Activation, DType, Storage, SupportsDLPack

Tensor = TypeVar("Tensor", bound="SupportsDLPack")


class PackedExperts:
    """Experts packed once, to be called many times. Made by :func:`moeshard.pack`.

    Attributes:
        num_experts: number of experts E.
        d_model: width D of tokens.
        d_ff: width F of an expert's hidden layer.
        dtype: storage of the packed weights.
        nbytes: memory of the packed weights.
        device: where they are and tokens are expected: ``"cpu"``, ``"cuda:0"`` ...
    """

    def __init__(self, packed: PackedColumns) -> None:
        """Take packed weights; :func:`moeshard.pack` makes them."""
        self._packed = packed
        self._run: _OnCpu | _OnCuda
        if isinstance(packed, _core.PackedExperts):
            self._run, self.device = _OnCpu(packed), "cpu"
        else:
            self._run, self.device = _OnCuda(packed), f"cuda:{packed.device}"
        self._lock = threading.Lock()
        self.num_experts = packed.num_experts
        self.d_model = packed.d_model
        self.d_ff = packed.d_ff
        self.dtype: Storage = packed.dtype
        self.nbytes = packed.nbytes

    @classmethod
    def of(cls, weights: ExpertWeights, dtype: object = None) -> PackedExperts:
        """Pack any weights for one rank; arguments and errors as :func:`moeshard.pack`."""
        sizes = weights.sizes()
        columns = Plan.shard(1, sizes.num_experts, sizes.d_ff).columns[0]
        return cls(weights.pack(columns, sizes, sizes.dtype if dtype is None else storage_name(dtype)))

    def __call__(
        self,
        hidden: Tensor,
        top_k_index: SupportsDLPack,
        top_k_weights: SupportsDLPack,
        out: Tensor | None = None,
    ) -> Tensor:
        """Send each token through its experts. Calls from several threads take turns.

        Args:
            hidden: ``[..., D]`` float32, bfloat16 or float16, where the experts are.
            top_k_index: ``[..., K]`` int32 or int64, the experts of each token; -1 = no expert.
            top_k_weights: ``[..., K]`` float32, bfloat16 or float16, finite; multiplies each expert's output.
            out: like ``hidden``, contiguous, not overlapping it. ``None``: a new one.

        Returns:
            ``out``: shape, dtype and library of ``hidden``.

        Raises:
            ShapeError: shapes that do not fit; both are named.
            DTypeError: a dtype that is not accepted.
            RangeError: an index outside ``-1..E-1`` or a weight that is not finite; on CUDA raised by a later call.
            ArgumentError: a tensor that requires grad or is on another device.
        """
        rows = _rows("hidden", hidden, self.device)
        shape, dtype, *_ = describe("hidden", rows, self.device)
        if shape[1] != self.d_model:
            raise _core.ShapeError(f"hidden: expected [..., {self.d_model}] as the experts, got {_shape(hidden)}")
        index, weights = (
            _rows("top_k_index", top_k_index, self.device),
            _rows("top_k_weights", top_k_weights, self.device),
        )
        if out is None:
            memory: Any = self._run.empty(rows, shape, cast("DType", dtype))
        else:
            memory = without_grad("out", out)
            if _shape(out) != _shape(hidden) or not describe("out", memory, self.device)[2]:
                raise _core.ShapeError(f"out: expected contiguous {_shape(hidden)} as hidden, got {_shape(out)}")
            memory = _rows("out", memory, self.device)
        with self._lock:
            self._run(rows, index, weights, memory)
        return self._run.in_library_of(hidden, memory) if out is None else out

    def __repr__(self) -> str:
        """Sizes, dtype and kind."""
        return (
            f"PackedExperts(num_experts={self.num_experts}, d_model={self.d_model}, d_ff={self.d_ff}, "
            f"dtype={self.dtype!r}, activation={self._packed.activation!r}, gated={self._packed.gated})"
        )


def pack(
    w_in: Stack,
    w_out: Stack,
    *,
    activation: Activation = "relu",
    gated: bool = False,
    b_in: Stack | None = None,
    b_out: Stack | None = None,
    dtype: object = None,
) -> PackedExperts:
    """Pack the weights of a layer's experts for one rank.

    Args:
        w_in: ``[E, F, D]`` (gated: ``[E, 2F, D]``, gate rows first) float32, bfloat16 or float16, in CPU memory or on a
            CUDA device: one tensor or a sequence of E tensors, as ``nn.Linear`` and HuggingFace keep them.
        w_out: ``[E, D, F]``.
        activation: ``"identity"``, ``"relu"``, ``"gelu"`` (erf), ``"gelu_tanh"``, ``"silu"``; ``"clamped_swiglu"``:
            gpt-oss's, gated only: ``g sigmoid(1.702 g) (u + 1)``, gate g at most 7, u in [-7, 7].
        gated: ``y = act(x W_gate^T) * (x W_up^T)``.
        b_in: ``[E, F]`` (gated: ``[E, 2F]``) or ``None``.
        b_out: ``[E, D]`` or ``None``.
        dtype: storage, ``"float32"``, ``"bfloat16"``, ``"float16"`` or ``"int8"`` (or torch's and NumPy's). int8 keeps
            each row of ``w_in`` and ``w_out`` as integers times its largest magnitude / 127. ``None``: as ``w_in``.

    Returns:
        The packed experts, where the weights are: a copy of them in ``dtype``, beside the originals, which are not
        needed any more.

    Raises:
        ShapeError: a shape that does not fit the others.
        DTypeError: a dtype that is not accepted.
        ArgumentError: an unknown activation, or tensors on different devices.

    Example:
        >>> import numpy as np
        >>> pack(np.ones((2, 3, 4), np.float32), np.ones((2, 4, 3), np.float32)).num_experts
        2
    """
    return PackedExperts.of(ExpertWeights(w_in, w_out, b_in, b_out, activation, gated), dtype)


def fused_experts(
    hidden: Tensor,
    top_k_index: SupportsDLPack,
    top_k_weights: SupportsDLPack,
    w_in: Stack,
    w_out: Stack,
    *,
    activation: Activation = "relu",
    gated: bool = False,
    b_in: Stack | None = None,
    b_out: Stack | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Send each token through its experts: ``pack`` and one call. To call more than once, keep ``pack``'s result.

    Args:
        hidden: ``[..., D]`` float32, bfloat16 or float16, where the weights are.
        top_k_index: ``[..., K]`` int32 or int64; -1 = no expert.
        top_k_weights: ``[..., K]`` float32, bfloat16 or float16, finite.
        w_in: ``[E, F, D]`` (gated: ``[E, 2F, D]``, gate rows first).
        w_out: ``[E, D, F]``.
        activation: ``"identity"``, ``"relu"``, ``"gelu"`` (erf), ``"gelu_tanh"``, ``"silu"``; ``"clamped_swiglu"``:
            gpt-oss's, gated only: ``g sigmoid(1.702 g) (u + 1)``, gate g at most 7, u in [-7, 7].
        gated: ``y = act(x W_gate^T) * (x W_up^T)``.
        b_in: ``[E, F]`` (gated: ``[E, 2F]``) or ``None``.
        b_out: ``[E, D]`` or ``None``.
        out: like ``hidden``, contiguous, not overlapping it. ``None``: a new one.

    Returns:
        ``sum_j weight_j * (act(x W_in^T + b_in) W_out^T + b_out)`` over the experts of each token; shape, dtype and
        library of ``hidden``.

    Raises:
        ShapeError, DTypeError, RangeError, ArgumentError: as :func:`moeshard.pack` and its result.

    Example:
        >>> import numpy as np
        >>> ones = np.ones
        >>> x, w_in, w_out = ones((1, 2), np.float32), ones((1, 3, 2), np.float32), ones((1, 2, 3), np.float32)
        >>> fused_experts(x, np.zeros((1, 1), np.int64), ones((1, 1), np.float32), w_in, w_out).tolist()
        [[6.0, 6.0]]
    """
    packed = pack(w_in, w_out, activation=activation, gated=gated, b_in=b_in, b_out=b_out)
    return packed(hidden, top_k_index, top_k_weights, out)


def without_grad(name: str, tensor: Any) -> Any:
    """The tensor, detached; ArgumentError if autograd would follow it."""
    if not getattr(tensor, "requires_grad", False):
        return tensor
    if sys.modules["torch"].is_grad_enabled():
        raise _core.ArgumentError(
            f"{name}: requires grad, and moeshard is for inference only: "
            "call it under torch.no_grad() or torch.inference_mode()"
        )
    return tensor.detach()


def _shape(tensor: Any) -> list[int]:
    return list(describe("tensor", tensor, "cpu", "cuda")[0])


def _rows(name: str, tensor: Any, device: str) -> Any:
    """As [rows, last dimension], contiguous; a copy only if it must be."""
    tensor = without_grad(name, tensor)
    shape, _, contiguous, _ = describe(name, tensor, device)
    if not shape:
        raise _core.ShapeError(f"{name}: expected at least one dimension, got a scalar")
    if not contiguous:
        if hasattr(tensor, "contiguous"):
            tensor = tensor.contiguous()
        else:
            tensor = (np if device == "cpu" else _library_of(tensor)).ascontiguousarray(tensor)
    return tensor if len(shape) == 2 else tensor.reshape(math.prod(shape[:-1]), shape[-1])


def _library_of(tensor: Any) -> Any:
    """The module of the tensor's functions: torch, numpy, cupy, jax.numpy ..."""
    library = type(tensor).__module__.partition(".")[0]
    if library in ("torch", "numpy"):
        return sys.modules[library]
    return tensor.__array_namespace__() if hasattr(tensor, "__array_namespace__") else None


class _OnCpu:
    """The five steps on one rank of the CPU engine."""

    def __init__(self, packed: _core.PackedExperts) -> None:
        self._packed = packed
        self._batch = _core.Batch()
        self._exchange = _core.exchange_one()

    def __call__(self, hidden: Any, index: Any, weights: Any, out: Any) -> None:
        use_threads()
        self._batch.route(hidden, index, weights, self._packed.num_experts, out)
        self._exchange.gather(self._batch)
        self._batch.group()
        self._batch.ffn(self._packed)
        self._exchange.combine(self._batch)

    def empty(self, rows: Any, shape: tuple[int, ...], dtype: DType) -> Any:
        return _core.Tensor(shape, dtype)

    def in_library_of(self, hidden: Any, memory: Any) -> Any:
        """Our memory as a tensor of hidden's library and shape; no copy where that library makes none."""
        library = _library_of(hidden)
        return memory if library is None else library.from_dlpack(memory).reshape(hidden.shape)


class _OnCuda:
    """The same on a device: enqueued on the stream that hidden's library works on."""

    def __init__(self, packed: _cuda.PackedExperts) -> None:
        self._packed = packed
        self._engine = extension().Engine(packed.device)

    def __call__(self, hidden: Any, index: Any, weights: Any, out: Any) -> None:
        self._engine.forward(self._packed, hidden, index, weights, out)

    def empty(self, rows: Any, shape: tuple[int, ...], dtype: DType) -> Any:
        library = _library_of(rows)
        if library is None:
            raise _core.ArgumentError(f"out: {type(rows).__name__} cannot be made here, give one to write to")
        return library.empty_like(rows)

    def in_library_of(self, hidden: Any, memory: Any) -> Any:
        return memory.reshape(hidden.shape)
