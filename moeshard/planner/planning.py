# SPDX-License-Identifier: Apache-2.0
"""moeshard.plan: asks the C core for the best table of every layer, and says why in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .. import _core
from ..plans import Plan
from .histograms import Load, loads
from .machines import Machine, machine
from .results import STEPS, Alternative, LayerPlan, ModelPlan, StepTimes, milliseconds, size
from .shapes import SIZES, LayerShape, ModelShape, model_shape

Cost = tuple[float, float, float, float, float, float, bool]  # as _core.plan_cost returns it
Candidate = tuple[int, int, int, int, bool, float, Cost]  # as _core.plan_search does
LayoutChoice = Literal["auto", "shard", "uneven", "expert_parallel", "balanced", "hybrid", "hot_sharded", "hot_copied"]

# In the order of csrc/moeshard.h's ms_layout_kind: simple ones first.
KINDS = ("shard", "uneven", "expert_parallel", "balanced", "hybrid", "hot_sharded", "hot_copied", "mixed")
ALL = (1 << len(KINDS)) - 1
COPIED = 1 << KINDS.index("hot_copied")

# "auto" takes the simplest layout that is predicted within this of the fastest: predictions are not that good, and
# the simple ones depend less on the routing staying as it was.
MARGIN = 0.03


def plan(
    model_or_shapes: object,
    *,
    ranks: int,
    tokens: float | Sequence[float],
    histogram: object = None,
    devices: object = None,
    layout: LayoutChoice = "auto",
    hosts: int | None = None,
) -> ModelPlan:
    """Choose the layout of every MoE layer of a model, and predict what it costs.

    For each layer the C core builds and predicts: every expert over every rank (evenly and by the ranks' speed), expert
    parallelism (contiguous, and balanced by load), hybrids of every group size, hot experts sharded or copied beside
    them, and for tiny layers every table there is. ``docs/planner.md`` has the cost model.

    Args:
        model_or_shapes: a preset's name, a HuggingFace config or model, or :class:`moeshard.planner.LayerShape` s; see
            :func:`moeshard.planner.model_shape`.
        ranks: number of ranks R, 1 to 1024.
        tokens: of each rank in a call: one number, or R of them.
        histogram: how popular the experts are; ``None``: all alike. Arrays, ``"0.6:0.1"``, a mapping, a
            :func:`moeshard.report` or recorded :class:`moeshard.TokenPaths`, see
            :func:`moeshard.planner.histograms.loads`.
        devices: what the ranks are; ``None``: this machine (``moeshard doctor --calibrate`` measures it). A preset such
            as ``"h100"``, see :func:`moeshard.planner.machine`.
        layout: ``"auto"``: the fastest; or only one family.
        hosts: how many hosts the ranks are spread over, evenly. ``None``: as the devices say.

    Returns:
        Tables, times, bytes, alternatives and reasons; ``shard(model, plan=...)`` takes it.

    Raises:
        ArgumentError: bad numbers; names which, and what would do.
        ShapeError: a histogram of another shape.
        RangeError: the experts do not fit into memory; says how much is missing and what would do.

    Example:
        >>> found = plan("switch-base-8", ranks=2, tokens=1000)
        >>> found.layers[0].plan.ranks
        2
    """
    return plan_on(model_shape(model_or_shapes), ranks, tokens, histogram, machine(devices), layout=layout, hosts=hosts)


def plan_on(
    model: ModelShape,
    ranks: int,
    tokens: float | Sequence[float],
    histogram: object,
    ranks_of: Machine,
    *,
    layout: LayoutChoice = "auto",
    hosts: int | None = None,
    compare: bool = True,
) -> ModelPlan:
    """:func:`plan` for a shape and a machine.

    Args:
        model: the layers.
        ranks: number of ranks R.
        tokens: of each rank.
        histogram: popularity of the experts.
        ranks_of: the machine.
        layout: ``"auto"`` or a family.
        hosts: how many the ranks are spread over.
        compare: with a family: also look at the others, to say what they would take.
    """
    _check(ranks, layout)
    each = _tokens(ranks, tokens)
    ranks_of = ranks_of.on_hosts(ranks, hosts)
    memory = ranks_of.memory(ranks)
    wanted = loads(model, histogram, float(each.sum()))
    # Layers that are alike but for their names are planned once.
    done: dict[tuple[LayerShape, bytes], LayerPlan] = {}
    layers = []
    for shape, load in zip(model.layers, wanted, strict=True):
        key = replace(shape, name=""), load.tobytes()
        if key not in done:
            room = memory * (shape.weight_bytes / model.weight_bytes)
            try:
                done[key] = _plan_layer(shape, load, each, ranks_of, room, layout, compare)
            except _core.RangeError:
                raise _core.RangeError(_too_big(model, ranks_of, memory, layout)) from None
        layers.append(replace(done[key], shape=shape))
    return ModelPlan(model, ranks, tuple(each.tolist()), ranks_of, tuple(layers))


def _check(ranks: object, layout: object) -> None:
    if not isinstance(ranks, int) or isinstance(ranks, bool) or not 1 <= ranks <= 1024:
        raise _core.ArgumentError(f"ranks: expected an integer from 1 to 1024, got {ranks!r}")
    if layout not in ("auto", *KINDS[:-1]):
        raise _core.ArgumentError(f"layout: expected one of auto, {', '.join(KINDS[:-1])}, got {layout!r}")


def _tokens(ranks: int, tokens: float | Sequence[float]) -> NDArray[np.float64]:
    try:
        each = np.asarray(tokens, np.float64)
    except (TypeError, ValueError):
        raise _core.ArgumentError(f"tokens: expected a number, or one for each rank, got {tokens!r}") from None
    if each.ndim == 0:
        each = np.full(ranks, float(each))
    if each.shape != (ranks,):
        raise _core.ShapeError(f"tokens: expected a number or [{ranks}] (one for each rank), got {list(each.shape)}")
    if not (np.isfinite(each).all() and (each >= 0).all() and each.sum() > 0):
        raise _core.ArgumentError(f"tokens: expected at least one token and no negative numbers, got {tokens!r}")
    return each


def arguments(
    shape: LayerShape, load: Load, tokens: NDArray[np.float64], *, exact: bool = False
) -> tuple[Load, NDArray[np.float64], int, int, int, int, int, int, bool]:
    """A layer as the C core takes it.

    Args:
        shape: the layer.
        load: ``[E]`` (token, choice) pairs of all ranks.
        tokens: ``[R]`` of each rank.
        exact: the load is the count of one batch, not a mean over batches.
    """
    sizes = shape.d_model, shape.d_ff, shape.top_k, shape.matrices, SIZES[shape.dtype], shape.token_size
    return tokens, load, *sizes, exact


def predict(
    shape: LayerShape,
    table: Plan,
    load: Load,
    tokens: NDArray[np.float64],
    ranks_of: Machine,
    *,
    exact: bool = False,
) -> tuple[StepTimes, NDArray[np.float64]]:
    """Predict one layer under any table.

    Args:
        shape: the layer.
        table: its plan.
        load: ``[E]`` (token, choice) pairs of all ranks.
        tokens: ``[R]`` of each rank.
        ranks_of: the machine.
        exact: the load is the count of one batch, not a mean over batches.

    Returns:
        The times, and ``[4, R]`` float64: seconds of ffn, bytes of weights, bytes that arrive in gather and in combine.

    Raises:
        ArgumentError, ShapeError: sizes that do not fit.
    """
    room = np.full(table.ranks, math.inf)
    cost, each = _core.plan_cost(
        table.columns,
        table.copies,
        ranks_of.arrays(table.ranks, shape.dtype, room),
        arguments(shape, load, tokens, exact=exact),
    )
    return _times(cost), each


def _times(cost: Cost) -> StepTimes:
    return StepTimes(*cost[:5], sparse=cost[6])


def _plan_layer(
    shape: LayerShape,
    load: Load,
    tokens: NDArray[np.float64],
    ranks_of: Machine,
    room: NDArray[np.float64],
    layout: LayoutChoice,
    compare: bool,
) -> LayerPlan:
    arrays = ranks_of.arrays(len(tokens), shape.dtype, room)
    layer = arguments(shape, load, tokens)

    def search(kinds: int) -> tuple[NDArray[np.int64], NDArray[np.int32], list[Alternative], Alternative, bool]:
        columns, copies, candidates, chosen, proven = _core.plan_search(arrays, layer, kinds)
        others = [_alternative(candidate, shape.num_experts) for candidate in candidates]
        return columns, copies, others, others[chosen], proven

    if layout == "hot_copied" and not ranks_of.copies:
        raise _core.ArgumentError(f"layout: no copies of experts are planned for {ranks_of.name}")
    every = ALL if ranks_of.copies else ALL & ~COPIED
    if layout == "auto":
        columns, copies, others, taken, proven = search(every)
        best = taken
        near = [o for o in others if o.fits and o.times.total <= best.times.total * (1 + MARGIN)]
        simplest = min(near, key=lambda other: KINDS.index(other.kind))
        if simplest.kind != best.kind:
            columns, copies, _, taken, proven = search(1 << KINDS.index(simplest.kind))
    else:
        try:
            columns, copies, others, taken, proven = search(1 << KINDS.index(layout))
        except _core.ArgumentError as error:
            raise _core.ArgumentError(f"layout: {layout!r} is not there for {len(tokens)} ranks ({error})") from error
        best = taken
        if compare:
            _, _, others, best, _ = search(every)
            if all(other.layout != taken.layout for other in others):
                others.append(taken)
    table = Plan(columns, shape.d_ff, copies)
    times, (ffn, memory, gathered, combined) = predict(shape, table, load, tokens, ranks_of)
    others.sort(key=lambda other: (not other.fits, other.times.total))
    return LayerPlan(
        shape,
        table,
        taken.layout,
        times,
        ffn,
        memory,
        gathered,
        combined,
        tuple(others),
        proven,
        _why(taken, best, others, layout != "auto", len(tokens), shape),
    )


def _alternative(candidate: Candidate, experts: int) -> Alternative:
    kind, group, hot, hot_group, fits, memory, cost = candidate
    return Alternative(_words(KINDS[kind], group, hot, hot_group, experts), KINDS[kind], _times(cost), memory, fits)


def _words(kind: str, group: int, hot: int, hot_group: int, experts: int) -> str:
    rest = "each other on one rank" if group == 1 else f"each other over {group} ranks"
    if kind == "hot_sharded":
        return f"{hot} hottest over all ranks, {rest}"
    if kind == "hot_copied":
        copy = "a copy on every rank" if hot_group == 1 else f"a copy on every {hot_group} ranks"
        return f"every expert with {copy}" if hot == experts else f"{hot} hottest with {copy}, {rest}"
    return {
        "shard": "shard",
        "uneven": "shard by speed",
        "expert_parallel": "expert parallel",
        "balanced": "expert parallel, balanced",
        "hybrid": f"hybrid, groups of {group}",
        "mixed": "mixed",
    }[kind]


# ---- why ------------------------------------------------------------------------------------------------

_MEANING = {
    "shard": "every expert is cut over every rank, so that all ranks do the same whatever the routing",
    "uneven": "every expert is cut over every rank in proportion to its speed, so that all are done together",
    "expert_parallel": "each expert is whole on one rank",
    "balanced": "each expert is whole on one rank, dealt so that the busiest rank has as little as possible",
    "hybrid": "each expert is cut over a group of ranks only",
    "hot_sharded": "only the popular experts are cut over all ranks",
    "hot_copied": "the popular experts have copies, so that their tokens are split",
    "mixed": "found by looking at every table",
}


def _why(
    taken: Alternative, best: Alternative, others: Sequence[Alternative], asked: bool, ranks: int, shape: LayerShape
) -> str:
    if ranks == 1:
        return "One rank holds everything, so there is nothing to choose."
    text = f"{taken.layout[0].upper()}{taken.layout[1:]}: {_MEANING[taken.kind]}"
    slower = taken.times.total / best.times.total - 1
    if asked:
        text += "; this layout was asked for"
        if slower > 0.005:
            return f"{text}, {best.layout} is predicted to take {slower / (1 + slower):.0%} less time."
        return f"{text}, and it is the fastest."
    if slower > 0:
        return (
            f"{text}; {best.layout} is predicted only {slower / (1 + slower):.1%} faster, which is less than a "
            "prediction is worth, and depends more on the routing."
        )
    rivals = [other for other in others if other.fits and other.kind != taken.kind]
    cut = next((other for other in others if other.kind == "shard"), None)
    rival = cut if cut is not None and cut in rivals else rivals[0] if rivals else None
    if rival is None:
        return f"{text}; no other layout fits into memory."
    if taken.kind == "shard":
        rival = next((other for other in rivals if other.kind in ("balanced", "expert_parallel")), rivals[0])
    if rival.times.total < 1.005 * taken.times.total:
        return f"{text}; {rival.layout} would take as long, and depends on the routing."
    gains = {step: getattr(rival.times, step) - getattr(taken.times, step) for step in STEPS}
    step = max(gains, key=lambda name: gains[name])
    loss = min(gains, key=lambda name: gains[name])
    text += (
        f"; {rival.layout} would take {rival.times.total / taken.times.total:.3g} times as long, mostly in {step} "
        f"({milliseconds(getattr(rival.times, step))} ms instead of {milliseconds(getattr(taken.times, step))})"
    )
    if step in ("gather", "combine"):
        text += f": a token has {shape.top_k} of {shape.num_experts} experts and need not reach all {ranks} ranks"
    elif step == "ffn" and taken.kind == "shard":
        text += ": its busiest rank has more than its share"
    if gains[loss] < -0.02 * taken.times.total:
        text += (
            f", though its {loss} is shorter ({milliseconds(getattr(rival.times, loss))} ms instead of "
            f"{milliseconds(getattr(taken.times, loss))})"
        )
    return text + "."


def _too_big(model: ModelShape, ranks_of: Machine, memory: NDArray[np.float64], layout: str) -> str:
    """What is missing, and the smallest changes that would fit."""
    ranks = len(memory)
    whole, room = model.weight_bytes, float(memory.sum())
    text = f"memory: the experts of {model.name} take {size(whole)}, {ranks} ranks have {size(room)} for them"
    ways = []
    if whole > room:
        enough = math.ceil(whole / float(memory.mean()))
        if ranks_of.cores:  # more ranks on a host have no more memory
            ways.append(f"hosts={math.ceil(whole / ranks_of.devices[0].memory)} of this size")
        elif enough <= 1024:
            ways.append(f"ranks={max(enough, ranks + 1)} of this size")
        for dtype in ("bfloat16", "int8"):
            narrow = model.with_dtype(dtype).weight_bytes
            if narrow < whole and narrow <= room:
                ways.append(f"dtype={dtype} ({size(narrow)})")
                break
        ways.append(f"{size(whole / ranks)} for each rank")
    elif layout not in ("auto", "shard"):
        ways.append("layout='auto'")
    else:
        text += ", but no layout spreads them evenly enough"
        ways.append(f"{size(1.02 * whole / ranks)} for each rank")
    return f"{text}. What would do: {' or '.join(ways)}"
