# SPDX-License-Identifier: Apache-2.0
"""A rival: DeepSpeed's MoE layer, expert parallel over torch.distributed (gloo) on the CPU. Written for 0.19.8.

What it computes: the router is ``softmax(x router^T)``; each token goes to its ``top_k`` best experts; outputs are
multiplied by the probability of the expert as it is for ``top_k=1`` (Switch's rule), by the probabilities divided by
their sum over the choices that are kept for ``top_k>=2`` (Mixtral's rule).

What it costs: every expert gets a buffer of C rows from every rank and computes all of them, empty ones too. A layer
computes ``R * E * C`` rows for ``R * T * top_k`` (token, choice) pairs; ``E * C * D`` values of each rank travel there
and back. Without dropping, C is the largest number of tokens that any expert gets from any rank; with a capacity factor
it is ``ceil(T / E * capacity_factor * top_k)``, and tokens beyond it come out as zeros (of that choice).

Settings differ from DeepSpeed's defaults only where those are random or not the plain rule: no random choice of the
tokens to drop (``use_rts``), no noise on the second choice (``top2_2nd_expert_sampling``), no least capacity of 4.
"""

import contextlib
import importlib
import importlib.util
import io
import os
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.nn import functional

from .. import _core
from ..experts import Stack
from ..group import Group

if TYPE_CHECKING:
    from .._core import Activation

_HOST = "127.0.0.1"  # the ranks of a benchmark share a machine

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "identity": lambda x: x,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
}


def unavailable() -> str | None:
    """Why DeepSpeed cannot be used here; ``None``: it can."""
    if importlib.util.find_spec("deepspeed") is None:
        return "DeepSpeed is not installed: make test-compare, or pip install 'moeshard[compare]' with DS_BUILD_OPS=0"
    return None


def join_world(group: Group, timeout: float = 60.0) -> None:
    """Initialise torch.distributed over gloo with the ranks of a group, if it is not yet. Collective.

    The workers of :func:`moeshard.launch` have no such world, and DeepSpeed's layer needs one as soon as there are two.

    Args:
        group: the ranks; none may be in a world that the others are not in.
        timeout: seconds a rank may be late, here and in every collective call of the world.

    Raises:
        CommError: a rank is lost, late or elsewhere.
        RuntimeError: torch.distributed cannot connect the ranks.
    """
    group.agree({"whether torch.distributed is initialised": str(dist.is_initialized())})
    if group.size == 1 or dist.is_initialized():
        return
    limit = timedelta(seconds=timeout)
    first = None
    with group.refusing():
        if group.rank == 0:
            first = TCPStore(_HOST, 0, group.size, is_master=True, timeout=limit, wait_for_workers=False)
    port = int(group.all_gather(str(first.port).encode() if first else b"")[0])
    store = first or TCPStore(_HOST, port, group.size, is_master=False, timeout=limit)
    dist.init_process_group("gloo", store=store, rank=group.rank, world_size=group.size, timeout=limit)


def build(
    w_in: Stack,
    w_out: Stack,
    router: torch.Tensor,
    *,
    activation: "Activation",
    top_k: int,
    capacity_factor: float | None,
) -> "DeepSpeedMoE":
    """Make DeepSpeed's layer around weights that are there already: nothing is copied. Collective.

    Args:
        w_in: ``[E, F, D]`` float32: one tensor or a sequence of E tensors, the same on all ranks. Each rank uses
            ``E / R`` of them: ``rank * E / R`` and those that follow.
        w_out: ``[E, D, F]``.
        router: ``[E, D]``, without bias: DeepSpeed's has none.
        activation: of the experts; see :class:`moeshard.ExpertWeights`.
        top_k: experts of each token.
        capacity_factor: rows of an expert's buffer over an even share of the tokens; ``None``: no token is dropped.

    Returns:
        The layer, whose experts are dealt out over the world of torch.distributed where there is one (``R`` ranks).

    Raises:
        ArgumentError: DeepSpeed is missing, the ranks do not divide the experts, or an unknown activation.
        ShapeError: a router that does not fit the experts.
    """
    if (reason := unavailable()) is not None:
        raise _core.ArgumentError(reason)
    if activation not in _ACTIVATIONS:
        raise _core.ArgumentError(f"activation: expected one of {', '.join(_ACTIVATIONS)}, got {activation!r}")
    experts, (d_ff, d_model) = len(w_in), w_in[0].shape
    if router.shape != (experts, d_model):
        raise _core.ShapeError(f"router: expected {[experts, d_model]} as the experts, got {list(router.shape)}")
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if experts % ranks:
        raise _core.ArgumentError(
            f"w_in: DeepSpeed needs as many experts on each rank: got {experts} for {ranks} ranks"
        )
    moe = _moe_class()(
        d_model,
        _Expert(d_model, d_ff, _ACTIVATIONS[activation]),
        experts,
        ep_size=ranks,
        k=top_k,
        eval_capacity_factor=1.0 if capacity_factor is None else capacity_factor,
        min_capacity=0,
        drop_tokens=capacity_factor is not None,
        use_rts=False,
        top2_2nd_expert_sampling=False,
    )
    if ranks > 1:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints that it makes a process group
            moe.set_deepspeed_parallelism()  # only deepspeed.initialize, which is for training, calls this by itself
    moe.deepspeed_moe.gate.wg.weight = _view(router)
    first = (dist.get_rank() if ranks > 1 else 0) * (experts // ranks)
    for expert, own in enumerate(moe.deepspeed_moe.experts.deepspeed_experts, first):
        own.w_in, own.w_out = _view(w_in[expert]), _view(w_out[expert])
    return DeepSpeedMoE(moe).eval()


class DeepSpeedMoE(nn.Module):
    """DeepSpeed's layer, called as the other contestants are.

    Args:
        moe: a ``deepspeed.moe.layer.MoE``.
    """

    def __init__(self, moe: nn.Module) -> None:
        """Wrap a layer; :func:`build` makes one."""
        super().__init__()
        self.moe = moe

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Route and compute tokens; collective.

        Args:
            hidden_states: ``[..., D]`` float32, the same number of tokens on all ranks: C must be one, but with a
                capacity factor it follows from a rank's own tokens, and without it is at most their number.

        Returns:
            The same shape.
        """
        output: torch.Tensor = self.moe(hidden_states)[0]  # then the training loss of the router, and the counts
        return output

    @property
    def experts(self) -> nn.ModuleList:
        """This rank's experts, each called once with ``[R, 1, C, D]``."""
        found: Any = self.moe.deepspeed_moe
        experts: nn.ModuleList = found.experts.deepspeed_experts
        return experts


class _Expert(nn.Module):
    """Two matrices without biases, with room for the weights on no device: DeepSpeed copies the module E / R times."""

    def __init__(self, d_model: int, d_ff: int, activation: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.w_in = nn.Parameter(torch.empty(d_ff, d_model, device="meta"))
        self.w_out = nn.Parameter(torch.empty(d_model, d_ff, device="meta"))
        self.activation = activation

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return functional.linear(self.activation(functional.linear(rows, self.w_in)), self.w_out)


def _view(weight: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach(), requires_grad=False)


def _moe_class() -> Callable[..., Any]:
    """DeepSpeed's ``MoE``, its communication initialised. Imported by name: it has no types to check against."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # read at the first import; it would take a GPU if there is one
    comm = importlib.import_module("deepspeed.comm")
    if dist.is_initialized() and not comm.is_initialized():
        # Initialising would compile deepspeed_shm_comm for minutes, which serves inference_all_reduce alone, and no MoE
        # layer calls that (0.19.8: comm/torch.py). DeepSpeed goes without wherever its own table says it must.
        operations = importlib.import_module("deepspeed.ops").__compatible_ops__
        operations["deepspeed_shm_comm"] = False
        comm.init_distributed(dist_backend="gloo", verbose=False)
    moe: Callable[..., Any] = importlib.import_module("deepspeed.moe.layer").MoE
    return moe
