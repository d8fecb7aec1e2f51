# SPDX-License-Identifier: Apache-2.0
"""What each rank of the encoder benchmark does: one Switch encoder with each contestant's MoE layers, in turn.

All contestants live in one process, use the same threads and share every weight but moeshard's packed experts:
HuggingFace's model owns them, DeepSpeed's layers hold views. All ranks start each forward pass together.

The router is a linear layer in every contestant, so it can be forced for all alike by its weights alone. For that, the
first features of a token ("carried" below) pass through the whole encoder unchanged, because no layer writes to them:
a router that reads only these sends each token where its id says. The normalisation in front of a router scales them by
one positive number, which leaves the order of the experts as it is.
"""

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import SwitchTransformersConfig, SwitchTransformersEncoderModel
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersLayerFF

import moeshard

from ..adapters.switch import ADAPTER
from . import rival_deepspeed
from .encoder import Case, Contestant, shares_of_experts

UNLIMITED = 2**62  # tokens of one sequence that an expert takes: never reached

# Routers get a tenth of HuggingFace's initial weights, as in demo_rank.py: with all of it, logits have a standard
# deviation of 27 at d_model 768 and HuggingFace's own rounding errors move the gates.
ROUTER_SCALE = 0.1
CARRIED_ONE_IN = 8  # of the features
FORCED_LOGIT = 8.0  # of the wanted expert, before normalisation
NEAR_TIE = 1e-5  # a lead of the best logit, relative to the largest, that rounding errors may turn


@dataclass(frozen=True)
class Job:
    """What every rank is told.

    Attributes:
        config: arguments of ``SwitchTransformersConfig``.
        seed: of the weights and the tokens.
        contestants: whom to build; HuggingFace is one of them.
    """

    config: dict[str, int]
    seed: int
    contestants: tuple[Contestant, ...]


@dataclass(frozen=True)
class Check:
    """One case's outputs on one rank, each contestant's against HuggingFace's.

    Attributes:
        difference: largest absolute difference over the sequences that are compared.
        left_out: number of sequences that are not: a router decided otherwise than HuggingFace's, or nearly so.
        magnitude: largest absolute value of HuggingFace's output.
        counts: ``[L, E]`` tokens of this rank that each expert of each MoE layer got.
    """

    difference: dict[Contestant, float]
    left_out: dict[Contestant, int]
    magnitude: float
    counts: NDArray[np.int64]


@dataclass
class _Entry:
    """A contestant's encoder and its MoE layers, in order."""

    model: nn.Module
    layers: list[nn.Module]


@dataclass
class _Rank:
    """What a rank keeps from call to call."""

    group: moeshard.Group
    job: Job
    entries: dict[Contestant, _Entry]
    routers: list[nn.Parameter]  # [E, D] each, shared by all contestants
    own: list[torch.Tensor]  # their values as drawn
    codes: torch.Tensor  # [E, carried]: the carried features of an expert's tokens
    batch: torch.Tensor  # [B, S] of the case that was checked last


def prepare(job: Job) -> int:
    """Make every contestant's encoder. Collective, as everything that follows.

    Args:
        job: what to make.

    Returns:
        Parameters of the model.
    """
    group = moeshard.init()
    if "deepspeed" in job.contestants:
        rival_deepspeed.join_world(group, timeout=600)
    torch.manual_seed(job.seed)
    model = SwitchTransformersEncoderModel(SwitchTransformersConfig.from_dict(job.config))
    model.requires_grad_(False).train(False)
    codes = _carry(model, job.config)
    routers = [feed_forward.mlp.router.classifier.weight.mul_(ROUTER_SCALE) for feed_forward in _sparse(model)]
    for feed_forward in _sparse(model):
        feed_forward.mlp.router.expert_capacity = UNLIMITED
    makers: dict[Contestant, Callable[[nn.Module], nn.Module]] = {
        "hf": lambda twin: twin,
        "deepspeed": _put_in_deepspeed,
        "moeshard": lambda twin: moeshard.shard(twin, group=group, capacity=None, progress=False),
    }
    entries = {}
    for name in job.contestants:
        # A copy that shares all weights with the original: only what a contestant makes of them is new.
        shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
        encoder = makers[name](copy.deepcopy(model, shared))
        entries[name] = _Entry(encoder, [feed_forward.mlp for feed_forward in _sparse(encoder)])
    moeshard.worker_state["encoder"] = _Rank(
        group, job, entries, routers, [router.clone() for router in routers], codes, torch.empty(0)
    )
    return sum(p.numel() for p in model.parameters())


def check(case: Case) -> Check:
    """Draw a case's tokens, set the routers, and compare all contestants; also warms them up.

    Args:
        case: the case that everything is about until the next call.
    """
    rank: _Rank = moeshard.worker_state["encoder"]
    experts, carried = rank.codes.shape
    rng = np.random.default_rng((rank.job.seed, rank.group.rank, case.batch))
    wanted = rng.choice(experts, (case.batch, case.length), p=shares_of_experts(case.routing, experts))
    others = rng.integers(0, rank.job.config["vocab_size"] // experts, wanted.shape)
    rank.batch = torch.from_numpy(wanted + experts * others)  # ids whose code is that of the wanted expert
    for router, own in zip(rank.routers, rank.own, strict=True):
        router.copy_(own)
        if case.routing == "skew":
            router.zero_()
            router[:, :carried] = rank.codes * (FORCED_LOGIT / carried)

    found = {name: _watched(entry, rank) for name, entry in rank.entries.items()}
    expected, logits = found["hf"]
    best = logits.topk(min(2, experts)).values
    unsure = best[..., 0] - best[..., -1] < NEAR_TIE * logits.abs().max()  # [L, B, S]
    difference, left_out = {}, {}
    for name, (output, theirs) in found.items():
        doubtful = (unsure | (theirs.argmax(-1) != logits.argmax(-1))).any(0).any(1)  # [B]
        apart = (output - expected).abs().amax((1, 2)).nan_to_num(nan=torch.inf)  # [B]
        difference[name] = max([0.0, *apart[~doubtful].tolist()])
        left_out[name] = int(doubtful.sum())
    chosen = logits.argmax(-1).flatten(1).numpy()
    counts = np.stack([np.bincount(layer, minlength=experts) for layer in chosen])
    return Check(difference, left_out, float(expected.abs().max()), counts)


def measure(order: Sequence[Contestant]) -> dict[Contestant, float]:
    """Seconds of a forward pass of each contestant, on the case that was checked last.

    Args:
        order: who goes first.
    """
    rank: _Rank = moeshard.worker_state["encoder"]
    return {name: _seconds(rank, rank.entries[name]) for name in order}


def measure_moe(order: Sequence[Contestant]) -> dict[Contestant, float]:
    """Share of a forward pass's time that each contestant spends in MoE layers, waiting for other ranks included.

    Args:
        order: who goes first.
    """
    rank: _Rank = moeshard.worker_state["encoder"]
    shares = {}
    for name in order:
        stamps: list[float] = []

        def stamp(*ignored: object, stamps: list[float] = stamps) -> None:
            stamps.append(time.perf_counter())

        with _hooked(rank.entries[name], stamp, stamp):
            seconds = _seconds(rank, rank.entries[name])
        shares[name] = (sum(stamps[1::2]) - sum(stamps[::2])) / seconds
    return shares


def _seconds(rank: _Rank, entry: _Entry) -> float:
    with torch.inference_mode():
        rank.group.barrier()
        start = time.perf_counter()
        entry.model(input_ids=rank.batch)
        return time.perf_counter() - start


def _watched(entry: _Entry, rank: _Rank) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [B, S, D], and all routers' logits [L, B, S, E] for what the MoE layers were given."""
    given: list[torch.Tensor] = []
    with torch.inference_mode(), _hooked(entry, lambda layer, inputs: given.append(inputs[0])):
        output: torch.Tensor = entry.model(input_ids=rank.batch).last_hidden_state
        logits = [nn.functional.linear(hidden, router) for hidden, router in zip(given, rank.routers, strict=True)]
        return output, torch.stack(logits)


@contextlib.contextmanager
def _hooked(entry: _Entry, before: Callable[..., None], after: Callable[..., None] | None = None) -> Iterator[None]:
    """Call ``before`` (and ``after``) at every MoE layer."""
    hooks = [layer.register_forward_pre_hook(before) for layer in entry.layers]
    if after is not None:
        hooks += [layer.register_forward_hook(after) for layer in entry.layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _sparse(model: nn.Module) -> list[Any]:
    """The feed-forward layers whose ``mlp`` is a MoE layer; their attributes have no types in transformers."""
    return [module for module in model.modules() if isinstance(module, SwitchTransformersLayerFF) and module.is_sparse]


def _carry(model: SwitchTransformersEncoderModel, config: dict[str, int]) -> torch.Tensor:
    """Let the first features of each token say which expert it is for: id modulo E. Returns their codes, [E, carried].

    Codes have the mean square of 1 that the embedding's other features have, and no two are alike.
    """
    experts, carried = config["num_experts"], config["d_model"] // CARRIED_ONE_IN
    codes: torch.Tensor = nn.functional.normalize(torch.randn(experts, carried), dim=1) * carried**0.5
    embedding = model.encoder.embed_tokens.weight
    embedding[:, :carried] = codes[torch.arange(len(embedding)) % experts]
    for name, weight in model.named_parameters():
        if name.endswith((".o.weight", ".wo.weight")):  # the last matrix of every attention, dense layer and expert
            weight[:carried] = 0
    return codes


def _put_in_deepspeed(model: nn.Module) -> nn.Module:
    for feed_forward in _sparse(model):
        weights = ADAPTER.weights(feed_forward.mlp)
        feed_forward.mlp = rival_deepspeed.build(
            weights.w_in,
            weights.w_out,
            feed_forward.mlp.router.classifier.weight,
            activation=weights.activation,
            top_k=1,
            capacity_factor=None,
        )
    return model
