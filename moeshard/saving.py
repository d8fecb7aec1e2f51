# SPDX-License-Identifier: Apache-2.0
"""save_pretrained and state_dict: the whole weights of a sharded model, out of the ranks.

Experts are gathered one by one. On disk they are what transformers' own ``save_pretrained`` would write: the 5 line
undoes on the way out what it converted on the way in.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import _core
from .api import Original, Places, originals, put
from .checkpoint import Writer
from .conversion import CONVERTS, match
from .experts import ExpertWeights
from .lazy import Computed, Lazy, Region, Strided
from .memory import Canvas
from .streaming import allocate, collect, empty
from .streaming import progress as progress_bar

Tensors = dict[str, torch.Tensor]


def state_dict(model: nn.Module, *, rank0_only: bool = False) -> Tensors:
    """The whole weights of a sharded model under their original names, gathered from the ranks. Collective.

    What ``model.state_dict()`` gives before ``shard``, in the same order. The model stays sharded.

    Memory: a copy of all experts, on every rank that gets the result; the other weights are the model's own.
    :func:`moeshard.save_pretrained` needs no such copy.

    Args:
        model: what :func:`moeshard.shard` returned, on every rank of its group.
        rank0_only: the other ranks get an empty dictionary, and need one expert's memory.

    Returns:
        Name -> tensor, on the devices where the model's parameters were.

    Raises:
        ArgumentError: the model is not sharded, or its plan has pruned experts, whose weights are gone.
        CommError: a rank failed (PeerError; there its own error) or is lost.

    Example:
        >>> weights = moeshard.state_dict(model, rank0_only=True)  # doctest: +SKIP
    """
    sharded = originals(model)
    group = sharded[0][1].experts.group
    wanted = group.rank == 0 or not rank0_only
    with torch.inference_mode(False), torch.no_grad(), contextlib.ExitStack() as stack:
        with group.all_or_none():
            layers = [stack.enter_context(_opened(original, keep=wanted)) for _, original in sharded]
        for layer in layers:
            for expert in range(layer.original.experts.packed.num_experts):
                collect(layer.original.experts, layer.weights, expert)
                layer.release()
        group.barrier()
        if not wanted:
            return {}
        with _in_place(model, sharded) as whole:
            return dict(whole.state_dict())


def save_pretrained(
    model: nn.Module, path: str | Path, *, max_shard_size: int | str | None = None, progress: bool = True
) -> None:
    """Write a sharded model as a normal HuggingFace checkpoint: ``cls.from_pretrained(path)`` loads it. Collective.

    Rank 0 writes; the others send their columns, one expert at a time. Names, files and configuration are those of
    transformers' own ``save_pretrained``. A weight has the bits that it was loaded with, if ``dtype`` was not given to
    ``shard``. Everything is written beside ``path`` first and put in place at the end: a save that fails or is killed
    leaves an older checkpoint there as it was. The model stays sharded.

    Memory: one expert on every rank, and what transformers itself copies of the other weights to convert them. Where
    transformers converts experts in a way that cannot be done piece by piece, all experts on rank 0.

    Args:
        model: a HuggingFace model that was sharded, on every rank of its group.
        path: a folder; made if it is not there.
        max_shard_size: size of a file, bytes or ``"5GB"``. ``None``: what transformers takes.
        progress: show a progress bar over the experts on rank 0, if tqdm is installed.

    Raises:
        ArgumentError: the model is not sharded, or none of transformers, or its plan has pruned experts, whose weights
            are gone.
        OSError: the files cannot be written (rank 0; the others raise PeerError).
        CommError: a rank failed (PeerError; there its own error) or is lost.

    Example:
        >>> moeshard.save_pretrained(model, "switch-copy")  # doctest: +SKIP
    """
    sharded = originals(model)
    group = sharded[0][1].experts.group
    shown = progress and group.rank == 0
    with torch.inference_mode(False), torch.no_grad(), contextlib.ExitStack() as stack:
        with group.all_or_none():
            layers = [stack.enter_context(_opened(original, keep=False)) for _, original in sharded]
            with _in_place(model, sharded) as whole:
                layout = _Layout(whole, layers, max_shard_size)
            writer = layout.writer(Path(path)) if group.rank == 0 else None
            if writer is not None:
                stack.callback(writer.discard)
                layout.store.writer = writer
        gathered = {} if layout.piecewise else state_dict(model, rank0_only=True)
        experts = sum(layer.original.experts.packed.num_experts for layer in layers)
        with progress_bar(experts, shown, "saving experts") as step:
            for layer in layers if layout.piecewise else ():
                for expert in range(layer.original.experts.packed.num_experts):
                    collect(layer.original.experts, layer.weights, expert)
                    with group.refusing():
                        if writer is not None:
                            layout.write_expert(layer, expert)
                        layer.release()
                    step()
        with group.all_or_none():
            if writer is not None:
                layout.write_others(writer, gathered)
                layout.write_config(writer.staging)
                writer.commit()


# ---- the blocks, for a while ----------------------------------------------------------------------------------


@dataclass
class _Layer:
    """A sharded block whose parameters have their shapes back, to be filled."""

    original: Original
    weights: ExpertWeights
    canvas: Canvas | None  # None: memory that is kept

    def release(self) -> None:
        """Give back what an expert has taken."""
        if self.canvas is not None:
            self.canvas.release()


@contextlib.contextmanager
def _opened(original: Original, *, keep: bool) -> Iterator[_Layer]:
    """Parameters with their shapes, and memory as it is written to; emptied again at the end."""
    try:
        canvas = None
        if keep:
            allocate(original.parameters, original.shapes)
        else:
            canvas = Canvas([(shape, p.dtype) for p, shape in zip(original.parameters, original.shapes, strict=True)])
            for parameter, tensor in zip(original.parameters, canvas.tensors, strict=True):
                parameter.data = tensor
        yield _Layer(original, original.adapter.weights(original.block), canvas)
    finally:
        empty(original.parameters)


@contextlib.contextmanager
def _in_place(model: nn.Module, sharded: list[tuple[Places, Original]]) -> Iterator[nn.Module]:
    """The model with its original blocks, so that it has its original names."""
    replaced = [getattr(*places[0]) if places else model for places, _ in sharded]
    whole = model
    try:
        for places, original in sharded:
            whole = put(whole, places, original.block)
        yield whole
    finally:
        for (places, _), replacement in zip(sharded, replaced, strict=True):
            put(model, places, replacement)


# ---- what goes where ------------------------------------------------------------------------------------------


class _Layout:
    """The tensors of the checkpoint to write, the files that they go to, and how parameters turn into them.

    Attributes:
        piecewise: whether every expert can be written by itself.
        store: what is written to a parameter goes there, as the tensors that loading would make it of.
    """

    def __init__(self, model: Any, layers: list[_Layer], max_shard_size: int | str | None) -> None:
        transformers = import_module("transformers")
        hub = import_module("huggingface_hub")
        if not isinstance(model, transformers.PreTrainedModel):
            raise _core.ArgumentError(
                f"model: expected a model of transformers, got {type(model).__name__}: moeshard.state_dict(model) "
                "gathers the weights of any model"
            )
        if max_shard_size is None:
            parameters = inspect.signature(transformers.PreTrainedModel.save_pretrained).parameters
            max_shard_size = parameters["max_shard_size"].default
        self._model = model
        state = dict(model.state_dict())
        experts = {id(parameter) for layer in layers for parameter in layer.original.parameters}
        self._names: dict[int, str] = {}  # of the experts' parameters
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if id(parameter) in experts:
                self._names.setdefault(id(parameter), name)
        kept = _kept(model, state)
        names = set(self._names.values())
        self._others = {name: state[name] for name in kept if name not in names}
        meta = {name: torch.empty_like(state[name], device="meta") for name in kept}
        self._others = _revert(model, self._others)
        self._tensors = {name: (tensor.shape, tensor.dtype) for name, tensor in _revert(model, meta).items()}
        split = hub.split_torch_state_dict_into_shards(
            {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in self._tensors.items()},
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
        self._files = split.filename_to_tensors
        self._metadata = {"total_parameters": sum(p.numel() for p in model.parameters()), **split.metadata}
        self.store = _Store()
        whole = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
        found = match(model, whole, self._tensors, self.store)
        self._sources = {} if found.problems else found.sources
        self.piecewise = names <= self._sources.keys() and all(
            _is_piecewise(self._sources[name]) and self._sources[name].dtype == state[name].dtype for name in names
        )
        self._config = copy.deepcopy(model.config)
        self._config.dtype = str(model.dtype).removeprefix("torch.")
        self._config.architectures = [type(model).__name__]

    def writer(self, path: Path) -> Writer:
        """The files, with room for everything."""
        if path.exists() and not path.is_dir():
            raise _core.ArgumentError(f"path: expected a folder, got a file, {path}")
        return Writer(path.absolute(), self._tensors, self._files, self._metadata)

    def write_expert(self, layer: _Layer, expert: int) -> None:
        """Write one expert's part of each parameter of its layer."""
        weights = layer.weights
        bases = {parameter.untyped_storage().data_ptr(): parameter for parameter in layer.original.parameters}
        for stack in (weights.w_in, weights.w_out, weights.b_in, weights.b_out):
            if stack is None:
                continue
            view = stack[expert]
            parameter = bases[view.untyped_storage().data_ptr()]
            base = Lazy(parameter.shape, parameter.dtype)
            region: Region = Strided(base, view.shape, view.stride(), view.storage_offset()).on_base()
            self._sources[self._names[id(parameter)]].write(region, parameter.data[region])

    def write_others(self, writer: Writer, gathered: Mapping[str, torch.Tensor]) -> None:
        """Write all that is not written expert by expert."""
        others = self._others
        if gathered:
            kept = _kept(self._model, gathered)
            others = _revert(self._model, {name: gathered[name] for name in kept})
        for name, tensor in others.items():
            writer.write(name, tensor)

    def write_config(self, folder: Path) -> None:
        """Write config.json, and what generation needs."""
        self._config.save_pretrained(folder)
        if self._model.can_generate():
            self._model.generation_config.save_pretrained(folder)


class _Store:
    """The files, once there are some."""

    writer: Writer | None = None

    def tensor(self, name: str) -> torch.Tensor:
        raise LookupError(name)

    def write(self, name: str, tensor: torch.Tensor, first: int) -> None:
        assert self.writer is not None
        self.writer.write(name, tensor, first)


def _is_piecewise(source: Lazy) -> bool:
    return not isinstance(source, Computed) and all(_is_piecewise(child) for child in source.children)


def _revert(model: Any, state: Tensors) -> Tensors:
    """Undo transformers' conversions: the tensors of a checkpoint."""
    if not CONVERTS:
        reverted: Tensors = model._fix_state_dict_keys_on_save(state)
        return reverted
    return dict(import_module("transformers.core_model_loading").revert_weight_conversion(model, state))


def _kept(model: Any, state: Mapping[str, torch.Tensor]) -> list[str]:
    """The names that a checkpoint has: of tensors that are tied, one."""
    declared = getattr(model, "all_tied_weights_keys", None)
    if declared is None:
        declared = getattr(model, "_tied_weights_keys", None) or []
    patterns = [re.escape(name) for name in declared] if CONVERTS else list(declared)
    same: dict[tuple[object, ...], list[str]] = {}
    for name, tensor in state.items():
        where = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride()) if tensor.numel() else (name,)
        same.setdefault(where, []).append(name)
    dropped = set(getattr(model, "_keys_to_ignore_on_save", None) or [])
    for names in same.values():
        tied = [name for name in names if any(re.search(pattern, name) for pattern in patterns)]
        free = [name for name in names if name not in tied]
        dropped.update(set(names) - {(free or sorted(names))[0]})
    return [name for name in state if name not in dropped]
