# SPDX-License-Identifier: Apache-2.0
"""Pictures of a run: time against tokens, experts and routing, and of each rank. matplotlib, without a display."""

import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .. import palette
from .grid import ROUTINGS, plural
from .results import CONTESTANTS, DROPPING, Circumstances, Row
from .tables import machine_line

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    "moeshard": palette.BLUE,
    "hf": palette.GREY,
    "grouped_mm": palette.SKY,
    "loop": palette.GREEN,
    "published": palette.ORANGE,
    "deepspeed": palette.RED,
    DROPPING: palette.PINK,
}
LEGEND_WIDTH = 1.6  # inches of an entry at most

Launch = tuple[int, int]


def draw(about: Circumstances, rows: Sequence[Row], folder: Path, stem: str) -> list[Path]:
    """Draw what the rows allow, of the layer that has the most of them.

    Args:
        about: where the run was made: the caption.
        rows: of any grid.
        folder: for the pictures.
        stem: how their names begin.

    Returns:
        The pictures, ``<stem>-tokens.png`` and so on.

    Raises:
        ImportError: matplotlib is missing.
        OSError: a picture cannot be written.
    """
    if not rows:
        return []
    (shape, dtype), _ = Counter((row.case.build.shape, row.case.build.dtype) for row in rows).most_common(1)[0]
    main = [row for row in rows if (row.case.build.shape, row.case.build.dtype) == (shape, dtype)]
    paths = []
    pictures: dict[str, Callable[[Sequence[Row]], Figure | None]] = {
        "tokens": _tokens,
        "experts": _experts,
        "skew": _skew,
        "ranks": _ranks,
    }
    for name, picture in pictures.items():
        figure = picture(main)
        if figure is None:
            continue
        caption = f"{shape}, {dtype}; median of the slowest rank; {machine_line(about)}"
        width = int(12 * figure.get_figwidth())
        figure.supxlabel(textwrap.fill(caption, width), fontsize=8, color=palette.TEXT)
        paths.append(folder / f"{stem}-{name}.png")
        figure.savefig(paths[-1], dpi=150)
    return paths


def _tokens(rows: Sequence[Row]) -> "Figure | None":
    """Time against tokens, uniform routing: a panel for each number of experts and each launch."""
    uniform = [row for row in rows if row.case.routing == "uniform"]
    launches, experts = _launches(uniform), _values(uniform, lambda row: row.case.build.num_experts)
    if len(_values(uniform, lambda row: row.case.tokens)) < 2:
        return None
    figure, panels = _panels(len(launches), len(experts))
    for line, launch in enumerate(launches):
        for column, count in enumerate(experts):
            here = [row for row in uniform if _launch(row) == launch and row.case.build.num_experts == count]
            axes = panels[line][column]
            _curves(axes, here, lambda row: row.case.tokens, ticks=4)
            axes.set_title(f"E = {count}, {_named(launch)}", fontsize=10)
            axes.set_xlabel("tokens of a rank")
    return _finish(figure, panels)


def _experts(rows: Sequence[Row]) -> "Figure | None":
    """Time against experts, uniform routing, at each launch's number of tokens that most numbers of experts have."""
    uniform = [row for row in rows if row.case.routing == "uniform"]
    curves: dict[Launch, list[Row]] = {}
    for launch in _launches(uniform):
        here = [row for row in uniform if _launch(row) == launch]
        spread = Counter(row.case.tokens for row in here)
        tokens = max(spread, key=lambda count: (spread[count], count))
        if spread[tokens] > 1:
            curves[launch] = [row for row in here if row.case.tokens == tokens]
    if not curves:
        return None
    figure, panels = _panels(1, len(curves))
    for axes, (launch, here) in zip(panels[0], curves.items(), strict=True):
        _curves(axes, here, lambda row: row.case.build.num_experts, ticks=2)
        axes.set_title(f"T = {here[0].case.tokens}, {_named(launch)}", fontsize=10)
        axes.set_xlabel("experts")
    return _finish(figure, panels)


def _skew(rows: Sequence[Row]) -> "Figure | None":
    """Time of each routing, at the most tokens of each number of experts that have more than one."""
    panels_of: dict[tuple[int, Launch], list[Row]] = {}
    for launch in _launches(rows):
        for count in _values(rows, lambda row: row.case.build.num_experts):
            here = [row for row in rows if _launch(row) == launch and row.case.build.num_experts == count]
            kinds = {
                row.case.tokens: {r.case.routing for r in here if r.case.tokens == row.case.tokens} for row in here
            }
            several = {tokens: len(found) for tokens, found in kinds.items() if len(found) > 1}
            if several:
                tokens = max(several, key=lambda own: (several[own], own))
                panels_of[count, launch] = [row for row in here if row.case.tokens == tokens]
    if not panels_of:
        return None
    columns = min(3, len(panels_of))
    figure, panels = _panels(-(-len(panels_of) // columns), columns)
    flat = [axes for line in panels for axes in line]
    for axes in flat[len(panels_of) :]:
        axes.remove()
    for axes, ((count, launch), here) in zip(flat, panels_of.items(), strict=False):
        found = {row.case.routing: row for row in here}
        routings = [routing for routing in ROUTINGS if routing in found]
        for place, name in enumerate(CONTESTANTS):
            times = [found[routing].timings.get(name) for routing in routings]
            bars = [(x, 1e3 * timing.median) for x, timing in enumerate(times) if timing]
            if bars:
                offsets = [x + (place - len(CONTESTANTS) / 2) * 0.11 for x, _ in bars]
                axes.bar(offsets, [height for _, height in bars], 0.11, label=name, **palette.area(COLOURS[name]))
        axes.set_xticks(range(len(routings)), routings)
        axes.set_title(f"E = {count}, T = {here[0].case.tokens}, {_named(launch)}", fontsize=10)
        axes.set_xlabel("routing")
    return _finish(figure, panels)


def _ranks(rows: Sequence[Row]) -> "Figure | None":
    """Time of each rank, skewed routing, at the most tokens of each number of experts."""
    skewed = [row for row in rows if row.case.routing == "skew" and row.case.build.ranks > 1]
    experts = _values(skewed, lambda row: row.case.build.num_experts)
    if not experts:
        return None
    figure, panels = _panels(1, len(experts))
    for axes, count in zip(panels[0], experts, strict=True):
        here = [row for row in skewed if row.case.build.num_experts == count]
        row = max(here, key=lambda row: (len(row.timings), row.case.tokens))
        for name in CONTESTANTS:
            if name in row.timings:
                heights = [1e3 * seconds for seconds in row.timings[name].per_rank]
                place = CONTESTANTS.index(name)
                offsets = [rank + (place - len(CONTESTANTS) / 2) * 0.11 for rank in range(len(heights))]
                axes.bar(offsets, heights, 0.11, label=name, **palette.area(COLOURS[name]))
        axes.set_xticks(range(row.case.build.ranks), [f"rank {rank}" for rank in range(row.case.build.ranks)])
        axes.set_xlabel(f"routing: {row.case.routing}")
        axes.set_title(f"E = {count}, T = {row.case.tokens}, {_named(_launch(row))}", fontsize=10)
    return _finish(figure, panels)


def _curves(axes: "Axes", rows: Sequence[Row], x: Callable[[Row], int], ticks: int) -> None:
    """A line for each contestant: milliseconds, both scales logarithmic, the one of x marked at powers of ``ticks``."""
    from matplotlib.ticker import LogLocator, NullLocator

    rows = sorted(rows, key=x)
    for name in CONTESTANTS:
        points = [(x(row), 1e3 * row.timings[name].median) for row in rows if name in row.timings]
        if points:
            width = 2.5 if name == "moeshard" else 1.2
            axes.plot(*zip(*points, strict=True), linewidth=width, label=name, **palette.line(COLOURS[name]))
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis, marks in ((axes.xaxis, LogLocator(ticks)), (axes.yaxis, LogLocator(10, (1, 2, 5)))):
        axis.set_major_locator(marks)
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=8)
    axes.grid(True, which="major", color=palette.FAINT, linewidth=0.6)


def _panels(lines: int, columns: int) -> "tuple[Figure, list[list[Axes]]]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(7.0, 3.8 * columns), 3.2 * lines + 1.0), layout="constrained")
    return figure, figure.subplots(lines, columns, squeeze=False).tolist()


def _finish(figure: "Figure", panels: "Sequence[Sequence[Axes]]") -> "Figure":
    """Label the times, and one legend for all panels."""
    handles: dict[str, Artist] = {}
    for line in panels:
        line[0].set_ylabel("time of the layer (ms)")
        for axes in line:
            found, names = axes.get_legend_handles_labels()
            handles |= dict(zip(names, found, strict=True))
    columns = min(len(handles), int(figure.get_figwidth() / LEGEND_WIDTH))
    figure.legend(list(handles.values()), list(handles), loc="outside upper center", ncols=columns, frameon=False)
    return figure


def _launch(row: Row) -> Launch:
    return row.case.build.ranks, row.case.threads


def _launches(rows: Sequence[Row]) -> list[Launch]:
    return sorted({_launch(row) for row in rows})


def _named(launch: Launch) -> str:
    return f"{plural(launch[0], 'rank')} x {plural(launch[1], 'thread')}"


def _values(rows: Sequence[Row], value: Callable[[Row], int]) -> list[int]:
    return sorted({value(row) for row in rows})
