# SPDX-License-Identifier: Apache-2.0
"""Two ranks, one of which shares its core with a busy loop: equal widths against widths that follow measured speed.

    python benchmarks/uneven_ranks.py --output benchmarks/results/uneven-ranks.json

Each rank is one thread on a core of its own. The busy loops on rank 1's core take their share of it, so rank 1 runs
at about 1 / (1 + loops) of rank 0's speed. Every timed layer is checked against the float64 reference first, on a few
tokens. What is told is the time of ffn, the step that the widths divide, on each rank (median over the repeats), and
how far apart the ranks finish.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import moeshard
from moeshard import Plan

BUSY = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])}); print(flush=True)\nwhile True: pass"


@contextlib.contextmanager
def busy_loops(count: int, core: int) -> Iterator[None]:
    """Processes that never sleep, on one core."""
    command = [sys.executable, "-c", BUSY, str(core)]
    loops = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(count)]
    try:
        for loop in loops:
            assert loop.stdout is not None
            loop.stdout.readline()  # it runs
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.communicate()


def timed(shape: tuple[int, int, int], tokens: int, repeats: int, rounds: int) -> dict[str, object]:
    """On each rank: equal widths, the speeds, widths by speed, by turns: a change of the machine meets both."""
    import torch

    group = moeshard.init()
    experts, d_model, d_ff = shape
    torch.manual_seed(0)
    w_in = torch.randn(experts, d_ff, d_model) * d_model**-0.5
    w_out = torch.randn(experts, d_model, d_ff) * d_ff**-0.5
    hidden = torch.randn(tokens, d_model)
    index, weights = torch.randint(experts, (tokens, 1)), torch.ones(tokens, 1)
    options = {"num_experts": experts, "d_model": d_model, "d_ff": d_ff, "tokens": 2 * tokens, "seconds": 1.0}
    found: dict[str, object] = {"speed": [], "equal": [], "by speed": [], "widths": []}
    for _ in range(rounds):
        speed = moeshard.measure_speed(group, **options)
        found["speed"].append(speed.tolist())
        for name, plan in (("equal", Plan.shard(2, experts, d_ff)), ("by speed", Plan.shard(2, experts, d_ff, speed))):
            layer = moeshard.ShardedExperts.from_weights(w_in, w_out, plan=plan, group=group)
            few = [x[:4] for x in (hidden, index, weights)]
            right = reference(*few, w_in, w_out)
            error = float((layer(*few).double() - right).abs().max() / right.abs().max())
            assert error < 2e-6, f"{name}: wrong by {error:.1e}"
            layer(hidden, index, weights)
            with moeshard.profile(layer, limits=False) as profile:
                for _ in range(repeats):
                    layer(hidden, index, weights)
            stamps = [[call.stamps for call in rank.calls] for rank in profile.by_rank]
            found[name].append([float(np.median([s[4] - s[3] for s in rank])) / 1e9 for rank in stamps])
        widths = plan.columns[:, :, 1] - plan.columns[:, :, 0]
        found["widths"].append(widths.sum(axis=1).tolist())
    return found


def reference(hidden, index, weights, w_in, w_out):  # type: ignore[no-untyped-def]
    """The layer, in float64."""
    hidden = hidden.double()
    h = (w_in[index[:, 0]].double() @ hidden[:, :, None]).relu()
    return weights.double() * (w_out[index[:, 0]].double() @ h)[:, :, 0]


def apart(seconds: list[list[float]]) -> list[float]:
    """How much later than the first rank the last one finishes, of each round."""
    return [max(ranks) / min(ranks) - 1 for ranks in seconds]


def main() -> None:
    """Measure and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loops", type=int, nargs="*", default=[0, 1], help="busy loops on rank 1's core")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--d-ff", type=int, default=3072)
    parser.add_argument("--tokens", type=int, default=512, help="of each rank")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        sys.exit("uneven_ranks: needs two cores")
    os.sched_setaffinity(0, cores[:2])  # launch gives each rank one of them
    shape = (options.experts, options.d_model, options.d_ff)
    results = []
    for loops in options.loops:
        with moeshard.launch(2, threads=1) as ranks, busy_loops(loops, cores[1]):
            found = ranks.run(timed, shape, options.tokens, options.repeats, options.rounds)[0]
        found = {"loops": loops, **found, "apart": {name: apart(found[name]) for name in ("equal", "by speed")}}
        results.append(found)
        print(
            f"{loops} busy loops on rank 1's core; "
            f"speed of rank 1: {[round(b / a, 3) for a, b in found['speed']]} of rank 0's"
        )
        for name in ("equal", "by speed"):
            times = ["/".join(f"{1e3 * s:.1f}" for s in ranks) for ranks in found[name]]
            print(
                f"  widths {name}: ffn {', '.join(times)} ms; "
                f"apart {', '.join(f'{x:.1%}' for x in found['apart'][name])}"
            )
    if options.output:
        machine = {
            "processor": platform.processor() or platform.machine(),
            "cores": len(cores),
            "isa": moeshard._core.isa(),
        }
        sizes = {name: getattr(options, name) for name in ("experts", "d_model", "d_ff", "tokens", "repeats", "rounds")}
        options.output.write_text(json.dumps({"machine": machine, "sizes": sizes, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
