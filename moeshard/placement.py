# SPDX-License-Identifier: Apache-2.0
"""Placement: which rank holds which whole expert, from recorded routing, for expert parallelism; needs no torch.

The work is done in C (csrc/plan/placement.h says how); here are the arguments, the result, its tables and files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import _core
from .paths import TokenPaths
from .plans import Plan, check_layers, find_layer
from .tables import Tabular

if TYPE_CHECKING:
    from .reports import Report

Method = Literal["contiguous", "balanced", "two-stage", "sweep", "exact"]
_METHODS: tuple[Method, ...] = ("contiguous", "balanced", "two-stage", "sweep", "exact")
_FORMAT = 1  # of the JSON


class Hops(NamedTuple):
    """What a placement does to the hops: pairs (expert of a token in a layer, expert of the token in the next).

    Attributes:
        total: ``[L - 1]`` int64: hops from each layer to the next.
        local: ``[L - 1]`` int64: those whose two experts are on one rank.
        most: ``[L - 1]`` int64: no placement with equally many experts a rank has more local ones.
        gap: ``[L]`` int64: local hops that another placement of this layer alone, the others as they are, could win at
            most: a Lagrangian dual less what there is. 0: proved to be the best.
    """

    total: NDArray[np.int64]
    local: NDArray[np.int64]
    most: NDArray[np.int64]
    gap: NDArray[np.int64]


class Unbalanceable(NamedTuple):
    """An expert with more slots than a rank's whole share: no placement of whole experts balances its layer.

    Attributes:
        layer: the layer's name.
        expert: its number.
        share: its slots over those of the layer: more than 1 / ranks.
    """

    layer: str
    expert: int
    share: float


@dataclass(frozen=True, eq=False, repr=False)
class Placement(Tabular):
    """Which rank holds which whole expert. Made by :func:`moeshard.place`; prints as a table, in a notebook as HTML.

    ``moeshard.shard(model, plan=this)`` carries it out.

    Attributes:
        owner: ``[L, E]`` int32, read-only: the rank of each expert of each layer; -1: cut over all ranks.
        ranks: number of ranks R.
        counts: ``[L, E]`` int64, read-only: slots (token, choice) of each expert that it was planned for.
        layers: names of the layers.
        method: how it was made.
        slack: how much heavier than ``bound`` a rank was allowed to be.
        hops: what it does to hops. ``None``: only counts were known.
        remote_contiguous: the share of remote hops of contiguous blocks of experts, for comparison.
        remote_held_out: the share of remote hops of this method on tokens that it has not seen: planned on the first
            half of the tokens, scored on the second. The number to expect; ``remote`` fits the recorded tokens, chance
            included. ``None``: not measured.
        loads: ``[L, R]`` float64: slots of each rank; those of an expert that is cut count 1 / R on each.
        bound: ``[L]`` float64: the heaviest rank cannot be below it: max(mean, hottest whole expert).
        cap: ``[L]`` float64: what the heaviest rank was allowed: ``(1 + slack) * bound``, or the heaviest rank of the
            balanced placement where equal numbers of experts leave no better one.
    """

    owner: NDArray[np.int32]
    ranks: int
    counts: NDArray[np.int64]
    layers: tuple[str, ...]
    method: str
    slack: float
    hops: Hops | None = None
    remote_contiguous: float | None = None
    remote_held_out: float | None = None
    loads: NDArray[np.float64] = field(init=False)
    bound: NDArray[np.float64] = field(init=False)
    cap: NDArray[np.float64] = field(init=False)

    columns = ("layer", "experts a rank", "heaviest rank", "at best", "remote hops", "at least", "gap", "unbalanceable")

    def __post_init__(self) -> None:
        """Copy, check and freeze the arrays; weigh the ranks."""
        owner, counts = np.array(self.owner, np.int32, order="C"), np.array(self.counts, np.int64, order="C")
        if owner.ndim != 2 or counts.shape != owner.shape or len(self.layers) != len(owner):
            raise _core.ShapeError(
                f"placement: expected owner and counts [L, E] and L names, got {list(owner.shape)}, "
                f"{list(counts.shape)} and {len(self.layers)}"
            )
        load, bound, cap, *_ = _core.place_measure(owner, counts, self.ranks, self.slack, apart=owner < 0, gap=False)
        cut = np.where(owner < 0, counts, 0).sum(axis=1) / self.ranks
        arrays = {
            "owner": owner,
            "counts": counts,
            "loads": load + cut[:, None],
            "bound": bound + cut,
            "cap": cap + cut,
        }
        for name, array in arrays.items():
            array.flags.writeable = False
            object.__setattr__(self, name, array)

    @property
    def num_experts(self) -> int:
        """Number of experts E of a layer."""
        return int(self.owner.shape[1])

    @property
    def remote(self) -> float | None:
        """The share of hops whose experts are on different ranks, on the tokens that it was planned for.

        Hops to or from an expert that is cut over all ranks are remote. ``None``: only counts were known.
        """
        return None if self.hops is None else _remote(self.hops.local, self.hops.total)

    @property
    def remote_at_least(self) -> float | None:
        """No placement with equally many experts a rank has a smaller share of remote hops. ``None``: as ``remote``."""
        return None if self.hops is None else _remote(self.hops.most, self.hops.total)

    @property
    def gap(self) -> float | None:
        """What changing one layer alone could take from ``remote`` at most. ``None``: as ``remote``."""
        if self.hops is None:
            return None
        return float(self.hops.gap.max()) / max(int(self.hops.total.sum()), 1)

    @property
    def imbalance(self) -> float:
        """The heaviest rank over the mean rank, of the worst layer; 1 is perfect."""
        return float((self.loads.max(axis=1) / _positive(self.loads.mean(axis=1))).max())

    @property
    def unbalanceable(self) -> tuple[Unbalanceable, ...]:
        """Experts with more slots than a rank's whole share, hottest first; cut or not.

        Example:
            >>> place([[70, 10, 10, 10]], ranks=2).unbalanceable
            (Unbalanceable(layer='layer 0', expert=0, share=0.7),)
        """
        totals = self.counts.sum(axis=1, keepdims=True)
        found = np.argwhere(self.counts * self.ranks > totals) if self.ranks > 1 else ()
        experts = [
            Unbalanceable(self.layers[layer], int(e), float(self.counts[layer, e] / totals[layer, 0]))
            for layer, e in found
        ]
        return tuple(sorted(experts, key=lambda expert: -expert.share))

    def for_layer(self, layer: int | str, d_ff: int) -> Plan:
        """The layout of a layer: whole experts on their ranks; those without a rank cut over all.

        Args:
            layer: its number or name; names count as in :meth:`moeshard.ModelPlan.for_layer`.
            d_ff: hidden width F of its experts.

        Raises:
            ArgumentError: there is no such layer in this placement, or a width below 1.

        Example:
            >>> place([[70, 10, 10, 10]], ranks=2, cut_unbalanceable=True).for_layer(0, d_ff=8).columns[:, :2].tolist()
            [[[0, 4], [0, 8]], [[4, 8], [0, 0]]]
        """
        number = find_layer(self.layers, layer, "placement") if isinstance(layer, str) else layer
        if not 0 <= number < len(self.layers):
            raise _core.ArgumentError(f"layer: expected 0 to {len(self.layers) - 1}, got {number}")
        owner = self.owner[number]
        whole = Plan.expert_parallel(self.ranks, self.num_experts, d_ff, np.maximum(owner, 0).tolist())
        if (owner >= 0).all():
            return whole
        cut = Plan.shard(self.ranks, self.num_experts, d_ff)
        return Plan.from_columns(np.where((owner < 0)[:, None], cut.columns, whole.columns), d_ff)

    def check_layers(self, names: Sequence[str]) -> None:
        """Check that the placement has no layer that a model does not have.

        Raises:
            ArgumentError: it has; names them.
        """
        check_layers(self.layers, names)

    def remote_on(self, paths: TokenPaths) -> float:
        """The share of remote hops for other tokens.

        Args:
            paths: of the same layers and experts.

        Raises:
            ShapeError: of others.

        Example:
            >>> paths = TokenPaths([[[0], [1]], [[1], [1]]], num_experts=2)
            >>> place(paths, ranks=2, method="contiguous").remote_on(paths)
            0.5
        """
        if paths.experts.shape[1] != len(self.layers) or paths.num_experts != self.num_experts:
            raise _core.ShapeError(
                f"paths: expected {len(self.layers)} layers of {self.num_experts} experts, got "
                f"{paths.experts.shape[1]} of {paths.num_experts}"
            )
        if not len(paths):
            return 0.0
        hops = _measure(self.owner, paths.counts, self.ranks, self.slack, paths.hops(), gap=False)
        return _remote(hops.local, hops.total)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON; :meth:`from_dict` takes them."""
        return {
            "moeshard_placement": _FORMAT,
            "ranks": self.ranks,
            "layers": list(self.layers),
            "owner": self.owner.tolist(),
            "counts": self.counts.tolist(),
            "method": self.method,
            "slack": self.slack,
            "hops": self.hops and {name: array.tolist() for name, array in self.hops._asdict().items()},
            "remote_contiguous": self.remote_contiguous,
            "remote_held_out": self.remote_held_out,
            # What follows is for readers; from_dict computes it again.
            "remote": self.remote,
            "remote_at_least": self.remote_at_least,
            "imbalance": self.imbalance,
            "loads": self.loads.tolist(),
            "bound": self.bound.tolist(),
            "cap": self.cap.tolist(),
            "unbalanceable": [expert._asdict() for expert in self.unbalanceable],
        }

    @classmethod
    def from_dict(cls, numbers: dict[str, Any]) -> Placement:
        """Take what :meth:`to_dict` has given.

        Raises:
            ArgumentError: the numbers are of another kind or version.
        """
        version = numbers.get("moeshard_placement") if isinstance(numbers, dict) else None
        if version != _FORMAT:
            raise _core.ArgumentError(f"placement: expected format {_FORMAT}, got {version}")
        try:
            hops = numbers["hops"] and Hops(**{key: np.array(row, np.int64) for key, row in numbers["hops"].items()})
            return cls(
                owner=np.array(numbers["owner"], np.int32),
                ranks=int(numbers["ranks"]),
                counts=np.array(numbers["counts"], np.int64),
                layers=tuple(numbers["layers"]),
                method=str(numbers["method"]),
                slack=float(numbers["slack"]),
                hops=hops,
                remote_contiguous=numbers["remote_contiguous"],
                remote_held_out=numbers["remote_held_out"],
            )
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, _core.MoeshardError):
                raise
            raise _core.ArgumentError(f"placement: cannot be read: {type(error).__name__}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write JSON.

        Raises:
            OSError: the file cannot be written.
        """
        Path(path).write_text(json.dumps(self.to_dict()) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Placement:
        """Read what :meth:`save` has written.

        Raises:
            ArgumentError: the file is of another kind or version.
            OSError: the file cannot be read.

        Example:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     place([[3, 1, 2, 2]], ranks=2).save(f"{folder}/placement.json")
            ...     Placement.load(f"{folder}/placement.json").owner.tolist()
            [[0, 0, 1, 1]]
        """
        try:
            numbers = json.loads(Path(path).read_text())
        except ValueError as error:  # no JSON, or no text
            raise _core.ArgumentError(f"{path}: this is no placement that moeshard has saved: {error}") from error
        return cls.from_dict(numbers)

    def title(self) -> str:
        """How it was made, and what it does to hops."""
        text = (
            f"moeshard placement: {self.method}, {len(self.layers)} layers of {self.num_experts} experts on "
            f"{self.ranks} ranks"
        )
        if self.remote is None:
            return f"{text}; counts without token paths: only the load is balanced, nothing is known about hops"
        others = [
            f"{name} {share:.1%}"
            for name, share in (
                ("on unseen tokens", self.remote_held_out),
                ("contiguous blocks", self.remote_contiguous),
                ("no placement below", self.remote_at_least),
            )
            if share is not None
        ]
        return f"{text}; remote hops {self.remote:.1%} ({', '.join(others)})"

    def cells(self) -> Iterator[tuple[str, ...]]:
        """One row a layer; hops are those to the next layer."""
        unbalanceable = self.unbalanceable
        for number, name in enumerate(self.layers):
            mean = max(float(self.loads[number].mean()), 1e-9)
            held = np.bincount(self.owner[number][self.owner[number] >= 0], minlength=self.ranks)
            low, high = int(held.min()), int(held.max())
            remote, least, gap = "-", "-", "-"
            if self.hops is not None:
                total, local, most, gaps = self.hops
                gap = f"{gaps[number] / max(int(total.sum()), 1):.2%}"
                if number + 1 < len(self.layers):
                    remote = f"{_remote(local[number], total[number]):.1%}"
                    least = f"{_remote(most[number], total[number]):.1%}"
            yield (
                name,
                f"{low}" if low == high else f"{low}..{high}",
                f"{self.loads[number].max() / mean:.3f} x mean",
                f"{self.bound[number] / mean:.3f} x mean",
                remote,
                least,
                gap,
                " ".join(f"{e.expert} ({e.share:.0%})" for e in unbalanceable if e.layer == name) or "none",
            )

    def __repr__(self) -> str:
        """Sizes, method and the two aims."""
        remote = "" if self.remote is None else f", remote={self.remote:.3f}"
        return (
            f"Placement({len(self.layers)} layers, {self.num_experts} experts, {self.ranks} ranks, {self.method}, "
            f"imbalance={self.imbalance:.3f}{remote})"
        )


def place(
    routing: TokenPaths | Report | Mapping[str, Sequence[int]] | NDArray[np.int64] | Sequence[Sequence[int]],
    ranks: int,
    *,
    method: Method = "sweep",
    slack: float = 0.02,
    starts: int = 4,
    seed: int = 0,
    cut_unbalanceable: bool = False,
    polish: bool = False,
    held_out: bool = True,
) -> Placement:
    """Give each expert whole to one rank: equal loads in every layer, and a token's next expert on the same rank.

    Every rank gets equally many experts of a layer (or one more, where they do not divide), and at most
    ``(1 + slack) * max(mean, hottest expert)`` slots. Within that, hops between ranks are made few.

    Args:
        routing: token paths of :func:`moeshard.record_routing`. Or counts, by which only the load is balanced: what
            :func:`moeshard.report` returned, ``[E]`` by layer name, or ``[L, E]`` (layers without the names by which
            ``shard`` finds them).
        ranks: number of ranks R.
        method: ``"contiguous"``: blocks of consecutive experts, whatever the routing. ``"balanced"``: loads only, the
            longest first. ``"two-stage"``: MoETuner's: balanced, then clusters are mapped to ranks. ``"sweep"``: layer
            by layer with its neighbours fixed, until none changes; never worse than two-stage. ``"exact"``: the best,
            for small cases (16 experts on 2 ranks).
        slack: see above; 0.02 is 2 %.
        starts: of ``"sweep"``: two-stage, then random ones; the best is kept.
        seed: of the random ones. Equal arguments give equal placements.
        cut_unbalanceable: experts with more slots than a rank's whole share (of what is left when hotter ones are cut)
            are cut over all ranks instead of placed: the layout is mixed, and balanced again. Their hops are remote.
        polish: afterwards solve each layer, its neighbours fixed, as a mixed-integer program, until none gains: needs
            scipy (``pip install 'moeshard[plan]'``), and minutes for large layers.
        held_out: measure ``remote_held_out``, which takes as long again.

    Returns:
        The placement.

    Raises:
        ArgumentError: an unknown method, ``ranks`` or ``starts`` below 1, a negative slack or seed, ``"exact"`` on a
            large case or on counts.
        ShapeError, DTypeError, RangeError: counts that are not ``[L, E]`` integers of 0 or more.
        ImportError: ``polish`` without scipy.

    Example:
        >>> paths = TokenPaths([[[0], [1]], [[0], [1]], [[1], [0]], [[1], [0]]], num_experts=2)
        >>> place(paths, ranks=2)
        Placement(2 layers, 2 experts, 2 ranks, sweep, imbalance=1.000, remote=0.000)
        >>> place([[5, 3, 2, 4]], ranks=2).loads.tolist()
        [[7.0, 7.0]]

    Source: MoETuner, arXiv 2502.06643, for the problem and "two-stage"; csrc/plan/sweep.c for "sweep".
    """
    if method not in _METHODS:
        raise _core.ArgumentError(f"method: expected one of {', '.join(_METHODS)}, got {method!r}")
    if not 0 <= seed < 2**64:
        raise _core.ArgumentError(f"seed: expected 0 to 2**64 - 1, got {seed}")
    if not isinstance(routing, TokenPaths):
        counts, names = _counts(routing)
        _check_ranks(ranks)
        apart = _hotter_than_share(counts, ranks) if cut_unbalanceable else None
        how: Method = method if method in ("contiguous", "exact") else "balanced"
        owner = _core.place(how, counts, ranks, slack, apart=apart)
        return Placement(owner, ranks, counts, names, how, slack)

    _check_ranks(ranks)

    def planned(paths: TokenPaths) -> NDArray[np.int32]:
        counts = paths.counts
        apart = _hotter_than_share(counts, ranks) if cut_unbalanceable else None
        hops = paths.hops() if len(paths) else None
        how: Method = "balanced" if method == "exact" and hops is None else method  # nothing to be exact about
        owner = _core.place(how, counts, ranks, slack, hops, apart, starts, seed)
        return _polished(owner, paths, ranks, slack) if polish and len(paths) else owner

    owner, counts = planned(routing), routing.counts
    placement = Placement(owner, ranks, counts, routing.layers, f"{method}, polished" if polish else method, slack)
    if not len(routing):
        return placement
    blocks = Placement(
        _core.place("contiguous", counts, ranks, slack), ranks, counts, routing.layers, "contiguous", slack
    )
    half = len(routing) // 2
    unseen = None
    if held_out and half and len(routing.layers) > 1:
        first = placement if method == "contiguous" else _with_owner(placement, planned(routing[:half]))
        unseen = first.remote_on(routing[half:])
    return Placement(
        owner,
        ranks,
        counts,
        routing.layers,
        placement.method,
        slack,
        hops=_measure(owner, counts, ranks, slack, routing.hops()),
        remote_contiguous=blocks.remote_on(routing),
        remote_held_out=unseen,
    )


def _with_owner(placement: Placement, owner: NDArray[np.int32]) -> Placement:
    return Placement(owner, placement.ranks, placement.counts, placement.layers, placement.method, placement.slack)


def _counts(rows: Any) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Counts and names of the layers, of a report, a mapping or a table."""
    if hasattr(rows, "layers"):
        rows = {layer.name: layer.histogram for layer in rows.layers}
    names = tuple(rows) if isinstance(rows, Mapping) else None
    try:
        counts = np.asarray(rows if names is None else list(rows.values()))
    except ValueError as error:
        raise _core.ShapeError(f"routing: expected equally many experts in all layers: {error}") from error
    if counts.dtype.kind not in "iu":
        raise _core.DTypeError(f"routing: expected token paths, or counts of integers, got {counts.dtype}")
    if counts.ndim != 2 or 0 in counts.shape:
        raise _core.ShapeError(f"routing: expected counts [layers, experts], got {list(counts.shape)}")
    if int(counts.max()) > np.iinfo(np.int64).max:
        raise _core.RangeError(f"routing: got {int(counts.max())}, expected at most 2^44 slots in a layer")
    return counts.astype(np.int64), names or tuple(f"layer {number}" for number in range(len(counts)))


def _check_ranks(ranks: object) -> None:
    if not isinstance(ranks, int) or ranks < 1:
        raise _core.ArgumentError(f"ranks: expected a positive integer, got {ranks!r}")


def _hotter_than_share(counts: NDArray[np.int64], ranks: int) -> NDArray[np.bool_]:
    """Experts to be cut: above a rank's share of what is not cut, until no other is."""
    apart = np.zeros(counts.shape, np.bool_)
    while ranks > 1:
        rest = np.where(apart, 0, counts)
        hot = rest * ranks > rest.sum(axis=1, keepdims=True)
        if not hot.any():
            break
        apart |= hot
    return apart


def _measure(
    owner: NDArray[np.int32],
    counts: NDArray[np.int64],
    ranks: int,
    slack: float,
    hops: _core.Hops,
    gap: bool = True,
) -> Hops:
    _, _, _, local, most, gaps = _core.place_measure(owner, counts, ranks, slack, hops, owner < 0, gap)
    return Hops(_core.hops_totals(hops), local, most, gaps)


def _remote(local: NDArray[np.int64] | np.int64, total: NDArray[np.int64] | np.int64) -> float:
    return 1 - float(local.sum()) / float(total.sum()) if total.sum() else 0.0


def _positive(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(values > 0, values, 1.0)


def _polished(owner: NDArray[np.int32], paths: TokenPaths, ranks: int, slack: float) -> NDArray[np.int32]:
    """Solve layers whose gap is open as mixed-integer programs, in turn, until none gains."""
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import block_array, eye_array, kron
    except ImportError as error:
        raise ImportError("polish needs scipy: pip install 'moeshard[plan]'") from error

    counts, hops, table = paths.counts, paths.hops(), paths.transitions
    apart = owner < 0
    owner = owner.copy()
    _, _, cap, *_ = _core.place_measure(owner, counts, ranks, slack, hops, apart, False)
    again = True
    while again:
        again = False
        *_, gaps = _core.place_measure(owner, counts, ranks, slack, hops, apart)
        for layer in np.flatnonzero(gaps).tolist():
            placed = np.flatnonzero(~apart[layer])
            here = owner[layer, placed]
            benefit = np.zeros((len(placed), ranks), np.int64)
            for other, seen in ((layer - 1, table[layer - 1].T), (layer + 1, table[min(layer, len(table) - 1)])):
                if 0 <= other < len(owner):
                    on_rank = owner[other][:, None] == np.arange(ranks)
                    benefit += seen[placed] @ on_rank.astype(np.int64)
            few, wide = divmod(len(placed), ranks)
            ones = np.ones((1, len(placed)))
            rows = block_array(
                [
                    [kron(eye_array(len(placed)), np.ones((1, ranks)))],  # each expert on one rank
                    [kron(ones, eye_array(ranks))],  # as many on each
                    [kron(counts[layer, placed][None], eye_array(ranks))],  # no rank above the cap
                ]
            )
            low = np.concatenate([np.ones(len(placed)), np.full(ranks, few), np.zeros(ranks)])
            high = np.concatenate([np.ones(len(placed)), np.full(ranks, few + (wide > 0)), np.full(ranks, cap[layer])])
            solved = milp(
                -benefit.reshape(-1),
                integrality=np.ones(benefit.size),
                bounds=Bounds(0, 1),
                constraints=LinearConstraint(rows.tocsr(), low, high),
                options={"node_limit": 2000, "mip_rel_gap": 0.0},  # nodes, not seconds: the same everywhere
            )
            if solved.x is None:
                continue
            # The solver keeps to its constraints within a tolerance, which is many slots of a hot expert.
            better = solved.x.reshape(benefit.shape).argmax(axis=1)
            held = np.bincount(better, minlength=ranks)
            load = np.zeros(ranks, np.int64)
            np.add.at(load, better, counts[layer, placed])
            keeps_to = held.min() >= few and held.max() <= few + (wide > 0) and load.max() <= cap[layer]
            every = np.arange(len(placed))
            if keeps_to and benefit[every, better].sum() > benefit[every, here].sum():
                owner[layer, placed] = better
                again = True
    return owner
