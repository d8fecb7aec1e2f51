# SPDX-License-Identifier: Apache-2.0
"""Holds the planner's predictions against measured times, on this machine.

    python benchmarks/plan_check.py                      # measures shard, expert parallel ... on 2 ranks: 4 minutes
    python benchmarks/plan_check.py --grid benchmarks/results/layer-quick.json      # against a run of `moeshard bench`

The first runs every layout on the same tokens in turn and prints, for each case, predicted against measured, whether
the ranking is right where measured times differ by more than 15 %, and how far the layout that "auto" takes is from the
best one. The second predicts moeshard's times of a benchmark's rows from the peaks that stand beside them.
"""

import argparse
import math
import os
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

import moeshard
from moeshard import _core
from moeshard.bench.grid import Build, Case, choices
from moeshard.bench.results import read
from moeshard.planner import LayerShape, machine
from moeshard.planner.calibration import calibrate
from moeshard.planner.machines import CPU, Device
from moeshard.planner.planning import predict
from moeshard.planner.results import ModelPlan, StepTimes

Spec = tuple[str, str, int, int]  # shape, routing, experts, tokens of a rank
LAYOUTS = ("shard", "expert_parallel", "balanced", "hot_sharded", "hot_copied")
NEAR = 0.2  # of the measured time, that a prediction may be off
CLEAR = 0.15  # a measured difference that a prediction must see
ROUNDS = 15


# ---- measuring -----------------------------------------------------------------------------------------


def measure(
    cases: list[tuple[str, str, int, int]], plans: dict[str, dict[str, str]]
) -> dict[str, dict[str, list[float]]]:
    """On each rank: seconds of every case under every layout. Weights are the same for all layouts of a shape."""
    import torch

    group = moeshard.init()
    ranks = group.size
    torch.set_grad_enabled(False)
    found: dict[str, dict[str, list[float]]] = {}
    for name, routing, experts, tokens in cases:
        case = Case(Build(name, experts, "float32", ranks), 1, routing, tokens)  # type: ignore[arg-type]
        shape = case.shape
        generator = torch.Generator().manual_seed(0)
        w_in = torch.rand(experts, shape.d_ff * (1 + shape.gated), shape.d_model, generator=generator) - 0.5
        w_out = torch.rand(experts, shape.d_model, shape.d_ff, generator=generator) - 0.5
        hidden = torch.randn(tokens, shape.d_model, generator=generator)
        index = torch.from_numpy(choices(case, group.rank))
        weights = torch.full(index.shape, 1 / shape.top_k)
        layers, outputs = {}, {}
        for layout, text in plans[case.key].items():
            layers[layout] = moeshard.ShardedExperts.from_weights(
                w_in, w_out, activation=shape.activation, gated=shape.gated, plan=ModelPlan.from_json(text), group=group
            )
            outputs[layout] = layers[layout](hidden, index, weights)
        reference = outputs["shard"]
        for layout, output in outputs.items():
            error = float((output - reference).abs().max() / reference.abs().max())
            assert error < 1e-5, f"{case.key}, {layout}: {error}"
        seconds: dict[str, list[float]] = {layout: [] for layout in layers}
        for number in range(ROUNDS):
            order = list(layers) if number % 2 else list(reversed(layers))
            for layout in order:
                group.barrier()
                start = time.perf_counter()
                layers[layout](hidden, index, weights)
                seconds[layout].append(time.perf_counter() - start)
        found[case.key] = seconds
        del w_in, w_out, layers
    return found


def check(ranks_of: "moeshard.planner.Machine", cases: "list[Spec]", ranks: int) -> bool:
    """Plan, measure and print. Returns whether every bar is met."""
    plans: dict[str, dict[str, str]] = {}
    predicted: dict[str, dict[str, StepTimes]] = {}
    auto: dict[str, str] = {}
    for name, routing, experts, tokens in cases:
        case = Case(Build(name, experts, "float32", ranks), 1, routing, tokens)  # type: ignore[arg-type]
        shape = LayerShape("", experts, case.shape.d_model, case.shape.d_ff, case.shape.top_k, case.shape.gated)
        counts = sum(np.bincount(choices(case, rank).ravel(), minlength=experts) for rank in range(ranks))
        plans[case.key], predicted[case.key] = {}, {}
        request = {"ranks": ranks, "tokens": tokens, "histogram": counts, "devices": ranks_of}
        for layout in (*LAYOUTS, *(["hybrid"] if ranks > 3 else []), "auto"):
            found = moeshard.plan(shape, layout=layout, **request)
            layer = found.layers[0]
            if layout == "auto":
                auto[case.key] = next(o.kind for o in layer.alternatives if o.layout == layer.layout)
                layout = auto[case.key]
            plans[case.key][layout] = found.to_json()
            each = np.full(ranks, float(tokens))
            times, _ = predict(shape, layer.plan, counts.astype(float), each, ranks_of, exact=True)
            predicted[case.key][layout] = replace(times, route=0.0)  # the router is not run here
    with moeshard.launch(ranks, threads=1) as workers:
        by_rank = workers.run(measure, cases, plans)
    inside = right = pairs = 0
    worst_auto = 1.0
    total = 0
    print(f"{'case':44} {'layout':16} {'predicted':>10} {'measured':>9} {'ratio':>6}")
    for key in plans:
        measured = {
            layout: statistics.median(map(max, zip(*(found[key][layout] for found in by_rank), strict=True)))
            for layout in plans[key]
        }
        for layout, seconds in measured.items():
            ratio = predicted[key][layout].total / seconds
            total += 1
            inside += abs(ratio - 1) <= NEAR
            mark = "  <- auto" if layout == auto[key] else ""
            print(f"{key:44} {layout:16} {1e3 * ratio * seconds:10.2f} {1e3 * seconds:9.2f} {ratio:6.2f}{mark}")
        for one in measured:
            for other in measured:
                if measured[other] > measured[one] * (1 + CLEAR):
                    pairs += 1
                    right += predicted[key][other].total > predicted[key][one].total
        worst_auto = max(worst_auto, measured[auto[key]] / min(measured.values()))
    print(f"\nwithin 20 %: {inside} of {total}; ranking right: {right} of {pairs} pairs that differ by more than 15 %")
    print(f"auto: at worst {worst_auto - 1:.1%} slower than the best layout measured")
    return inside == total and right == pairs and worst_auto <= 1.05


# ---- against a benchmark --------------------------------------------------------------------------------


def against(path: Path) -> bool:
    """Predict moeshard's times of a benchmark's rows from the peaks beside them; whether all are within 20 %."""
    _, rows = read(path)
    both = [row for row in rows if row.case.build.ranks * row.case.threads == 2]
    host = statistics.median(sum(row.bytes_per_second) for row in both if row.case.threads == 2) if both else math.inf
    inside = 0
    ratios = []
    print(f"memory of the host: {host / 1e9:.1f} GB/s for all ranks (median of rows with two threads)")
    print(f"{'case':52} {'predicted':>10} {'measured':>9} {'ratio':>6}")
    for row in rows:
        case = row.case
        ranks, experts = case.build.ranks, case.build.num_experts
        peak = statistics.fmean(row.flops_per_second)
        # Two ranks do not measure at the same moment every time: what they read together is known from above.
        bandwidth = statistics.median(row.bytes_per_second)
        if ranks * case.threads == 1:
            core = bandwidth
        else:
            core = CPU.devices[0].bandwidth
        device = Device("core", peak / case.threads, peak / case.threads, core, 1e12)
        here = replace(CPU, devices=(device,), cores=ranks * case.threads, host_bandwidth=max(host, core))
        dtype = case.build.dtype
        shape = LayerShape("", experts, case.shape.d_model, case.shape.d_ff, case.shape.top_k, case.shape.gated, dtype)
        counts = sum(np.bincount(choices(case, rank).ravel(), minlength=experts) for rank in range(ranks))
        table = moeshard.Plan.shard(ranks, experts, shape.d_ff)
        times, _ = predict(shape, table, counts.astype(float), np.full(ranks, float(case.tokens)), here, exact=True)
        ratio = times.total / row.timings["moeshard"].median
        ratios.append(ratio)
        inside += abs(ratio - 1) <= NEAR
        print(f"{case.key:52} {1e3 * times.total:10.2f} {1e3 * row.timings['moeshard'].median:9.2f} {ratio:6.2f}")
    error = statistics.fmean(abs(math.log(ratio)) for ratio in ratios)
    print(f"\nwithin 20 %: {inside} of {len(rows)}; mean error {math.expm1(error):.1%}")
    return inside == len(rows)


def main() -> int:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--grid", type=Path, metavar="FILE", help="hold against a benchmark's results, measure nothing")
    parser.add_argument("--devices", metavar="NAME", help="as for moeshard plan (this machine, measured first)")
    parser.add_argument("--ranks", type=int, default=2, metavar="R", help="that measure (%(default)s)")
    options = parser.parse_args()
    if options.grid:
        return 0 if against(options.grid) else 1
    ranks_of = machine(options.devices) if options.devices else calibrate(lambda line: None)
    print(f"{ranks_of.name}: {ranks_of.source}; load average {os.getloadavg()[0]:.2f}; kernels {_core.isa()}")
    cases = [
        ("switch-base", routing, experts, tokens)
        for experts in (8, 64)
        for routing in ("uniform", "skew")
        for tokens in (64, 512, 2048)
    ]
    if options.ranks > 2:  # each has a copy of the weights
        cases = [case for case in cases if case[3] == 512]
    cases += [("nomic", "uniform", 8, 512), ("nomic", "skew", 8, 512), ("switch-base", "one", 8, 512)]
    return 0 if check(ranks_of, cases, options.ranks) else 1


if __name__ == "__main__":
    sys.exit(main())
