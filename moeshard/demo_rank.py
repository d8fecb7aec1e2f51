# SPDX-License-Identifier: Apache-2.0
"""What each rank of the demo does: HuggingFace's encoder and the sharded one, in turn, on the same tokens.

Both live in one process and use the same threads; all ranks start each forward pass together. The routers are watched
by hooks and the sharded layers count their tokens, so that routing, drops and flips are what really occurred.
"""

import copy
import time
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import SwitchTransformersConfig, SwitchTransformersEncoderModel
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

import moeshard

UNLIMITED = 2**62  # tokens of one sequence that an expert takes: never reached

# Seeded routers get a tenth of HuggingFace's initial weights. With all of it, logits have a standard deviation of 27 at
# d_model 768, rounding errors move the gates of near ties, and HuggingFace's own output in float32 is 4e-5 from that in
# float64 (this shape, seed 0, 2,048 tokens).
ROUTER_SCALE = 0.1


@dataclass(frozen=True)
class Job:
    """What every rank is told.

    Attributes:
        path: checkpoint to load; ``None``: seeded weights of the shape in ``config``.
        config: arguments of ``SwitchTransformersConfig``.
        seed: of the weights.
        batches: for each rank, its batches, ``[sequences, length]`` int64 each.
    """

    path: str | None
    config: dict[str, int]
    seed: int
    batches: list[list[NDArray[np.int64]]]


@dataclass(frozen=True)
class Facts:
    """What a rank holds.

    Attributes:
        columns: ``[L, E]`` hidden columns of each expert of each MoE layer on this rank.
        d_ff: hidden columns of an expert.
        parameters: of the whole model.
        capacity: the model's own expert capacity, in tokens of one sequence.
        weight_bytes: weights of the sharded model on this rank.
        weight_bytes_hf: weights of HuggingFace's model.
    """

    columns: NDArray[np.int64]
    d_ff: int
    parameters: int
    capacity: int
    weight_bytes: int
    weight_bytes_hf: int


@dataclass(frozen=True)
class Pair:
    """One batch through both models on one rank. A token is counted once for every MoE layer it passes.

    Attributes:
        seconds: forward pass of the sharded model.
        seconds_hf: forward pass of HuggingFace's.
        counts: ``[L, E]`` tokens of all ranks that each expert of each MoE layer took.
        dropped: tokens of all ranks that no expert took.
        dropped_by_default: tokens of this rank that the model's own capacity would have dropped.
        flips: tokens of this rank for which the two models' routers decided differently.
        difference: largest absolute difference between the two outputs.
        difference_without_flips: the same, over sequences in which all decisions are alike.
        magnitude: largest absolute value of HuggingFace's output.
    """

    seconds: float
    seconds_hf: float
    counts: NDArray[np.int64]
    dropped: int
    dropped_by_default: int
    flips: int
    difference: float
    difference_without_flips: float
    magnitude: float


class Watched:
    """A model whose routers are watched.

    Args:
        model: the encoder.

    Attributes:
        model: the encoder.
        routers: its routers, in layer order.
        wanted: of the last forward pass, per MoE layer: the expert that each token chose, ``[sequences, length]``.
    """

    def __init__(self, model: SwitchTransformersEncoderModel) -> None:
        """Hook its routers."""
        self.model = model
        self.routers = [module for module in model.modules() if isinstance(module, SwitchTransformersTop1Router)]
        self.wanted: list[torch.Tensor] = []
        for router in self.routers:
            router.register_forward_hook(self._watch)

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        """Encode token ids ``[sequences, length]``: ``[sequences, length, D]``."""
        self.wanted.clear()
        output: torch.Tensor = self.model(input_ids=batch).last_hidden_state
        return output

    def _watch(self, router: nn.Module, inputs: object, output: tuple[torch.Tensor, ...]) -> None:
        self.wanted.append(output[2].softmax(-1).argmax(-1))


@dataclass(frozen=True)
class Rank:
    """What a rank keeps from call to call."""

    group: moeshard.Group
    batches: list[torch.Tensor]
    ours: Watched
    hf: Watched
    layers: list[moeshard.ShardedExperts]
    capacity: int


def prepare(job: Job) -> Facts:
    """Load the model, shard a copy, and warm both up. Collective, as everything that follows."""
    group = moeshard.init()
    model = _load(job)
    capacity = int(model.config.expert_capacity)
    # A copy that shares all weights with the original: only what shard() makes is new.
    twin = copy.deepcopy(model, {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()})
    ours, hf = Watched(moeshard.shard(twin, group=group, capacity=None, progress=False)), Watched(model)
    for router in hf.routers:
        router.expert_capacity = UNLIMITED
    layers = [module for module in ours.model.modules() if isinstance(module, moeshard.ShardedExperts)]
    batches = [torch.from_numpy(batch) for batch in job.batches[group.rank]]
    moeshard.worker_state["demo"] = Rank(group, batches, ours, hf, layers, capacity)
    with torch.inference_mode():
        for watched in (ours, hf):
            watched(batches[0][:1])
    return Facts(
        columns=np.stack([layer.packed.columns[:, 1] - layer.packed.columns[:, 0] for layer in layers]),
        d_ff=layers[0].packed.d_ff,
        parameters=sum(p.numel() for p in model.parameters()),
        capacity=capacity,
        weight_bytes=_bytes(ours.model) + sum(layer.packed.nbytes for layer in layers),
        weight_bytes_hf=_bytes(model),
    )


def compare(batch: int, ours_first: bool) -> Pair:
    """Run one batch through both models, one after the other.

    Args:
        batch: its number.
        ours_first: whether the sharded model goes first.
    """
    rank: Rank = moeshard.worker_state["demo"]
    for layer in rank.layers:
        layer.reset_counts()
    ours, hf = rank.ours, rank.hf
    seconds, outputs = {}, {}
    with torch.inference_mode():
        for watched in (ours, hf) if ours_first else (hf, ours):
            rank.group.barrier()
            start = time.perf_counter()
            outputs[watched] = watched(rank.batches[batch])
            seconds[watched] = time.perf_counter() - start
    difference = (outputs[ours] - outputs[hf]).abs().amax((1, 2)).nan_to_num(nan=torch.inf)  # of each sequence
    wanted, wanted_hf = torch.stack(ours.wanted), torch.stack(hf.wanted)  # [L, sequences, length]
    flipped = wanted != wanted_hf
    taken = nn.functional.one_hot(wanted, rank.layers[0].packed.num_experts).sum(2)  # [L, sequences, E]
    counts = np.stack([layer.counts for layer in rank.layers])
    return Pair(
        seconds=seconds[ours],
        seconds_hf=seconds[hf],
        counts=counts,
        dropped=sum(layer.slots for layer in rank.layers) - int(counts.sum()),
        dropped_by_default=int((taken - rank.capacity).clamp(min=0).sum()),
        flips=int(flipped.sum()),
        difference=float(difference.max()),
        difference_without_flips=max([0.0, *difference[~flipped.any(0).any(1)].tolist()]),
        magnitude=float(outputs[hf].abs().max()),
    )


def skew(hot: int, share: float) -> None:
    """Bias every router, of both models and on all ranks alike, towards its first experts.

    Args:
        hot: number of experts to prefer.
        share: share of the tokens of the first batch that they get.
    """
    rank: Rank = moeshard.worker_state["demo"]
    shifts: list[float] = []

    def prefer(router: SwitchTransformersTop1Router, inputs: tuple[torch.Tensor]) -> None:
        logits = router.classifier(inputs[0])
        # A token goes to the preferred ones if they lead, or trail by less than the shift.
        trails = logits[..., hot:].amax(-1) - logits[..., :hot].amax(-1)
        shifts.append(float(trails.flatten().quantile(share)))
        _shift(router, hot, shifts[-1])

    hooks = [router.register_forward_pre_hook(prefer) for router in rank.hf.routers]
    with torch.inference_mode():
        rank.hf(rank.batches[0])
    for hook in hooks:
        hook.remove()
    # Each rank found shifts for its own tokens. All must use the same router: the mean.
    everyone = np.stack([np.frombuffer(row) for row in rank.group.all_gather(np.array(shifts).tobytes())])
    for mine, theirs, found, mean in zip(rank.ours.routers, rank.hf.routers, shifts, everyone.mean(0), strict=True):
        _shift(theirs, hot, float(mean) - found)
        _shift(mine, hot, float(mean))


def _load(job: Job) -> SwitchTransformersEncoderModel:
    model: SwitchTransformersEncoderModel
    if job.path is not None:
        model = SwitchTransformersEncoderModel.from_pretrained(job.path, dtype=torch.float32)
    else:
        torch.manual_seed(job.seed)
        model = SwitchTransformersEncoderModel(SwitchTransformersConfig.from_dict(job.config))
        for module in model.modules():
            if isinstance(module, SwitchTransformersTop1Router):
                module.classifier.weight.data *= ROUTER_SCALE
    model.requires_grad_(False).train(False)
    return model


def _bytes(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())


def _shift(router: SwitchTransformersTop1Router, hot: int, shift: float) -> None:
    old = router.classifier.bias
    bias = torch.zeros(router.num_experts) if old is None else old.clone()
    bias[:hot] += shift
    router.classifier.bias = nn.Parameter(bias, requires_grad=False)
