# SPDX-License-Identifier: Apache-2.0
"""Weights on their way from a model into packed memory and back, so that they are never in memory twice.

Both ways expert by expert: beside what was there before, one expert is held twice, and up to 32 MiB are freed but not
yet returned to the system. Where a model keeps a layer's experts in one tensor, none of it can be freed before the last
expert is packed: on the way in, one layer is held twice then.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from . import _core
from .experts import ExpertWeights, PackedColumns, Sizes, Tensors, engine_of
from .layer import ShardedExperts
from .memory import RETURNED_AT_ONCE, return_freed_memory

if TYPE_CHECKING:
    from ._core import Storage


@dataclass
class Load:
    """A layer's experts, ready to be packed: nothing that can fail is left to do.

    Attributes:
        packed: where they go.
        experts: of each expert, the tensors they come from; with ``parameters``, all that holds their memory.
        parameters: the model's own, to be emptied.
    """

    packed: PackedColumns
    experts: list[Tensors]
    parameters: Sequence[nn.Parameter]

    @classmethod
    def prepare(
        cls, weights: ExpertWeights, sizes: Sizes, packed: PackedColumns, parameters: Sequence[nn.Parameter]
    ) -> Load:
        """Take hold of the tensors, and let each be checked by the very code that will pack it."""
        experts = [weights.of(expert) for expert in range(sizes.num_experts)]
        # A rank without columns: everything is checked, nothing is written.
        rehearsal = weights.reserve(np.zeros_like(packed.columns), sizes, packed.dtype)
        for expert, tensors in enumerate(experts):
            rehearsal.pack(expert, *tensors)
        return cls(packed, experts, parameters)


def pack_and_free(loads: list[Load], shown: bool) -> None:
    """Pack expert by expert, each original freed before the next expert is packed. Takes the loads from the list.

    Args:
        loads: the layers.
        shown: show a progress bar.
    """
    freed = 0
    with progress(sum(len(load.experts) for load in loads), shown, "packing experts") as step:
        while loads:
            load = loads.pop(0)
            empty(load.parameters)
            for expert in range(len(load.experts)):
                load.packed.pack(expert, *load.experts[expert])
                freed += sum(tensor.nbytes for tensor in load.experts[expert] if tensor is not None)
                load.experts[expert] = (None, None, None, None)
                if freed >= RETURNED_AT_ONCE:
                    return_freed_memory()
                    freed = 0
                step()
    return_freed_memory()


def empty(parameters: Sequence[nn.Parameter]) -> None:
    """Let go of the parameters' memory; they stay the same objects."""
    for parameter in parameters:
        parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)


def allocate(parameters: Sequence[nn.Parameter], shapes: Sequence[torch.Size]) -> None:
    """Give emptied parameters room for their weights. A page gets memory when it is first written to."""
    for parameter, shape in zip(parameters, shapes, strict=True):
        parameter.data = torch.empty(shape, dtype=parameter.dtype, device=parameter.device)


def repack(packed: PackedColumns, dtype: Storage, device: str, *, interleaved: bool, free: bool) -> PackedColumns:
    """A rank's columns in another storage, expert by expert. Not collective.

    Args:
        packed: the columns; with ``free``, each expert is given up once it is in the new storage.
        dtype: the new storage.
        device: where they are.
        interleaved: how the rows lie in what will be packed later, when ``unshard`` fails half-way.
        free: nobody else uses ``packed``.
    """
    fresh = engine_of(device)(
        columns=packed.columns,
        d_model=packed.d_model,
        d_ff=packed.d_ff,
        dtype=dtype,
        activation=packed.activation,
        gated=packed.gated,
        b_in=packed.has_b_in,
        b_out=packed.has_b_out,
        interleaved=interleaved,
    )
    rounded: torch.dtype = torch.float32 if dtype == "int8" else getattr(torch, dtype)
    for expert, (start, stop) in enumerate(packed.columns.tolist()):
        w_in, w_out, b_in, b_out = (part.to(rounded) for part in _unpack(packed, expert, slice(start, stop)))
        if interleaved:
            w_in, b_in = (part.view(2, stop - start, -1).transpose(0, 1).flatten(0, 1) for part in (w_in, b_in))
        if stop > start:
            fresh.pack(
                expert,
                w_in,
                w_out.T,
                b_in.view(-1) if packed.has_b_in else None,
                b_out.view(-1) if packed.has_b_out else None,
                first=start,
            )
        if free and isinstance(packed, _core.PackedExperts):
            packed.release(expert)
    return_freed_memory()
    return fresh


def unpack_and_free(experts: ShardedExperts, weights: ExpertWeights, load: Load) -> None:
    """Fill a layer's weights with every rank's columns, each expert's packed memory freed before the next. Collective.

    The memory of a layer that has copies (``copy.deepcopy``) is kept: they compute with it.

    Args:
        experts: the packed columns.
        weights: where the weights go.
        load: gets the experts that are back, so that packing it undoes this.

    Raises:
        CommError: a rank failed (PeerError) or is lost.
    """
    for expert in range(experts.packed.num_experts):
        collect(experts, weights, expert)
        load.experts.append(weights.of(expert))
        if isinstance(experts.packed, _core.PackedExperts) and not experts.is_shared:  # on CUDA they go together
            experts.packed.release(expert)


def collect(experts: ShardedExperts, weights: ExpertWeights, expert: int) -> None:
    """Fill one expert's weights with every rank's columns. Collective."""
    group, halves = experts.group, 2 if experts.packed.gated else 1
    columns = [slice(*span) for span in experts.plan.columns[:, expert].tolist()]
    with group.refusing():
        w_in, w_out, b_in, b_out = _unpack(experts.packed, expert, columns[group.rank])
        pieces = [  # this rank's rows, and where everyone's go: [halves, F, columns of a row]
            (w_in, _halves(weights.w_in[expert], halves, weights.interleaved)),
            (w_out, weights.w_out[expert].T.unsqueeze(0)),
        ]
        if weights.b_in is not None:
            pieces.append((b_in, _halves(weights.b_in[expert], halves, weights.interleaved).unsqueeze(-1)))
    for own, target in pieces:
        everyone = group.gather_rows(own)
        with group.refusing():
            for span, rows in zip(columns, everyone, strict=True):
                shape = (target.shape[0], span.stop - span.start, target.shape[2])
                target[:, span] = torch.from_numpy(rows).view(own.dtype).view(shape)
    if weights.b_out is not None:
        everyone = group.gather_rows(b_out)
        with group.refusing():
            first = next(rank for rank, span in enumerate(columns) if span.start == 0 < span.stop)
            weights.b_out[expert].copy_(torch.from_numpy(everyone[first])[0])


def _halves(rows: torch.Tensor, halves: int, interleaved: bool) -> torch.Tensor:
    """Gate and up rows as ``[2, F, ..]``, rows of experts without a gate as ``[1, F, ..]``: a view."""
    if interleaved:
        return rows.view(-1, halves, *rows.shape[1:]).transpose(0, 1)
    return rows.view(halves, -1, *rows.shape[1:])


def _unpack(packed: PackedColumns, expert: int, own: slice) -> list[torch.Tensor]:
    """This rank's columns ``own`` of one expert as rows to gather: w_in, w_out transposed, b_in, b_out."""
    dtype: torch.dtype = torch.float32 if packed.dtype == "int8" else getattr(torch, packed.dtype)
    width = own.stop - own.start
    rows = 2 * width if packed.gated else width
    w_in, w_out = torch.empty(rows, packed.d_model, dtype=dtype), torch.empty(packed.d_model, width, dtype=dtype)
    b_in, b_out = torch.empty(rows, 1), torch.empty(1, packed.d_model)
    packed.unpack(
        expert, w_in, w_out, b_in.view(-1) if packed.has_b_in else None, b_out.view(-1) if packed.has_b_out else None
    )
    return [w_in, w_out.T.contiguous(), b_in, b_out]


@contextlib.contextmanager
def progress(experts: int, shown: bool, doing: str) -> Iterator[Callable[[], None]]:
    """A bar over all experts, and what moves it on. One that cannot be written is no reason to stop half-way."""
    bar = None
    if shown:
        with contextlib.suppress(Exception):
            from tqdm import tqdm  # type: ignore[import-untyped]

            bar = tqdm(total=experts, desc=f"moeshard: {doing}", unit="expert")

    def step() -> None:
        if bar is not None:
            with contextlib.suppress(Exception):
                bar.update()

    yield step
    if bar is not None:
        with contextlib.suppress(Exception):
            bar.close()
