# SPDX-License-Identifier: Apache-2.0
"""``moeshard demo``: a Switch encoder over several ranks on real English, beside HuggingFace's own.

This file makes the job, sums up what the ranks measured (demo_rank.py) and shows it: tables, JSON, a plot.
"""

import argparse
import contextlib
import json
import math
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from . import doctor, palette, text
from .errors import ArgumentError
from .plans import Plan

if TYPE_CHECKING:
    from .demo_rank import Facts, Job, Pair
    from .launcher import Ranks

SUMMARY = "shard a Switch encoder over several ranks, feed it English, and compare with HuggingFace's own"
TOLERANCE = 1e-5  # max|difference| / max|output| over the whole encoder, where no router flip explains more

SEQUENCES, LENGTH = 16, 256  # of a batch
TIMEOUT = 600.0  # seconds that a rank may be late: HuggingFace's passes do not wait for each other
HEAD = 64  # width of an attention head in every Switch checkpoint
HOT_SHARE, HOT_ONE_IN = 0.6, 10  # the skewed router sends 60 % of the tokens to one expert in 10


@dataclass(frozen=True)
class Outcome:
    """All ranks' measurements under one routing; the names are those of the JSON file.

    Attributes:
        tokens: of all ranks.
        tokens_dropped: (token, MoE layer) pairs that no expert took; sharded model.
        tokens_dropped_by_default_capacity: pairs that HuggingFace's default capacity would have dropped.
        seconds: median time of a forward pass of the sharded model: of its slowest rank.
        seconds_hf: the same for HuggingFace's model on every rank.
        seconds_all, seconds_hf_all: what the medians are of.
        max_rel_diff: largest difference between the two outputs, relative to the largest output.
        max_rel_diff_without_flips: the same over sequences in which both routers decided alike.
        router_flips: (token, MoE layer) pairs for which the two routers decided differently (near ties).
        share_of_work: of each rank, sharded, for the routing that occurred.
        share_of_work_expert_parallel: of each rank, if the experts were dealt out whole.
        busiest_rank: work of the busiest rank of each layer over an even share, mean over layers: 1 is balance.
        busiest_rank_expert_parallel: the same, if the experts were dealt out whole.
        hot_share: share of the tokens that went to the experts that the skewed router prefers.
        tokens_per_expert: per MoE layer, tokens of each expert.
    """

    tokens: int
    tokens_dropped: int
    tokens_dropped_by_default_capacity: int
    seconds: float
    seconds_hf: float
    seconds_all: list[float]
    seconds_hf_all: list[float]
    max_rel_diff: float
    max_rel_diff_without_flips: float
    router_flips: int
    share_of_work: list[float]
    share_of_work_expert_parallel: list[float]
    busiest_rank: float
    busiest_rank_expert_parallel: float
    hot_share: float
    tokens_per_expert: list[list[int]]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the demo's options.

    Args:
        parser: of the subcommand.
    """
    add = parser.add_argument
    add("--ranks", type=_positive, default=2, help="worker processes, each a rank (default: %(default)s)")
    add("--model", metavar="PATH_OR_NAME", help="a Switch checkpoint with its tokenizer, in place of seeded weights")
    add("--tokens", type=_positive, default=8192, help="tokens for each rank, at least (default: %(default)s)")
    add("--threads", type=_positive, help="threads of each rank (default: the cores over the ranks)")
    add("--repeats", type=_positive, default=2, help="times that every batch is run (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the results to FILE")
    add("--plot", type=Path, metavar="FILE", default=Path("moeshard-demo.png"), help="(default: %(default)s)")
    shape = parser.add_argument_group("seeded model (not with --model)", "the defaults are switch-base-8's shape")
    shape.add_argument("--experts", type=_positive, default=8, help="of an MoE layer (default: %(default)s)")
    shape.add_argument("--layers", type=_positive, default=12, help="every second one is MoE (default: %(default)s)")
    shape.add_argument("--d-model", type=_positive, default=768, help="a multiple of 64 (default: %(default)s)")
    shape.add_argument("--d-ff", type=_positive, default=3072, help="hidden width of an expert (default: %(default)s)")
    shape.add_argument("--seed", type=int, default=0, help="of the weights (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    """Run the demo and show its results.

    Args:
        options: as declared by :func:`add_options`.

    Returns:
        0, or 1 if the outputs differ by more than 1e-5 where no router flip explains it.

    Raises:
        ArgumentError: an option that cannot be used, or a library is missing (says how to install it).
    """
    try:
        import matplotlib  # noqa: F401  (for the plot at the end)

        from .demo_rank import Job, prepare
    except ImportError as error:
        raise ArgumentError(f"the demo needs {error.name}: pip install 'moeshard[hf,demo]'") from error
    from .launcher import launch

    for path in (options.json, options.plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise ArgumentError(f"{path}: there is no folder {path.parent}")
    documents, vocabulary = _documents(options.model)
    job = Job(options.model, _config(options, vocabulary), options.seed, _batches(documents, options))
    threads = options.threads or max(1, len(os.sched_getaffinity(0)) // options.ranks)
    sequences, length = job.batches[0][0].shape
    weights = options.model or f"seeded, not trained (seed {options.seed})"
    print(
        f"{options.ranks} ranks, {threads} {'thread' if threads == 1 else 'threads'} each; a forward pass takes "
        f"{sequences} x {length} tokens a rank.\nText: Python's help topics. Weights: {weights}.",
        flush=True,
    )
    passes = options.repeats * len(job.batches[0])
    with launch(options.ranks, threads=threads, timeout=TIMEOUT) as ranks, _progress(4 * passes) as advance:
        facts = ranks.run(prepare, job)
        natural, skewed = _measure(ranks, passes, len(job.batches[0]), facts, advance)

    _print_table(natural, skewed, facts)
    if options.json:
        everything = asdict(natural) | {"skewed": asdict(skewed)} | _circumstances(options, threads, job, facts)
        options.json.write_text(json.dumps(everything, indent=2) + "\n")
        print(f"Results: {options.json}")
    plot(natural, skewed, options.plot)
    print(f"Plot: {options.plot}")
    if max(natural.max_rel_diff_without_flips, skewed.max_rel_diff_without_flips) > TOLERANCE:
        print(f"FAILED: the outputs differ by more than {TOLERANCE:g} where no router flip explains it")
        return 1
    return 0


def _measure(
    ranks: "Ranks", passes: int, batches: int, facts: "Sequence[Facts]", advance: Callable[[int], object]
) -> tuple[Outcome, Outcome]:
    """Run the batches in turn through both models, with the router as it is and then with a skewed one."""
    from .demo_rank import compare, skew

    hot = _hot(facts[0].columns.shape[1])

    def measure() -> Outcome:
        pairs = []
        for number in range(passes):
            pairs.append(ranks.run(compare, number % batches, ours_first=number % 2 == 1))
            advance(2)
        return summarize(pairs, batches, facts, hot)

    natural = measure()
    if hot < facts[0].columns.shape[1]:
        ranks.run(skew, hot, HOT_SHARE)
    return natural, measure()


def summarize(passes: "Sequence[Sequence[Pair]]", batches: int, facts: "Sequence[Facts]", hot: int) -> Outcome:
    """Put the ranks' measurements under one routing together.

    Args:
        passes: for each forward pass, one measurement per rank.
        batches: how many passes it takes to see every token once; later ones are repetitions.
        facts: what each rank holds.
        hot: number of experts, the first ones, that the skewed router prefers.

    Returns:
        The outcome. A forward pass takes as long as its slowest rank.
    """
    once = [pair for ranks in passes[:batches] for pair in ranks]
    every = [pair for ranks in passes for pair in ranks]
    counts = np.sum([ranks[0].counts for ranks in passes[:batches]], axis=0)  # [L, E], of all ranks
    seconds = [max(pair.seconds for pair in ranks) for ranks in passes]
    seconds_hf = [max(pair.seconds_hf for pair in ranks) for ranks in passes]
    magnitude = max(pair.magnitude for pair in every)
    sharded = np.array([(counts * rank.columns).sum(1) for rank in facts], float)  # [R, L] work
    owned = Plan.expert_parallel(len(facts), counts.shape[1], facts[0].d_ff)
    dealt_out = np.array([owned.work(layer) for layer in counts]).T
    dropped = sum(ranks[0].dropped for ranks in passes[:batches])
    return Outcome(
        tokens=(int(counts.sum()) + dropped) // len(counts),
        tokens_dropped=dropped,
        tokens_dropped_by_default_capacity=sum(pair.dropped_by_default for pair in once),
        seconds=statistics.median(seconds),
        seconds_hf=statistics.median(seconds_hf),
        seconds_all=seconds,
        seconds_hf_all=seconds_hf,
        max_rel_diff=_ratio(max(pair.difference for pair in every), magnitude),
        max_rel_diff_without_flips=_ratio(max(pair.difference_without_flips for pair in every), magnitude),
        router_flips=sum(pair.flips for pair in once),
        share_of_work=(sharded.sum(1) / sharded.sum()).tolist(),
        share_of_work_expert_parallel=(dealt_out.sum(1) / dealt_out.sum()).tolist(),
        busiest_rank=float((sharded.max(0) / sharded.mean(0)).mean()),
        busiest_rank_expert_parallel=float((dealt_out.max(0) / dealt_out.mean(0)).mean()),
        hot_share=float(counts[:, :hot].sum() / counts.sum()),
        tokens_per_expert=counts.tolist(),
    )


def plot(natural: Outcome, skewed: Outcome, path: Path) -> None:
    """Draw share of work, time per forward pass and tokens per expert.

    Args:
        natural: with the router as it is.
        skewed: with the skewed router.
        path: the picture; its ending decides the format.

    Raises:
        ImportError: matplotlib is missing.
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    work, time, load = figure.subplots(1, 3, width_ratios=(1.2, 0.9, 1.2))
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2), "ncols": 2, "frameon": False}

    ranks = len(natural.share_of_work)
    places = np.concatenate([np.arange(ranks), np.arange(ranks) + ranks + 0.6])
    sharded = natural.share_of_work + skewed.share_of_work
    dealt_out = natural.share_of_work_expert_parallel + skewed.share_of_work_expert_parallel
    work.bar(places - 0.2, 100 * np.array(sharded), 0.4, label="moeshard", **palette.area(palette.BLUE))
    work.bar(places + 0.2, 100 * np.array(dealt_out), 0.4, label="expert parallel", **palette.area(palette.ORANGE))
    work.axhline(100 / ranks, color=palette.GREY, linewidth=1, linestyle="--")
    work.set_xticks(places, [str(rank) for rank in range(ranks)] * 2)
    work.set_xlabel("rank (left: router as it is, right: skewed router)")
    work.set_ylabel("share of the experts' work (%)")
    work.set_title("Work of each rank")
    work.legend(**below)

    for offset, colour, label in ((-0.2, palette.BLUE, "moeshard"), (0.2, palette.GREY, "HuggingFace")):
        for place, outcome in enumerate((natural, skewed)):
            ours = label == "moeshard"
            passes = outcome.seconds_all if ours else outcome.seconds_hf_all
            shown = None if place else label
            time.bar(place + offset, statistics.median(passes), 0.4, label=shown, **palette.area(colour))
            time.plot([place + offset] * len(passes), passes, "k.", markersize=3)
    time.set_xticks([0, 1], ["router as it is", "skewed router"])
    time.set_ylabel("time of a forward pass (s)")
    time.set_title("Median (bars) and each pass (dots)")
    time.legend(**below)

    for outcome, colour, style, label in (
        (natural, palette.GREEN, "-", "router as it is"),
        (skewed, palette.RED, "--", "skewed router"),
    ):
        tokens = np.mean(outcome.tokens_per_expert, axis=0)
        edges = np.arange(len(tokens) + 1) - 0.5
        load.stairs(tokens, edges, color=colour, linestyle=style, label=label, linewidth=2)
    load.set_ylim(bottom=0)
    load.xaxis.get_major_locator().set_params(integer=True)
    load.set_xlabel("expert")
    load.set_ylabel("tokens (mean over MoE layers)")
    load.set_title("Tokens of each expert")
    load.legend(**below)
    figure.savefig(path, dpi=150)


def _positive(word: str) -> int:
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


def _config(options: argparse.Namespace, vocabulary: int) -> dict[str, int]:
    if options.d_model % HEAD:
        raise ArgumentError(f"--d-model: expected a multiple of {HEAD}, got {options.d_model}")
    return {
        "vocab_size": vocabulary,
        "d_model": options.d_model,
        "d_ff": options.d_ff,
        "d_kv": HEAD,
        "num_heads": options.d_model // HEAD,
        "num_layers": options.layers,
        "num_sparse_encoder_layers": max(1, options.layers // 2),
        "num_experts": options.experts,
    }


def _documents(model: str | None) -> tuple[list[list[int]], int]:
    """Token ids of each document, and the size of the vocabulary."""
    topics = text.english()
    if model is None:
        own = text.train_tokenizer(topics)
        return [encoding.ids for encoding in own.encode_batch(topics)], own.get_vocab_size()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return tokenizer(topics, verbose=False)["input_ids"], len(tokenizer)


def _batches(documents: list[list[int]], options: argparse.Namespace) -> list[list[NDArray[np.int64]]]:
    """Each rank's batches: its own stretch of the text."""
    length = min(LENGTH, options.tokens)
    each = -(-options.tokens // length)
    rows = text.sequences(documents, options.ranks * each, length).reshape(options.ranks, each, length)
    return [np.split(mine, range(SEQUENCES, each, SEQUENCES)) for mine in rows]


def _circumstances(
    options: argparse.Namespace, threads: int, job: "Job", facts: "Sequence[Facts]"
) -> dict[str, object]:
    """What the results were measured on."""
    layers, experts = facts[0].columns.shape
    return {
        "ranks": options.ranks,
        "threads_per_rank": threads,
        "weights": options.model or "seeded",
        "seed": options.seed,
        "tokens_per_rank": sum(batch.size for batch in job.batches[0]),
        "batch": list(job.batches[0][0].shape),
        "repeats": options.repeats,
        "moe_layers": layers,
        "experts": experts,
        "d_ff": facts[0].d_ff,
        "parameters": facts[0].parameters,
        "default_capacity": facts[0].capacity,
        "weight_bytes": [rank.weight_bytes for rank in facts],
        "weight_bytes_hf": [rank.weight_bytes_hf for rank in facts],
        "machine": doctor.machine(),
        "versions": doctor.versions(),
    }


def _hot(experts: int) -> int:
    return -(-experts // HOT_ONE_IN)


def _ratio(difference: float, magnitude: float) -> float:
    return difference / magnitude if magnitude else math.inf


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[int], object]]:
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ImportError:
        yield lambda passes: None
        return
    with tqdm(total=total, desc="forward passes", unit="pass", disable=None) as bar:  # shown on terminals
        yield bar.update


def _print_table(natural: Outcome, skewed: Outcome, facts: "Sequence[Facts]") -> None:
    rank = facts[0]
    layers, experts = rank.columns.shape
    hot = _hot(experts)

    def row(label: str, form: Callable[[Outcome], str]) -> tuple[str, str, str]:
        return label, form(natural), form(skewed)

    def shares(values: list[float]) -> str:
        return " ".join(f"{100 * value:.1f}" for value in values) + " %"

    rows = [
        row("tokens", lambda o: f"{o.tokens:,}"),
        row("tokens dropped", lambda o: f"{o.tokens_dropped:,}"),
        row(
            f"  HuggingFace's default capacity ({rank.capacity})",
            lambda o: shares([o.tokens_dropped_by_default_capacity / (o.tokens * layers)]),
        ),
        row(f"tokens of {hot} of {experts} experts", lambda o: shares([o.hot_share])),
        row("share of the work, each rank", lambda o: shares(o.share_of_work)),
        row("  under expert parallelism", lambda o: shares(o.share_of_work_expert_parallel)),
        row("busiest rank of a layer", lambda o: f"{o.busiest_rank:.2f} x even"),
        row("  under expert parallelism", lambda o: f"{o.busiest_rank_expert_parallel:.2f} x even"),
        row("time per forward pass", lambda o: f"{o.seconds:.3g} s"),
        row("  HuggingFace, same cores", lambda o: f"{o.seconds_hf:.3g} s"),
        row("largest relative difference", lambda o: f"{o.max_rel_diff:.1e}"),
        row("router flips", lambda o: f"{o.router_flips}"),
    ]
    weights = max(each.weight_bytes for each in facts) / 2**30
    rows += [
        ("weights of a rank", f"{weights:.2f} GiB", ""),
        ("  HuggingFace", f"{rank.weight_bytes_hf / 2**30:.2f} GiB", ""),
    ]
    heading = ("router", "as it is", "skewed")
    title = f"{rank.parameters / 1e6:.0f} million parameters, {layers} MoE layers of {experts} experts"
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(title)
        for label, left, right in (heading, *rows):
            print(f"{label:42}{left:>18}{right:>18}".rstrip())
        return
    table = Table(title=title, title_justify="left")
    table.add_column(heading[0], no_wrap=True)
    for name in heading[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    for cells in rows:
        table.add_row(*cells)
    Console().print(table)
