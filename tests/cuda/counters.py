#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What the kernels' memory accesses cost beside the ideal, as ptxsim counts them: a table that changes are reviewed in.

    python tests/cuda/counters.py FILE...            compare what PTXSIM_COUNTERS=FILE wrote with counters.json
    python tests/cuda/counters.py FILE... --write    make the table anew

For each kernel, over all its launches: wavefronts of shared memory over the fewest that its bytes need (bank
conflicts), and 32-byte sectors of global memory over the fewest (stray accesses). Meant for layers of aligned shapes
(``layer_cases.py --aligned``). LIMITS hold for every kernel but those that EXCUSED gives a reason for, and these may
not become worse than the table.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from budgets import demangled

TABLE = Path(__file__).with_suffix(".json")
LIMITS = {"shared": 1.05, "global": 1.2}
EXCUSED: dict[tuple[str, str], str] = {}
SLACK = 0.01  # the numbers are exact, but a compiler may merge two accesses

Ratios = dict[str, dict[str, float]]  # kernel -> "shared", "global" -> used / ideal


def ratios(files: Iterable[Path]) -> Ratios:
    """The kernels that touched memory."""
    totals: dict[str, Counter[str]] = {}
    for file in files:
        for line in file.read_text().splitlines():
            launch = json.loads(line)
            totals.setdefault(launch["kernel"], Counter()).update(
                {name: launch[name] for name in ("shared_wavefronts", "shared_ideal", "global_sectors", "global_ideal")}
            )
    names = sorted(totals)
    found = {}
    for mangled, name in zip(names, demangled(names), strict=True):
        total = totals[mangled]
        found[name] = {
            space: round(total[used] / total[ideal], 3)
            for space, used, ideal in (
                ("shared", "shared_wavefronts", "shared_ideal"),
                ("global", "global_sectors", "global_ideal"),
            )
            if total[ideal]
        }
    return dict(sorted(found.items()))


def excess(found: Ratios, table: Ratios) -> Iterator[str]:
    """What is wrong with the kernels; nothing: all is as in the table and within the limits."""
    for kernel in sorted({*found, *table}):
        if kernel not in found or kernel not in table:
            yield f"{kernel}: {'was not launched' if kernel in table else 'is not in the table'}"
            continue
        for space, limit in LIMITS.items():
            ratio, known = found[kernel].get(space, 1.0), table[kernel].get(space, 1.0)
            excuse = next(
                (why for (name, where), why in EXCUSED.items() if kernel.startswith(name) and where == space), ""
            )
            if ratio > limit and not excuse:
                yield f"{kernel}: {space} {ratio}, at most {limit} is allowed"
            if ratio > known + SLACK:
                yield f"{kernel}: {space} {ratio}, the table says {known}"


def main(arguments: list[str]) -> int:
    """The program."""
    files = [Path(argument) for argument in arguments if argument != "--write"]
    if not files:
        print(__doc__)
        return 2
    found = ratios(files)
    if "--write" in arguments:
        lines = ",\n".join(f" {json.dumps(kernel)}: {json.dumps(values)}" for kernel, values in found.items())
        TABLE.write_text(f"{{\n{lines}\n}}\n")
    wrong = list(excess(found, json.loads(TABLE.read_text())))
    print("\n".join(wrong) or "all kernels within their limits")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
