# SPDX-License-Identifier: Apache-2.0
"""The bars: what moeshard promises of a layer's time, as data, and whether rows hold it. No torch.

Numbers without a remark are the project's own requirements. "Usual routing" is uniform or skewed: when all tokens take
the same experts, the layer is one product that everybody is good at, and there only "never slower" is asked.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from .grid import ROUTINGS, Case
from .results import EXACT, TORCH, Row

State = Literal["missed", "met", "not measured"]
USUAL = ("uniform", "skew")
MANY = 1 << 40  # tokens: no upper limit


@dataclass(frozen=True)
class Point:
    """A value that a bar is about, and the case it was measured at."""

    value: float
    where: str


Points = Callable[[Sequence[Row]], Iterable[Point]]


@dataclass(frozen=True)
class Bar:
    """A promise: every point is at least, or at most, the limit.

    Attributes:
        claim: in words.
        least: at least the limit; else at most.
        limit: of every point.
        points: finds them among rows.
    """

    claim: str
    least: bool
    limit: float
    points: Points


@dataclass(frozen=True)
class Verdict:
    """What became of a bar.

    Attributes:
        state: ``"missed"``, ``"met"`` or ``"not measured"``.
        claim: in words.
        required: the limit, with its direction.
        worst: the value nearest to, or farthest beyond, the limit.
        where: its case.
        points: how many were measured.
        missed: how many of them miss.
    """

    state: State
    claim: str
    required: str
    worst: float | None
    where: str
    points: int
    missed: int


def judge(rows: Sequence[Row], promises: "Sequence[Bar] | None" = None) -> list[Verdict]:
    """Hold rows against bars.

    Args:
        rows: measured; disturbed ones say nothing about shares of what the machine can do.
        promises: None: all of :data:`BARS`.

    Returns:
        A verdict for each bar: missed ones first, then met ones, then those without a point.
    """
    verdicts = [_verdict(bar, list(bar.points(rows))) for bar in (BARS if promises is None else promises)]
    order: tuple[State, ...] = ("missed", "met", "not measured")
    return sorted(verdicts, key=lambda verdict: order.index(verdict.state))


def _verdict(bar: Bar, points: Sequence[Point]) -> Verdict:
    required = f"{'>=' if bar.least else '<='} {bar.limit:g}"
    if not points:
        return Verdict("not measured", bar.claim, required, None, "", 0, 0)
    missed = [point for point in points if not (point.value >= bar.limit if bar.least else point.value <= bar.limit)]
    worst = (min if bar.least else max)(points, key=lambda point: point.value)
    return Verdict(
        "missed" if missed else "met", bar.claim, required, worst.value, worst.where, len(points), len(missed)
    )


@dataclass(frozen=True)
class Where:
    """Which cases a bar is about; ``None``: all.

    Attributes:
        shapes: names.
        dtypes: of weights and tokens.
        experts: numbers of them.
        launches: (ranks, threads).
        routings: names.
        tokens: of each rank, from and to.
    """

    shapes: tuple[str, ...] | None = ("switch-base",)
    dtypes: tuple[str, ...] | None = ("float32",)
    experts: tuple[int, ...] | None = None
    launches: tuple[tuple[int, int], ...] | None = None
    routings: tuple[str, ...] = USUAL
    tokens: tuple[int, int] = (1, MANY)

    def __contains__(self, case: Case) -> bool:
        """Whether a case is meant."""
        build = case.build
        wanted = (
            (build.shape, self.shapes),
            (build.dtype, self.dtypes),
            (build.num_experts, self.experts),
            ((build.ranks, case.threads), self.launches),
            (case.routing, self.routings),
        )
        fits = all(allowed is None or value in allowed for value, allowed in wanted)
        return fits and self.tokens[0] <= case.tokens <= self.tokens[1]


ONE_RANK = ((1, 1), (1, 2))
ONE_THREAD = ((1, 1),)
TWO_RANKS = ((2, 1),)
TWO_CORES = ((1, 2), (2, 1))


def each(value: Callable[[Row], float | None], where: Where) -> Points:
    """A value of every row that is meant, and that has it."""

    def points(rows: Sequence[Row]) -> Iterator[Point]:
        for row in rows:
            if row.case in where and (found := value(row)) is not None:
                yield Point(found, row.case.key)

    return points


def against(other: Callable[[Case], Case], value: Callable[[Row, Row], float | None], where: Where) -> Points:
    """A value of every row that is meant and another row, both measured."""

    def points(rows: Sequence[Row]) -> Iterator[Point]:
        by_case = {row.case: row for row in rows}
        for row in rows:
            partner = by_case.get(other(row.case)) if row.case in where else None
            if partner is not None and (found := value(row, partner)) is not None:
                yield Point(found, f"{row.case.key} / {partner.case.key}")

    return points


def rivals(*names: str) -> Callable[[Row], float | None]:
    """How many times moeshard's block is as fast as the fastest of these."""
    return lambda row: row.best(names)


def share_of_roof(row: Row) -> float | None:
    """Bound over time of moeshard's experts."""
    return None if row.disturbed else row.share


def share_of_peak(row: Row) -> float | None:
    """Arithmetic alone over time of moeshard's experts, slowest rank."""
    seconds = max(work / peak for work, peak in zip(row.flops, row.flops_per_second, strict=True))
    return None if row.disturbed else seconds / row.timings["experts"].median


def _roof(both_limits: bool) -> Callable[[Row], float | None]:
    """The share at points with 16 tokens in all, split by whether arithmetic and streaming take about as long."""

    def value(row: Row) -> float | None:
        enough = row.case.tokens * row.case.build.ranks >= 16
        return share_of_roof(row) if enough and (4 <= row.rows / row.hit <= 12) == both_limits else None

    return value


def _narrow_storage(row: Row) -> float | None:
    narrow = row.timings.get("experts-bf16")
    return row.timings["experts"].median / narrow.median if narrow else None


def _exchange(row: Row) -> float | None:
    exchange = row.timings.get("exchange")
    return 100 * exchange.median / row.timings["moeshard"].median if exchange else None


def _imbalance(row: Row) -> float | None:
    return 100 * (max(row.work) - min(row.work)) * len(row.work)


def _error_to_torch(row: Row) -> float | None:
    errors = [row.errors[name] for name in TORCH if name in row.errors]
    return row.errors["moeshard"] / min(errors) if errors and min(errors) > 0 else None


def _time(row: Row, other: Row) -> float:
    return row.timings["moeshard"].median / other.timings["moeshard"].median


def _skewed_time(row: Row, uniform: Row) -> float | None:
    return _time(row, uniform) if sum(row.bytes) <= sum(uniform.bytes) else None


def _activation_time(gelu: Row, relu: Row) -> float:
    return gelu.timings["experts"].median / relu.timings["experts"].median


def _growth(row: Row, few: Row) -> float:
    """Time over that with 8 experts and the time of streaming the weights that came with the others."""
    more = (
        max(0.0, own - before) / rate
        for own, before, rate in zip(row.bytes, few.bytes, row.bytes_per_second, strict=True)
    )
    return row.timings["experts"].median / (few.timings["experts"].median + max(more))


def _linear(rows: Sequence[Row]) -> Iterator[Point]:
    """Time per token over that with the next smaller number of tokens, where arithmetic decides."""
    where = Where(experts=(8,), tokens=(512, MANY), routings=ROUTINGS)
    curves: dict[Case, list[Row]] = {}
    for row in rows:
        if row.case in where:
            curves.setdefault(replace(row.case, tokens=0), []).append(row)
    for curve in curves.values():
        for few, many in pairwise(sorted(curve, key=lambda row: row.case.tokens)):
            yield Point(_time(many, few) * few.case.tokens / many.case.tokens, f"{many.case.key} / T={few.case.tokens}")


def _uniform(case: Case) -> Case:
    return replace(case, routing="uniform")


def _one_process(case: Case) -> Case:
    """The same tokens and threads on one rank."""
    return replace(case, build=replace(case.build, ranks=1), threads=2, tokens=2 * case.tokens)


def _top1_relu(case: Case) -> Case:
    """Switch with as many (token, choice) pairs."""
    return replace(case, build=replace(case.build, shape="switch-base"), tokens=2 * case.tokens)


def _eight_experts(case: Case) -> Case:
    return replace(case, build=replace(case.build, num_experts=8))


def _bars() -> Iterator[Bar]:
    torch, exact = rivals(*TORCH), rivals(*EXACT)
    everywhere = Where(shapes=None, dtypes=None, routings=ROUTINGS)

    roofs = ((ONE_THREAD, "one thread", 0.80, 0.72), (TWO_CORES, "two threads or ranks", 0.75, 0.68))
    for launches, cores, usual, both in roofs:
        where = replace(everywhere, launches=launches)
        yield Bar(f"share of the roofline, {cores}, from 16 tokens", True, usual, each(_roof(False), where))
        yield Bar(f"the same with 4 to 12 tokens an expert, {cores}", True, both, each(_roof(True), where))

    for experts, tokens, name, limit in (
        (128, (1, 1024), "E=128, T<=1024", 2.0),
        (128, (4096, 4096), "E=128, T=4096", 1.5),
        (8, (120, 120), "E=8, T=120", 1.8),
        (8, (1024, MANY), "E=8, T>=1024", 1.10),
    ):
        where = Where(experts=(experts,), launches=ONE_RANK, tokens=tokens)
        yield Bar(f"1 rank, {name}: times the best torch", True, limit, each(torch, where))
    where = Where(("switch-base", "privacy-filter"), ("bfloat16",), launches=ONE_RANK)
    yield Bar("1 rank, bfloat16 models: times the best torch", True, 2.0, each(torch, where))
    yield Bar("never slower than the best rival", True, 1.0, each(exact, everywhere))

    for experts, tokens, name, limit in (
        (128, (1, 1024), "E=128, T<=1024", 2.2),
        (8, (120, 120), "E=8, T=120", 1.6),
        (8, (1024, MANY), "E=8, T>=1024", 1.05),
    ):
        where = Where(experts=(experts,), launches=TWO_RANKS, tokens=tokens)
        yield Bar(f"2 ranks, {name}: times HuggingFace replicated", True, limit, each(rivals("hf"), where))

    deepspeed = rivals("deepspeed")
    skewed = Where(launches=TWO_RANKS, routings=("skew", "one"))
    small = replace(skewed, experts=(8,), tokens=(120, 120))
    others = each(lambda row: None if row.case in small else deepspeed(row), skewed)
    yield Bar("2 ranks, skewed: times DeepSpeed", True, 5.0, others)
    yield Bar("2 ranks, skewed, E=8, T=120: times DeepSpeed", True, 3.5, each(deepspeed, small))
    for experts, limit in ((128, 2.0), (8, 1.2)):
        where = Where(experts=(experts,), launches=TWO_RANKS, routings=("uniform",))
        yield Bar(f"2 ranks, uniform, E={experts}: times DeepSpeed", True, limit, each(deepspeed, where))
    where = replace(everywhere, launches=TWO_RANKS)
    yield Bar("2 ranks: times the published algorithm over gloo", True, 1.0, each(rivals("published"), where))

    where = replace(everywhere, launches=TWO_RANKS, tokens=(512, MANY))
    yield Bar("2 ranks, T>=512: exchange, % of the layer", False, 2.0, each(_exchange, where))
    where = replace(everywhere, launches=TWO_RANKS)
    yield Bar("2 ranks: difference of the ranks' work, %", False, 1.0, each(_imbalance, where))
    where = replace(everywhere, launches=TWO_RANKS, routings=USUAL)
    yield Bar("2 ranks of 1 thread: time over 1 rank of 2", False, 1.05, against(_one_process, _time, where))

    where = replace(everywhere, routings=("skew", "one"))
    skew = against(_uniform, _skewed_time, where)
    yield Bar("skewed or one, no more weights hit: time over uniform", False, 1.05, skew)
    yield Bar("E=8, T>=512: time per token over that at the T before", False, 1.05, _linear)
    where = Where(experts=(64, 128, 256))
    growth = against(_eight_experts, _growth, where)
    yield Bar("time over E=8 and streaming the other weights", False, 1.05, growth)

    # docs/cpu.md: what a prototype of the kernels reached, one thread
    for experts, count, value, unit, limit in (
        (8, 4096, share_of_peak, "peak", 0.85),
        (8, 512, share_of_peak, "peak", 0.82),
        (128, 4096, share_of_peak, "peak", 0.80),
        (128, 64, share_of_roof, "roofline", 0.85),
        (128, 512, share_of_roof, "roofline", 0.72),
    ):
        where = Where(experts=(experts,), launches=ONE_THREAD, tokens=(count, count))
        yield Bar(f"1 thread, E={experts}, T={count}: share of {unit}", True, limit, each(value, where))
    for experts, count, limit in ((8, 4096, 1.0), (8, 512, 1.25), (128, 4096, 1.5), (128, 512, 2.2), (128, 64, 2.4)):
        where = Where(experts=(experts,), launches=ONE_THREAD, tokens=(count, count))
        claim = f"1 thread, E={experts}, T={count}: times HuggingFace"
        yield Bar(claim, True, limit, each(rivals("hf"), where))
    where = Where(experts=(8,), launches=ONE_THREAD, tokens=(512, 512))
    yield Bar("1 thread, E=8, T=512: times the best torch", True, 1.10, each(torch, where))
    for name, least, most, limit in (("T=64", 64, 64, 1.5), ("T=512", 512, 512, 1.4), ("T>=4096", 4096, MANY, 0.97)):
        where = Where(experts=(128,), launches=ONE_THREAD, tokens=(least, most))
        claim = f"1 thread, E=128, {name}: times as fast with weights in bfloat16"
        yield Bar(claim, True, limit, each(_narrow_storage, where))
    gelu = against(_top1_relu, _activation_time, Where(("nomic",), ("float32",), launches=ONE_RANK, tokens=(64, MANY)))
    yield Bar("gelu, top-2: time over relu, top-1, as many pairs", False, 1.06, gelu)

    where = Where(shapes=None, dtypes=("bfloat16",), routings=ROUTINGS)
    yield Bar("bfloat16: error over the best torch's", False, 1.5, each(_error_to_torch, where))


BARS = tuple(_bars())
