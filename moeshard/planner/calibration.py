# SPDX-License-Identifier: Apache-2.0
"""Measures this machine for the planner: `moeshard doctor --calibrate`. Takes about ten seconds.

Without torch there is no router to measure, and the preset's is taken. Each number is measured by what it describes:
the peaks by loops that do nothing else, the engine's share of them by one large product and by streaming many cold
experts, latency and bandwidth of the exchange by two ranks that gather and combine few and many tokens. The best of
several tries counts: others on the machine take away, never add.
"""

from __future__ import annotations

import importlib.util
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from .. import __version__, _core, doctor
from .machines import CPU, Device, Link, Machine

SECONDS = 0.4  # of each measurement of the machine
TRIES = 7
D_MODEL, D_FF = 768, 3072
MANY_ROWS = 512
COLD_EXPERTS, FEW_ROWS = 64, 4  # of fp32: 1.2 GB, more than any cache
MANY_TRIES = 200
ROUTED_TOKENS, ROUTED_EXPERTS = 1024, 128
TOKENS = (1, 1024)  # of an exchange: for its latency, for its bandwidth


def calibrate(say: Callable[[str], object] = print) -> Machine:
    """Measure this machine.

    Args:
        say: called with a line for every number, as it is known.

    Returns:
        The machine: a host of CPU cores. Between hosts nothing is measured; that link is the preset's.

    Raises:
        RankLost: worker processes could not be started.
        MemoryError: it has less than 2 GiB free.
    """
    here = doctor.machine()
    cores = int(here["cores"])
    before = _core.get_num_threads()
    try:
        device, host_bandwidth = _peaks(cores, float(here["memory_bytes"]), str(here["cpu"]))
        say(f"one core: {device.flops / 1e9:.0f} GFLOP/s float32, {device.flops_16 / 1e9:.0f} bfloat16")
        say(f"memory: {device.bandwidth / 1e9:.1f} GB/s for one core, {host_bandwidth / 1e9:.1f} for all {cores}")
        _core.set_num_threads(1)
        flops_share, bandwidth_share, bandwidth_share_16 = _shares(device)
        say(f"ffn on one core: {flops_share:.0%} of the peak in large products, {bandwidth_share:.0%} of the bandwidth")
        step, slot = _overheads()
        say(f"a step: {1e6 * step:.0f} us; group: {1e9 * slot:.1f} ns a choice")
        router, logit = _router(device, flops_share)
        say(f"a router in torch: {1e6 * router:.0f} us and {1e9 * logit:.1f} ns for each token and expert")
    finally:
        _core.set_num_threads(before)
    link = _exchange()
    say(f"exchange of two ranks: {1e6 * link.latency:.0f} us, {link.bandwidth / 1e9:.1f} GB/s")
    return replace(
        CPU,
        name="this machine",
        devices=(device,),
        cores=cores,
        host_bandwidth=host_bandwidth,
        inside=link,
        step=step,
        slot=slot,
        router=router,
        logit=logit,
        flops_share=flops_share,
        bandwidth_share=bandwidth_share,
        bandwidth_share_16=bandwidth_share_16,
        source=f"measured by moeshard {__version__} doctor --calibrate; {_preset()} and the link between hosts: preset",
    )


def _peaks(cores: int, memory: float, cpu: str) -> tuple[Device, float]:
    """One core alone, and the bandwidth of all together. The flops are those of all cores at once, divided."""
    _core.set_num_threads(1)
    flops, dots, bandwidth = _core.measure_machine(SECONDS)
    _core.set_num_threads(cores)
    all_flops, all_dots, all_bandwidth = _core.measure_machine(SECONDS)
    flops, dots = min(flops, all_flops / cores), min(dots, all_dots / cores)
    bandwidth = min(bandwidth, all_bandwidth) if cores > 1 else bandwidth
    source = f"measured by moeshard doctor --calibrate, {_core.isa()}"
    # Without dot products 16-bit weights are widened and multiplied as float32.
    return Device(f"a core of {cpu}", flops, dots or flops, bandwidth, memory, source), all_bandwidth


def _times(call: Callable[[], object], tries: int) -> list[float]:
    """Seconds of several calls."""
    seconds = []
    for _ in range(tries):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def _best(call: Callable[[], object]) -> float:
    """Seconds of the fastest of several calls: of a limit."""
    return min(_times(call, TRIES))


def _usual(call: Callable[[], object]) -> float:
    """Median seconds of many calls: of an overhead, which is what it is on most calls."""
    return statistics.median(_times(call, MANY_TRIES))


class _Layer:
    """A layer on one rank, made of the core's objects."""

    def __init__(self, experts: int, dtype: str) -> None:
        columns = np.tile(np.array([0, D_FF]), (experts, 1))
        self.packed = _core.PackedExperts(
            columns=columns,
            d_model=D_MODEL,
            d_ff=D_FF,
            dtype=dtype,  # type: ignore[arg-type]
            activation="relu",
            gated=False,
            b_in=False,
            b_out=False,
        )
        rng = np.random.default_rng(0)
        w_in = rng.standard_normal((D_FF, D_MODEL), np.float32)
        for expert in range(experts):
            self.packed.pack(expert, w_in, w_in.T)
        self.experts = experts
        self.batch = _core.Batch()
        self.exchange = _core.exchange_one()

    def route(self, index: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> None:
        """Take tokens with these experts, and sort them."""
        hidden = np.ones((len(index), D_MODEL), np.float32)
        self.out = np.empty_like(hidden)
        self.batch.route(hidden, index, np.ones(index.shape, np.float32), self.experts, self.out)
        self.exchange.gather(self.batch)
        self.batch.group()

    def seconds(self) -> float:
        """Of ffn."""
        seconds = _best(lambda: self.batch.ffn(self.packed))
        self.exchange.combine(self.batch)
        return seconds


def _shares(device: Device) -> tuple[float, float, float]:
    """The parts of the peaks that ffn reaches on one core."""
    product = 4 * D_MODEL * D_FF / device.flops  # seconds a row, at the peak
    many = _Layer(1, "float32")
    many.route(np.zeros((MANY_ROWS, 1), np.int64))
    flops_share = MANY_ROWS * product / many.seconds()
    del many
    shares = []
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        cold = _Layer(COLD_EXPERTS, dtype)
        cold.route(np.repeat(np.arange(COLD_EXPERTS), FEW_ROWS)[:, None])
        weights = COLD_EXPERTS * 2 * D_MODEL * D_FF
        # The model is hypot(arithmetic, reading): what is left of the time is reading.
        peak = flops_share * (device.flops if size == 4 else device.flops_16)
        arithmetic = 2 * weights * (FEW_ROWS + CPU.idle_rows) / peak
        reading = math.sqrt(max(cold.seconds() ** 2 - arithmetic**2, 0.0))
        shares.append(min(weights * size / (device.bandwidth * reading), 1.0) if reading else 1.0)
        del cold
    return min(flops_share, 1.0), shares[0], shares[1]


def _overheads() -> tuple[float, float]:
    """Seconds of a step that has nothing to do, and of sorting a choice."""
    layer = _Layer(1, "float32")
    nobody = np.full((1, 1), -1)

    def call() -> None:
        layer.route(nobody)
        layer.batch.ffn(layer.packed)
        layer.exchange.combine(layer.batch)

    if _has_torch():
        import torch

        from ..group import init
        from ..layer import ShardedExperts

        w_in, w_out = torch.ones(1, D_FF, D_MODEL), torch.ones(1, D_MODEL, D_FF)
        experts = ShardedExperts.from_weights(w_in, w_out, group=init("one"))
        inputs = torch.ones(1, D_MODEL), torch.full((1, 1), -1), torch.ones(1, 1)
        with torch.inference_mode():
            step = _usual(lambda: experts(*inputs)) / 5
    else:
        step = _usual(call) / 5
    slots = np.random.default_rng(0).integers(0, 128, (1 << 16, 2))
    batch, exchange = _core.Batch(), _core.exchange_one()
    hidden = np.zeros((len(slots), 1), np.float32)
    batch.route(hidden, slots, np.ones(slots.shape, np.float32), 128)
    exchange.gather(batch)
    group = _usual(batch.group)
    exchange.combine(batch)
    return step, group / slots.size


def _has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None


def _preset() -> str:
    """What is not measured."""
    return "idle_rows, expert" if _has_torch() else "idle_rows, expert, router, logit"


def _router(device: Device, flops_share: float) -> tuple[float, float]:
    """Seconds of a router in torch whatever its size, and for each token and expert beside its product."""
    if not _has_torch():
        return CPU.router, CPU.logit
    import torch

    from ..bench.inputs import Router

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            router = Router(torch.ones(ROUTED_EXPERTS, D_MODEL), top_k=1, normalize=False)
            one, many = torch.randn(1, D_MODEL), torch.randn(ROUTED_TOKENS, D_MODEL)
            router(one)
            few = _usual(lambda: router(one))
            more = _usual(lambda: router(many))
    finally:
        torch.set_num_threads(threads)
    product = 2 * D_MODEL / (flops_share * device.flops)
    return few, max((more - few) / (ROUTED_TOKENS * ROUTED_EXPERTS) - product, 0.0)


def _exchange() -> Link:
    """Two ranks on this host: what a gather and a combine of one token take, and each byte more."""
    from ..launcher import launch

    with launch(2, threads=1) as ranks:
        few, many = (max(times) for times in zip(*ranks.run(exchange_seconds, TOKENS), strict=True))
    more = (TOKENS[1] - TOKENS[0]) * D_MODEL * (4 + 4)  # bytes that reach each rank, fp32 tokens and partial outputs
    # Two exchanges, each log2(2) = 1 message. A combine also writes and adds partial outputs, which the model counts
    # as memory traffic of its own; that is small beside the wait, so it stays in here.
    # All ranks of a host meet at once, so a further peer costs next to nothing.
    return Link(few / 2, CPU.inside.message, more / max(many - few, 1e-9))


def exchange_seconds(tokens: tuple[int, ...]) -> list[float]:
    """On each rank: seconds of a gather and a combine without an expert's work, for each number of tokens."""
    from ..group import init

    group = init()
    found = []
    for count in tokens:
        hidden = np.zeros((count, D_MODEL), np.float32)
        out = np.empty_like(hidden)
        index, weights = np.full((count, 1), -1), np.zeros((count, 1), np.float32)
        columns = np.tile(np.array([0, 16]) + 16 * group.rank, (1, 1))
        packed = _core.PackedExperts(
            columns=columns, d_model=D_MODEL, d_ff=32, dtype="float32", activation="relu", gated=False, b_in=False,
            b_out=False,
        )  # fmt: skip
        packed.pack(0, np.zeros((32, D_MODEL), np.float32), np.zeros((D_MODEL, 32), np.float32))
        seconds = []
        for _ in range(MANY_TRIES // 2):
            group.barrier()
            group.batch.route(hidden, index, weights, 1, out)
            routed = time.perf_counter()
            group.gather(group.batch)
            gathered = time.perf_counter()
            group.batch.group()
            group.batch.ffn(packed)
            computed = time.perf_counter()
            group.combine(group.batch)
            seconds.append(time.perf_counter() - computed + gathered - routed)
        found.append(statistics.median(seconds))
    return found


def run(say: Callable[[str], object] = print) -> int:
    """Measure, write :func:`moeshard.planner.machines.calibration_file`, and say so: ``moeshard doctor --calibrate``.

    Returns:
        The exit status, 0.
    """
    from .machines import calibration_file, save

    busy = os.getloadavg()[0]
    if busy > 0.5 * len(os.sched_getaffinity(0)):
        say(f"load average {busy:.1f}: others are using this machine, so the numbers will be too low")
    found = calibrate(say)
    path = calibration_file()
    save(found, path)
    say(f"written to {path}: moeshard plan uses it")
    return 0
