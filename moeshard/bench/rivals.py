# SPDX-License-Identifier: Apache-2.0
"""The contestants: the whole MoE block, router included, in the ways one can compute it.

Each maps ``[1, T, D]`` to ``[1, T, D]``. All rivals read the same stacked weights, HuggingFace's modules included,
whose parameters are views. moeshard has its packed copy. Those that are not cut over the ranks are replicated: each
rank computes its own tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from moeshard.layer import ShardedExperts

from . import rival_deepspeed
from .grid import Activation, Shape
from .inputs import Router, Weights

UNLIMITED = 2**62  # tokens of a sequence that an expert takes: never reached

# The fastest that torch has, in place where it can.
ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "gelu": functional.gelu,
    "silu": lambda hidden: functional.silu(hidden, inplace=True),
}


class Unavailable(Exception):
    """A contestant that cannot take part; its text says why."""


@dataclass(frozen=True)
class Contestant:
    """One way to compute the block.

    Attributes:
        name: in tables.
        block: ``[1, T, D]`` -> ``[1, T, D]``.
        capacity_factor: DeepSpeed's; None: no token is dropped.
        padded: DeepSpeed: every expert computes as many rows as the fullest.
    """

    name: str
    block: nn.Module
    capacity_factor: float | None = None
    padded: bool = False


def contestants(weights: Weights, experts: ShardedExperts) -> tuple[list[Contestant], dict[str, str]]:
    """Everyone who can take part.

    Args:
        weights: all experts.
        experts: moeshard's, packed from them.

    Returns:
        The contestants, ``loop`` first because its output is what the others' are compared with, and why the others
        cannot take part.
    """
    makers: dict[str, Callable[[], Contestant]] = {
        "loop": lambda: Contestant("loop", Loop(weights)),
        "hf": lambda: Contestant("hf", huggingface(weights)),
        "grouped_mm": lambda: Contestant("grouped_mm", GroupedMM(weights)),
        "moeshard": lambda: Contestant("moeshard", Moeshard(weights, experts)),
    }
    if experts.group.size > 1:
        makers["published"] = lambda: Contestant("published", Published(weights))
    for name, factor in (("deepspeed", None), ("deepspeed-cf1.25", 1.25)):
        makers[name] = lambda name=name, factor=factor: Contestant(name, deepspeed(weights, factor), factor, True)  # type: ignore[misc]
    found, absent = [], {}
    for name, make in makers.items():
        try:
            found.append(make())
        except Unavailable as reason:
            absent[name] = str(reason)
    return found, absent


class Block(nn.Module):
    """A block whose router is :class:`~moeshard.bench.inputs.Router`; subclasses add the experts."""

    def __init__(self, weights: Weights) -> None:
        """Share the weights."""
        super().__init__()
        shape = weights.shape
        self.shape = shape
        self.router = Router(weights.router, top_k=shape.top_k, normalize=shape.normalize)
        self.num_experts = weights.num_experts
        self.w_in, self.w_out = weights.w_in, weights.w_out

    def forward(self, hidden: Tensor) -> Tensor:
        """``[1, T, D]`` -> ``[1, T, D]``."""
        rows = hidden.view(-1, hidden.shape[-1])
        return self.experts(rows, *self.router(rows)).view(hidden.shape)

    def experts(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """``[T, D]``, ``[T, K]``, ``[T, K]`` -> ``[T, D]``."""
        raise NotImplementedError


class Moeshard(Block):
    """moeshard's layer behind the router."""

    def __init__(self, weights: Weights, experts: ShardedExperts) -> None:
        """Take the packed experts."""
        super().__init__(weights)
        self.sharded = experts

    def experts(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The five steps."""
        output: Tensor = self.sharded(hidden, index, weights)
        return output


class Loop(Block):
    """The best simple torch: sort the tokens by expert once, two products per expert that has any, put them back."""

    def experts(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """As in :class:`Block`."""
        order = index.flatten().argsort(stable=True)
        sizes = index.flatten().bincount(minlength=self.num_experts).tolist()
        gathered = hidden[order // index.shape[1]]
        outputs = torch.empty_like(gathered)
        end = 0
        for expert, size in enumerate(sizes):
            if size:
                start, end = end, end + size
                inner = ffn_in(gathered[start:end] @ self.w_in[expert].T, self.shape)
                torch.mm(inner, self.w_out[expert].T, out=outputs[start:end])
        outputs *= weights.flatten()[order, None]
        in_order = torch.empty_like(outputs).index_copy_(0, order, outputs)
        return in_order if index.shape[1] == 1 else in_order.view(*index.shape, -1).sum(1)


class HuggingFaceEager(Block):
    """HuggingFace's eager experts for a shape it has no class for: top-k without a gate.

    A one-hot mask, a loop over the experts hit, index_add.
    """

    def experts(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """As in :class:`Block`."""
        output = torch.zeros_like(hidden)
        mask = functional.one_hot(index, self.num_experts).permute(2, 1, 0)
        for (expert,) in (mask.sum(dim=(-1, -2)) > 0).nonzero():
            choice, token = torch.where(mask[expert])
            inner = ffn_in(functional.linear(hidden[token], self.w_in[expert]), self.shape)
            outputs = functional.linear(inner, self.w_out[expert]) * weights[token, choice, None]
            output.index_add_(0, token, outputs.to(output.dtype))
        return output


class GroupedMM(Block):
    """``experts_implementation="grouped_mm"`` of transformers: its own function, on the stacked weights."""

    def __init__(self, weights: Weights) -> None:
        """Set what the function reads of an experts module."""
        super().__init__(weights)
        try:
            from transformers.integrations.moe import grouped_mm_experts_forward
        except ImportError as error:
            raise Unavailable("needs transformers 5") from error
        self.function = grouped_mm_experts_forward
        self.has_gate = self.shape.gated
        self.has_bias = self.is_transposed = self.has_post_expert_norm = self._is_expert_parallel = False
        self.up_proj = self.gate_up_proj = weights.w_in
        self.down_proj = weights.w_out
        self.act_fn = ACTIVATIONS[self.shape.activation]

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        return ffn_in(gate_up, self.shape)

    def experts(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """As in :class:`Block`."""
        output: Tensor = self.function(self, hidden, index, weights)
        return output


class Published(Block):
    """MoEShard as its paper describes it (arXiv 2503.08467, algorithm 1), in torch over gloo.

    A boolean mask and a gather per expert; all ranks' counts, then all ranks' tokens, by expert; per expert a
    concatenation of its tokens from all ranks; this rank's columns of each expert; partial outputs cut up and
    concatenated again by rank, and reduce-scattered. The paper has top-1 only: a token of K choices is sent K times.
    """

    def __init__(self, weights: Weights) -> None:
        """Cut the weights: views of this rank's columns."""
        super().__init__(weights)
        self.ranks, rank = dist.get_world_size(), dist.get_rank()
        # torch 2.13 has new names and warns of the old ones
        self._all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
        self._reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
        hidden = weights.shape.d_ff
        own = slice(rank * hidden // self.ranks, (rank + 1) * hidden // self.ranks)
        columns = self.w_in.view(self.num_experts, -1, hidden, weights.shape.d_model)[:, :, own]  # [E, 1 or 2, Fr, D]
        self.slices_in = [expert.flatten(0, 1) for expert in columns]
        self.slices_out = [expert[:, own] for expert in self.w_out]

    def experts(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """As in :class:`Block`."""
        top_k = index.shape[1]
        slots = hidden.repeat_interleave(top_k, 0) if top_k > 1 else hidden
        chosen = index.flatten()
        masks = [chosen == expert for expert in range(self.num_experts)]
        by_expert = torch.cat([slots[mask] for mask in masks])
        sizes = torch.stack([mask.sum() for mask in masks])

        all_sizes = sizes.new_empty(self.ranks * self.num_experts)
        self._all_gather(all_sizes, sizes)
        all_tokens = by_expert.new_empty(self.ranks * len(by_expert), by_expert.shape[1])
        self._all_gather(all_tokens, by_expert)

        sizes_of = all_sizes.view(self.ranks, self.num_experts).tolist()
        pieces = [torch.split(tokens, own) for tokens, own in zip(all_tokens.chunk(self.ranks), sizes_of, strict=True)]
        partial: list[list[Tensor]] = [[] for _ in range(self.ranks)]
        for expert in range(self.num_experts):
            tokens = torch.cat([pieces[rank][expert] for rank in range(self.ranks)])
            if not len(tokens):
                continue
            inner = ffn_in(functional.linear(tokens, self.slices_in[expert]), self.shape)
            outputs = functional.linear(inner, self.slices_out[expert])
            for rank, piece in enumerate(torch.split(outputs, [sizes_of[rank][expert] for rank in range(self.ranks)])):
                partial[rank].append(piece)

        summed = torch.empty_like(by_expert)
        self._reduce_scatter(summed, torch.cat([piece for of_rank in partial for piece in of_rank]))
        output = torch.empty_like(slots)
        for mask, piece in zip(masks, torch.split(summed, sizes.tolist()), strict=True):
            output[mask] = piece
        output *= weights.flatten()[:, None]
        return output if top_k == 1 else output.view(*index.shape, -1).sum(1)


class HuggingFace(nn.Module):
    """A block of transformers as it is; older versions return more than its output."""

    def __init__(self, block: nn.Module) -> None:
        """Take the block."""
        super().__init__()
        self.block = block.eval()

    def forward(self, hidden: Tensor) -> Tensor:
        """``[1, T, D]`` -> ``[1, T, D]``."""
        output: Tensor | tuple[Tensor, object] = self.block(hidden)
        return output[0] if isinstance(output, tuple) else output


def huggingface(weights: Weights) -> nn.Module:
    """HuggingFace's eager block of the shape: of Switch, of Mixtral if gated, else its pattern.

    Raises:
        Unavailable: the installed transformers has no stacked experts.
    """
    shape = weights.shape
    if shape.gated:
        return _mixtral(weights)
    return HuggingFaceEager(weights) if shape.top_k > 1 else _switch(weights)


def _switch(weights: Weights) -> nn.Module:
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

    shape = weights.shape
    config = SwitchTransformersConfig(
        d_model=shape.d_model,
        d_ff=shape.d_ff,
        num_experts=weights.num_experts,
        expert_capacity=UNLIMITED,
        dense_act_fn=shape.activation,
    )
    with torch.device("meta"):
        block: nn.Module = SwitchTransformersSparseMLP(config)
    _share(block, "router.classifier.weight", weights.router)
    for expert in range(weights.num_experts):
        _share(block, f"experts.expert_{expert}.wi.weight", weights.w_in[expert])
        _share(block, f"experts.expert_{expert}.wo.weight", weights.w_out[expert])
    return HuggingFace(block)


def _mixtral(weights: Weights) -> nn.Module:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    shape = weights.shape
    config = MixtralConfig(
        hidden_size=shape.d_model,
        intermediate_size=shape.d_ff,
        num_local_experts=weights.num_experts,
        num_experts_per_tok=shape.top_k,
        hidden_act=shape.activation,
    )
    config._experts_implementation = "eager"
    with torch.device("meta"):
        block: nn.Module = MixtralSparseMoeBlock(config)  # type: ignore[no-untyped-call]
    if not hasattr(block.experts, "gate_up_proj"):
        raise Unavailable("needs transformers 5")
    _share(block, "gate.weight", weights.router)
    _share(block, "experts.gate_up_proj", weights.w_in)
    _share(block, "experts.down_proj", weights.w_out)
    return HuggingFace(block)


def deepspeed(weights: Weights, capacity_factor: float | None) -> nn.Module:
    """DeepSpeed's MoE layer, its experts dealt out over the ranks.

    Args:
        weights: all experts.
        capacity_factor: tokens above ``factor * T * K / E`` of an expert are dropped; None: it pads instead.

    Raises:
        Unavailable: DeepSpeed is not installed, or has no such expert.
    """
    shape = weights.shape
    if shape.gated:
        raise Unavailable("its experts have no gate")
    if dist.is_initialized() and weights.num_experts % dist.get_world_size():
        raise Unavailable("needs as many experts on each rank")
    if weights.w_in.dtype != torch.float32:
        raise Unavailable("compared in float32 only")
    if (reason := rival_deepspeed.unavailable()) is not None:
        raise Unavailable(reason)
    block: nn.Module = rival_deepspeed.build(
        weights.w_in,
        weights.w_out,
        weights.router,
        activation=shape.activation,
        top_k=shape.top_k,
        capacity_factor=capacity_factor,
    )
    return block


def ffn_in(hidden: Tensor, shape: Shape) -> Tensor:
    """Activation and gate after the first product: ``[M, F]``, gated ``[M, 2F]`` -> ``[M, F]``. May work in place."""
    activation = ACTIVATIONS[shape.activation]
    if not shape.gated:
        return activation(hidden)
    gate, up = hidden.chunk(2, dim=-1)
    return activation(gate).mul_(up)


def _share(block: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in the place of a parameter, without a copy."""
    module, _, parameter = name.rpartition(".")
    setattr(block.get_submodule(module), parameter, nn.Parameter(tensor, requires_grad=False))
