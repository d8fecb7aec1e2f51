# SPDX-License-Identifier: Apache-2.0
"""Whole MoE layers on one GPU: moeshard's engine against what one would write with torch, in one run.

python layers.py FACTS.json LAYERS.json        QUICK=1: fewer shapes

All get the same tokens, choices and weights in bfloat16 and return the same layer; each is checked against float32
first. Rivals, all of them free of capacity limits:
  eager      HuggingFace's loop: for each expert that has tokens, gather, two matmuls, index_add (host synchronises)
  loop       the same after one sort, with the counts copied to the host once
  grouped    torch._grouped_mm over the sorted rows, offsets on the device
  padded     DeepSpeed's way with no drops: every expert padded to the fullest, batched matmuls
Times: medians of CUDA events round one layer, three inputs in turn; "graph": replays of a captured graph.
Floor: the larger of flops / measured bfloat16 rate and bytes (weights of experts with tokens, tokens in and out) /
measured copy rate.
"""

import json
import os
import statistics
import sys
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

QUICK = os.environ.get("QUICK") == "1"


@dataclass(frozen=True)
class Shape:
    """A layer: of the paper's grid (Switch base; tokens = batch * 120) or of a model in use."""

    experts: int
    tokens: int
    d_model: int = 768
    d_ff: int = 3072
    choices: int = 1
    gated: bool = False
    skew: float = 0.6  # share of the tokens that go to a tenth of the experts


GRID = [Shape(e, 120 * batch) for e in ((8, 128) if QUICK else (8, 32, 128, 256)) for batch in (10, 100, 450)]
GRID += [Shape(128, 8192, 640, 640, 4, True, 0.0)]
if not QUICK:
    GRID += [Shape(8, 54000, skew=0.0), Shape(128, 54000, skew=0.0), Shape(8, 8192, 4096, 14336, 2, True, 0.0)]


class Layer:
    """Weights and three inputs of a shape."""

    def __init__(self, shape, generator):
        """Draw them; popular experts come first."""
        self.shape = shape
        e, d, f = shape.experts, shape.d_model, shape.d_ff
        rows = 2 * f if shape.gated else f

        def normal(*size, scale):
            return torch.randn(*size, device="cuda", generator=generator, dtype=torch.bfloat16) * scale

        self.w_in, self.w_out = normal(e, rows, d, scale=d**-0.5), normal(e, d, f, scale=f**-0.5)
        self.inputs = []
        for _ in range(3):
            hidden = normal(shape.tokens, d, scale=1.0)
            share = torch.full((e,), 1.0 / e, device="cuda")
            if shape.skew:
                popular = max(1, e // 10)
                share[:] = (1 - shape.skew) / max(1, e - popular)
                share[:popular] = shape.skew / popular
            index = torch.multinomial(share.expand(shape.tokens, e), shape.choices, generator=generator)
            weight = torch.rand(shape.tokens, shape.choices, device="cuda", generator=generator)
            self.inputs.append((hidden, index, weight))

    def activate(self, x):
        """What lies between the two products."""
        if not self.shape.gated:
            return torch.relu(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up


def sort_rows(index):
    """Slots by expert: (order, expert of each)."""
    expert, order = torch.sort(index.reshape(-1), stable=True)
    return order, expert


def eager(layer, hidden, index, weight):
    """HuggingFace's loop over the experts that have tokens."""
    out = torch.zeros_like(hidden)
    mask = F.one_hot(index, layer.shape.experts).permute(2, 1, 0)
    for e in (mask.sum(dim=(-1, -2)) > 0).nonzero()[:, 0].tolist():
        choice, token = torch.where(mask[e])
        y = F.linear(layer.activate(F.linear(hidden[token], layer.w_in[e])), layer.w_out[e])
        out.index_add_(0, token, y * weight[token, choice, None].to(y.dtype))
    return out


def loop(layer, hidden, index, weight):
    """One sort, then two products for each expert."""
    order, expert = sort_rows(index)
    counts = torch.bincount(expert, minlength=layer.shape.experts).tolist()
    rows = hidden[order // layer.shape.choices]
    y = torch.empty_like(rows)
    first = 0
    for e, count in enumerate(counts):
        if count:
            x = rows[first : first + count]
            y[first : first + count] = F.linear(layer.activate(F.linear(x, layer.w_in[e])), layer.w_out[e])
            first += count
    return scatter(layer, hidden, order, y, weight)


def scatter(layer, hidden, order, y, weight):
    """Weigh the rows, add those of a token."""
    y = y * weight.reshape(-1)[order, None].to(y.dtype)
    if layer.shape.choices == 1:
        return torch.empty_like(hidden).index_copy_(0, order, y)
    slots = torch.empty_like(y).index_copy_(0, order, y)
    return slots.view(hidden.shape[0], layer.shape.choices, -1).sum(dim=1)


def grouped(layer, hidden, index, weight):
    """One sort, then two grouped products of torch."""
    order, expert = sort_rows(index)
    ends = torch.searchsorted(expert, torch.arange(layer.shape.experts, device="cuda"), right=True).int()
    rows = hidden[order // layer.shape.choices]
    h = layer.activate(torch._grouped_mm(rows, layer.w_in.transpose(1, 2), offs=ends))
    y = torch._grouped_mm(h, layer.w_out.transpose(1, 2), offs=ends)
    return scatter(layer, hidden, order, y, weight)


def padded(layer, hidden, index, weight):
    """Every expert padded to the fullest, two batched products."""
    order, expert = sort_rows(index)
    counts = torch.bincount(expert, minlength=layer.shape.experts)
    capacity = int(counts.max())
    starts = counts.cumsum(0) - counts
    place = expert * capacity + torch.arange(expert.numel(), device="cuda") - starts[expert]
    full = hidden.new_zeros(layer.shape.experts * capacity, hidden.shape[1])
    full[place] = hidden[order // layer.shape.choices]
    h = layer.activate(torch.bmm(full.view(layer.shape.experts, capacity, -1), layer.w_in.transpose(1, 2)))
    y = torch.bmm(h, layer.w_out.transpose(1, 2)).view(layer.shape.experts * capacity, -1)[place]
    return scatter(layer, hidden, order, y, weight)


def moeshard_layer(layer):
    """The engine as the Python package calls it."""
    from moeshard import _cuda

    shape = layer.shape
    experts = _cuda.PackedExperts(
        columns=[[0, shape.d_ff]] * shape.experts,
        d_model=shape.d_model,
        d_ff=shape.d_ff,
        dtype="bfloat16",
        activation="silu" if shape.gated else "relu",
        gated=shape.gated,
        b_in=False,
        b_out=False,
        device=0,
    )
    for e in range(shape.experts):
        experts.pack(e, layer.w_in[e], layer.w_out[e])
    engine = _cuda.Engine(0)

    def run(_, hidden, index, weight):
        out = torch.empty_like(hidden)
        engine.forward(experts, hidden, index, weight, out)
        return out

    return run


def exact(layer, hidden, index, weight):
    """The layer in float32, in pieces."""
    out = torch.zeros_like(hidden, dtype=torch.float32)
    for e in range(layer.shape.experts):
        token, choice = torch.where(index == e)
        if token.numel():
            x = hidden[token].float()
            y = F.linear(layer.activate(F.linear(x, layer.w_in[e].float())), layer.w_out[e].float())
            out.index_add_(0, token, y * weight[token, choice, None])
    return out


def milliseconds(run, repeats):
    """Median time of run(i), i of the inputs in turn."""
    times = []
    for i in range(repeats + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run(i % 3)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[3:])


def graphs(run):
    """A captured graph for each input."""
    captured = []
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(3):
            run(i)
    torch.cuda.current_stream().wait_stream(stream)
    for i in range(3):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            run(i)
        captured.append(graph)
    return captured


def measure(shape, ceilings):
    """One shape: the rivals' times and errors."""
    layer = Layer(shape, torch.Generator("cuda").manual_seed(1))
    reference = exact(layer, *layer.inputs[0])
    rows = shape.tokens * shape.choices
    used = len(layer.inputs[0][1].unique())
    matrices = (3 if shape.gated else 2) * shape.d_model * shape.d_ff
    flops, size = 2.0 * rows * matrices, 2.0 * (used * matrices + 2 * shape.tokens * shape.d_model)
    floor = 1e3 * max(flops / ceilings["bfloat16_flops"], size / ceilings["copy_bytes_per_second"])
    result = {**asdict(shape), "floor_ms": floor, "flops": flops, "bytes": size, "layers": {}}
    for name, rival in (
        ("moeshard", None),
        ("grouped", grouped),
        ("padded", padded),
        ("loop", loop),
        ("eager", eager),
    ):
        entry = result["layers"][name] = {}
        try:
            call = rival or moeshard_layer(layer)

            def run(i, call=call):
                return call(layer, *layer.inputs[i])

            got = run(0).float()
            entry["error"] = float((got - reference).norm() / reference.norm())
            entry["eager_ms"] = milliseconds(run, 7 if rival in (loop, eager) else 15)
            if name in ("moeshard", "grouped"):
                replays = graphs(run)
                entry["graph_ms"] = milliseconds(lambda i, replays=replays: replays[i].replay(), 15)
        except Exception as error:  # a rival may be missing here or not fit: say so and go on
            entry["failed"] = f"{type(error).__name__}: {error}"[:300]
            torch.cuda.synchronize()
    return result


def table_line(result):
    """A shape's result in a line."""
    cells = []
    for name, entry in result["layers"].items():
        if "eager_ms" not in entry:
            cells.append(f"{name} -")
            continue
        best = min(entry["eager_ms"], entry.get("graph_ms", float("inf")))
        wrong = "" if entry["error"] < 1e-2 else f" WRONG {entry['error']:.1e}"
        graph = f"/{entry['graph_ms']:.3f}" if "graph_ms" in entry else ""
        cells.append(f"{name} {entry['eager_ms']:.3f}{graph} ({result['floor_ms'] / best:.0%}){wrong}")
    what = f"E={result['experts']} T={result['tokens']} D={result['d_model']} F={result['d_ff']} K={result['choices']}"
    return f"{what} skew={result['skew']} floor {result['floor_ms']:.3f} ms: " + ", ".join(cells)


def main(facts, path):
    """Measure the grid, print a line a shape, keep the file complete."""
    torch.backends.cuda.matmul.allow_tf32 = False
    with open(facts) as file:
        ceilings = json.load(file)
    results = []
    print("milliseconds a layer, eager/graph (share of the floor)")
    with torch.inference_mode():
        for shape in GRID:
            results.append(measure(shape, ceilings))
            print(table_line(results[-1]))
            for name, entry in results[-1]["layers"].items():
                if "failed" in entry:
                    print(f"  {name}: {entry['failed']}")
            with open(path, "w") as file:
                json.dump(results, file, indent=1)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main(*sys.argv[1:])
