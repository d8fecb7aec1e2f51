# SPDX-License-Identifier: Apache-2.0
"""profile: where the time of a sharded model's MoE layers goes, by step and by rank, against what the machine can do.

A layer tells the names of its steps as they begin (``ShardedExperts.on_step``); a recorder a layer notes the time and,
when the call is done, what the batch knows about its size. On CUDA the engine puts events between the steps, which are
read at the end. Ranks exchange their records once, at the end.
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from time import perf_counter_ns  # CLOCK_MONOTONIC: one clock for all processes of a host
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from . import _core, palette
from .reports import ELEMENT_BYTES
from .tables import Tabular
from .threads import use_threads

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from torch import nn

    from .cuda import CudaEngine, Rows
    from .layer import ShardedExperts

STEPS = ("route", "gather", "group", "ffn", "combine")
ALL_LAYERS = "all layers"


class Limits(NamedTuple):
    """What a rank can do at most with its threads, measured while all ranks measure.

    Attributes:
        flops: fp32 multiply-adds, flops per second.
        dot_flops: bfloat16 dot products, flops per second; 0 where the CPU has none. CUDA: bfloat16 matrix products.
        bandwidth: bytes per second read from memory; CUDA: read and written.
    """

    flops: float
    dot_flops: float
    bandwidth: float


class Call(NamedTuple):
    """One call of one layer on one rank.

    Attributes:
        layer: its place in :attr:`Profile.layers`.
        block: when the MoE block of the model was entered: the model's own router ran from then to ``stamps[0]``.
            ``None``: the layer was called without a block.
        stamps: when each of the five steps began and the last one ended: ns of CLOCK_MONOTONIC.
        tokens: of this rank.
        flops: of ffn: 2 * D * (3 if gated else 2) * this rank's columns of the expert, summed over the slots that it
            computes.
        gather_bytes: tokens of the other ranks that this rank computes something of, and the choices of all of them.
        ffn_bytes: this rank's weights of the experts that it computed something of, each once.
        combine_bytes: partial outputs of the other ranks for tokens of this one, which it reads.
        bfloat16: tokens and weights both are: dot products can do the work where the CPU has them.
    """

    layer: int
    block: int | None
    stamps: Sequence[int]
    tokens: int
    flops: int
    gather_bytes: int
    ffn_bytes: int
    combine_bytes: int
    bfloat16: bool

    def at_peak(self, limits: Limits) -> float:
        """Seconds that the flops take at least."""
        dot = self.bfloat16 and limits.dot_flops > 0
        return self.flops / (limits.dot_flops if dot else limits.flops)

    def at_bandwidth(self, limits: Limits) -> float:
        """Seconds that reading the weights takes at least."""
        return self.ffn_bytes / limits.bandwidth


class RankProfile(NamedTuple):
    """What one rank recorded.

    Attributes:
        clock: which clock the times are of: ranks with equal ones can be compared.
        entered: when it entered the profile, right after all ranks had met: ns of that clock.
        limits: of its machine, if they were measured.
        calls: in order.
    """

    clock: str
    entered: int
    limits: Limits | None
    calls: tuple[Call, ...]


@dataclass(frozen=True)
class ProfileRow:
    """The calls of one layer, or of all, on one rank; times and amounts are sums over them.

    Attributes:
        layer: its name in the model, or ``"all layers"``.
        rank: the rank.
        calls: how many.
        tokens: of this rank.
        seconds: of each step.
        router_seconds: of the model's own router, which is no part of the layer.
        flops: of ffn.
        bytes: of gather, ffn and combine, see :class:`Call`.
        share_of_work: flops over those of all ranks.
        of_peak_flops: flops of ffn over what the rank can do at most in its time. ``None``: not measured.
        of_bandwidth: the same of the bytes of ffn. Above 1 if the weights were in a cache.
        of_roofline: max(flops / peak, bytes / bandwidth) of every call, over the time of ffn.
    """

    layer: str
    rank: int
    calls: int
    tokens: int
    seconds: dict[str, float]
    router_seconds: float
    flops: int
    bytes: dict[str, int]
    share_of_work: float
    of_peak_flops: float | None
    of_bandwidth: float | None
    of_roofline: float | None


class Profile(Tabular):
    """What :func:`moeshard.profile` recorded on all ranks. Prints as a table, in a notebook as HTML, with rich too.

    Attributes:
        layers: names of the MoE layers, in the model's order.
        by_rank: what each rank recorded; empty until the profile is left, and if it was left by an exception.
    """

    columns = (
        *("layer", "rank", "calls", "router", *STEPS),
        *("received", "weights", "work", "of peak flops", "of bandwidth", "of roofline"),
    )

    def __init__(self, layers: Sequence[str]) -> None:
        """Start without records."""
        self.layers = tuple(layers)
        self.by_rank: tuple[RankProfile, ...] = ()

    @property
    def rows(self) -> list[ProfileRow]:
        """Each layer on each rank, then all layers on each rank."""
        rows = []
        for number, name in (*enumerate(self.layers), (None, ALL_LAYERS)):
            calls = [[call for call in rank.calls if number in (None, call.layer)] for rank in self.by_rank]
            flops = sum(call.flops for rank in calls for call in rank)
            rows += [_row(name, r, calls[r], rank.limits, flops) for r, rank in enumerate(self.by_rank)]
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON: the limits and the calls of each rank, and the rows of the table."""
        return {
            "layers": list(self.layers),
            "limits": [rank.limits and rank.limits._asdict() for rank in self.by_rank],
            "rows": [asdict(row) for row in self.rows],
            "calls": [[call._asdict() for call in rank.calls] for rank in self.by_rank],
        }

    def trace(self, path: str | Path) -> None:
        """Write a Chrome trace, for chrome://tracing and https://ui.perfetto.dev.

        Each rank is a process with one row: the calls of the layers, in each its five steps, before it the model's
        router.

        Ranks of one host share a clock. Clocks of several hosts are set to the moment at which their first rank entered
        the profile, right after all ranks had met: between hosts, times are off by as much as that meeting takes.

        Args:
            path: the JSON file.

        Raises:
            ArgumentError: nothing was recorded.
            OSError: the file cannot be written.
        """
        self._check_recorded()
        origin: dict[str, int] = {}
        for rank in self.by_rank:
            origin[rank.clock] = min(rank.entered, origin.get(rank.clock, rank.entered))
        events: list[dict[str, object]] = []
        for number, rank in enumerate(self.by_rank):
            place = {"pid": number, "tid": 0}
            events.append({"ph": "M", "name": "process_name", "args": {"name": f"rank {number}"}, **place})
            events.append({"ph": "M", "name": "thread_name", "args": {"name": "MoE layers"}, **place})
            for call in rank.calls:
                for name, begin, end, facts in self._slices(call):
                    times = {"ts": (begin - origin[rank.clock]) / 1e3, "dur": (end - begin) / 1e3}  # us
                    events.append({"ph": "X", "name": name, "args": facts, **times, **place})
        Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))

    def plot(self, path: str | Path) -> None:
        """Draw each rank's time in the five steps and, if limits were measured, its shares of them.

        Args:
            path: the picture; its ending decides the format.

        Raises:
            ArgumentError: nothing was recorded.
            ImportError: matplotlib is missing.
            OSError: the file cannot be written.
        """
        self._check_recorded()
        from matplotlib.figure import Figure

        rows = [row for row in self.rows if row.layer == ALL_LAYERS]
        places, names = np.arange(len(rows)), [f"rank {row.rank}" for row in rows]
        measured = rows[0].of_roofline is not None
        figure = Figure(figsize=(11 if measured else 6, 1.8 + 0.6 * len(rows)), layout="constrained")
        time, *others = figure.subplots(1, 1 + measured, squeeze=False)[0]
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.3), "frameon": False}
        left = np.zeros(len(rows))
        for step in STEPS:
            width = np.array([1e3 * row.seconds[step] for row in rows])
            time.barh(places, width, 0.6, left, label=step, **palette.area(palette.STEPS[step]))
            left += width
        time.set_xlabel(f"ms in {rows[0].calls} calls of {len(self.layers)} MoE layers")
        time.legend(ncols=5, **below)
        for limit in others:
            for offset, attribute, colour in (
                (-0.25, "of_peak_flops", palette.SKY),
                (0, "of_bandwidth", palette.PINK),
                (0.25, "of_roofline", palette.RED),
            ):
                shares = [100 * getattr(row, attribute) for row in rows]
                limit.barh(places + offset, shares, 0.25, label=attribute.replace("_", " "), **palette.area(colour))
            limit.axvline(100, color=palette.GREY, linewidth=1, linestyle="--")
            limit.set_xlabel("ffn: % of what this rank can do at most")
            limit.legend(ncols=3, **below)
        for axes in (time, *others):
            axes.set_yticks(places, names)
            axes.invert_yaxis()
        figure.savefig(path, dpi=150)

    def title(self) -> str:
        """How much was recorded, and the limits."""
        if not self.by_rank:
            return f"moeshard profile: {len(self.layers)} MoE layers, nothing recorded"
        ranks = f"{len(self.by_rank)} rank{'s' * (len(self.by_rank) > 1)}"
        title = f"moeshard profile: {len(self.layers)} MoE layers on {ranks}, mean of a call, times in ms"
        limits = [rank.limits for rank in self.by_rank if rank.limits is not None]
        if limits:
            flops = " ".join(f"{limit.flops / 1e9:.0f}" for limit in limits)
            bandwidths = " ".join(f"{limit.bandwidth / 1e9:.1f}" for limit in limits)
            title += f"; at most {flops} Gflop/s, {bandwidths} GB/s"
        return title

    def cells(self) -> Iterator[tuple[str, ...]]:
        """One row a layer and rank."""
        for row in self.rows:
            calls = max(row.calls, 1)
            received = row.bytes["gather"] + row.bytes["combine"]
            yield (
                row.layer,
                str(row.rank),
                str(row.calls),
                *(f"{1e3 * s / calls:.3f}" for s in (row.router_seconds, *row.seconds.values())),
                *(f"{nbytes / calls / 2**20:.2f} MiB" for nbytes in (received, row.bytes["ffn"])),
                f"{row.share_of_work:.1%}",
                *("-" if x is None else f"{x:.0%}" for x in (row.of_peak_flops, row.of_bandwidth, row.of_roofline)),
            )

    def _slices(self, call: Call) -> Iterator[tuple[str, int, int, dict[str, int]]]:
        """(name, begin, end, facts) of the router, the layer and its steps."""
        if call.block is not None:
            yield "router", call.block, call.stamps[0], {}
        yield self.layers[call.layer], call.stamps[0], call.stamps[-1], {"tokens": call.tokens}
        facts: dict[str, dict[str, int]] = {
            "gather": {"bytes": call.gather_bytes},
            "ffn": {"bytes": call.ffn_bytes, "flops": call.flops},
            "combine": {"bytes": call.combine_bytes},
        }
        for step, (begin, end) in zip(STEPS, pairwise(call.stamps), strict=True):
            yield step, begin, end, facts.get(step, {})

    def _check_recorded(self) -> None:
        if not any(rank.calls for rank in self.by_rank):
            raise _core.ArgumentError(
                "profile: nothing was recorded: call the model inside `with moeshard.profile(model)` and leave it first"
            )


@contextlib.contextmanager
def profile(model: nn.Module, *, limits: bool = True) -> Iterator[Profile]:
    """Record where the time of every MoE layer goes while the body of a ``with`` statement runs.

    Collective: all ranks enter and leave it together; in between the model is called as always. Afterwards every rank
    has the records of all. If the body raises, the records are dropped and nothing is sent.

    A layer's time is cut into the five steps without a gap. ``route`` is moeshard's part, checking and copying the
    choices; the model's own router is shown beside it. ``gather`` and ``combine`` hold the time this rank waits for the
    others, so a rank that is late shows as time of the ranks that are not. Ranks that share memory read each other's
    tokens in ``ffn``, where they lie.

    On CUDA times are those of the device, read when the body has ended: the host does not wait for it meanwhile. A slow
    host shows as time between calls, or in steps that waited for their launch. Replays of a captured graph do not show.

    Args:
        model: a sharded model, or a :class:`moeshard.ShardedExperts`.
        limits: first measure for 0.2 s what the machine can do, on all ranks at the same time: fractions of it are
            shown then. A rank takes 256 MiB for that. On CUDA: what torch reaches with large matrices and in a copy
            (640 MiB of device memory).

    Yields:
        The profile: empty until the body has ended. ``print`` it, or use its ``plot``, ``trace`` and ``to_dict``.

    Raises:
        ArgumentError: the model is not sharded, its layers have different groups, or it is being profiled already.
        RankMismatch: the ranks profile different layers, or not all with limits.
        CommError: a rank is lost, late or failed.

    Example:
        >>> with moeshard.profile(model) as profile:  # doctest: +SKIP
        ...     model(**batch)
        >>> print(profile)  # doctest: +SKIP
    """
    from .layer import sharded_layers, unobserved

    layers = sharded_layers(model)
    group = layers[0][1].group
    with group.all_or_none():
        for name, layer in layers:
            if layer.group is not group:
                raise _core.ArgumentError(f"{name}: has another group than {layers[0][0]}, profile them one by one")
            if layer.on_step is not unobserved:
                raise _core.ArgumentError(f"{name}: it is being profiled already, profiles cannot be nested")
    recorded = Profile([name for name, _ in layers])
    group.agree({"the profiled layers": ", ".join(recorded.layers), "limits": str(limits)})
    device = next((layer.device for _, layer in layers if layer.device.type == "cuda"), None)
    with group.all_or_none():
        use_threads()
        measured = (_measured(device) if device else Limits(*_core.measure_machine(0.2))) if limits else None
    entered = perf_counter_ns()
    calls: list[Call] = []
    with contextlib.ExitStack() as attached:
        blocks = _blocks(model)
        on_device = _DeviceRecorder(group.engine(device.index), layers, calls) if device else None
        for number, (_, layer) in enumerate(layers):
            recorder = _Recorder(number, layer, calls)
            attached.callback(setattr, layer, "on_step", unobserved)
            layer.on_step = recorder
            if layer in blocks:
                enter = on_device.enter_block if on_device else recorder.enter_block
                attached.callback(blocks[layer].register_forward_pre_hook(enter, with_kwargs=True).remove)
        try:
            yield recorded
        finally:
            if on_device:
                on_device.finish()
    own = RankProfile(_clock(), entered, measured, tuple(calls))
    recorded.by_rank = tuple(_decode(message) for message in group.all_gather(json.dumps(own).encode()))


class _Read(NamedTuple):
    """What a rank reads of the others in a call: rows of tokens, choices, rows of partial outputs."""

    tokens: int
    routing: int
    partials: int


class _Recorder:
    """What a layer's ``on_step`` is while a profile runs. Calls of one group take turns, so it needs no lock."""

    def __init__(self, number: int, layer: ShardedExperts, calls: list[Call]) -> None:
        self._number = number
        self._layer = layer
        self.ranks = layer.group.size
        self._calls = calls
        self._block: int | None = None
        self._stamps: list[int] = []
        packed = layer.packed
        self._widths = packed.columns[:, 1] - packed.columns[:, 0]  # [E]
        self._parameters = packed.d_model * (3 if packed.gated else 2)  # of one column of an expert

    def enter_block(self, *arguments: object) -> None:
        """The block's forward pre-hook."""
        self._block = perf_counter_ns()

    def __call__(self, step: str) -> None:
        now = perf_counter_ns()
        if step == STEPS[0]:
            self._stamps = []  # with them goes a call that failed
        self._stamps.append(now)
        if step == "done":
            self._calls.append(self._finish())
            self._block = None

    def _finish(self) -> Call:
        batch = self._layer.group.batch
        tokens, _, choices = batch.shape
        tokens_read, partials_read = batch.rows_read
        others = int(batch.tokens_per_rank.sum()) - tokens  # 0 if the tokens are replicated
        read = _Read(tokens_read, others * choices, partials_read)
        return self.call(self._block, self._stamps, tokens, read, batch.dtype, batch.counts(True))

    def own(self, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """On CUDA: which of the slots that experts got this rank computed."""
        shares = self._layer.shares
        return counts if shares is None else shares.own(counts)

    def call(
        self,
        block: int | None,
        stamps: Sequence[int],
        tokens: int,
        read: _Read,
        dtype: str,
        counts: NDArray[np.int64],
    ) -> Call:
        """A call of the layer, of which this rank computed ``counts[e]`` slots of expert e."""
        packed = self._layer.packed
        return Call(
            layer=self._number,
            block=block,
            stamps=stamps,
            tokens=tokens,
            flops=2 * self._parameters * int(counts @ self._widths),
            gather_bytes=read.tokens * ELEMENT_BYTES[dtype] * packed.d_model + read.routing * 8,  # int32, float32
            ffn_bytes=ELEMENT_BYTES[packed.dtype] * self._parameters * int(self._widths[counts > 0].sum()),
            combine_bytes=read.partials * 4 * packed.d_model,  # float32
            bfloat16=packed.dtype == dtype == "bfloat16",
        )


class _DeviceRecorder:
    """The calls of CUDA layers: their engine records on the device, this reads it when the profile ends."""

    def __init__(self, engine: CudaEngine, layers: Sequence[tuple[str, ShardedExperts]], calls: list[Call]) -> None:
        self._engine = engine
        self._recorders = {layer.layer: _Recorder(number, layer, calls) for number, (_, layer) in enumerate(layers)}
        self._calls = calls
        engine.start_recording()
        self._origin = perf_counter_ns()

    def enter_block(self, block: nn.Module, arguments: tuple[object, ...], keywords: dict[str, object]) -> None:
        """The block's forward pre-hook."""
        for argument in (*arguments, *keywords.values()):
            if getattr(argument, "is_cuda", False):
                return self._engine.stamp(cast("Rows", argument))

    def finish(self) -> None:
        """Read what was recorded; layers of the group that are not profiled do not count."""
        for call in self._engine.stop_recording():
            if call.layer not in self._recorders:
                continue
            block = None if np.isnan(call.block) else self._origin + round(call.block)
            begin = self._origin + round(call.begin)
            stamps = [begin, *(begin + round(passed) for passed in np.cumsum(call.steps))]
            recorder = self._recorders[call.layer]
            others = int(call.seen[-1]) // max(call.choices, 1) - call.tokens
            # Every rank gathers all tokens, whatever the table, and every rank's partial outputs are summed.
            read = _Read(others, others * call.choices, (recorder.ranks - 1) * call.tokens)
            counts = recorder.own(call.seen[:-1])
            self._calls.append(recorder.call(block, stamps, call.tokens, read, call.dtype, counts))


def _measured(device: torch.device) -> Limits:
    """What torch reaches on a CUDA device: products of 4096 x 4096 matrices, and a copy of 256 MiB."""
    import torch

    def best(work: Callable[[], object]) -> float:
        times = []
        for _ in range(12):  # the first ones warm up
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            work()
            end.record()
            end.synchronize()
            times.append(float(begin.elapsed_time(end)) / 1e3)
        return min(times)

    size = 4096
    with torch.cuda.device(device):
        x = torch.randn(size, size, device=device)
        y, out = x.bfloat16(), torch.empty(size, size, device=device, dtype=torch.bfloat16)
        words = torch.zeros(1 << 26, device=device)
        copy = torch.empty_like(words)
        return Limits(
            flops=2 * size**3 / best(lambda: x @ x),
            dot_flops=2 * size**3 / best(lambda: torch.matmul(y, y, out=out)),
            bandwidth=2 * words.nbytes / best(lambda: copy.copy_(words)),
        )


def _blocks(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """The module that shard has put in a block's place, by the sharded layer in it: it calls router and layer."""
    from .api import Original

    found: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        original: object = getattr(module, "moeshard_original", None)
        if isinstance(original, Original):
            found[original.experts] = module
    return found


def _clock() -> str:
    """CLOCK_MONOTONIC counts from the boot of a host."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _decode(message: bytes) -> RankProfile:
    clock, entered, limits, calls = json.loads(message)
    return RankProfile(clock, entered, limits and Limits(*limits), tuple(Call(*call) for call in calls))


def _row(layer: str, rank: int, calls: Sequence[Call], limits: Limits | None, all_flops: int) -> ProfileRow:
    seconds = {step: sum(c.stamps[i + 1] - c.stamps[i] for c in calls) / 1e9 for i, step in enumerate(STEPS)}
    flops = sum(call.flops for call in calls)
    peak = bandwidth = roofline = None
    if limits is not None and calls:
        peak = sum(call.at_peak(limits) for call in calls) / seconds["ffn"]
        bandwidth = sum(call.at_bandwidth(limits) for call in calls) / seconds["ffn"]
        roofline = sum(max(call.at_peak(limits), call.at_bandwidth(limits)) for call in calls) / seconds["ffn"]
    return ProfileRow(
        layer=layer,
        rank=rank,
        calls=len(calls),
        tokens=sum(call.tokens for call in calls),
        seconds=seconds,
        router_seconds=sum(call.stamps[0] - call.block for call in calls if call.block is not None) / 1e9,
        flops=flops,
        bytes={
            "gather": sum(call.gather_bytes for call in calls),
            "ffn": sum(call.ffn_bytes for call in calls),
            "combine": sum(call.combine_bytes for call in calls),
        },
        share_of_work=flops / all_flops if all_flops else 0.0,
        of_peak_flops=peak,
        of_bandwidth=bandwidth,
        of_roofline=roofline,
    )
