# SPDX-License-Identifier: Apache-2.0
"""What each rank of the benchmark does: build a layer in every way, then verify and time all of them at each case.

All contestants of a case are called in turn, in an order that rotates and is reversed every other round, and all ranks
start every call together. Decisions (how many rounds, who is left out) are made on facts that all ranks have agreed on.
"""

import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import moeshard
from moeshard import _core
from moeshard.group import Group
from moeshard.layer import ShardedExperts
from moeshard.threads import use_threads

from . import rival_deepspeed
from .grid import ITEMSIZE, SHAPES, Build, Case, choices, counts
from .inputs import Router, Weights, make_tokens, make_weights
from .rivals import Contestant, Loop, contestants

OURS = ("moeshard", "experts", "experts-bf16", "exchange")
LEAST_ROUNDS, MOST_ROUNDS = 3, 21
PEAK_SECONDS = 0.1  # of measuring the machine, before and after each case
ROOM = 0.8  # of the free memory that a contestant may take
TIMEOUT = 300.0  # seconds that a rank may be late


@dataclass(frozen=True)
class Limits:
    """How long things may take, in seconds.

    Attributes:
        rounds: all rounds of a case.
        slow: a call above this is timed once, and not in every round.
        endless: a call predicted to take longer is not made.
    """

    rounds: float
    slow: float
    endless: float


LIMITS = {
    "quick": Limits(rounds=0.6, slow=0.25, endless=2.0),
    "full": Limits(rounds=1.2, slow=0.8, endless=6.0),
    "tiny": Limits(rounds=0.1, slow=1.0, endless=10.0),
}


@dataclass(frozen=True)
class Measured:
    """What one rank measured at one case: the fields are those of :class:`moeshard.bench.results.Row`.

    Attributes:
        seconds: of each contestant, in each round.
        errors: of each contestant's output.
        absent: why a contestant was not timed.
        columns: ``[E]`` of each expert on this rank.
        flops_per_second: this rank's peak, for the dtype of the case.
        bytes_per_second: this rank's rate of reading memory.
    """

    seconds: dict[str, list[float]]
    errors: dict[str, float]
    absent: dict[str, str]
    columns: list[int]
    flops_per_second: float
    bytes_per_second: float


@dataclass(frozen=True)
class _Built:
    """What a worker holds between cases."""

    group: Group
    weights: Weights
    experts: ShardedExperts
    experts_bf16: ShardedExperts | None
    contestants: list[Contestant]
    absent: dict[str, str]


def memory_needed(build: Build) -> int:
    """Bytes of all ranks: the stacked weights on each, moeshard's columns (and those in bfloat16) once over all."""
    packed = build.weight_bytes * (1.5 if _has_bf16_twin(build) else 1.0)
    return int(build.ranks * build.weight_bytes + packed)


def build_layer(build: Build) -> None:
    """Build the layer in every way, on this rank, for the cases that follow."""
    group = moeshard.init()
    rival_deepspeed.join_world(group, TIMEOUT)
    shape = SHAPES[build.shape]
    weights = make_weights(build, shape)

    def pack(dtype: str) -> ShardedExperts:
        return ShardedExperts.from_weights(
            weights.w_in, weights.w_out, activation=shape.activation, gated=shape.gated, dtype=dtype, group=group
        )

    experts = pack(build.dtype)
    twin = pack("bfloat16") if _has_bf16_twin(build) else None
    found, absent = contestants(weights, experts)
    moeshard.worker_state["bench"] = _Built(group, weights, experts, twin, found, absent)


@torch.inference_mode()
def measure(case: Case, limits: Limits) -> Measured:
    """Verify and time everyone at one case, on this rank. Collective.

    Raises:
        RuntimeError: the router did not send the tokens where the case says.
    """
    built: _Built = moeshard.worker_state["bench"]
    group = built.group
    os.environ["MOESHARD_NUM_THREADS"] = str(case.threads)
    torch.set_num_threads(case.threads)
    use_threads()
    hidden = make_tokens(case, group.rank)
    rows = hidden[0]
    index, weights = Router(built.weights.router, top_k=case.shape.top_k, normalize=case.shape.normalize)(rows)
    _check_routing(case, group.rank, index)

    before = _machine(group, case)
    absent = dict(built.absent)
    calls: dict[str, Callable[[], Tensor]] = {}
    for contestant in built.contestants:
        reason = _endless(contestant, case, limits, before[0])
        if reason:
            absent[contestant.name] = reason
        else:
            calls[contestant.name] = lambda block=contestant.block: block(hidden)[0]  # type: ignore[misc]
    calls["experts"] = lambda: built.experts(rows, index, weights)
    if built.experts_bf16 is not None:
        twin = built.experts_bf16
        calls["experts-bf16"] = lambda: twin(rows, index, weights)
    if group.size > 1:
        nobody = torch.full_like(index, -1)
        calls["exchange"] = lambda: built.experts(rows, nobody, weights)

    first, outputs = _first(group, calls, absent)
    errors = _errors(case, built.weights, rows, outputs)
    del outputs
    seconds = _rounds(group, calls, first, limits)
    after = _machine(group, case)
    widths = built.experts.plan.columns[group.rank]
    return Measured(
        seconds,
        errors,
        absent,
        (widths[:, 1] - widths[:, 0]).tolist(),
        # The larger, so that a machine that slowed down in between does not look better used than it was.
        max(before[0], after[0]),
        max(before[1], after[1]),
    )


def _first(
    group: Group, calls: dict[str, Callable[[], Tensor]], absent: dict[str, str]
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Seconds and output of a first call of each; a rival that fails is moved from the calls to the absent."""
    seconds, outputs = {}, {}
    for name, call in list(calls.items()):
        failure = ""
        try:
            seconds[name], outputs[name] = _timed(group, call)
        except (RuntimeError, MemoryError) as error:
            if name in OURS or name == "loop":
                raise
            failure = str(error).splitlines()[0] or type(error).__name__
        if failures := [said.decode() for said in group.all_gather(failure.encode()) if said]:
            absent[name] = failures[0]
            for found in (calls, seconds, outputs):
                found.pop(name, None)
    return seconds, outputs


def _rounds(
    group: Group, calls: dict[str, Callable[[], Tensor]], first: dict[str, float], limits: Limits
) -> dict[str, list[float]]:
    """Seconds of each call in each round; a slow rival's in the first round only."""
    slowest = {name: _largest(group, seconds) for name, seconds in first.items()}
    steady = [name for name in calls if name in OURS or slowest[name] <= limits.slow]
    rounds = int(limits.rounds / sum(slowest[name] for name in steady))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    try:
        for number in range(min(max(rounds, LEAST_ROUNDS), MOST_ROUNDS)):
            names = steady if number else list(calls)
            start = number // 2 % len(names)
            turn = names[start:] + names[:start]
            for name in turn if number % 2 == 0 else reversed(turn):
                seconds[name].append(_timed(group, calls[name])[0])
    finally:
        gc.enable()
    return seconds


def _timed(group: Group, call: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Seconds of one call that all ranks start together, and its output."""
    group.barrier()
    start = time.perf_counter()
    output = call()
    return time.perf_counter() - start, output


def _errors(case: Case, weights: Weights, rows: Tensor, outputs: dict[str, Tensor]) -> dict[str, float]:
    """Of every output that should be the block's: the largest difference over the largest value.

    In float32 ``loop`` is the reference, in bfloat16 the same loop in float32, one expert's weights at a time.
    """
    reference = outputs["loop"] if case.build.dtype == "float32" else _in_float32(weights, rows)
    largest = float(reference.abs().max())
    errors = {}
    for name, output in outputs.items():
        if name not in ("exchange", "experts-bf16"):
            errors[name] = float((output.float() - reference).abs().max()) / largest
    return errors


def _in_float32(weights: Weights, rows: Tensor) -> Tensor:
    """The block in float32 arithmetic on 16-bit numbers."""
    widened = Weights(weights.shape, _Widened(weights.w_in), _Widened(weights.w_out), weights.router)  # type: ignore[arg-type]
    loop = Loop(widened)
    index, chosen = loop.router(rows)
    return loop.experts(rows.float(), index, chosen.float())


class _Widened:
    """Stacked weights whose experts are widened to float32 when they are asked for."""

    def __init__(self, stack: Tensor) -> None:
        self.stack = stack

    def __len__(self) -> int:
        return len(self.stack)

    def __getitem__(self, expert: int) -> Tensor:
        return self.stack[expert].float()


def _check_routing(case: Case, rank: int, index: Tensor) -> None:
    wanted = choices(case, rank)
    if not np.array_equal(index.numpy(), wanted):
        raise RuntimeError(f"{case.key}: the router did not choose the experts that the case wants")


def _endless(contestant: Contestant, case: Case, limits: Limits, flops_per_second: float) -> str | None:
    """Why a contestant that computes empty rows too is not called; all ranks find the same."""
    if not contestant.padded:
        return None
    shape, experts, ranks = case.shape, case.build.num_experts, case.build.ranks
    if contestant.capacity_factor is None:
        capacity = int(counts(case).max())
    else:
        capacity = -int(-case.tokens * shape.top_k * contestant.capacity_factor // experts)
    padded = experts * capacity  # rows that a rank computes: E / R experts, C rows from each of R ranks
    built: _Built = moeshard.worker_state["bench"]
    seconds = padded * shape.matrices * 2 * shape.d_model * shape.d_ff / flops_per_second
    memory = padded * (3 * shape.d_model + 2 * shape.d_ff) * ITEMSIZE[case.build.dtype]
    room = ROOM * _least(built.group, free_memory()) / ranks
    slowest = _largest(built.group, seconds)
    if slowest > limits.endless:
        return f"pads to {padded:,} rows a rank: {slowest:.0f} s at least"
    if memory > room:
        return f"pads to {padded:,} rows a rank: {memory / 2**30:.1f} GiB"
    return None


def free_memory() -> int:
    """Bytes that can be had without swapping."""
    with open("/proc/meminfo") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable"))


def _machine(group: Group, case: Case) -> tuple[float, float]:
    """What this rank's threads can do while all ranks try: flops/s for the dtype, bytes/s."""
    group.barrier()
    flops, dots, read = _core.measure_machine(PEAK_SECONDS)
    return dots if case.build.dtype == "bfloat16" and dots else flops, read


def _largest(group: Group, value: float) -> float:
    """The largest of all ranks' values."""
    return max(float(said) for said in group.all_gather(repr(value).encode()))


def _least(group: Group, value: float) -> float:
    """The smallest of all ranks' values."""
    return -_largest(group, -value)


def _has_bf16_twin(build: Build) -> bool:
    """Whether moeshard also holds its columns in bfloat16, for the bars on narrow storage."""
    return build.dtype == "float32" and build.ranks == 1 and build.num_experts <= 128
