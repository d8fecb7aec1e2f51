# SPDX-License-Identifier: Apache-2.0
"""What share of a sharded MoE layer its router takes, product aside: softmax, choice, capacity, gathering of weights.

    python benchmarks/router_share.py --output benchmarks/results/router-share.json

Layers of HuggingFace's classes with seeded weights, sharded on one rank; Switch with its own router and with the fused
one. A call is taken apart by clocks: the router's product ends where ``torch.nn.functional.linear`` returns, the
experts begin where they are called; what lies between is what a router of our own could replace. Every layer is
compared with the unsharded one first. All token counts and both routers take turns, call by call, so that a change of
the machine meets all of them. Told are medians over the calls, of seconds and of processor seconds (all threads), which
other programs on the machine disturb less.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSparseMLP
from transformers.models.openai_privacy_filter.modeling_openai_privacy_filter import OpenAIPrivacyFilterMLP
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

import moeshard
from moeshard.doctor import machine
from moeshard.router import FusedTop1, fuse, unfuse

Times = tuple[float, float]  # seconds, processor seconds

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def switch(experts: int) -> nn.Module:
    """The layer of switch-base, and its capacity of 64 a sequence."""
    return SwitchTransformersSparseMLP(transformers.SwitchTransformersConfig(d_ff=3072, num_experts=experts))


def nllb(experts: int) -> nn.Module:
    """Of switch-base's size: nllb-moe-54b's (2048, 8192) has seven times the arithmetic, and the same router."""
    config = transformers.NllbMoeConfig(d_model=768, num_experts=experts, moe_eval_capacity_token_fraction=1.0)
    return NllbMoeSparseMLP(config, 3072)


def privacy_filter(experts: int) -> nn.Module:
    """The layer of openai/privacy-filter."""
    config = transformers.OpenAIPrivacyFilterConfig(
        hidden_size=640, intermediate_size=640, num_local_experts=experts, num_experts_per_tok=4
    )
    return OpenAIPrivacyFilterMLP(config)


def mixtral(experts: int) -> nn.Module:
    """Top-2 of small experts: Mixtral-8x7B's (4096, 14336) have 25 times the arithmetic."""
    config = transformers.MixtralConfig(hidden_size=768, intermediate_size=3072, num_local_experts=experts)
    return MixtralSparseMoeBlock(config)


def qwen3_moe(experts: int) -> nn.Module:
    """The layer of Qwen3-30B-A3B, top-8."""
    config = transformers.Qwen3MoeConfig(
        hidden_size=2048, moe_intermediate_size=768, num_experts=experts, num_experts_per_tok=8, norm_topk_prob=True
    )
    return Qwen3MoeSparseMoeBlock(config)


FAMILIES: dict[str, Callable[[int], nn.Module]] = {
    "switch": switch,
    "nllb": nllb,
    "privacy_filter": privacy_filter,
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
}


def now() -> Times:
    """Both clocks."""
    return perf_counter(), process_time()


class Clocks:
    """When the last product ended and when the experts were called."""

    def __init__(self, layer: nn.Module) -> None:
        """Watch a sharded layer; a context manager, which puts torch's function back."""
        self._linear = nn.functional.linear
        self.product = self.experts = now()
        [experts] = [module for module in layer.modules() if isinstance(module, moeshard.ShardedExperts)]
        experts.register_forward_pre_hook(self._called)

    def _called(self, *arguments: object) -> None:
        self.experts = now()

    def __enter__(self) -> Clocks:
        """Begin."""

        def linear(*arguments: torch.Tensor) -> torch.Tensor:
            out = self._linear(*arguments)
            self.product = now()
            return out

        nn.functional.linear = linear
        return self

    def __exit__(self, *exception: object) -> None:
        """Put torch's function back."""
        nn.functional.linear = self._linear


def build(family: str, experts: int, dtype: str) -> nn.Module:
    """A layer with weights of a trained model's size."""
    torch.manual_seed(0)
    layer = FAMILIES[family](experts)
    if hasattr(getattr(layer, "experts", None), "config"):
        layer.experts.config._experts_implementation = "eager"
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -1, 1).mul_((3 / parameter.shape[-1]) ** 0.5 if parameter.ndim > 1 else 0.1)
    return layer.to(DTYPES[dtype]).eval()


def first(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """What the layer computes; some return the router's scores as well."""
    return output[0] if isinstance(output, tuple) else output


def check(family: str, whole: torch.Tensor, sharded: torch.Tensor, dtype: str) -> None:
    """Refuse to time what is wrong. transformers 5's own NLLB experts are wrong themselves (docs/models.md)."""
    error = float((whole - sharded).abs().max() / whole.abs().max())
    if family != "nllb":
        assert error < (1e-5 if dtype == "float32" else 3e-2), f"{family}: wrong by {error:.1e}"


def timed(family: str, experts: int, dtype: str, tokens: list[int], repeats: int) -> list[dict[str, Any]]:
    """A row for each token count."""
    layer = build(family, experts, dtype)
    width = next(p.shape[-1] for name, p in layer.named_parameters() if "gate.weight" in name or "outer" in name)
    # Sequences of 512 at most: Switch counts its capacity over each.
    given = {count: torch.randn(-(-count // 512), min(count, 512), width).to(DTYPES[dtype]) for count in tokens}
    whole = first(layer(given[tokens[0]])).float()
    layer = moeshard.shard(layer, group=moeshard.init("one"), progress=False)
    check(family, whole, first(layer(given[tokens[0]])).float(), dtype)
    kinds = {"own": unfuse}
    if any(isinstance(module, FusedTop1) for module in layer.modules()):
        kinds["fused"] = fuse
    calls: dict[tuple[int, str], list[list[Times]]] = {(count, kind): [] for count in tokens for kind in kinds}
    with Clocks(layer) as clocks:
        for turn in range(repeats + 1):
            for (count, kind), stamps in calls.items():
                if len(kinds) > 1:
                    kinds[kind](layer.router)
                start = now()
                layer(given[count])
                stop = now()
                if turn:  # the first call of a shape takes memory
                    stamps.append([start, clocks.product, clocks.experts, stop])
    return [
        {"family": family, "router": kind, "experts": experts, "dtype": dtype, "tokens": count, **told(stamps)}
        for (count, kind), stamps in calls.items()
    ]


def told(calls: list[list[Times]]) -> dict[str, Any]:
    """Medians of the parts of a call in us, by both clocks, and of the share of the second part."""
    found: dict[str, Any] = {"calls": len(calls)}
    for clock, name in enumerate(("", "_processor")):
        parts = [[1e6 * (b[clock] - a[clock]) for a, b in pairwise(stamps)] for stamps in calls]
        found[f"us{name}"] = [round(median(part), 1) for part in zip(*parts, strict=True)]
        found[f"share{name}"] = round(median(part[1] / sum(part) for part in parts), 4)
    return found


def main() -> None:
    """Measure and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 128])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 120, 1024, 4096])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    print(f"{'us of product, rest of router, experts':>75}   rest / all, by processor time")
    with torch.inference_mode():
        for family in options.families:
            for experts in options.experts:
                for dtype in options.dtypes:
                    for row in timed(family, experts, dtype, options.tokens, options.repeats):
                        rows.append(row)
                        times = "".join(f"{us:12,.0f}" for us in row["us"])
                        shares = "".join(f"{row[name]:8.1%}" for name in ("share", "share_processor"))
                        about = f"{family:15} {row['router']:5} {experts:4} {dtype:9} {row['tokens']:5}"
                        print(f"{about}{times}   {shares}", flush=True)
                    gc.collect()
    if options.output:
        about = {
            "date": datetime.date.today().isoformat(),
            "machine": machine(),
            "load": os.getloadavg(),
            "threads": options.threads,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        lines = ",\n".join(json.dumps(row) for row in rows)
        options.output.write_text(f'{{"about": {json.dumps(about)}, "rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
