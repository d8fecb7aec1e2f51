# SPDX-License-Identifier: Apache-2.0
"""Rows and verdicts for reading in a terminal. No torch."""

from collections.abc import Sequence

from .bars import Verdict
from .grid import plural
from .results import DROPPING, EXACT, Circumstances, Row

LEGEND = (
    "Columns of rivals: their time over moeshard's; * timed once; ! wrong output; - not timed. "
    f"{DROPPING} drops tokens, the others none.\n"
    "roof: moeshard's experts alone against max(arithmetic / peak, weights hit / bandwidth), both measured beside the "
    "case; ? the machine changed meanwhile."
)


def show(about: Circumstances, rows: Sequence[Row], verdicts: Sequence[Verdict]) -> None:
    """Print the rows, a table for each layer, then the bars, missed ones first."""
    print(machine_line(about))
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(f"{row.case.build}, {plural(row.case.threads, 'thread')} each", []).append(row)
    for title, same in groups.items():
        headings = ("routing", "T", "moeshard ms", *EXACT, DROPPING, "roof", "error")
        _table(title, headings, [_cells(row) for row in same])
    print(LEGEND)
    reasons = {f"{name}: {reason}" for row in rows for name, reason in row.absent.items() if "pads to" not in reason}
    for reason in sorted(reasons):
        print(f"Not timed: {reason}")
    for build, reason in about.get("left_out", {}).items():
        print(f"Left out: {build}: {reason}")
    _table("bars", ("", "bar", "required", "worst", "points", "where"), [_verdict_cells(v) for v in verdicts])
    states = [verdict.state for verdict in verdicts]
    print(", ".join(f"{states.count(state)} {state}" for state in ("missed", "met", "not measured")))


def machine_line(about: Circumstances) -> str:
    """Where and of what a run was made, in a line."""
    machine, versions = about["machine"], about["versions"]
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['isa']} kernels; moeshard {versions['moeshard']} "
        f"({about['commit'] or 'no checkout'}), torch {versions['torch']}, transformers {versions['transformers']}; "
        f"{about['date'][:10]}"
    )


def _cells(row: Row) -> list[str]:
    cells = [row.case.routing, str(row.case.tokens), f"{1e3 * row.timings['moeshard'].median:.3g}"]
    for rival in (*EXACT, DROPPING):
        ratio = row.ratio(rival)
        mark = ("*" if ratio and row.timings[rival].rounds == 1 else "") + ("!" if rival in row.wrong else "")
        cells.append("-" if ratio is None else f"{ratio:.2f}{mark}")
    wrong = "!" if {"moeshard", "experts"} & set(row.wrong) else ""
    cells.append(f"{100 * row.share:.0f}%{'?' if row.disturbed else ''}")
    return [*cells, f"{row.errors['moeshard']:.0e}{wrong}"]


def _verdict_cells(verdict: Verdict) -> list[str]:
    worst = "" if verdict.worst is None else f"{verdict.worst:.3g}"
    points = f"{verdict.missed} of {verdict.points} miss" if verdict.missed else str(verdict.points)
    return [verdict.state, verdict.claim, verdict.required, worst, points, verdict.where]


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table: rich's on terminals, else plain columns that survive a pipe."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        console = None
    else:
        console = Console()
    if console is None or not console.is_terminal:
        widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
        print(f"\n{title}")
        for cells in (headings, *rows):
            print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
        return
    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for cells in rows:
        table.add_row(*cells)
    console.print(table)
