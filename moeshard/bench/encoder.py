# SPDX-License-Identifier: Apache-2.0
"""Time to first token: the forward pass of a whole Switch encoder, with the MoE layers of each contestant.

HuggingFace as it is, HuggingFace with DeepSpeed's MoE layers put in, and moeshard, on the same weights and tokens. No
contestant drops a token. This file makes the grid, runs it, sums up what the ranks measured (encoder_rank.py) and shows
it: a table, JSON, a plot.
"""

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from .. import doctor, palette
from ..errors import ArgumentError

if TYPE_CHECKING:
    from ..launcher import Ranks
    from .encoder_rank import Check

SUMMARY = "time to first token of a Switch encoder: HuggingFace, DeepSpeed's MoE layers, moeshard"
TOLERANCE = 1e-5  # max|difference| / max|output| over the whole encoder, where no router decided otherwise

Contestant = Literal["hf", "deepspeed", "moeshard"]
Routing = Literal["own", "skew"]

CONTESTANTS: tuple[Contestant, ...] = ("hf", "deepspeed", "moeshard")
ROUTINGS: tuple[Routing, ...] = ("own", "skew")
NAMES = {"hf": "HuggingFace", "deepspeed": "DeepSpeed", "moeshard": "moeshard"}

TIMEOUT = 600.0  # seconds that a rank may be late: passes of HuggingFace do not wait for each other
HEAD = 64  # width of an attention head in every Switch checkpoint
VOCABULARY = 32128  # of every Switch checkpoint
FILLED = 0.75  # of the machine's memory, by the experts' weights
HOT_ONE_IN, HOT_EXTRA = 10, 0.6  # the paper's skew
ROUNDS, MOE_PASSES = 3, 3  # passes of each contestant: timed at least, watched at most


@dataclass(frozen=True)
class Case:
    """What one forward pass is given.

    Attributes:
        routing: ``"own"``: random routers; ``"skew"``: routers forced to the paper's skew.
        batch: sequences of each rank.
        length: tokens of a sequence.
    """

    routing: Routing
    batch: int
    length: int


@dataclass(frozen=True)
class Row:
    """One contestant's measurements in one case; the names are those of the JSON file.

    Attributes:
        experts: of an MoE layer.
        moe_layers: of the encoder's ``layers``.
        layers: all of them.
        ranks: processes, each with a batch of its own.
        threads_per_rank: of torch and of moeshard.
        routing: ``"own"`` or ``"skew"``.
        batch: sequences of each rank.
        length: tokens of a sequence.
        contestant: ``"hf"``, ``"deepspeed"`` or ``"moeshard"``.
        seconds: median time of a forward pass of the slowest rank.
        seconds_all: what the median is of.
        over_moeshard: ``seconds`` over moeshard's in the same case.
        moe_share: share of its pass that a rank spends in MoE layers, from separate passes: median over these of the
            ranks' mean. Waiting for other ranks inside MoE layers counts.
        max_rel_diff: largest difference from HuggingFace's output, relative to its largest value.
        sequences_compared: over how many sequences of all ranks; in the others a router decided otherwise, or its best
            two experts are closer than rounding errors.
        hot_share: share of the tokens that go to the busiest tenth of the experts, mean over MoE layers.
    """

    experts: int
    moe_layers: int
    layers: int
    ranks: int
    threads_per_rank: int
    routing: Routing
    batch: int
    length: int
    contestant: Contestant
    seconds: float
    seconds_all: list[float]
    over_moeshard: float
    moe_share: float
    max_rel_diff: float
    sequences_compared: int
    hot_share: float


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's options.

    Args:
        parser: of the subcommand.
    """
    add = parser.add_argument
    add("--quick", action="store_true", help="8 experts, batches of 1 and 4, 2 s a case: under 2 minutes")
    add("--experts", type=_positive, nargs="+", help="of an MoE layer (default: 8 128)")
    add("--batches", type=_positive, nargs="+", help="sequences of each rank (default: 1 8 32)")
    add("--ranks", type=_positive, nargs="+", default=[1, 2], help="(default: 1 2)")
    add("--seconds", type=float, help=f"to repeat each case, {ROUNDS} times at least (default: 20)")
    add("--json", type=Path, metavar="FILE", help="write the results to FILE, after each case")
    add("--plot", type=Path, metavar="FILE", default=Path("moeshard-encoder.png"), help="(default: %(default)s)")
    shape = parser.add_argument_group("shape", "the defaults are those of switch-base")
    shape.add_argument("--length", type=_positive, default=128, help="tokens of a sequence (default: %(default)s)")
    shape.add_argument("--layers", type=_positive, default=12, help="of the encoder (default: %(default)s)")
    shape.add_argument("--d-model", type=_positive, default=768, help="a multiple of 64 (default: %(default)s)")
    shape.add_argument("--d-ff", type=_positive, default=3072, help="hidden width of an expert (default: %(default)s)")
    shape.add_argument("--seed", type=int, default=0, help="of weights and tokens (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    """Run the benchmark and show its results.

    Args:
        options: as declared by :func:`add_options`.

    Returns:
        0, or 1 if an output differs from HuggingFace's by more than 1e-5, or none could be compared.

    Raises:
        ArgumentError: an option that cannot be used, or a library is missing (says how to install it).
    """
    try:
        import matplotlib  # noqa: F401  (for the plot at the end)

        from . import rival_deepspeed
    except ImportError as error:
        raise ArgumentError(f"the benchmark needs {error.name}: pip install 'moeshard[hf,demo]'") from error

    experts = options.experts or ([8] if options.quick else [8, 128])
    batches = options.batches or ([1, 4] if options.quick else [1, 8, 32])
    budget = options.seconds if options.seconds is not None else 2.0 if options.quick else 20.0
    for path in (options.json, options.plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise ArgumentError(f"{path}: there is no folder {path.parent}")
    configs = [_config(options, number, max(options.ranks)) for number in experts]
    cases = [Case(routing, batch, options.length) for batch in batches for routing in ROUTINGS]
    missing = {"deepspeed": reason} if (reason := rival_deepspeed.unavailable()) is not None else {}
    for name, why in missing.items():
        print(f"Without {NAMES[name]}: {why}")

    rows: list[Row] = []
    with _progress(len(configs) * len(options.ranks) * len(cases)) as advance:
        for config, ranks in itertools.product(configs, options.ranks):
            names = tuple(name for name in CONTESTANTS if name not in missing)
            if config["num_experts"] % ranks:  # DeepSpeed deals them out evenly or not at all
                names = tuple(name for name in names if name != "deepspeed")
            for found in _run_encoder(config, options.seed, ranks, names, cases, budget):
                rows += found
                advance(1)
                if options.json:
                    options.json.write_text(json.dumps(_report(options, budget, missing, rows), indent=1) + "\n")
    _print_table(rows)
    if options.json:
        print(f"Results: {options.json}")
    plot(rows, options.plot)
    print(f"Plot: {options.plot}")
    bad = [row for row in rows if not row.max_rel_diff <= TOLERANCE or not row.sequences_compared]
    for row in bad:
        print(
            f"FAILED: {NAMES[row.contestant]}, {row.experts} experts, {row.ranks} ranks, {row.batch} x {row.length}, "
            f"{row.routing}: difference {row.max_rel_diff:.1e} over {row.sequences_compared} sequences"
        )
    return 1 if bad else 0


def shares_of_experts(routing: Routing, experts: int) -> NDArray[np.float64]:
    """How often each expert is wanted.

    Args:
        routing: ``"own"``: all alike (the routers then decide by themselves); ``"skew"``: each of the first
            ``ceil(E / 10)`` has 0.6 added to its ``1 / E``, then all are divided by their sum.
        experts: E.

    Returns:
        ``[E]``, sum 1.

    Example:
        >>> round(float(shares_of_experts("skew", 128)[:13].sum()), 2)
        0.9

    Source: arXiv 2503.08467, section 4, for the skew.
    """
    shares = np.full(experts, 1 / experts)
    if routing == "skew":
        shares[: _hot(experts)] += HOT_EXTRA
    normalised: NDArray[np.float64] = shares / shares.sum()
    return normalised


def sparse_layers(layers: int, wanted: int) -> tuple[int, int]:
    """How Switch spreads MoE layers: every step-th layer, from the second on.

    Args:
        layers: of the encoder.
        wanted: MoE layers at most, at least 1.

    Returns:
        The most that Switch's configuration can have, up to ``wanted`` and one in two; the number to configure.

    Example:
        >>> sparse_layers(12, 5)
        (4, 4)
    """
    best = (0, 0)
    for configured in range(1, max(1, layers // 2) + 1):
        step = layers // configured
        found = layers if step == 1 else len(range(1, layers, step))
        if best[0] < found <= wanted:
            best = (found, configured)
    return best


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw each contestant's time, MoE and the rest apart, relative to HuggingFace's.

    Args:
        rows: what :func:`run` measured.
        path: the picture; its ending decides the format.

    Raises:
        ImportError: matplotlib is missing.
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    colours = {"hf": palette.GREY, "deepspeed": palette.RED, "moeshard": palette.BLUE}
    encoders = sorted({(row.experts, row.ranks, row.moe_layers, row.layers) for row in rows})
    figure = Figure(figsize=(max(7.0, 4.2 * len(encoders)), 4.4), layout="constrained")
    for axes, encoder in zip(figure.subplots(1, len(encoders), squeeze=False, sharey=True)[0], encoders, strict=True):
        mine = [row for row in rows if (row.experts, row.ranks, row.moe_layers, row.layers) == encoder]
        cases = list(dict.fromkeys((row.batch, row.length, row.routing) for row in mine))
        hf = {(row.batch, row.routing): row.seconds for row in mine if row.contestant == "hf"}
        for row in mine:
            place = cases.index((row.batch, row.length, row.routing)) + 0.27 * (CONTESTANTS.index(row.contestant) - 1)
            height = row.seconds / hf[row.batch, row.routing]
            rest = height * (1 - row.moe_share)
            style = palette.area(colours[row.contestant])
            axes.bar(place, rest, 0.25, alpha=0.45, **style)
            axes.bar(place, height - rest, 0.25, bottom=rest, **style)
            label = _milliseconds(row.seconds)
            axes.text(place, height, label, ha="center", va="bottom", fontsize=6, rotation=90)
        axes.axhline(1, color=palette.GREY, linewidth=1, linestyle="--")
        axes.set_xticks(range(len(cases)), [f"{batch}x{length}\n{routing}" for batch, length, routing in cases])
        experts, ranks, moe, layers = encoder
        axes.set_title(f"{experts} experts, {moe} of {layers} layers, {ranks} {_plural(ranks, 'rank')}", fontsize=10)
        axes.margins(y=0.12)
    figure.supylabel("time of a forward pass (HuggingFace = 1; ms on the bars)", fontsize=10)
    present = [name for name in CONTESTANTS if any(row.contestant == name for row in rows)]
    handles = [Patch(label=NAMES[name], **palette.area(colours[name])) for name in present]
    handles.append(Patch(color="black", alpha=0.3, label="lighter: outside MoE layers"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=150)


def _run_encoder(
    config: dict[str, int], seed: int, ranks: int, names: tuple[Contestant, ...], cases: Sequence[Case], budget: float
) -> Iterator[list[Row]]:
    """One encoder on a number of ranks: a case's rows at a time. Its memory is free again afterwards."""
    from ..launcher import launch
    from .encoder_rank import Job, prepare

    with launch(ranks, timeout=TIMEOUT) as workers:
        threads = workers.run(_threads)[0]
        workers.run(prepare, Job(config, seed, names))
        for case in cases:
            yield _run_case(workers, config, threads, names, case, budget)


def _run_case(
    workers: "Ranks", config: dict[str, int], threads: int, names: tuple[Contestant, ...], case: Case, budget: float
) -> list[Row]:
    """Verify, then time everyone alternately until the budget is spent, then watch where the time goes."""
    from .encoder_rank import check, measure, measure_moe

    checks = workers.run(check, case)
    seconds: dict[Contestant, list[float]] = {name: [] for name in names}
    for order in _rounds(names, budget, ROUNDS, math.inf):
        found = workers.run(measure, order)
        for name in names:
            seconds[name].append(max(rank[name] for rank in found))
    shares: dict[Contestant, list[float]] = {name: [] for name in names}
    for order in _rounds(names, budget / 4, 1, MOE_PASSES):
        found = workers.run(measure_moe, order)
        for name in names:
            shares[name].append(statistics.mean(rank[name] for rank in found))
    return [summarize(config, case, name, len(checks), threads, checks, seconds, shares[name]) for name in names]


def summarize(
    config: dict[str, int],
    case: Case,
    name: Contestant,
    ranks: int,
    threads: int,
    checks: "Sequence[Check]",
    seconds: dict[Contestant, list[float]],
    moe_shares: Sequence[float],
) -> Row:
    """Put what the ranks found about one contestant in one case together."""
    counts = np.sum([rank.counts for rank in checks], axis=0)  # [L, E]
    busiest = np.sort(counts, axis=1)[:, -_hot(config["num_experts"]) :]
    median = statistics.median(seconds[name])
    magnitude = max(rank.magnitude for rank in checks)
    difference = max(rank.difference[name] for rank in checks)
    return Row(
        experts=config["num_experts"],
        moe_layers=len(counts),
        layers=config["num_layers"],
        ranks=ranks,
        threads_per_rank=threads,
        routing=case.routing,
        batch=case.batch,
        length=case.length,
        contestant=name,
        seconds=median,
        seconds_all=seconds[name],
        over_moeshard=median / statistics.median(seconds["moeshard"]),
        moe_share=statistics.median(moe_shares),
        max_rel_diff=difference / magnitude if magnitude else math.inf,
        sequences_compared=sum(case.batch - rank.left_out[name] for rank in checks),
        hot_share=float((busiest.sum(1) / counts.sum(1)).mean()),
    )


def _rounds(names: tuple[Contestant, ...], budget: float, least: int, most: float) -> Iterator[tuple[Contestant, ...]]:
    """Orders of the contestants, each in the other direction than the one before, while there is time."""
    start = time.monotonic()
    for number in itertools.count():
        if number >= most or (number >= least and time.monotonic() - start > budget):
            return
        yield names[::-1] if number % 2 else names


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _positive(word: str) -> int:
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


def _hot(experts: int) -> int:
    return -(-experts // HOT_ONE_IN)


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.3g}"


def _plural(count: int, word: str) -> str:
    return word if count == 1 else f"{word}s"


def _config(options: argparse.Namespace, experts: int, ranks: int) -> dict[str, int]:
    """The model's configuration, with as many MoE layers as fit: on each rank whole, and packed over all of them."""
    if options.d_model % HEAD:
        raise ArgumentError(f"--d-model: expected a multiple of {HEAD}, got {options.d_model}")
    layer = 4 * experts * 2 * options.d_model * options.d_ff * (ranks + 1)  # bytes
    memory = int(doctor.machine()["memory_bytes"])
    found, configured = sparse_layers(options.layers, max(1, int(FILLED * memory / layer)))
    if not found or layer > FILLED * memory:
        raise ArgumentError(
            f"--experts {experts}: one MoE layer takes {layer / 2**30:.1f} GiB on {ranks} {_plural(ranks, 'rank')}, "
            f"{FILLED:.0%} of this machine's memory are {FILLED * memory / 2**30:.1f}"
        )
    return {
        "vocab_size": VOCABULARY,
        "d_model": options.d_model,
        "d_ff": options.d_ff,
        "d_kv": HEAD,
        "num_heads": options.d_model // HEAD,
        "num_layers": options.layers,
        "num_sparse_encoder_layers": configured,
        "num_experts": experts,
    }


def _report(
    options: argparse.Namespace, budget: float, missing: dict[str, str], rows: Sequence[Row]
) -> dict[str, object]:
    """Everything, for the JSON file."""
    versions = doctor.versions() | ({} if missing else {"deepspeed": metadata.version("deepspeed")})
    return {
        "benchmark": SUMMARY,
        "d_model": options.d_model,
        "d_ff": options.d_ff,
        "vocabulary": VOCABULARY,
        "dtype": "float32",
        "seed": options.seed,
        "seconds_per_case": budget,
        "without": missing,
        "machine": doctor.machine(),
        "versions": versions,
        "rows": [asdict(row) for row in rows],
    }


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], object]]:
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ImportError:
        yield lambda cases: None
        return
    with tqdm(total=total, desc="encoder", unit="case", disable=None) as bar:  # shown on terminals
        yield bar.update


def _print_table(rows: Sequence[Row]) -> None:
    """One line a case: times, how much faster moeshard is, and how much faster it could be at most."""
    cases: dict[tuple[int, int, int, str], dict[Contestant, Row]] = {}
    for row in rows:
        cases.setdefault((row.experts, row.ranks, row.batch, row.routing), {})[row.contestant] = row
    heading = ("E", "R", "batch", "router", "HF", "DS", "ours", "HF/ours", "limit", "DS/ours", "MoE %")
    lines = []
    for (experts, ranks, batch, routing), found in cases.items():
        hf, ours = found["hf"], found["moeshard"]
        deepspeed = found.get("deepspeed")
        shares = "/".join(f"{100 * found[name].moe_share:.0f}" if name in found else "-" for name in CONTESTANTS)
        lines.append(
            (
                f"{experts}",
                f"{ranks}",
                f"{batch}x{hf.length}",
                routing,
                _milliseconds(hf.seconds),
                _milliseconds(deepspeed.seconds) if deepspeed else "-",
                _milliseconds(ours.seconds),
                f"{hf.over_moeshard:.2f}",
                f"{1 / max(1e-3, 1 - hf.moe_share):.2f}",
                f"{deepspeed.over_moeshard:.2f}" if deepspeed else "-",
                shares,
            )
        )
    layers = dict.fromkeys((row.experts, row.moe_layers, row.layers) for row in rows)
    title = "; ".join(f"{experts} experts: {moe} MoE layers of {all_layers}" for experts, moe, all_layers in layers)
    note = (
        "E experts, R ranks with a batch each. HF, DS, ours: ms of a forward pass, median of the slowest rank. "
        "limit: HF/ours if MoE layers took no time. MoE %: of the pass of HF, DS, ours."
    )
    try:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(title)
        for line in (heading, *lines):
            print(" ".join(f"{cell:>8}" for cell in line))
        print(note)
        return
    table = Table(title=title, title_justify="left", caption=note, caption_justify="left", box=SIMPLE_HEAD)
    table.padding, table.pad_edge = (0, 0, 0, 1), False
    for name in heading:
        table.add_column(name, justify="right", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    Console().print(table)
