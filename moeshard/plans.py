# SPDX-License-Identifier: Apache-2.0
"""A plan: which rank holds which hidden columns of which expert. One table for every layout; needs no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from . import _core

if TYPE_CHECKING:
    from .placement import Placement
    from .planner.results import ModelPlan


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """The layout of one MoE layer: rank r holds columns ``columns[r, e, 0] .. columns[r, e, 1] - 1`` of expert e.

    Build one with :meth:`shard`, :meth:`expert_parallel`, :meth:`hybrid` or :meth:`from_columns`. A plan is checked
    when it is made (every column of every expert is held by ``copies[e]`` ranks) and cannot be changed afterwards.

    Attributes:
        columns: ``[R, E, 2]`` int64, read-only.
        d_ff: width F of an expert's hidden layer.
        copies: ``[E]`` int32, read-only: how many ranks hold each column of an expert.

    Example:
        >>> Plan.shard(ranks=2, num_experts=4, d_ff=37)
        Plan(ranks=2, num_experts=4, d_ff=37, 18..19 columns of 4 experts a rank)

    Source: arXiv 2503.08467 section 3; deviation: widths need not be equal.
    """

    columns: NDArray[np.int64]
    d_ff: int
    copies: NDArray[np.int32]

    def __post_init__(self) -> None:
        """Copy, check and freeze the table."""
        columns = np.array(self.columns, dtype=np.int64, order="C")
        copies = np.array(self.copies, dtype=np.int32, order="C")
        if columns.ndim != 3 or columns.shape[2] != 2:
            raise _core.ShapeError(f"columns: expected [ranks, experts, 2], got {list(columns.shape)}")
        if copies.shape != columns.shape[1:2]:
            raise _core.ShapeError(f"copies: expected [{columns.shape[1]}] (one per expert), got {list(copies.shape)}")
        _core.plan_check(columns, self.d_ff, copies)
        columns.flags.writeable = copies.flags.writeable = False
        object.__setattr__(self, "columns", columns)
        object.__setattr__(self, "copies", copies)

    @classmethod
    def shard(cls, ranks: int, num_experts: int, d_ff: int, speed: Sequence[float] | None = None) -> Plan:
        """Cut every expert over every rank.

        Args:
            ranks: number of ranks R.
            num_experts: number of experts E.
            d_ff: hidden width F of each expert.
            speed: R positive numbers: widths in proportion to them. ``None``: all alike.

        Returns:
            A plan whose widths differ from the exact share by less than one column; odd columns rotate over the
            ranks with the expert.

        Raises:
            ArgumentError: a size below 1, or a speed that is not positive and finite.

        Example:
            >>> Plan.shard(2, 2, 8, speed=[3, 1]).columns.tolist()
            [[[0, 6], [0, 6]], [[6, 8], [6, 8]]]

        Source: arXiv 2503.08467 section 3; deviation: ragged and weighted widths.
        """
        weights = None if speed is None else np.ascontiguousarray(speed, dtype=np.float64)
        return cls.from_columns(_core.plan_shard(ranks, num_experts, d_ff, weights), d_ff)

    @classmethod
    def expert_parallel(cls, ranks: int, num_experts: int, d_ff: int, owner: Sequence[int] | None = None) -> Plan:
        """Give each expert whole to one rank.

        Args:
            ranks: number of ranks R.
            num_experts: number of experts E.
            d_ff: hidden width F of each expert.
            owner: E ranks. ``None``: contiguous blocks of experts.

        Returns:
            The plan.

        Raises:
            ArgumentError: a size below 1, or an owner outside ``0..R-1``.

        Example:
            >>> Plan.expert_parallel(2, 2, 8).columns.tolist()
            [[[0, 8], [0, 0]], [[0, 0], [0, 8]]]
        """
        owners = None if owner is None else np.ascontiguousarray(owner, dtype=np.int32)
        return cls.from_columns(_core.plan_expert_parallel(ranks, num_experts, d_ff, owners), d_ff)

    @classmethod
    def hybrid(cls, ranks: int, num_experts: int, d_ff: int, group: int) -> Plan:
        """Give blocks of experts to groups of consecutive ranks, and cut them inside the group.

        Args:
            ranks: number of ranks R.
            num_experts: number of experts E.
            d_ff: hidden width F of each expert.
            group: ranks in a group: R is the shard layout, 1 is expert parallelism.

        Returns:
            The plan.

        Raises:
            ArgumentError: a size below 1, or ``ranks`` is not a multiple of ``group``.

        Example:
            >>> Plan.hybrid(4, 2, 8, group=2).columns[:, 0].tolist()
            [[0, 4], [4, 8], [0, 0], [0, 0]]
        """
        return cls.from_columns(_core.plan_hybrid(ranks, num_experts, d_ff, group), d_ff)

    @classmethod
    def from_columns(cls, columns: NDArray[np.int64], d_ff: int, copies: Sequence[int] | None = None) -> Plan:
        """Take any table.

        Args:
            columns: ``[R, E, 2]`` integers: start and stop of the columns that rank r holds of expert e.
            d_ff: hidden width F of each expert.
            copies: E numbers: how many ranks hold each column of an expert. ``None``: one.

        Returns:
            The plan; the table is copied.

        Raises:
            ShapeError: ``columns`` is not ``[R, E, 2]`` or ``copies`` not ``[E]``.
            ArgumentError: a column is held by more or fewer ranks than declared; names expert, column and owners.

        Example:
            >>> Plan.from_columns([[[0, 3]], [[3, 8]]], 8).ranks
            2
        """
        table = np.asarray(columns)
        if table.dtype.kind not in "iu":
            raise _core.DTypeError(f"columns: expected integers, got {table.dtype}")
        ones = np.ones(table.shape[1] if table.ndim == 3 else 0, np.int32)
        return cls(table, d_ff, ones if copies is None else np.asarray(copies, np.int32))

    @property
    def ranks(self) -> int:
        """Number of ranks R."""
        return int(self.columns.shape[0])

    @property
    def num_experts(self) -> int:
        """Number of experts E."""
        return int(self.columns.shape[1])

    @property
    def digest(self) -> str:
        """A short text that is the same for equal plans on every machine."""
        state = hashlib.blake2b(digest_size=8)
        for part in (np.int64(self.d_ff), *self.columns.shape[:2]):
            state.update(np.int64(part).tobytes())
        state.update(self.columns.tobytes())
        state.update(self.copies.tobytes())
        return state.hexdigest()

    def work(self, counts: NDArray[np.int64] | Sequence[int]) -> NDArray[np.float64]:
        """Work of each rank for a routing histogram.

        Args:
            counts: ``[E]`` integers: slots (token, choice) of each expert.

        Returns:
            ``[R]`` float64, in token-columns: ``sum_e counts[e] * columns held``.

        Raises:
            ShapeError: ``counts`` is not ``[E]``.

        Example:
            >>> Plan.expert_parallel(2, 2, 8).work([3, 1]).tolist()
            [24.0, 8.0]
        """
        histogram = np.ascontiguousarray(counts, dtype=np.int64)
        if histogram.shape != (self.num_experts,):
            raise _core.ShapeError(f"counts: expected [{self.num_experts}], got {list(histogram.shape)}")
        return _core.plan_work(self.columns, histogram, self.copies)

    def share(self, counts: NDArray[np.int64] | Sequence[int]) -> NDArray[np.float64]:
        """Share of the work of each rank: :meth:`work` divided by its sum.

        Args:
            counts: ``[E]`` integers: slots (token, choice) of each expert.

        Returns:
            ``[R]`` float64 with sum 1 (all zero if there is no work).

        Raises:
            ShapeError: ``counts`` is not ``[E]``.

        Example:
            >>> Plan.shard(2, 2, 8).share([3, 1]).tolist()
            [0.5, 0.5]
        """
        work = self.work(counts)
        total = work.sum()
        return work / total if total else work

    def __eq__(self, other: object) -> bool:
        """Whether the tables are equal."""
        return (
            isinstance(other, Plan)
            and self.d_ff == other.d_ff
            and np.array_equal(self.columns, other.columns)
            and np.array_equal(self.copies, other.copies)
        )

    def __hash__(self) -> int:
        """Equal plans hash alike."""
        return hash(self.digest)

    def __repr__(self) -> str:
        """Sizes, and how wide the slices are."""
        widths = self.columns[:, :, 1] - self.columns[:, :, 0]
        held = np.count_nonzero(widths, axis=1)
        return (
            f"Plan(ranks={self.ranks}, num_experts={self.num_experts}, d_ff={self.d_ff}, "
            f"{_span(widths[widths > 0])} columns of {_span(held)} experts a rank)"
        )


def _same_layer(one: str, other: str) -> bool:
    """Whether two names mean one layer: equal, or equal but for what stands before a dot."""
    return one == other or one.endswith(f".{other}") or other.endswith(f".{one}")


def find_layer(names: Sequence[str], name: str, what: str) -> int:
    """The number of a layer: the one of that name, or the only one that means the same; without a name, the only one.

    Args:
        names: of the layers that there are.
        name: to be found.
        what: has these layers, for the message.

    Raises:
        ArgumentError: there is no such layer, or more than one.
    """
    if name in names:
        return names.index(name)
    same = [number for number, other in enumerate(names) if not name or _same_layer(other, name)]
    if len(same) != 1:
        raise _core.ArgumentError(f"{what}: it has no layer {name!r}, only {', '.join(names)}")
    return same[0]


def check_layers(planned: Sequence[str], names: Sequence[str]) -> None:
    """Check that a plan has no layer that a model does not have.

    Args:
        planned: the names of its layers.
        names: those of the model's.

    Raises:
        ArgumentError: it has; names them.
    """
    extra = [layer for layer in planned if not any(_same_layer(layer, name) for name in names)]
    if extra and names != [""]:
        raise _core.ArgumentError(
            f"plan: made for {len(planned)} layers, but the model has no {', '.join(extra)}; it has {', '.join(names)}"
        )


PlanChoice: TypeAlias = 'Plan | ModelPlan | Placement | Literal["auto", "shard", "expert_parallel"]'


def plan_for(plan: PlanChoice, ranks: int, num_experts: int, d_ff: int, layer: str = "") -> Plan:
    """The plan of a layer of this size; ``"auto"`` is the shard layout. A Plan must fit it.

    Args:
        plan: a choice of the user's.
        ranks: number of ranks R.
        num_experts: number of experts E.
        d_ff: hidden width F of each expert.
        layer: its name, by which it is found in a :class:`moeshard.ModelPlan` or a :class:`moeshard.Placement`;
            without one, the only layer there.

    Raises:
        ShapeError: the plan is for other sizes.
        ArgumentError: the plan has no such layer, or is none.
    """
    from .placement import Placement  # these two make plans
    from .planner.results import ModelPlan

    if isinstance(plan, ModelPlan):
        plan = plan.for_layer(layer)
    elif isinstance(plan, Placement):
        plan = plan.for_layer(layer, d_ff)
    if isinstance(plan, Plan):
        found = (plan.ranks, plan.num_experts, plan.d_ff)
        if found != (ranks, num_experts, d_ff):
            raise _core.ShapeError(
                f"plan: expected (ranks, experts, d_ff) = {(ranks, num_experts, d_ff)} of the group and the layer, "
                f"got {found}"
            )
        return plan
    if plan in ("auto", "shard"):
        return Plan.shard(ranks, num_experts, d_ff)
    if plan == "expert_parallel":
        return Plan.expert_parallel(ranks, num_experts, d_ff)
    raise _core.ArgumentError(
        "plan: expected a moeshard.Plan, what moeshard.plan or moeshard.place returned, 'auto', 'shard' or "
        f"'expert_parallel', got {plan!r}"
    )


def _span(values: NDArray[np.int64]) -> str:
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    return f"{low}" if low == high else f"{low}..{high}"
