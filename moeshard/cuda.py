# SPDX-License-Identifier: Apache-2.0
"""CUDA: a rank's engine on its device, and how the ranks agree how much room a call needs. Needs no torch.

NCCL's buffers have the same size on all ranks, but a rank knows its own number of tokens only; and once a rank has
enqueued a call, nothing can tell it any more that another one needs more room. So the ranks agree before they enqueue:

- by default in every call, between the hosts, with the group's own exchange (shared memory, or gloo). No rank waits for
  a device. Ranks that disagree about the layer, that refuse or died are found here, before anything is enqueued, and
  raise as they do on CPUs.
- after :meth:`moeshard.Group.reserve` once for all: then no host waits for another. A rank with more tokens than that
  takes part without any and raises; the others notice nothing.

What the device alone can see (an index out of range, ranks that disagree after ``reserve``) is raised by a later call.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from . import _core
from .experts import DTYPES

if TYPE_CHECKING:
    from . import _cuda
    from .group import Group


class Rows(Protocol):
    """A CUDA tensor of two dimensions, of any library that speaks DLPack and slices rows."""

    shape: Any
    dtype: Any

    def __getitem__(self, rows: slice, /) -> Self:
        """Some of the rows."""

    def __dlpack__(self, *, stream: Any = None) -> Any:
        """The tensor for another library."""

    def __dlpack_device__(self) -> tuple[Any, Any]:
        """(kDLCUDA, device number)."""


def extension() -> ModuleType:
    """The extension ``moeshard._cuda``.

    Raises:
        ArgumentError: it was not built, or the CUDA runtime is missing; says which.
    """
    try:
        from . import _cuda
    except ImportError as error:
        raise _core.ArgumentError(
            f"tensors on CUDA need the extension moeshard._cuda: {error}. "
            "Build it with nvcc on PATH (MOESHARD_CUDA=1 pip install .), or move the model to the CPU"
        ) from error
    return _cuda


def nccl_files() -> list[str]:
    """Where pip's nvidia packages keep NCCL in this Python, the one beside torch first."""
    nvidia = importlib.util.find_spec("nvidia")
    homes = [] if nvidia is None else list(nvidia.submodule_search_locations or ())
    files = [Path(home, "nccl", "lib", "libnccl.so.2") for home in homes]
    return [str(file) for file in files if file.exists()]


class Recorded(NamedTuple):
    """One call, as the device saw it.

    Attributes:
        layer: the layer's number.
        tokens: of this rank.
        choices: of each token.
        dtype: of the tokens.
        block: when the model's router began: nanoseconds since recording began; nan: not known.
        begin: when the layer began.
        steps: nanoseconds in route, gather, group, ffn and combine.
        seen: ``[E+1]``: slots of each expert, then all slots, over all ranks.
    """

    layer: int
    tokens: int
    choices: int
    dtype: str
    block: float
    begin: float
    steps: tuple[float, float, float, float, float]
    seen: NDArray[np.int64]


class CudaEngine:
    """The five steps on one CUDA device. Made by :meth:`moeshard.Group.engine`, collectively.

    Args:
        group: the ranks; with more than one, NCCL carries the rows.
        device: the number of this rank's device.
        chunks: pieces that the tokens of a call are cut into, so that they travel while others are computed.

    Raises:
        CommError: NCCL was not found (says where it was looked for), or its error; the other ranks raise PeerError.
    """

    def __init__(self, group: Group, device: int, *, chunks: int = 1) -> None:
        """Meet the other ranks."""
        cuda = extension()
        self.device = device
        self._group = group
        self._calls = 0
        self._exchange: _cuda.NcclExchange | None = None
        if group.size > 1:
            files = nccl_files()
            with group.refusing():
                name = cuda.nccl_unique_id(files) if group.rank == 0 else b""
            (name, *_) = group.all_gather(name)
            with group.all_or_none():
                self._exchange = cuda.NcclExchange(name, group.rank, group.size, device, group.timeout, files)
        self._engine: _cuda.Engine | None = cuda.Engine(device, self._exchange, chunks=chunks)

    @contextlib.contextmanager
    def checking(self) -> Iterator[None]:
        """Work of a call that stands before :meth:`forward`: if it fails here, the other ranks hear of it."""
        group = self._group
        self._calls += 1
        if group.size == 1:
            yield
        elif group.reserved is None:
            with group.refusing():
                yield
        else:
            with self._leaving_if_it_fails():
                yield

    def forward(
        self,
        experts: _cuda.PackedExperts,
        hidden: Rows,
        top_k_index: Rows,
        top_k_weights: Rows,
        out: Rows,
        *,
        layer: int,
        replicated: bool = False,
        layout: _cuda.Layout | None = None,
    ) -> None:
        """Enqueue a layer on the current stream, within ``group.call()`` and after :meth:`checking`. Collective.

        Args:
            experts: this rank's columns, on the device.
            hidden: ``[T, D]``, contiguous, on the device, as all that follows.
            top_k_index: ``[T, K]`` int32 or int64; -1 = no expert.
            top_k_weights: ``[T, K]``.
            out: ``[T, D]`` of hidden's dtype; written on the stream. If the device finds something wrong with the
                call, it becomes NaN on every rank, and a later call raises.
            layer: the layer's number, the same on all ranks.
            replicated: all ranks hold the same tokens.
            layout: which slots this rank computes, of the same table on all ranks. ``None``: something of each.

        Raises:
            ArgumentError: more tokens than :meth:`moeshard.Group.reserve` was told.
            RangeError: an index of an **earlier** call was out of range.
            CommError: a rank is lost, late, elsewhere or failed; see :mod:`moeshard.errors`.
        """
        group, tokens = self._group, hidden.shape[0]
        with group.in_step():
            if group.size == 1:
                room = tokens
            elif group.reserved is None:
                room = self._agree(layer, experts, hidden, top_k_index, replicated)
            else:
                room = group.reserved
            rows: Sequence[Rows] = (hidden, top_k_index, top_k_weights, out)
            if tokens > room:
                rows = [tensor[:0] for tensor in rows]
            if room and self._engine is not None:
                with self._leaving_if_it_fails():
                    self._engine.forward(
                        experts, *rows, capacity=room, layer=layer, replicated=replicated, layout=layout
                    )
        if tokens > room:
            raise _core.ArgumentError(
                f"hidden_states: {tokens} tokens, but the ranks have reserved room for {room} each: "
                "call group.reserve with more on all ranks, or with None"
            )

    def start_recording(self) -> None:
        """Let the device note when the steps of each call begin: for :func:`moeshard.profile`."""
        if self._engine is not None:
            self._engine.start_recording()

    def stamp(self, tensor: Rows) -> None:
        """The router of the next call begins to work, on the stream of this tensor."""
        if self._engine is not None:
            self._engine.stamp(tensor)

    def stop_recording(self) -> list[Recorded]:
        """Wait for the device, and tell what it noted."""
        return [] if self._engine is None else [Recorded(*call) for call in self._engine.stop_recording()]

    def close(self) -> None:
        """Let go of the device; waits some seconds for ranks that are still in a collective. Legal twice."""
        self._engine = self._exchange = None

    def abort(self, reason: str) -> None:
        """End what waits on the device for other ranks, here and, through NCCL, there. Legal twice."""
        if self._exchange is not None:
            self._exchange.abort(reason)
        self.close()

    def _agree(self, layer: int, experts: _cuda.PackedExperts, hidden: Rows, index: Rows, replicated: bool) -> int:
        """The most tokens that a rank has in this call."""
        kind = DTYPES.index(str(hidden.dtype).removeprefix("torch.")) | replicated << 32  # two int32
        facts = (self._calls, layer, hidden.shape[0], experts.d_model, index.shape[1], experts.num_experts, kind, 0, 0)
        headers = self._group.gather_row(np.array(facts, np.int64))  # ms_header of csrc/moeshard.h
        _core.header_check(headers)
        return int(headers[:, 2].max())

    @contextlib.contextmanager
    def _leaving_if_it_fails(self) -> Iterator[None]:
        """The others are in a collective by now: a rank that will not be there must not keep them waiting."""
        try:
            yield
        except (_core.RangeError, _core.RankMismatch, _core.PeerError):
            raise  # of an earlier call: this one is enqueued
        except Exception as error:
            if self._group.size > 1:
                self._group.abandon(f"{type(error).__name__}: {error}")
            raise
