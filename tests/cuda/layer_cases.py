# SPDX-License-Identifier: Apache-2.0
"""Layers on the CUDA engine against float64 and the CPU engine: a program, since ptxsim reads its settings once.

    python layer_cases.py [NAME...]      all cases, or those whose names contain one of the NAMEs
    python layer_cases.py --aligned      layers whose rows are whole lines of memory and fill their tiles (counters.py)

Every element is held to a bound of its own, computed beside the float64 reference: what the dtype's roundings and the
order of fp32 sums may do to it. With t the relative error of a sum in terms of its absolute terms and u the rounding of
the dtype:

    |up error|   <= t * (|x| . |w_in| + |b_in|)
    |H error|    <= slope * |up error| + u * |H|
    |out error|  <= |weight| * (|H error| . |w_out| + t * (|H| . |w_out| + |b_out|)) + u * |out|
"""

from __future__ import annotations

import dataclasses
import os
import sys
from dataclasses import dataclass

import numpy as np
import simdev
import torch
from reference import ACTIVATIONS, KINDS

import moeshard

ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}  # 24, 8, 11 bits of significand
TINY = {"float32": 2.0**-126, "bfloat16": 2.0**-126, "float16": 2.0**-25}  # half the smallest step of float16
SLOPE = 1.13  # the steepest of the activations: gelu


@dataclass(frozen=True)
class Case:
    """A layer, and the tokens that go through it."""

    name: str
    tokens: int = 64
    d_model: int = 64
    d_ff: int = 96
    experts: int = 3
    choices: int = 1
    dtype: str = "bfloat16"
    activation: str = "relu"
    gated: bool = False
    bias: bool = False
    routing: str = (
        "random"  # "one": expert 0 takes all; "dropped": a third of the slots are -1; "none": all are; "even"
    )
    seed: int = 0


BASE = Case("plain")
CASES = [
    BASE,
    *(dataclasses.replace(BASE, name=f"{t}-tokens", tokens=t) for t in (0, 1, 7, 15, 16, 17, 127, 128, 130)),
    *(dataclasses.replace(BASE, name=f"d{d}-f{f}", d_model=d, d_ff=f, tokens=33)
      for d, f in ((32, 32), (96, 160), (160, 64), (37, 64), (64, 37), (37, 37), (8, 1), (40, 24))),
    *(dataclasses.replace(BASE, name=f"{e}-experts-top{k}", experts=e, choices=k, tokens=40, bias=True)
      for e, k in ((1, 1), (3, 2), (8, 1), (8, 2), (8, 4), (64, 1), (64, 4))),
    *(dataclasses.replace(BASE, name=f"{a}{'-gated' if g else ''}", activation=a, gated=g, bias=True, tokens=20)
      for a, g in KINDS),
    *(dataclasses.replace(BASE, name=f"{d}-{r}", dtype=d, routing=r, experts=8, choices=2, tokens=70, bias=True)
      for d in ("bfloat16", "float16") for r in ("one", "dropped", "none")),
    *(dataclasses.replace(BASE, name=f"float16-{a}", dtype="float16", activation=a, gated=g, choices=2, tokens=33)
      for a, g in (("relu", False), ("silu", True))),
    # Strict float32 is slow on ptxsim: small ones.
    *(dataclasses.replace(BASE, name=f"float32-{t}-{a}{'-gated' if g else ''}", dtype="float32", tokens=t, d_model=d,
                          d_ff=f, activation=a, gated=g, bias=True, choices=k)
      for t, d, f, a, g, k in ((0, 32, 32, "relu", False, 1), (1, 32, 64, "relu", False, 1),
                               (7, 37, 37, "gelu", False, 2), (64, 32, 32, "relu", False, 1),
                               (20, 64, 37, "silu", True, 2), (17, 36, 40, "gelu_tanh", False, 4))),
    # Large enough for the 128-row tiles, and more than one of them.
    dataclasses.replace(BASE, name="tile-128", tokens=300, experts=1, d_model=64, d_ff=64),
    dataclasses.replace(BASE, name="tile-128-ragged", tokens=257, experts=1, d_model=96, d_ff=72, gated=True,
                        bias=True),
    dataclasses.replace(BASE, name="tile-128-clamped", tokens=150, experts=1, d_ff=72, gated=True, bias=True,
                        activation="clamped_swiglu"),
    # More slots than one block sorts.
    dataclasses.replace(BASE, name="many-slots", tokens=8448, d_model=32, d_ff=32, experts=8, routing="even"),
    dataclasses.replace(BASE, name="float32-clamped", dtype="float32", tokens=20, d_model=32, d_ff=37, gated=True,
                        bias=True, activation="clamped_swiglu"),
]  # fmt: skip


# Every kernel that a layer on one rank may launch, at its best. Choices are dealt out evenly, so that tiles are full.
ALIGNED = [
    Case(f"aligned-{t}-{dtype}{'-gated' * gated}-top{k}", tokens=t, d_model=d, d_ff=f, experts=e, choices=k,
         dtype=dtype, gated=gated, routing="even", activation="silu" if gated else "relu", bias=True)
    for dtype, sizes in (("bfloat16", ((256, 1, 256), (192, 3, 256), (64, 4, 256))), ("float16", ((256, 1, 256),)),
                         ("float32", ((128, 1, 128), (64, 1, 128), (32, 2, 128))))
    for t, e, width in sizes
    for d, f in ((width, width),)
    for gated, k in ((False, 1), (True, 2))
]  # fmt: skip


def inputs(case: Case) -> dict[str, torch.Tensor | None]:
    """Random tokens, choices and weights, scaled as a trained model's, in the dtype of the case."""
    seed = torch.Generator().manual_seed(case.seed)
    dtype = getattr(torch, case.dtype)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=seed, dtype=torch.float64) * scale).to(dtype)

    E, T, K, D, F = case.experts, case.tokens, case.choices, case.d_model, case.d_ff
    index = torch.randint(0, E, (T, K), generator=seed)
    if case.routing == "one":
        index[:] = 0
    elif case.routing == "even":
        index = torch.arange(T * K).view(T, K) % E
    elif case.routing == "dropped":
        index[torch.rand((T, K), generator=seed) < 1 / 3] = -1
    elif case.routing == "none":
        index[:] = -1
    rows = 2 * F if case.gated else F
    return {
        "hidden": normal(T, D, scale=6.0 if case.activation == "clamped_swiglu" else 1.0),  # beyond its clamps too
        "index": index.int() if case.seed % 2 else index,
        "weights": torch.rand((T, K), generator=seed).to(torch.float32 if T % 2 else dtype),
        "w_in": normal(E, rows, D, scale=D**-0.5),
        "w_out": normal(E, D, F, scale=F**-0.5),
        "b_in": normal(E, rows) if case.bias else None,
        "b_out": normal(E, D) if case.bias else None,
    }


def sum_error(case: Case, terms: int) -> float:
    """The error of a sum of that many products in fp32, relative to the sum of their absolute values."""
    if case.dtype != "float32" and os.environ.get("PTXSIM_MMA", "exact") != "exact" or not simdev.simulated:
        return 3e-5  # tensor cores align products and cut (arXiv 2511.10909); measured by ptxsim's models
    return (terms + 4) * 2.0**-24


def reference(case: Case, given: dict[str, torch.Tensor | None]) -> tuple[np.ndarray, np.ndarray]:
    """The output in float64, and the bound of the error of each of its elements: [T, D] both."""
    array = {name: None if tensor is None else tensor.double().numpy() for name, tensor in given.items()}
    x, index, weights = array["hidden"], given["index"].numpy(), array["weights"]
    act, u = ACTIVATIONS[case.activation], ROUNDING[case.dtype]
    t_in, t_out = sum_error(case, case.d_model), sum_error(case, case.d_ff)
    out, bound = np.zeros_like(x), np.zeros_like(x)
    for e in range(case.experts):
        tokens, choices = np.nonzero(index == e)
        if not len(tokens):
            continue
        w_in, w_out = array["w_in"][e], array["w_out"][e]
        up, terms = x[tokens] @ w_in.T, np.abs(x[tokens]) @ np.abs(w_in).T
        if case.bias:
            up, terms = up + array["b_in"][e], terms + np.abs(array["b_in"][e])
        error = t_in * terms
        if case.gated:
            gate, up, gate_error, up_error = (*np.split(up, 2, axis=1), *np.split(error, 2, axis=1))
            if case.activation == "clamped_swiglu":
                up = np.clip(up, -7, 7) + 1
            h = act(gate) * up
            # An activation in fp32 is right to some units of its argument's last place.
            gate_error = SLOPE * gate_error + 8 * 2.0**-24 * (np.abs(gate) + 1)
            h_error = gate_error * (np.abs(up) + up_error) + np.abs(act(gate)) * up_error
        else:
            h = act(up)
            h_error = SLOPE * error + 8 * 2.0**-24 * (np.abs(up) + 1) * (case.activation not in ("identity", "relu"))
        h_error = h_error + u * (np.abs(h) + h_error) + TINY[case.dtype]
        y, y_terms = h @ w_out.T, (np.abs(h) + h_error) @ np.abs(w_out).T
        y_error = h_error @ np.abs(w_out).T
        if case.bias:
            y, y_terms = y + array["b_out"][e], y_terms + np.abs(array["b_out"][e])
        y_error = y_error + t_out * y_terms
        scale = weights[tokens, choices, None]
        np.add.at(out, tokens, scale * y)
        np.add.at(bound, tokens, np.abs(scale) * (y_error + case.choices * 2.0**-23 * y_terms))
    return out, bound + u * (np.abs(out) + bound) + TINY[case.dtype]


def run(case: Case) -> str | None:
    """None, or what is wrong."""
    given = inputs(case)
    expected, bound = reference(case, given)
    weights = {name: given[name] for name in ("w_in", "w_out", "b_in", "b_out")}
    call = [given[name] for name in ("hidden", "index", "weights")]
    kind = {"activation": case.activation, "gated": case.gated}

    def on_device(tensor: torch.Tensor | None) -> simdev.Tensor | None:
        return None if tensor is None else simdev.to_device(tensor)

    packed = moeshard.pack(**{name: on_device(tensor) for name, tensor in weights.items()}, **kind)
    out = simdev.empty((case.tokens, case.d_model), case.dtype)  # NaN: what is not written shows
    packed(*map(on_device, call), out)
    found = out.torch()
    again = packed(*map(on_device, call))
    if not torch.equal(found.view(torch.uint8), again.torch().view(torch.uint8)):
        return "a second call has other bits"

    on_cpu = moeshard.pack(**weights, **kind)(*call)
    error = np.abs(found.double().numpy() - expected)
    apart = np.abs(found.double().numpy() - on_cpu.double().numpy())
    for what, difference, allowed in (("float64", error, bound), ("the CPU engine", apart, 2 * bound)):
        if not (difference <= allowed).all():  # NaN is not <=
            worst = np.unravel_index(np.argmax(np.nan_to_num(difference / allowed, nan=np.inf)), difference.shape)
            return (
                f"{what}: {int((~(difference <= allowed)).sum())} of {difference.size} elements off; at {worst}: "
                f"found {float(found[worst])}, expected {expected[worst]}, allowed {allowed[worst]:.2e}"
            )
    return None


def main(names: list[str]) -> int:
    """Run, print a line per case, and return how many failed."""
    if names == ["--aligned"]:
        names, everything = [], ALIGNED
    else:
        everything = CASES
    cases = [case for case in everything if not names or any(name in case.name for name in names)]
    failures = 0
    for seed, case in enumerate(cases):
        try:
            problem = run(dataclasses.replace(case, seed=seed))
        except moeshard.CudaError as error:
            problem = str(error)  # sticky, if a kernel failed: then all that follows fails too
        failures += problem is not None
        print(f"{'ok  ' if problem is None else 'FAIL'} {case.name}{'' if problem is None else ': ' + problem}")
    return failures


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
