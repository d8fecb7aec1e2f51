# SPDX-License-Identifier: Apache-2.0
"""Colours, hatches and markers of every picture of this project. Needs no matplotlib.

The colours are Okabe and Ito's, which colour-blind readers can tell apart. In black and white the hatch of an area and
the marker of a line do: each colour has its own.
"""

from typing import Any

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PINK, YELLOW, GREY = "#56B4E9", "#CC79A7", "#F0E442", "#999999"
FAINT = "#DDDDDD"  # grids
TEXT = "#555555"  # captions

RANKS = (BLUE, ORANGE, GREEN, PINK, SKY, RED, YELLOW, GREY)  # rank r has colour r % 8
STEPS = {"route": GREY, "gather": ORANGE, "group": YELLOW, "ffn": BLUE, "combine": GREEN}

_HATCHES = {BLUE: "", ORANGE: "//", GREEN: "..", RED: "xx", SKY: "\\\\", PINK: "++", YELLOW: "--", GREY: "||"}
_MARKERS = {BLUE: "o", ORANGE: "D", GREEN: "v", RED: "P", SKY: "^", PINK: "X", YELLOW: "*", GREY: "s"}


def area(colour: str) -> dict[str, Any]:
    """How matplotlib draws a bar or a box of a colour.

    Example:
        >>> area(ORANGE)
        {'facecolor': '#E69F00', 'hatch': '//', 'edgecolor': 'white', 'linewidth': 0.5}
    """
    return {"facecolor": colour, "hatch": _HATCHES[colour], "edgecolor": "white", "linewidth": 0.5}


def line(colour: str) -> dict[str, Any]:
    """How matplotlib draws a line of a colour.

    Example:
        >>> line(BLUE)
        {'color': '#0072B2', 'marker': 'o', 'markersize': 5}
    """
    return {"color": colour, "marker": _MARKERS[colour], "markersize": 5}
