# SPDX-License-Identifier: Apache-2.0
"""One layer under each layout, with uniform and skewed routing, through shared memory and torch.distributed (gloo).

    python benchmarks/layouts.py --ranks 2 --output layouts.json

Layouts take turns call by call, so that a change of the machine meets all of them. A call's time is that of the slowest
rank, from a barrier on; all outputs are compared with the first layout's. Sizes are those of switch-base unless told.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

import moeshard
from moeshard import Plan


def layouts(ranks: int, experts: int, d_ff: int) -> dict[str, Plan]:
    """What is compared."""
    everywhere = np.tile([0, d_ff], (ranks, experts, 1))
    hot = Plan.expert_parallel(ranks, experts, d_ff).columns.copy()
    hot[:, 0] = 0, d_ff  # expert 0, the hot one, is everywhere
    found = {
        "shard": Plan.shard(ranks, experts, d_ff),
        "expert parallel": Plan.expert_parallel(ranks, experts, d_ff),
        "copies of the hot expert": Plan.from_columns(hot, d_ff, [ranks] + [1] * (experts - 1)),
        "copies of all": Plan.from_columns(everywhere, d_ff, [ranks] * experts),
    }
    if ranks == 4:
        found["hybrid"] = Plan.hybrid(ranks, experts, d_ff, group=2)
    return found


def routing(tokens: int, experts: int, choices: int, skew: float, rank: int) -> NDArray[np.int64]:
    """``[T, K]``: a share `skew` of the tokens have expert 0 as their first choice, all else is uniform."""
    rng = np.random.default_rng(rank)
    index = np.argsort(rng.random((tokens, experts)), axis=1)[:, :choices]
    for row in map(index.__getitem__, np.flatnonzero(rng.random(tokens) < skew)):
        row[row == 0] = row[0]
        row[0] = 0
    return index


def connect(ranks: int, store: str | None) -> moeshard.Group:
    """Shared memory, or gloo that meets at a file."""
    if store is None:
        return moeshard.init()
    import torch.distributed as dist

    from moeshard.group import launched

    assert launched is not None
    if not dist.is_initialized():
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=launched.rank, world_size=ranks)
    return moeshard.init("torch")


def timed(
    shape: tuple[int, int, int], cases: list[tuple[int, int, float]], rounds: int, store: str | None, only: list[str]
):  # type: ignore[no-untyped-def]
    """On each rank: for each case and layout the seconds of every round on this rank, and of its steps."""
    import torch

    experts, d_model, d_ff = shape
    from moeshard.group import launched

    group = connect(launched.ranks, store)
    torch.manual_seed(0)
    w_in = torch.randn(experts, d_ff, d_model) * d_model**-0.5
    w_out = torch.randn(experts, d_model, d_ff) * d_ff**-0.5
    plans = {name: plan for name, plan in layouts(group.size, experts, d_ff).items() if not only or name in only}
    layers = {name: moeshard.ShardedExperts.from_weights(w_in, w_out, plan=p, group=group) for name, p in plans.items()}
    found = []
    for tokens, choices, skew in cases:
        index = torch.from_numpy(routing(tokens, experts, choices, skew, group.rank))
        hidden, weights = torch.randn(tokens, d_model), torch.full((tokens, choices), 1 / choices)
        seconds: dict[str, list[float]] = {name: [] for name in layers}
        steps = {name: [] for name in layers}
        first = None
        for turn in range(rounds + 1):
            for name, layer in layers.items():
                stamps = []
                layer.on_step = lambda step, stamps=stamps: stamps.append(perf_counter())
                group.barrier()
                start = perf_counter()
                output = layer(hidden, index, weights)
                if turn:
                    seconds[name].append(perf_counter() - start)
                    steps[name].append(np.diff(stamps).tolist())
                elif first is None:
                    first = output
                else:
                    assert float((output - first).abs().max() / first.abs().max()) < 4e-6, name
        found.append({"seconds": seconds, "steps": steps})
    return found


def main() -> None:
    """Measure and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--d-ff", type=int, default=3072)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 1024], help="of each rank")
    parser.add_argument("--choices", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--skew", type=float, nargs="+", default=[0.0, 0.6])
    parser.add_argument("--exchange", nargs="+", default=["shm", "torch"])
    parser.add_argument("--only", nargs="*", default=[], help="layouts")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    shape = (options.experts, options.d_model, options.d_ff)
    cases = [(t, k, s) for t in options.tokens for k in options.choices for s in options.skew]
    rows = []
    for exchange in options.exchange:
        with tempfile.TemporaryDirectory() as folder, moeshard.launch(options.ranks, timeout=300) as ranks:
            store = f"{folder}/store" if exchange == "torch" else None
            results = ranks.run(timed, shape, cases, options.rounds, store, options.only)
        for number, (tokens, choices, skew) in enumerate(cases):
            for name in results[0][number]["seconds"]:
                by_rank = np.array([result[number]["seconds"][name] for result in results])  # [R, rounds]
                steps = np.median([result[number]["steps"][name] for result in results], axis=1)  # [R, 5]
                row = {"exchange": exchange, "tokens": tokens, "choices": choices, "skew": skew, "layout": name}
                row |= {"seconds": float(np.median(by_rank.max(axis=0))), "steps": steps.tolist()}
                rows.append(row)
                told = " ".join(f"{1e3 * s:8.2f}" for s in steps.max(axis=0))
                print(
                    f"{exchange:5} T={tokens:<5} K={choices} skew={skew:<4} {name:25} "
                    f"{1e3 * row['seconds']:8.2f} ms | {told}",
                    flush=True,
                )
    if options.output:
        sizes = {"ranks": options.ranks, "experts": options.experts, "d_model": options.d_model, "d_ff": options.d_ff}
        options.output.write_text(json.dumps({"sizes": sizes, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
