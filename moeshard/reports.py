# SPDX-License-Identifier: Apache-2.0
"""What a sharded model did: tokens, routing, and each rank's share of the work, as a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from .plans import Plan
from .tables import Tabular, percent

if TYPE_CHECKING:
    from torch import nn

    from .layer import ShardedExperts

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


@dataclass(frozen=True, eq=False)
class LayerReport:
    """One MoE layer.

    Attributes:
        name: the layer's name in the model.
        plan: its layout.
        slots: (token, choice) pairs that came in, over all ranks and calls.
        dropped: those without an expert, padding that ``skip_padding`` left out among them.
        histogram: ``[E]`` int64: slots of each expert.
        share_of_work: ``[R]``: each rank's share under the layer's plan.
        share_of_work_expert_parallel: ``[R]``: the same if whole experts were dealt to the ranks.
        nbytes: this rank's packed weights.
        nbytes_all: the weights of all experts, in the same dtype.
    """

    name: str
    plan: Plan
    slots: int
    dropped: int
    histogram: NDArray[np.int64]
    share_of_work: NDArray[np.float64]
    share_of_work_expert_parallel: NDArray[np.float64]
    nbytes: int
    nbytes_all: int

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {
            "name": self.name,
            "num_experts": self.plan.num_experts,
            "d_ff": self.plan.d_ff,
            "slots": self.slots,
            "dropped": self.dropped,
            "histogram": self.histogram.tolist(),
            "share_of_work": self.share_of_work.tolist(),
            "share_of_work_expert_parallel": self.share_of_work_expert_parallel.tolist(),
            "nbytes": self.nbytes,
            "nbytes_all": self.nbytes_all,
        }


@dataclass(frozen=True, eq=False)
class Report(Tabular):
    """What a sharded model did so far. Prints as a table, in a notebook as HTML, with rich as a rich table.

    Attributes:
        layers: one entry per MoE layer, in the model's order.
        rank: this rank.
        ranks: number of ranks.
    """

    layers: tuple[LayerReport, ...]
    rank: int
    ranks: int

    columns = ("layer", "experts", "tokens", "dropped", "hottest expert", "share of work", "expert parallel", "memory")

    @property
    def share_of_work(self) -> NDArray[np.float64]:
        """``[R]``: each rank's share of the work of all layers, under their plans."""
        return _whole([layer.plan.work(layer.histogram) for layer in self.layers])

    @property
    def share_of_work_expert_parallel(self) -> NDArray[np.float64]:
        """``[R]``: the same if whole experts were dealt to the ranks."""
        return _whole([_expert_parallel(layer.plan).work(layer.histogram) for layer in self.layers])

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {
            "rank": self.rank,
            "ranks": self.ranks,
            "share_of_work": self.share_of_work.tolist(),
            "share_of_work_expert_parallel": self.share_of_work_expert_parallel.tolist(),
            "layers": [layer.to_dict() for layer in self.layers],
        }

    def title(self) -> str:
        """How much was sharded."""
        return f"moeshard: {len(self.layers)} MoE layers on {self.ranks} rank{'s' * (self.ranks > 1)}"

    def cells(self) -> Iterator[tuple[str, ...]]:
        """One row a layer."""
        for layer in self.layers:
            routed = layer.slots - layer.dropped
            hottest = int(layer.histogram.argmax())
            yield (
                layer.name,
                str(layer.plan.num_experts),
                f"{layer.slots:,}",
                f"{layer.dropped:,}",
                f"{hottest}: {layer.histogram[hottest] / routed:.0%}" if routed else "none",
                percent(layer.share_of_work),
                percent(layer.share_of_work_expert_parallel),
                f"{layer.nbytes / 2**20:.1f} of {layer.nbytes_all / 2**20:.1f} MiB",
            )


def report(model: nn.Module) -> Report:
    """Tell what the MoE layers of a sharded model did since :func:`moeshard.shard`. Not collective.

    Args:
        model: a sharded model; every rank has the counts of all ranks.

    Returns:
        The report; ``print`` it, or show it in a notebook.

    Raises:
        ArgumentError: the model is not sharded.

    Example:
        >>> print(moeshard.report(model))  # doctest: +SKIP
    """
    from .layer import sharded_layers

    layers = sharded_layers(model)
    group = layers[0][1].group
    return Report(tuple(_layer(name, layer) for name, layer in layers), group.rank, group.size)


def _layer(name: str, layer: ShardedExperts) -> LayerReport:
    plan, packed = layer.plan, layer.packed
    element = ELEMENT_BYTES[packed.dtype]
    matrices = 3 if packed.gated else 2
    return LayerReport(
        name=name,
        plan=plan,
        slots=layer.slots,
        dropped=layer.slots - int(layer.counts.sum()),
        histogram=layer.counts.copy(),
        share_of_work=plan.share(layer.counts),
        share_of_work_expert_parallel=_expert_parallel(plan).share(layer.counts),
        nbytes=packed.nbytes,
        nbytes_all=packed.num_experts * matrices * packed.d_model * packed.d_ff * element,
    )


def _expert_parallel(plan: Plan) -> Plan:
    return Plan.expert_parallel(plan.ranks, plan.num_experts, plan.d_ff)


def _whole(work: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    total = np.sum(work, axis=0)
    return cast("NDArray[np.float64]", total / total.sum() if total.sum() else total)
