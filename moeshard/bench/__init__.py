# SPDX-License-Identifier: Apache-2.0
"""``moeshard bench``: the MoE layer in every way one can compute it, side by side in one run.

    grid.py     what is measured: shapes, cases, grids, routing
    inputs.py   weights, router and tokens that all contestants share
    rivals.py   the contestants (rival_deepspeed.py: DeepSpeed's)
    worker.py   verifying and timing them, on each rank
    results.py  rows, their file, resuming
    bars.py     what is promised, and whether it holds
    tables.py   rows and bars for reading; plots.py: and for looking at

This file runs a grid and shows it. It imports no torch: the workers do.
"""

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moeshard.errors import ArgumentError

from . import bars, grid, plots, results, tables
from .grid import Case
from .results import Circumstances, Journal, Row, Timing

if TYPE_CHECKING:
    from .worker import Measured

SUMMARY = "time the MoE layer against HuggingFace, grouped_mm, a torch loop, DeepSpeed and the published algorithm"
RESULTS = Path("benchmarks/results")  # where there is such a folder
ENVIRONMENT = {"GLOO_SOCKET_IFNAME": "lo"}  # of the workers: all are here


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's options.

    Args:
        parser: of the subcommand.
    """
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--quick", dest="grid", action="store_const", const="quick", help="a point for every bar: minutes"
    )
    which.add_argument("--grid", choices=("full", "quick", "tiny"), help=argparse.SUPPRESS)  # tiny: for tests
    which.add_argument("--table", type=Path, metavar="FILE", help="run nothing: show the results in FILE again")
    parser.set_defaults(grid="full")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="go on with an interrupted run (a .jsonl file)")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help=f"for the results and plots (default: {RESULTS} if there is one, else the current folder)",
    )


def run(options: argparse.Namespace) -> int:
    """Run a grid, or read its results; print the table and the bars, and draw the plots.

    Args:
        options: as declared by :func:`add_options`.

    Returns:
        0, or 1 if an output was wrong. A missed bar is no failure: it is printed first.

    Raises:
        ArgumentError: an option that cannot be used, or a library is missing (says how to install it).
    """
    try:
        import matplotlib  # noqa: F401  (for the plots at the end)
    except ImportError as error:
        raise _missing(error) from error
    if options.table:
        about, rows = results.read(options.table)
        return _show(about, rows, options.output or options.table.parent, options.table.stem)
    folder = options.output or (options.resume.parent if options.resume else RESULTS if RESULTS.is_dir() else Path())
    if not folder.is_dir():
        raise ArgumentError(f"--output: there is no folder {folder}")
    about = results.circumstances(options.grid)
    journal = Journal(options.resume or folder / f"layer-{options.grid}.jsonl")
    before = []
    if options.resume:
        before = journal.resume(about)
    else:
        journal.start(about)
    try:
        rows, about["left_out"] = _measure(options.grid, before, journal)
    except KeyboardInterrupt:
        print(f"Interrupted: go on with --resume {journal.path}, or look at it with --table {journal.path}")
        return 130
    path = folder / f"{journal.path.stem}.json"
    verdicts = [asdict(verdict) for verdict in bars.judge(rows)]
    journal.finish({**about, "bars": verdicts, "rows": [row.to_dict() for row in rows]}, path)
    print(f"Results: {path}")
    return _show(about, rows, folder, path.stem)


def _measure(name: str, before: Sequence[Row], journal: Journal) -> tuple[list[Row], dict[str, str]]:
    """Measure the cases of a grid that were not before; each row is in the journal at once.

    Returns:
        All rows, and the layers that do not fit into memory, with the reason.
    """
    try:
        from . import worker
    except ImportError as error:
        raise _missing(error) from error
    from moeshard.launcher import launch

    done = {row.case.key for row in before}
    cases = [case for case in grid.grid(name) if case.key not in done]
    limits = worker.LIMITS[name]
    rows, left_out = list(before), {}
    with _progress(len(cases) + len(done), len(done)) as advance:
        for build, same in grid.by_build(cases):
            needed, free = worker.memory_needed(build), worker.free_memory()
            if needed > worker.ROOM * free:
                left_out[str(build)] = f"needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
                advance(len(same), f"left out: {build}")
                continue
            threads = max(case.threads for case in same)
            with launch(build.ranks, threads=threads, timeout=worker.TIMEOUT, env=ENVIRONMENT) as ranks:
                advance(0, f"building {build}")
                ranks.run(worker.build_layer, build)
                for case in same:
                    advance(0, case.key)
                    row = summarize(case, ranks.run(worker.measure, case, limits))
                    journal.add(row)
                    rows.append(row)
                    advance(1, case.key)
    return rows, left_out


def summarize(case: Case, measured: "Sequence[Measured]") -> Row:
    """Put together what the ranks measured at one case."""
    shape, itemsize = case.shape, grid.ITEMSIZE[case.build.dtype]
    tokens = grid.counts(case).sum(0)
    columns = np.array([rank.columns for rank in measured], float)  # [R, E]
    work = (columns * tokens).sum(1)
    per_column = shape.matrices * shape.d_model
    first = measured[0]
    # NumPy's max, because Python's can lose a NaN
    errors = {name: float(np.max([rank.errors[name] for rank in measured])) for name in first.errors}
    return Row(
        case=case,
        hit=int((tokens > 0).sum()),
        rows=int(tokens.sum()),
        work=(work / work.sum()).tolist(),
        flops=(2 * per_column * work).tolist(),
        bytes=(itemsize * per_column * (columns * (tokens > 0)).sum(1)).tolist(),
        flops_per_second=[rank.flops_per_second for rank in measured],
        bytes_per_second=[rank.bytes_per_second for rank in measured],
        timings={name: Timing.of([rank.seconds[name] for rank in measured]) for name in first.seconds},
        errors=errors,
        wrong=[
            name
            for name, error in errors.items()
            if name != results.DROPPING and not error <= results.TOLERANCES[case.build.dtype]
        ],
        absent=first.absent,
    )


def _show(about: Circumstances, rows: Sequence[Row], folder: Path, stem: str) -> int:
    """Print tables and bars, draw the plots; 1 if an output was wrong."""
    verdicts = bars.judge(rows)
    tables.show(about, rows, verdicts)
    for path in plots.draw(about, rows, folder, stem):
        print(f"Plot: {path}")
    wrong = [row for row in rows if row.wrong]
    for row in wrong:
        found = ", ".join(f"{name} by {row.errors[name]:.1e}" for name in row.wrong)
        print(f"WRONG: {row.case.key}: outputs differ: {found}")
    return 1 if wrong else 0


def _missing(error: ImportError) -> ArgumentError:
    return ArgumentError(f"the benchmark needs {error.name}: pip install 'moeshard[hf,demo]'")


@contextlib.contextmanager
def _progress(total: int, done: int) -> Iterator[Callable[[int, str], None]]:
    """A bar on terminals; call it with the number of cases done since and what is done now."""
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ImportError:
        yield lambda cases, now: None
        return
    with tqdm(total=total, initial=done, unit="case", disable=None) as bar:

        def advance(cases: int, now: str) -> None:
            bar.set_description(now, refresh=False)
            bar.update(cases)
            bar.refresh()

        yield advance
