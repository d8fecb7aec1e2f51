# SPDX-License-Identifier: Apache-2.0
"""Token paths: the experts of each token in each MoE layer, recorded, counted and saved; needs no torch."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from . import _core

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .layer import ShardedExperts

_FORMAT = 1  # of the .npz


@dataclass(frozen=True, eq=False, repr=False)
class TokenPaths:
    """The experts of each token in each MoE layer: what :func:`moeshard.place` needs to keep tokens where they are.

    Made by :func:`moeshard.record_routing`, or from any array. Cannot be changed afterwards.

    Attributes:
        experts: ``[T, L, k]`` int32, read-only: the experts of token t in layer l; -1: none (dropped by the capacity).
        num_experts: number of experts E of each layer.
        layers: names of the L layers, in the order in which tokens pass them.

    Raises:
        ShapeError, DTypeError: ``experts`` is not ``[T, L, k]`` integers, or ``layers`` are not L different names.
        RangeError: an expert outside ``-1..E-1``.

    Example:
        >>> paths = TokenPaths([[[0], [1]], [[0], [1]], [[2], [-1]]], num_experts=3)
        >>> paths
        TokenPaths(3 tokens, 2 layers, 1 choice, 3 experts)
        >>> paths.counts.tolist()
        [[2, 0, 1], [0, 2, 0]]
        >>> paths.transitions.tolist()
        [[[0, 2, 0], [0, 0, 0], [0, 0, 0]]]
    """

    experts: NDArray[np.int32]
    num_experts: int
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Copy, check and freeze."""
        found = np.asarray(self.experts)
        if found.dtype.kind not in "iu":
            raise _core.DTypeError(f"experts: expected integers, got {found.dtype}")
        if found.ndim != 3 or 0 in found.shape[1:]:
            raise _core.ShapeError(f"experts: expected [tokens, layers, choices], got {list(found.shape)}")
        if self.num_experts < 1:
            raise _core.ArgumentError(f"num_experts: expected at least 1, got {self.num_experts}")
        outside = np.argwhere((found < -1) | (found >= self.num_experts))
        if len(outside):
            token, layer, choice = outside[0].tolist()
            raise _core.RangeError(
                f"experts[{token}, {layer}, {choice}]: got {found[token, layer, choice]}, "
                f"expected -1 to {self.num_experts - 1}"
            )
        experts = np.array(found, dtype=np.int32, order="C")
        experts.flags.writeable = False
        layers = tuple(self.layers) or tuple(f"layer {number}" for number in range(experts.shape[1]))
        if len(set(layers)) != experts.shape[1]:
            raise _core.ShapeError(f"layers: expected {experts.shape[1]} different names, got {list(layers)}")
        object.__setattr__(self, "experts", experts)
        object.__setattr__(self, "layers", layers)

    @property
    def counts(self) -> NDArray[np.int64]:
        """``[L, E]`` int64: slots (token, choice) of each expert."""
        return np.stack([self._histogram(self.experts[:, layer]) for layer in range(len(self.layers))])

    @property
    def transitions(self) -> NDArray[np.int64]:
        """``[L - 1, E, E]`` int64: how many (token, choice, choice) go from an expert to one of the next layer."""
        if not len(self):
            return np.zeros((len(self.layers) - 1, self.num_experts, self.num_experts), np.int64)
        return _core.hops_table(self.hops())

    def hops(self) -> _core.Hops:
        """The transitions in the sparse form that the C core plans with; there must be a token."""
        return _core.count_hops(self.experts, self.num_experts)

    def __len__(self) -> int:
        """Number of tokens T."""
        return int(self.experts.shape[0])

    def __getitem__(self, tokens: slice) -> TokenPaths:
        """The paths of some of the tokens.

        Example:
            >>> TokenPaths(np.zeros((10, 2, 1), int), 4)[:5]
            TokenPaths(5 tokens, 2 layers, 1 choice, 4 experts)
        """
        return TokenPaths(self.experts[tokens], self.num_experts, self.layers)

    def save(self, path: str | Path) -> None:
        """Write a compressed ``.npz``; it holds numbers and text only, no pickles.

        Raises:
            OSError: the file cannot be written.
        """
        with open(path, "wb") as file:
            np.savez_compressed(file, allow_pickle=False, **self._arrays())

    @classmethod
    def load(cls, path: str | Path) -> TokenPaths:
        """Read what :meth:`save` has written.

        Raises:
            ArgumentError: the file is of another kind or version.
            OSError: the file cannot be read.

        Example:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     TokenPaths([[[0], [1]]], 2).save(f"{folder}/paths.npz")
            ...     TokenPaths.load(f"{folder}/paths.npz").experts.tolist()
            [[[0], [1]]]
        """
        with open(path, "rb") as file:
            return cls._read(file, str(path))

    @classmethod
    def _read(cls, file: Any, name: str) -> TokenPaths:
        try:
            with np.load(file, allow_pickle=False) as arrays:
                version = int(arrays["moeshard_paths"])
                experts, num_experts, layers = arrays["experts"], int(arrays["num_experts"]), arrays["layers"].tolist()
        except (BadZipFile, EOFError, KeyError, TypeError, ValueError) as error:
            raise _core.ArgumentError(f"{name}: these are no token paths that moeshard has saved: {error}") from error
        if version != _FORMAT:
            raise _core.ArgumentError(f"{name}: token paths of format {version}, expected {_FORMAT}")
        return cls(experts, num_experts, tuple(layers))

    def _arrays(self) -> dict[str, NDArray[Any]]:
        return {
            "moeshard_paths": np.array(_FORMAT),
            "experts": self.experts,
            "num_experts": np.array(self.num_experts),
            "layers": np.array(self.layers),
        }

    def _histogram(self, experts: NDArray[np.int32]) -> NDArray[np.int64]:
        return np.bincount(experts[experts >= 0], minlength=self.num_experts)

    def __repr__(self) -> str:
        """Sizes."""
        tokens, layers, choices = self.experts.shape
        sizes = zip((tokens, layers, choices), ("token", "layer", "choice"), strict=True)
        named = ", ".join(f"{size} {name}{'s' * (size != 1)}" for size, name in sizes)
        return f"TokenPaths({named}, {self.num_experts} experts)"


Batches = Iterable["Mapping[str, torch.Tensor] | torch.Tensor"]


def record_routing(
    model: nn.Module, batches: Batches, *, layers: Sequence[str] | None = None, gather: bool = False
) -> TokenPaths:
    """Run a model and record to which experts each token goes. Collective.

    The model's outputs are dropped. Only real tokens are recorded: where a batch has an ``attention_mask``, tokens
    with 0 in it are padding and left out. The router is the model's, and so is its capacity: a token that it drops has
    expert -1. To plan for routing without drops, shard with ``capacity=None`` first.

    Args:
        model: a sharded model, or a part of one; or a model that :func:`moeshard.shard` could take: then it is sharded
            on this process alone while it is recorded, and put back (bit for bit).
        batches: what the model is called with, one by one: mappings (``model(**batch)``) or tensors (``model(batch)``).
            Every rank has its own, but all equally many.
        layers: names of the MoE layers to record. ``None``: all. They must see the same tokens: of an encoder-decoder,
            record the encoder and the decoder one by one.
        gather: every rank gets the tokens of all ranks, in rank order. Otherwise each has its own.

    Returns:
        The paths of the tokens, in the order of the batches.

    Raises:
        ArgumentError: no MoE layer, an unknown name, a layer that is not called once in every batch, layers with
            different numbers of experts, tokens or choices, or a mask that does not fit.
        CommError: a rank is lost, late or failed.

    Example:
        >>> paths = moeshard.record_routing(model, [tokenizer(text, return_tensors="pt")])  # doctest: +SKIP
        >>> paths.save("paths.npz")  # doctest: +SKIP
    """
    import torch

    from .group import init
    from .layer import sharded_layers

    with _sharded(model) as sharded:
        chosen = _choose(sharded_layers(sharded), layers)
        group = chosen[0][1].group
        with group.all_or_none():
            _check_alike(chosen)
        group.agree({"the recorded layers": ", ".join(name for name, _ in chosen), "gather": str(gather)})
        recorder = _Recorder([name for name, _ in chosen])
        with contextlib.ExitStack() as attached, torch.inference_mode():
            for number, (_, layer) in enumerate(chosen):
                attached.callback(layer.register_forward_hook(recorder.hook(number), with_kwargs=True).remove)
            for batch in batches:
                _ = sharded(**batch) if isinstance(batch, Mapping) else sharded(batch)
                recorder.end_batch(batch)
        with group.all_or_none():
            paths = recorder.paths(chosen[0][1].packed.num_experts)
        replicated = chosen[0][1].replicated
    if gather and not replicated:
        ranks = group if sharded is model else init()  # of a model that is not sharded: those that shard would take
        paths = _gather(ranks.all_gather(_pack(paths)))
    return paths


class _Recorder:
    """Keeps each layer's choices of a batch; what is wrong with them is said at the end, when all ranks can hear it."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._calls: list[list[NDArray[np.int32]]] = [[] for _ in names]
        self._batches: list[tuple[list[list[NDArray[np.int32]]], NDArray[np.bool_] | None]] = []

    def hook(self, number: int) -> Any:
        """A forward hook: only calls that succeeded are recorded."""

        def record(
            module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: Mapping[str, torch.Tensor], output: object
        ) -> None:
            index = args[1] if len(args) > 1 else kwargs["top_k_index"]
            flat = index.detach().reshape(-1, index.shape[-1])
            self._calls[number].append(flat.cpu().numpy().astype(np.int32))  # a copy, also of int32

        return record

    def end_batch(self, batch: object) -> None:
        """The batch has gone through the model."""
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        real = None if mask is None else mask.detach().reshape(-1).cpu().numpy().astype(bool)
        self._batches.append((self._calls, real))
        self._calls = [[] for _ in self._names]

    def paths(self, num_experts: int) -> TokenPaths:
        """Everything recorded."""
        rows = [self._of_batch(number, *batch) for number, batch in enumerate(self._batches)]
        widths = {row.shape[2] for row in rows}
        if len(widths) > 1:
            raise _core.ArgumentError(f"batches: the number of choices changes between them: {sorted(widths)}")
        empty = np.empty((0, len(self._names), 1), np.int32)
        return TokenPaths(np.concatenate(rows) if rows else empty, num_experts, tuple(self._names))

    def _of_batch(
        self, number: int, calls: list[list[NDArray[np.int32]]], real: NDArray[np.bool_] | None
    ) -> NDArray[np.int32]:
        for name, found in zip(self._names, calls, strict=True):
            if len(found) != 1:
                raise _core.ArgumentError(
                    f"{name}: called {len(found)} times in batch {number}, expected once: leave it out by layers=[...]"
                )
        first = calls[0][0]
        for name, (index,) in zip(self._names, calls, strict=True):
            if index.shape != first.shape:
                raise _core.ArgumentError(
                    f"layers: {name} had {list(index.shape)} tokens and choices in batch {number}, but "
                    f"{self._names[0]} {list(first.shape)}: record layers that see the same tokens, with layers=[...]"
                )
        experts = np.stack([index for (index,) in calls], axis=1)
        if real is None or len(experts) == real.sum() != len(real):  # without a mask, or unpadded by the model
            return experts
        if len(real) != len(experts):
            raise _core.ArgumentError(
                f"batches: the attention_mask of batch {number} has {len(real)} tokens, {int(real.sum())} real ones, "
                f"but {self._names[0]} saw {len(experts)}"
            )
        return experts[real]


@contextlib.contextmanager
def _sharded(model: nn.Module) -> Iterator[nn.Module]:
    """The model itself if it is sharded, else sharded on this process alone until the end."""
    from .api import shard, unshard
    from .group import Group
    from .layer import ShardedExperts

    if any(isinstance(module, ShardedExperts) for module in model.modules()):
        yield model
        return
    with Group(_core.exchange_one(), "one") as alone:
        sharded = shard(model, group=alone, progress=False)
        try:
            yield sharded
        finally:
            unshard(sharded)


def _choose(found: list[tuple[str, ShardedExperts]], names: Sequence[str] | None) -> list[tuple[str, ShardedExperts]]:
    if names is None:
        return found
    missing = [name for name in names if name not in dict(found)]
    if missing or not names:
        raise _core.ArgumentError(
            f"layers: expected some of {', '.join(name for name, _ in found)}, got {', '.join(missing) or 'none'}"
        )
    return [entry for entry in found if entry[0] in names]


def _check_alike(layers: Sequence[tuple[str, ShardedExperts]]) -> None:
    first, one = layers[0]
    for name, layer in layers:
        if layer.group is not one.group:
            raise _core.ArgumentError(f"{name}: has another group than {first}, record them one by one")
        if layer.packed.num_experts != one.packed.num_experts:
            raise _core.ArgumentError(
                f"{name}: has {layer.packed.num_experts} experts but {first} {one.packed.num_experts}: record layers "
                "with equally many, with layers=[...]"
            )


def _pack(paths: TokenPaths) -> bytes:
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **paths._arrays())
    return file.getvalue()


def _gather(messages: Sequence[bytes]) -> TokenPaths:
    """The tokens of all ranks. A rank without tokens does not know the number of choices."""
    parts = [TokenPaths._read(io.BytesIO(message), "a rank's message") for message in messages]
    parts = [part for part in parts if len(part)] or parts[:1]
    choices = max(part.experts.shape[2] for part in parts)
    missing = [choices - part.experts.shape[2] for part in parts]
    whole = [
        np.pad(part.experts, ((0, 0), (0, 0), (0, less)), constant_values=-1)
        for part, less in zip(parts, missing, strict=True)
    ]
    return TokenPaths(np.concatenate(whole), parts[0].num_experts, parts[0].layers)
