# SPDX-License-Identifier: Apache-2.0
"""The layer: the five steps of one forward pass, under their names."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from . import _core, torch_op
from .cuda import extension
from .experts import ExpertWeights, PackedColumns, Stack, storage_name
from .functional import without_grad
from .group import Group, init
from .padding import Padding
from .plans import Plan, PlanChoice, plan_for
from .threads import use_threads

if TYPE_CHECKING:
    from . import _cuda
    from ._core import Activation


class ShardedExperts(nn.Module):
    """The experts of one MoE layer, cut over the ranks of a group. The router stays the model's own.

    :func:`moeshard.shard` puts one in the place of every MoE layer of a model; :meth:`from_weights` makes one from
    tensors. Inference only. The packed weights are no parameters: ``state_dict()`` raises, :func:`moeshard.state_dict`
    gathers them. ``copy.deepcopy`` gives a layer that computes with the same packed weights (they never change), with
    hooks and (on CPUs) counts of its own. ``to(dtype)`` stores the weights anew, if they had the model's dtype; the
    device stays.

    The device of the packed weights decides which engine runs: on ``cuda`` a layer is enqueued on the current stream.

    Args:
        packed: this rank's columns, on the CPU or a CUDA device; of the same kind on all ranks.
        plan: which rank holds which columns.
        group: the ranks.
        layer: a number that all ranks give this layer, from ``group.new_layer()``.
        replicated: all ranks hold the same tokens, instead of each its own.

    Raises:
        ShapeError: the plan has another number of ranks than the group.
        ArgumentError: packed columns that are not those of the plan.
        CommError: on CUDA, for the group's first layer: the ranks could not meet through NCCL.

    Attributes:
        layout: the plan made ready for this rank: which slots it computes.
        shares: the same on the CUDA device. ``None`` on CPUs, and where it computes something of every slot.
        device: where the experts are and tokens are expected.
        slots: (token, choice) pairs seen so far, over all ranks. On CUDA they are counted on the device: reading this
            or ``counts`` waits for it.
        counts: ``[E]`` int64: how many of them each expert got. The others were dropped (index -1).
        padding: which tokens of the forward pass that runs now are not computed. ``None``: all are.
        on_step: called with the name of each step when it begins, then with ``"done"``: :func:`moeshard.profile`. Not
            on CUDA, where the engine records.
        number: the layer's in this process, for ``torch.ops.moeshard.experts``.
        emptied: parameters of the model that held the weights; ``to(dtype)`` goes for them too.
        interleaved: how gate and up rows lie in what is packed, see :class:`moeshard.ExpertWeights`.
    """

    def __init__(
        self, packed: PackedColumns, plan: Plan, group: Group, *, layer: int, replicated: bool = False
    ) -> None:
        """Take packed weights; :meth:`from_weights` packs them."""
        super().__init__()
        self.packed = packed
        self.plan = plan
        self.layout = _layout_of(packed, plan, group)
        self.group = group
        self.layer = layer
        self.replicated = replicated
        self._slots = 0
        self._counts = np.zeros(packed.num_experts, np.int64)
        self.padding: Padding | None = None
        self.on_step: Callable[[str], object] = unobserved
        self.number = torch_op.register(self)
        self.emptied: list[nn.Parameter] = []
        self.interleaved = False
        self._users: weakref.WeakSet[ShardedExperts] = weakref.WeakSet([self])  # of the packed weights
        self.device = torch.device("cpu")
        self.shares: _cuda.Layout | None = None
        if not isinstance(packed, _core.PackedExperts):
            self.device = torch.device("cuda", group.engine(packed.device).device)
            if self.layout.sparse:
                self.shares = extension().Layout(plan.copies, self.layout.copy_of[group.rank], packed.device)

    @classmethod
    def from_weights(
        cls,
        w_in: Stack,
        w_out: Stack,
        *,
        b_in: Stack | None = None,
        b_out: Stack | None = None,
        activation: Activation = "relu",
        gated: bool = False,
        dtype: object = None,
        plan: PlanChoice = "auto",
        group: Group | None = None,
        tokens: Literal["local", "replicated"] = "local",
    ) -> ShardedExperts:
        """Pack this rank's columns of weights that every rank has. Collective.

        Args:
            w_in: ``[E, F, D]`` (gated: ``[E, 2F, D]``, gate rows first): one tensor or a sequence of E tensors, on the
                CPU or on this rank's CUDA device, where the layer will be.
            w_out: ``[E, D, F]``.
            b_in: ``[E, F]`` (gated: ``[E, 2F]``) or ``None``.
            b_out: ``[E, D]`` or ``None``.
            activation: ``"identity"``, ``"relu"``, ``"gelu"`` (erf), ``"gelu_tanh"``, ``"silu"``; ``"clamped_swiglu"``:
                gpt-oss's, gated only: ``g sigmoid(1.702 g) (u + 1)``, gate g at most 7, u in [-7, 7].
            gated: ``y = act(x W_gate^T) * (x W_up^T)``.
            dtype: storage of the packed weights, as in :func:`moeshard.shard`. ``None``: as ``w_in``.
            plan: the layout; ``"auto"`` is ``"shard"``. Any :class:`moeshard.Plan` of these sizes runs, also one with
                copies of experts; see ``docs/layouts.md``.
            group: the ranks. ``None``: :func:`moeshard.init`.
            tokens: ``"local"``: each rank calls the layer with its own tokens; ``"replicated"``: all with the same.

        Returns:
            The layer. It takes the memory of this rank's columns, beside the originals, which are not needed any more
            (:func:`moeshard.shard` frees a model's own one by one, so that there is no second copy).

        Raises:
            ShapeError, DTypeError, ArgumentError: a bad argument, on this rank; the others raise PeerError.
            RankMismatch: the ranks were given different layers.

        Example:
            >>> import torch
            >>> layer = ShardedExperts.from_weights(torch.ones(2, 3, 4), torch.ones(2, 4, 3))
            >>> layer(torch.ones(1, 4), torch.tensor([[1]]), torch.tensor([[0.5]]))
            tensor([[6., 6., 6., 6.]])
        """
        group = init() if group is None else group
        with group.all_or_none():
            replicated = is_replicated(tokens)
            weights = ExpertWeights(w_in, w_out, b_in, b_out, activation, gated)
            sizes = weights.sizes()
            table = plan_for(plan, group.size, sizes.num_experts, sizes.d_ff)
            storage = sizes.dtype if dtype is None else storage_name(dtype)
        group.agree(
            {
                "the layer": f"{sizes} {activation} gated={gated} b_in={b_in is not None} b_out={b_out is not None}",
                "the device": sizes.device_type,
                "dtype": storage,
                "plan": f"{table} {table.digest}",
                "tokens": tokens,
            }
        )
        with group.all_or_none():
            packed = weights.pack(table.columns[group.rank], sizes, storage)
        return cls(packed, table, group, layer=group.new_layer(), replicated=replicated)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Send each token through its experts. Collective: every rank of the group calls it, with any number of tokens.

        Args:
            hidden_states: ``[..., D]`` float32, bfloat16 or float16, on the device of the layer.
            top_k_index: ``[..., K]`` int32 or int64, the experts of each token; -1 = no expert.
            top_k_weights: ``[..., K]`` float32, bfloat16 or float16, finite; multiplies each expert's output.

        Returns:
            ``sum_j weight_j * expert_j(token)``: shape and dtype of ``hidden_states``.

        Raises:
            ShapeError, DTypeError, RangeError, ArgumentError: a bad argument, on this rank; the others raise PeerError.
                On CUDA the values of indices and weights are checked on the device: a later call raises.
            CommError: a rank is lost, late, elsewhere or failed; see :mod:`moeshard.errors`.

        Source: arXiv 2503.08467, algorithm 1.
        """
        if torch.compiler.is_compiling():
            out: torch.Tensor = torch_op.experts(hidden_states, top_k_index, top_k_weights, self.number)
            return out
        return self.run(hidden_states, top_k_index, top_k_weights)

    def run(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """:meth:`forward`, at once."""
        if self.padding is not None:
            top_k_index = self.padding.left_out(top_k_index)
        inputs, packed = (hidden_states, top_k_index, top_k_weights), self.packed
        if isinstance(packed, _core.PackedExperts):
            out = self._on_cpu(packed, *inputs)
        else:
            out = self._on_cuda(packed, *inputs)
        return out.view(hidden_states.shape)

    @property
    def slots(self) -> int:
        """(token, choice) pairs seen so far, over all ranks."""
        return self._slots if isinstance(self.packed, _core.PackedExperts) else int(self.packed.seen()[-1])

    @property
    def counts(self) -> NDArray[np.int64]:
        """``[E]``: how many of them each expert got."""
        return self._counts if isinstance(self.packed, _core.PackedExperts) else self.packed.seen()[:-1]

    def _on_cuda(self, packed: _cuda.PackedExperts, *inputs: torch.Tensor) -> torch.Tensor:
        """The five steps, enqueued at once."""
        engine = self.group.engine(packed.device)
        with self.group.call():
            with engine.checking():
                hidden, index, weights = self._rows(*inputs)
                out = torch.empty_like(hidden)
            engine.forward(
                packed, hidden, index, weights, out,
                layer=self.layer, replicated=self.replicated, layout=self.shares,
            )  # fmt: skip
        return out

    def _on_cpu(self, packed: _core.PackedExperts, *inputs: torch.Tensor) -> torch.Tensor:
        """The five steps, one after the other."""
        group, batch, experts, step = self.group, self.group.batch, packed.num_experts, self.on_step
        with group.call():
            step("route")
            with group.refusing():
                group.check_open()
                hidden, index, weights = self._rows(*inputs)
                out = torch.empty_like(hidden)
                use_threads()
                batch.route(
                    hidden, index, weights, experts, out,
                    layer=self.layer, replicated=self.replicated, layout=self.layout,
                )  # fmt: skip
            step("gather")
            group.gather(batch)
            with group.refusing():
                step("group")
                batch.group()
                self._slots += int(batch.tokens_per_rank.sum()) * index.shape[1]
                self._counts += batch.counts()
                step("ffn")
                batch.ffn(packed)
            step("combine")
            group.combine(batch)
            step("done")
        return out

    def _rows(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> list[torch.Tensor]:
        """The inputs as contiguous [T, D], [T, K], [T, K]; a copy only of what is not contiguous."""
        rows = []
        for name, tensor in (
            ("hidden_states", hidden_states),
            ("top_k_index", top_k_index),
            ("top_k_weights", top_k_weights),
        ):
            if not isinstance(tensor, torch.Tensor):
                raise _core.DTypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
            if tensor.device != self.device:
                where = "the CPU" if self.device.type == "cpu" else self.device
                raise _core.ArgumentError(f"{name}: expected a tensor on {where} as the experts, got {tensor.device}")
            if not tensor.ndim:
                raise _core.ShapeError(f"{name}: expected at least one dimension, got a scalar")
            width = tensor.shape[-1]
            tensor = without_grad(name, tensor)
            rows.append(tensor.reshape(tensor.numel() // width if width else 0, width).contiguous())
        if rows[0].shape[1] != self.packed.d_model:
            raise _core.ShapeError(
                f"hidden_states: expected [..., {self.packed.d_model}] as the experts, got {list(hidden_states.shape)}"
            )
        if not rows[1].shape[1]:
            raise _core.ShapeError(f"top_k_index: expected at least one choice, got {list(top_k_index.shape)}")
        return rows

    def reset_counts(self) -> None:
        """Forget the tokens seen so far."""
        self._slots = 0
        self._counts[:] = 0
        if not isinstance(self.packed, _core.PackedExperts):
            self.packed.seen(forget=True)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        packed = self.packed
        return (
            f"num_experts={packed.num_experts}, d_model={packed.d_model}, d_ff={packed.d_ff}, dtype={packed.dtype}, "
            f"activation={packed.activation}, gated={packed.gated}, rank={self.group.rank} of {self.group.size}, "
            f"{packed.nbytes / 2**20:.1f} MiB"
        )

    @property
    def is_shared(self) -> bool:
        """Whether other layers compute with the same packed weights: copies of this one."""
        return len(self._users) > 1

    def _save_to_state_dict(self, destination: object, prefix: str, keep_vars: bool) -> None:
        if not keep_vars:  # else the caller, torch.export for example, wants the live parameters, and has them all
            raise _core.ArgumentError(
                f"state_dict: the weights of {prefix.removesuffix('.') or 'the experts'} are spread over the ranks. "
                "moeshard.state_dict(model) gathers them, moeshard.save_pretrained(model, path) writes a checkpoint; "
                "both are collective"
            )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> ShardedExperts:
        """What ``model.to(...)`` does to each module: ``fn`` shows what it is by what it does to an empty tensor."""
        dtype = self.emptied[0].dtype if self.emptied else getattr(torch, self.packed.dtype, torch.float32)
        moved = fn(torch.empty(0, dtype=dtype, device=self.device))
        if moved.device != self.device:
            raise _core.ArgumentError(
                f"to: sharded experts stay on {self.device}, they cannot go to {moved.device}: call "
                "moeshard.unshard(model) first, then move the model, then shard (modules before this one have moved)"
            )
        if moved.dtype != dtype:
            storage = storage_name(moved.dtype)
            if self.packed.dtype == storage_name(dtype):  # else it was chosen by itself
                from .streaming import repack

                free = not self.is_shared
                self.packed = repack(self.packed, storage, str(self.device), interleaved=self.interleaved, free=free)
                self._users.discard(self)
                self._users = weakref.WeakSet([self])
            for parameter in self.emptied:
                parameter.data = parameter.data.to(moved.dtype)
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> ShardedExperts:
        """Copy everything but the packed weights, which both compute with."""
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        shared = ("packed", "plan", "layout", "shares", "group", "on_step", "_users")
        for name, value in self.__dict__.items():
            clone.__dict__[name] = value if name in shared else copy.deepcopy(value, memo)
        clone.number = torch_op.register(clone)
        self._users.add(clone)
        return clone

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse to be pickled."""
        raise pickle.PicklingError(
            "a sharded layer cannot be pickled, nor a model that has one: its weights are spread over the ranks. "
            "moeshard.save_pretrained(model, path) writes a checkpoint, moeshard.from_pretrained(cls, path) reads it"
        )


def unobserved(step: str) -> None:
    """What a layer does at each step when nobody looks: nothing, in 0.05 us."""


def sharded_layers(model: nn.Module) -> list[tuple[str, ShardedExperts]]:
    """The sharded layers of a model and their names, in its order.

    Raises:
        ArgumentError: there is none.
    """
    layers = [
        (name.removesuffix(".experts"), module)
        for name, module in model.named_modules()
        if isinstance(module, ShardedExperts)
    ]
    if not layers:
        raise _core.ArgumentError("model: it is not sharded, call moeshard.shard(model) first")
    return layers


def _layout_of(packed: PackedColumns, plan: Plan, group: Group) -> _core.Layout:
    if plan.ranks != group.size:
        raise _core.ShapeError(f"plan: expected {group.size} ranks as the group, got {plan.ranks}")
    if not np.array_equal(packed.columns, plan.columns[group.rank]):
        raise _core.ArgumentError(f"packed: they are not the columns that the plan gives rank {group.rank}")
    return _core.Layout(plan.columns, plan.d_ff, plan.copies, group.rank)


def is_replicated(tokens: str) -> bool:
    """Check and read the argument `tokens`."""
    if tokens not in ("local", "replicated"):
        raise _core.ArgumentError(f"tokens: expected 'local' or 'replicated', got {tokens!r}")
    return tokens == "replicated"
