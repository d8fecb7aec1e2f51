# SPDX-License-Identifier: Apache-2.0
"""Draws the figures of docs/how_it_works.md into docs/images: computed by moeshard's own plans, not measured.

python docs/draw.py
"""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Patch, Rectangle

from moeshard import Plan, palette

IMAGES = Path(__file__).parent / "images"
RANKS, EXPERTS, D_FF, TOKENS = 4, 8, 64, 1024
DPI = 110


def main() -> None:
    """Draw everything."""
    IMAGES.mkdir(exist_ok=True)
    for name, draw in (("columns", columns), ("waiting", waiting), ("steps", steps)):
        draw().savefig(IMAGES / f"{name}.png", dpi=DPI)


def plans() -> dict[str, Plan]:
    """The layouts that are shown."""
    return {
        "expert parallel": Plan.expert_parallel(RANKS, EXPERTS, D_FF),
        "sharded (MoEShard)": Plan.shard(RANKS, EXPERTS, D_FF),
        "two groups of ranks": Plan.hybrid(RANKS, EXPERTS, D_FF, group=2),
    }


def columns() -> Figure:
    """Which rank holds which columns of which expert."""
    figure = Figure(figsize=(9, 2.9), layout="constrained")
    for axes, (title, plan) in zip(figure.subplots(1, 3, sharey=True), plans().items(), strict=True):
        for rank in range(RANKS):
            for expert, (start, stop) in enumerate(plan.columns[rank].tolist()):
                if stop > start:
                    box = Rectangle((expert - 0.45, start), 0.9, stop - start, **palette.area(palette.RANKS[rank]))
                    axes.add_patch(box)
        axes.set(xlim=(-0.6, EXPERTS - 0.4), ylim=(D_FF, 0), xticks=range(EXPERTS), xlabel="expert")
        axes.set_title(title, fontsize=10)
    figure.axes[0].set_ylabel("hidden column of the expert")
    handles = [Patch(label=f"rank {rank}", **palette.area(palette.RANKS[rank])) for rank in range(RANKS)]
    figure.legend(handles=handles, loc="outside lower center", ncols=RANKS, frameon=False)
    return figure


def waiting() -> Figure:
    """Work of each rank, and how long it waits for the slowest, for three routings."""
    even = np.full(EXPERTS, TOKENS // EXPERTS)
    one = np.array([TOKENS, *[0] * (EXPERTS - 1)])
    hot = round(0.6 * TOKENS)
    skewed = np.array([hot, *[(TOKENS - hot) // (EXPERTS - 1)] * (EXPERTS - 1)])
    routings = {"even": even, "60 % to one expert": skewed, "all to one expert": one}
    figure = Figure(figsize=(9, 2.9), layout="constrained")
    layouts = list(plans().items())[:2]
    for axes, (title, plan) in zip(figure.subplots(1, 2, sharex=True, sharey=True), layouts, strict=True):
        for line, counts in enumerate(routings.values()):
            work = plan.work(counts) / (int(counts.sum()) * D_FF / RANKS)  # 1: an even share
            for rank in range(RANKS):
                place = line + (rank - 1.5) * 0.2
                axes.barh(place, work[rank], 0.18, **palette.area(palette.RANKS[rank]))
                axes.barh(place, work.max() - work[rank], 0.18, work[rank], color=palette.FAINT)
        axes.set_yticks(range(len(routings)), list(routings))
        axes.set_xlabel("time of the experts (1 = an even share)")
        axes.set_title(title, fontsize=10)
    figure.axes[0].invert_yaxis()
    handles = [Patch(label=f"rank {rank}", **palette.area(palette.RANKS[rank])) for rank in range(RANKS)]
    handles.append(Patch(label="waiting", color=palette.FAINT))
    figure.legend(handles=handles, loc="outside lower center", ncols=RANKS + 1, frameon=False)
    return figure


def steps() -> Figure:
    """The five steps on two ranks."""
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(0, 10.4), ylim=(0, 3.1))
    axes.axis("off")
    works = {
        "route": "expert and weight\nof each token",
        "gather": "all ranks' tokens\nand choices",
        "group": "sort by expert",
        "ffn": "own columns of\nevery expert",
        "combine": "sum over choices,\nthen over ranks",
    }
    for rank, bottom in ((0, 1.75), (1, 0.25)):
        axes.text(
            0.05, bottom + 0.5, f"rank {rank}", va="center", fontsize=10, color=palette.RANKS[rank], weight="bold"
        )
        for place, (step, work) in enumerate(works.items()):
            left = 0.9 + 1.9 * place
            _box(axes, left, bottom, palette.STEPS[step], step, work)
            if place:
                axes.annotate("", (left, bottom + 0.5), (left - 0.3, bottom + 0.5), arrowprops={"arrowstyle": "->"})
    for place in (1, 4):  # the two exchanges
        left = 0.9 + 1.9 * place + 0.8
        axes.annotate("", (left, 1.27), (left, 1.73), arrowprops={"arrowstyle": "<->", "linewidth": 2})
    axes.text(
        0.9 + 1.9 * 2.5 + 0.8,
        1.5,
        "the ranks meet twice: in gather and in combine",
        ha="center",
        va="center",
        fontsize=9,
    )
    return figure


def _box(axes: Axes, left: float, bottom: float, colour: str, title: str, text: str) -> None:
    axes.add_patch(
        FancyBboxPatch((left, bottom), 1.6, 1, boxstyle="round,pad=0,rounding_size=0.08", fill=False, ec=colour, lw=2)
    )
    axes.text(
        left + 0.8, bottom + 0.76, title, ha="center", va="center", fontsize=10, weight="bold", family="monospace"
    )
    axes.text(left + 0.8, bottom + 0.34, text, ha="center", va="center", fontsize=8)


if __name__ == "__main__":
    main()
