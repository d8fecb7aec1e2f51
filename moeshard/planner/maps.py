# SPDX-License-Identifier: Apache-2.0
"""Pictures: where the best layout changes as ranks, tokens, choices, skew and links do; the alternatives of a plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from .. import _core, palette
from .histograms import skewed
from .machines import Machine
from .planning import KINDS, plan
from .results import LayerPlan, ModelPlan
from .shapes import LayerShape

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {  # each cell has a letter too
    "shard": palette.BLUE,
    "uneven": palette.SKY,
    "expert_parallel": palette.ORANGE,
    "balanced": palette.YELLOW,
    "hybrid": palette.GREEN,
    "hot_sharded": palette.PINK,
    "hot_copied": palette.RED,
    "mixed": palette.GREY,
}
LETTERS = dict(zip(KINDS, "SUEBHXCM", strict=True))
NAMES = {
    "shard": "shard",
    "uneven": "shard by speed",
    "expert_parallel": "expert parallel",
    "balanced": "expert parallel, balanced",
    "hybrid": "hybrid",
    "hot_sharded": "hot experts sharded",
    "hot_copied": "hot experts copied",
    "mixed": "mixed",
}


@dataclass(frozen=True)
class Point:
    """A cell of a map: all that a plan depends on.

    Attributes:
        ranks: R.
        tokens: of each rank.
        top_k: experts of a token.
        skew: share of the choices that go to a tenth of the experts.
        network: how many times as fast as it is the link between ranks is.
    """

    ranks: int
    tokens: int
    top_k: int
    skew: float
    network: float = 1.0


@dataclass(frozen=True)
class Cell:
    """What is best there.

    Attributes:
        kind: its family.
        layout: in words.
        seconds: predicted, of one layer.
        gain: how many times as fast as the slower of shard and expert parallel.
    """

    kind: str
    layout: str
    seconds: float
    gain: float


@dataclass(frozen=True)
class Panel:
    """One map: ranks against something else.

    Attributes:
        axis: what the other axis is.
        values: its values.
        ranks: values of the first axis.
        cells: ``[values][ranks]``; ``None``: does not fit, or cannot be.
    """

    axis: str
    values: Sequence[float]
    ranks: Sequence[int]
    cells: list[list[Cell | None]]


def flip_map(shape: LayerShape, ranks_of: Machine, start: Point) -> list[Panel]:
    """Find the best layout around a point: ranks against tokens, choices, skew and the speed of links.

    Args:
        shape: the layer; its ``top_k`` is that of each point.
        ranks_of: the machine.
        start: what stays as it is in each panel, and the most ranks.

    Returns:
        Four panels.
    """
    ranks = [2**i for i in range(1, 11) if 2**i <= max(start.ranks, 2)]
    choices = [k for k in (1, 2, 4, 8, 16) if k <= shape.num_experts]
    axes: list[tuple[str, Sequence[float], Callable[[Point, float], Point]]] = [
        ("tokens a rank", [2**i for i in range(4, 17, 2)], lambda p, x: replace(p, tokens=int(x))),
        ("experts a token", choices, lambda p, x: replace(p, top_k=int(x))),
        (
            "% of choices to 10 % of experts",
            [10, 30, 50, 60, 70, 80, 90],
            lambda p, x: replace(p, skew=x / 100),
        ),
        ("speed of the links, times", [0.03, 0.1, 0.3, 1, 3, 10, 30], lambda p, x: replace(p, network=x)),
    ]
    return [
        Panel(
            axis,
            values,
            ranks,
            [[best(shape, ranks_of, move(replace(start, ranks=r), x)) for r in ranks] for x in values],
        )
        for axis, values, move in axes
    ]


def best(shape: LayerShape, ranks_of: Machine, at: Point) -> Cell | None:
    """The best layout at a point; ``None`` if nothing fits or no routing is like that."""
    layer = replace(shape, top_k=at.top_k)
    popularity = skewed(shape.num_experts, at.skew, 0.1)
    if popularity.max() * at.top_k > 1:
        return None
    links = (ranks_of.inside, ranks_of.between)
    faster = ranks_of.with_links(*(replace(link, bandwidth=link.bandwidth * at.network) for link in links))
    try:
        found = plan(layer, ranks=at.ranks, tokens=at.tokens, histogram=popularity, devices=faster).layers[0]
    except _core.RangeError:
        return None
    plain = [o.times.total for o in found.alternatives if o.kind in ("shard", "expert_parallel")]
    kind = next(other.kind for other in found.alternatives if other.layout == found.layout)
    return Cell(kind, found.layout, found.times.total, max(plain) / found.times.total)


def draw(panels: Sequence[Panel], title: str, path: Path) -> None:
    """Draw the panels of :func:`flip_map`.

    In a cell: the letter of the layout, and how many times as fast it is as the slower of shard and expert parallel.

    Raises:
        ImportError: matplotlib is missing.
        OSError: the picture cannot be written.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(12, 9.5), layout="constrained")
    seen: set[str] = set()
    for axes, panel in zip(figure.subplots(2, 2).flat, panels, strict=True):
        seen |= _draw_panel(axes, panel, ListedColormap(["white", *COLOURS.values()]))
    figure.suptitle(title)
    handles = [Patch(color=COLOURS[kind], label=f"{LETTERS[kind]}  {NAMES[kind]}") for kind in KINDS if kind in seen]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=130)


def _draw_panel(axes: Axes, panel: Panel, colours: object) -> set[str]:
    numbers = [[0 if cell is None else 1 + KINDS.index(cell.kind) for cell in row] for row in panel.cells]
    axes.imshow(np.array(numbers), cmap=cast("str", colours), vmin=0, vmax=len(KINDS), aspect="auto", origin="lower")
    for y, row in enumerate(panel.cells):
        for x, cell in enumerate(row):
            text = "" if cell is None else f"{LETTERS[cell.kind]}\n{cell.gain:.1f}x"
            axes.text(x, y, text, ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(panel.ranks)), [str(ranks) for ranks in panel.ranks])
    axes.set_yticks(range(len(panel.values)), [f"{value:g}" for value in panel.values])
    axes.set_xlabel("ranks")
    axes.set_ylabel(panel.axis)
    return {cell.kind for row in panel.cells for cell in row if cell is not None}


def plot_plan(found: ModelPlan, path: Path) -> None:
    """Draw the alternatives of every layer that differs from those before, as bars of steps; the chosen one is marked.

    Raises:
        ImportError: matplotlib is missing.
        OSError: the picture cannot be written.
    """
    from matplotlib.figure import Figure

    layers: dict[tuple[object, ...], LayerPlan] = {}
    for layer in found.layers:
        layers.setdefault((layer.layout, layer.times, layer.alternatives), layer)
    shown = list(layers.values())[:6]
    height = sum(1.2 + 0.3 * len(layer.alternatives) for layer in shown)
    figure = Figure(figsize=(9, 1 + height), layout="constrained")
    every = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
    for axes, layer in zip(every, shown, strict=True):
        others = [other for other in layer.alternatives if other.fits]
        places = np.arange(len(others))
        left = np.zeros(len(others))
        for step, colour in palette.STEPS.items():
            width = np.array([1e3 * getattr(other.times, step) for other in others])
            axes.barh(places, width, 0.7, left, label=step, **palette.area(colour))
            left += width
        marks = [f"{other.layout}{'  ◀' if other.layout == layer.layout else ''}" for other in others]
        axes.set_yticks(places, marks)
        axes.invert_yaxis()
        axes.set_xlabel(f"ms, {layer.name}")
    figure.suptitle(f"{found.model.name}, {found.ranks} ranks ({found.machine.name})")
    every[-1].legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=5, frameon=False)
    figure.savefig(path, dpi=130)
