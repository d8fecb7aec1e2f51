# SPDX-License-Identifier: Apache-2.0
"""Layers run on paper: routing drawn anew in every step, ranks that are late, pieces that overlap."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from .. import _core
from ..tables import Tabular
from .histograms import loads
from .machines import Machine, machine
from .planning import LayoutChoice, arguments, plan_on
from .results import ModelPlan
from .shapes import model_shape

LAYOUTS: tuple[LayoutChoice, ...] = ("shard", "expert_parallel", "balanced", "hybrid", "hot_sharded", "hot_copied")


@dataclass(frozen=True)
class Disorder:
    """What does not go as planned.

    Attributes:
        steps: how many times the layers run.
        chunks: the tokens come in so many pieces; one travels while another is computed. 1: no overlap.
        jitter: each rank's ffn takes ``exp(jitter * normal)`` times its prediction.
        slow_chance: of a rank in a step, to be a straggler.
        slow_factor: how many times slower it is then.
        drift: which experts are popular changes with every step.
        seed: of the random numbers.
    """

    steps: int = 50
    chunks: int = 1
    jitter: float = 0.0
    slow_chance: float = 0.0
    slow_factor: float = 2.0
    drift: bool = False
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Run:
    """One layout.

    Attributes:
        layout: in words.
        planned: predicted seconds of all layers.
        seconds: ``[steps]`` float64: simulated seconds of all layers.
        busy: mean share of the ranks' time that ffn takes.
    """

    layout: str
    planned: float
    seconds: NDArray[np.float64]
    busy: float


@dataclass(frozen=True, eq=False)
class Simulation(Tabular):
    """Layouts side by side under the same disorder, the fastest on average first. Prints as a table.

    Attributes:
        about: what was simulated.
        runs: one for each layout.
    """

    about: str
    runs: tuple[Run, ...]

    columns: ClassVar[tuple[str, ...]] = ("layout", "planned", "mean", "median", "p99", "p99 / median", "ranks busy")

    def title(self) -> str:
        """What was simulated."""
        return self.about

    def cells(self) -> Iterator[tuple[str, ...]]:
        """A row for each layout, in ms."""
        for run in self.runs:
            median, late = np.quantile(run.seconds, (0.5, 0.99))
            numbers = (run.planned, float(run.seconds.mean()), float(median), float(late))
            yield (run.layout, *(f"{1e3 * x:.4g}" for x in numbers), f"{late / median:.2f}", f"{run.busy:.0%}")


def run_plan(found: ModelPlan, histogram: object = None, disorder: Disorder | None = None) -> Run:
    """Simulate a plan.

    Args:
        found: the plan.
        histogram: popularity of the experts, as in :func:`moeshard.plan`; it may differ from what was planned for.
        disorder: what happens. ``None``: only the routing is drawn anew.

    Raises:
        ArgumentError: a number out of range.
    """
    how = disorder or Disorder()
    tokens = np.array(found.tokens)
    wanted = loads(found.model, histogram, float(tokens.sum()))
    seconds, busy = np.zeros(max(how.steps, 1)), 0.0
    done: dict[tuple[str, bytes], tuple[NDArray[np.float64], float]] = {}
    for layer, load in zip(found.layers, wanted, strict=True):
        key = layer.plan.digest, load.tobytes()
        if key not in done:  # the same draws for equal layers: half a model's variance is not worth twice the time
            done[key] = _core.plan_simulate(
                layer.plan.columns,
                layer.plan.copies,
                found.machine.arrays(found.ranks, layer.shape.dtype, np.full(found.ranks, math.inf)),
                arguments(layer.shape, load, tokens),
                (how.steps, how.chunks, how.jitter, how.slow_chance, how.slow_factor, how.drift, how.seed),
            )
        own, share = done[key]
        seconds += own
        busy += share / len(found.layers)
    layouts = dict.fromkeys(layer.layout for layer in found.layers)
    return Run(", ".join(layouts), found.seconds, seconds, busy)


def simulate(
    model_or_shapes: object,
    *,
    ranks: int,
    tokens: float | Sequence[float],
    histogram: object = None,
    devices: object = None,
    hosts: int | None = None,
    disorder: Disorder | None = None,
    layouts: Sequence[LayoutChoice] = LAYOUTS,
) -> Simulation:
    """Plan with every family of layouts, and run each on paper.

    Args:
        model_or_shapes: as in :func:`moeshard.plan`, and so is what follows.
        ranks: number of ranks R.
        tokens: of each rank.
        histogram: popularity of the experts.
        devices: what the ranks are.
        hosts: how many the ranks are spread over.
        disorder: what does not go as planned. ``None``: only the routing is drawn anew.
        layouts: families to compare; what does not exist for these ranks or does not fit is left out.

    Returns:
        A table of them.

    Raises:
        ArgumentError, ShapeError: as :func:`moeshard.plan`.
        RangeError: no family fits into memory.
    """
    model, how = model_shape(model_or_shapes), disorder or Disorder()
    ranks_of: Machine = machine(devices)
    runs: dict[str, Run] = {}
    failure: _core.MoeshardError | None = None
    for layout in layouts:
        try:
            found = plan_on(model, ranks, tokens, histogram, ranks_of, layout=layout, hosts=hosts, compare=False)
        except (_core.RangeError, _core.ArgumentError) as error:
            if layout == "shard" and not isinstance(error, _core.RangeError):
                raise
            failure = error
            continue
        run = run_plan(found, histogram, how)
        runs.setdefault(run.layout, run)
    if not runs:
        raise failure or _core.ArgumentError("layouts: expected at least one")
    words = [f"{how.steps} steps", f"{how.chunks} pieces" if how.chunks > 1 else "no overlap"]
    words += [f"jitter {how.jitter:g}"] if how.jitter else []
    words += [f"a rank in {1 / how.slow_chance:.0f} is {how.slow_factor:g} times slower"] if how.slow_chance else []
    words += ["popular experts change with every step"] if how.drift else []
    about = f"moeshard simulation: {model.name}, {ranks} ranks ({ranks_of.name}), {', '.join(words)}; all layers, in ms"
    return Simulation(about, tuple(sorted(runs.values(), key=lambda run: float(run.seconds.mean()))))
