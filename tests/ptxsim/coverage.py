#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""coverage.py FILE [PREFIX...]: reads what PTXSIM_COVERAGE=FILE wrote and prints, per source file, how many of
the lines that have code were executed, and which were not. PREFIXes choose files by the start of their path;
without any, files inside a CUDA toolkit are left out."""

import json
import sys


def merge(path):
    files = {}
    with open(path) as f:
        for record in map(json.loads, f):
            lines = files.setdefault(record["file"], {})
            for line, count in record["lines"].items():
                lines[int(line)] = lines.get(int(line), 0) + count
    return files


def ranges(numbers):
    """[1, 2, 3, 7] -> "1-3 7" """
    out = []
    for n in sorted(numbers):
        if out and out[-1][1] == n - 1:
            out[-1][1] = n
        else:
            out.append([n, n])
    return " ".join(str(a) if a == b else f"{a}-{b}" for a, b in out)


def wanted(name, prefixes):
    if prefixes:
        return name.startswith(tuple(prefixes))
    return "/targets/" not in name and "/nvidia/cu" not in name and "/cccl/" not in name


def main():
    for name, lines in sorted(merge(sys.argv[1]).items()):
        if not wanted(name, sys.argv[2:]):
            continue
        missing = [n for n, count in lines.items() if not count]
        done = len(lines) - len(missing)
        print(f"{100 * done / max(1, len(lines)):5.1f} %  {done}/{len(lines)}  {name}")
        if missing:
            print(f"         not executed: {ranges(missing)}")


if __name__ == "__main__":
    main()
