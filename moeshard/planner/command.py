# SPDX-License-Identifier: Apache-2.0
"""The command `moeshard plan`: its options, and what it prints."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from ..errors import ArgumentError
from ..experts import STORAGES
from ..paths import TokenPaths
from .histograms import parse_skew
from .machines import PRESETS as MACHINES
from .machines import machine
from .planning import KINDS, plan
from .shapes import PRESETS, LayerShape, ModelShape, model_shape

SUMMARY = "choose the layout of every MoE layer for given ranks, and predict what it costs"
DEFAULT = "switch-base-128"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    families = ("auto", *KINDS[:-1])
    model = parser.add_argument_group("the model")
    model.add_argument("--preset", choices=tuple(PRESETS), metavar="NAME", help=f"{', '.join(PRESETS)} ({DEFAULT})")
    model.add_argument("--config", type=Path, metavar="FILE", help="a HuggingFace config.json instead")
    model.add_argument("--layer", metavar="E,D,F,K", help="one layer instead: experts, d_model, d_ff, experts a token")
    model.add_argument("--gated", action="store_true", help="with --layer: experts have a gate matrix")
    model.add_argument("--dtype", choices=STORAGES, help="of the stored weights (as the model's)")
    work = parser.add_argument_group("the tokens")
    work.add_argument("--tokens", type=int, default=1024, metavar="N", help="of each rank in a call (%(default)s)")
    work.add_argument(
        "--skew", metavar="SHARE:PART", help="0.6:0.1: 60 %% of the choices go to 10 %% of the experts (all alike)"
    )
    work.add_argument(
        "--histogram",
        type=Path,
        metavar="FILE",
        help="counts of the experts, [E] or [L, E]: .npy, or .json; or .npz: token paths of moeshard.record_routing",
    )
    ranks = parser.add_argument_group("the ranks")
    ranks.add_argument("--ranks", type=int, default=2, metavar="R", help="(%(default)s)")
    ranks.add_argument(
        "--devices",
        metavar="NAME",
        help=f"{', '.join(MACHINES)}, or a calibration file (this machine; moeshard doctor --calibrate measures it)",
    )
    ranks.add_argument("--hosts", type=int, metavar="H", help="that the ranks are spread over (as the devices say)")
    ranks.add_argument(
        "--layout", choices=families, default="auto", metavar="KIND", help=f"{', '.join(families)} (%(default)s)"
    )
    out = parser.add_argument_group("what comes out")
    out.add_argument("--all", action="store_true", help="also the layouts that were considered")
    out.add_argument("--json", type=Path, metavar="FILE", help="write the plan; moeshard.ModelPlan.load reads it")
    out.add_argument("--plot", type=Path, metavar="FILE", help="draw the alternatives")
    out.add_argument("--map", type=Path, metavar="FILE", help="draw where the best layout changes (needs matplotlib)")
    simulated = parser.add_argument_group("on paper")
    simulated.add_argument("--simulate", action="store_true", help="run every family with routing drawn anew each step")
    simulated.add_argument("--steps", type=int, default=50, metavar="N", help="(%(default)s)")
    simulated.add_argument("--chunks", type=int, default=1, metavar="N", help="pieces that overlap (%(default)s: none)")
    simulated.add_argument(
        "--jitter", type=float, default=0.05, metavar="X", help="spread of ranks' times (%(default)s)"
    )
    simulated.add_argument(
        "--straggler", default="0:2", metavar="P:X", help="chance of a rank to be X times slower (%(default)s)"
    )
    simulated.add_argument("--drift", action="store_true", help="which experts are popular changes with every step")
    simulated.add_argument("--seed", type=int, default=0, metavar="N", help="(%(default)s)")


def run(options: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        0.

    Raises:
        MoeshardError, OSError, ImportError: see :func:`moeshard.plan`.
    """
    model = _model(options)
    histogram = _histogram(options)
    ranks_of = machine(options.devices)
    request = {"ranks": options.ranks, "tokens": options.tokens, "histogram": histogram, "hosts": options.hosts}
    found = plan(model, devices=ranks_of, layout=options.layout, **request)
    print(found)
    if options.all:
        print(f"\n{found.alternatives()}")
    if ranks_of.source:
        print(f"\n{ranks_of.name}: {ranks_of.source}")
    if options.json:
        found.save(options.json)
        print(f"written to {options.json}")
    if options.plot:
        found.plot(options.plot)
        print(f"drawn in {options.plot}")
    if options.simulate:
        from .simulation import Disorder, simulate

        chance, factor = _pair("--straggler", options.straggler)
        disorder = Disorder(options.steps, options.chunks, options.jitter, chance, factor, options.drift, options.seed)
        print(f"\n{simulate(model, devices=ranks_of, disorder=disorder, **request)}")
    if options.map:
        from .maps import Point, draw, flip_map

        shape = model.layers[0]
        skew = parse_skew(options.skew)[0] if options.skew else 0.1
        start = Point(options.ranks, options.tokens, shape.top_k, skew)
        title = (
            f"the best layout of a layer of {model.name} on {ranks_of.name}; around {start.tokens} tokens a rank, "
            f"top {start.top_k}, {100 * skew:.0f} % of choices to 10 % of the experts"
        )
        draw(flip_map(shape, ranks_of, start), title, options.map)
        print(f"drawn in {options.map}")
    return 0


def _model(options: argparse.Namespace) -> ModelShape:
    given = [name for name in ("preset", "config", "layer") if getattr(options, name)]
    if len(given) > 1:
        raise ArgumentError(f"expected one of --{', --'.join(given)}")
    if options.gated and not options.layer:
        raise ArgumentError("--gated: only with --layer")
    if options.config:
        found = model_shape(json.loads(options.config.read_text()))
    elif options.layer:
        try:
            experts, d_model, d_ff, top_k = (int(number) for number in options.layer.split(","))
        except ValueError:
            raise ArgumentError(f"--layer: expected E,D,F,K such as 128,768,3072,1, got {options.layer!r}") from None
        found = model_shape(LayerShape("layer", experts, d_model, d_ff, top_k, options.gated))
    else:
        found = model_shape(options.preset or DEFAULT)
    return found.with_dtype(options.dtype) if options.dtype else found


def _histogram(options: argparse.Namespace) -> object:
    if options.skew and options.histogram:
        raise ArgumentError("expected one of --skew, --histogram")
    path: Path | None = options.histogram
    if path is None:
        return options.skew
    if path.suffix == ".npy":
        return np.load(path, allow_pickle=False)
    if path.suffix == ".json":
        return json.loads(path.read_text())
    if path.suffix == ".npz":
        return TokenPaths.load(path)
    raise ArgumentError(f"--histogram: expected a .npy, .json or .npz file, got {path}")


def _pair(name: str, text: str) -> tuple[float, float]:
    first, colon, second = text.partition(":")
    try:
        return float(first), float(second if colon else "nothing")
    except ValueError:
        raise ArgumentError(f"{name}: expected two numbers with a colon, got {text!r}") from None
