# SPDX-License-Identifier: Apache-2.0
"""One MoE layer, HuggingFace's against moeshard's, side by side in one run: one rank and two, several shapes.

Both are the whole block (router included) of Switch at the shape of switch-base: d_model 768, d_ff 3072, fp32, no
capacity limit, random weights, forced routing: "uniform", or "skew" with 60 % of the tokens on the first tenth of the
experts. They run in turn in the same processes on the same threads; the figure is the median of the slowest rank. Every
case is verified first. With two ranks, HuggingFace's layer is replicated on both and moeshard's is cut over both.

    python benchmarks/bench_layer.py [--quick] [--json FILE]
"""

import argparse
import copy
import json
import platform
import statistics
import time
from pathlib import Path

import moeshard

D_MODEL, D_FF = 768, 3072
COLUMNS = ("ranks", "threads", "experts", "routing", "tokens", "hf_ms", "moeshard_ms", "ratio", "max_rel_diff")


def cpu_name() -> str:
    """What the system calls this CPU."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def make_layer(num_experts):
    """The same random Switch block on every rank, whose router reads the expert off the first features."""
    import torch
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

    torch.manual_seed(0)
    config = SwitchTransformersConfig(
        d_model=D_MODEL, d_ff=D_FF, num_experts=num_experts, expert_capacity=1 << 30, router_jitter_noise=0.0
    )
    layer = SwitchTransformersSparseMLP(config).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.02)
        layer.router.classifier.weight.zero_()
        layer.router.classifier.weight[:, :num_experts].fill_diagonal_(1.0)
    return layer


def make_tokens(num_experts, tokens, routing, seed):
    """[1, tokens, D_MODEL] that the router of `make_layer` sends where `routing` says."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    choice = torch.randint(num_experts, (tokens,), generator=generator)
    if routing == "skew":
        hot = max(1, round(0.1 * num_experts))
        to_hot = torch.rand(tokens, generator=generator) < 0.6
        choice = torch.where(to_hot, torch.randint(hot, (tokens,), generator=generator), choice)
    hidden = torch.randn(tokens, D_MODEL, generator=generator)
    hidden[torch.arange(tokens), choice] += 12.0
    return hidden.unsqueeze(0)


def run_cases(num_experts, cases, threads, repeats):
    """On each rank: time the cases, the two layers in turn. Returns [(hf seconds, moeshard seconds, difference)]."""
    import torch

    torch.set_num_threads(threads)
    group = moeshard.init()
    hf = make_layer(num_experts)
    ours = torch.nn.Sequential(copy.deepcopy(hf)).eval()
    moeshard.shard(ours, group=group, progress=False)
    first = lambda output: output[0] if isinstance(output, tuple) else output  # noqa: E731  (a tuple in 4.57)
    results = []
    with torch.inference_mode():
        for routing, tokens in cases:
            hidden = make_tokens(num_experts, tokens, routing, seed=1000 + group.rank)
            expected, got = first(hf(hidden)), first(ours(hidden))
            difference = float((expected - got).abs().max() / expected.abs().max())
            seconds = {"hf": [], "ours": []}
            for repeat in range(repeats):
                turn = [("hf", hf), ("ours", ours)]
                for name, layer in turn if repeat % 2 else reversed(turn):
                    group.barrier()
                    start = time.perf_counter()
                    layer(hidden)
                    seconds[name].append(time.perf_counter() - start)
            results.append((seconds["hf"], seconds["ours"], difference))
    return results


def slowest(results, case, which):
    """Median over repeats of the slowest rank's seconds."""
    return statistics.median(max(times) for times in zip(*(rank[case][which] for rank in results), strict=True))


def main():
    """Run the grid, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer shapes and repeats")
    parser.add_argument("--repeats", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    repeats = options.repeats or (3 if options.quick else 7)
    sizes = (120, 1024) if options.quick else (1, 16, 120, 1024, 4096)
    cases = [(routing, tokens) for routing in ("uniform", "skew") for tokens in sizes]
    rows = []
    print("  ".join(f"{name:>12}" for name in COLUMNS))
    for ranks, threads in ((1, 1), (1, 2), (2, 1)):
        for num_experts in (8, 128):
            with moeshard.launch(ranks, threads=threads) as workers:
                results = workers.run(run_cases, num_experts, cases, threads, repeats)
            for case, (routing, tokens) in enumerate(cases):
                hf, ours = slowest(results, case, 0), slowest(results, case, 1)
                difference = max(rank[case][2] for rank in results)
                row = (ranks, threads, num_experts, routing, tokens, hf * 1e3, ours * 1e3, hf / ours, difference)
                rows.append(dict(zip(COLUMNS, row, strict=True)))
                print("  ".join(f"{x:12.3g}" if isinstance(x, float) else f"{x!s:>12}" for x in row), flush=True)
    worst = min(rows, key=lambda row: row["ratio"])
    print(f"least gain over HuggingFace: {worst['ratio']:.2f}x ({worst})")
    if options.json:
        report = {"cpu": cpu_name(), "moeshard": moeshard.__version__, "repeats": repeats, "rows": rows}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if all(row["max_rel_diff"] <= 1e-5 for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
