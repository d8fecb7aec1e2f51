# SPDX-License-Identifier: Apache-2.0
"""What the planner answers: a table for each layer, what it costs, what else there was, and why."""

from __future__ import annotations

import base64
import json
import textwrap
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from .. import _core
from ..plans import Plan, check_layers, find_layer
from ..tables import Tabular
from .machines import Machine
from .shapes import LayerShape, ModelShape

FORMAT = "moeshard plan"
VERSION = 1
STEPS = ("route", "gather", "group", "ffn", "combine")


@dataclass(frozen=True)
class StepTimes:
    """Predicted seconds of one call of a layer, of the slowest rank.

    Attributes:
        route: the model's router.
        gather: tokens and choices travel.
        group: choices are sorted by expert.
        ffn: both matrices of the experts.
        combine: sums of the choices and of the ranks travel back.
        sparse: a token travels to the ranks that hold one of its experts (all-to-all), not to all of them.
    """

    route: float
    gather: float
    group: float
    ffn: float
    combine: float
    sparse: bool = False

    @property
    def total(self) -> float:
        """Their sum."""
        return self.route + self.gather + self.group + self.ffn + self.combine


@dataclass(frozen=True)
class Alternative:
    """A layout that was considered.

    Attributes:
        layout: in words.
        kind: its family: ``"shard"``, ``"uneven"``, ``"expert_parallel"``, ``"balanced"``, ``"hybrid"``,
            ``"hot_sharded"``, ``"hot_copied"`` or ``"mixed"``.
        times: predicted.
        memory: bytes of weights on the fullest rank.
        fits: into every rank's memory.
    """

    layout: str
    kind: str
    times: StepTimes
    memory: float
    fits: bool


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """The plan of one MoE layer.

    Attributes:
        shape: the layer.
        plan: its table: which rank holds which columns of which expert.
        layout: what kind of table it is, in words.
        times: predicted seconds of the five steps.
        ffn: ``[R]`` float64: predicted seconds of ffn on each rank, on average.
        memory: ``[R]`` float64: bytes of weights on each rank.
        gathered: ``[R]`` float64: bytes that reach each rank in gather.
        combined: ``[R]`` float64: bytes that reach each rank in combine.
        alternatives: what else was considered, the fastest first; the chosen one is among them.
        proven: every table was looked at, none is predicted to be faster.
        why: one sentence.
    """

    shape: LayerShape
    plan: Plan
    layout: str
    times: StepTimes
    ffn: NDArray[np.float64]
    memory: NDArray[np.float64]
    gathered: NDArray[np.float64]
    combined: NDArray[np.float64]
    alternatives: tuple[Alternative, ...]
    proven: bool
    why: str

    @property
    def name(self) -> str:
        """The layer's name in the model."""
        return self.shape.name


@dataclass(frozen=True, eq=False)
class ModelPlan(Tabular):
    """A plan for every MoE layer of a model. Prints as a table, in a notebook as HTML, with rich as a rich table.

    ``moeshard.shard(model, plan=this)`` carries it out.

    Attributes:
        model: what was planned for.
        ranks: number of ranks R.
        tokens: of each rank.
        machine: what the ranks are.
        layers: one entry per MoE layer, in the model's order.
    """

    model: ModelShape
    ranks: int
    tokens: tuple[float, ...]
    machine: Machine
    layers: tuple[LayerPlan, ...]

    columns: ClassVar[tuple[str, ...]] = (
        "layer", "layout", *STEPS, "total", "slowest/mean rank", "moved a rank", "weights a rank",
    )  # fmt: skip

    @property
    def seconds(self) -> float:
        """Predicted time of all MoE layers, once."""
        return sum(layer.times.total for layer in self.layers)

    def for_layer(self, name: str) -> Plan:
        """The table of a layer.

        Args:
            name: in the model. A name that ends with the planned one (or the other way round) after a dot is the same,
                where only one does.

        Raises:
            ArgumentError: there is no such layer in this plan.

        Example:
            >>> import moeshard
            >>> moeshard.plan("nomic-embed-v2-moe", ranks=2, tokens=64).for_layer("encoder.layers.1.mlp").ranks
            2
        """
        return self.layers[find_layer([layer.name for layer in self.layers], name, "plan")].plan

    def check_layers(self, names: Sequence[str]) -> None:
        """Check that the plan has no layer that a model does not have.

        Raises:
            ArgumentError: it has; names them.
        """
        check_layers([layer.name for layer in self.layers], names)

    # ---- printing -------------------------------------------------------------------------------------

    def title(self) -> str:
        """What was planned for what."""
        hosts = int(self.machine.hosts(self.ranks)[-1]) + 1
        where = f"{self.ranks} ranks" + (f" on {hosts} hosts" if hosts > 1 else "")
        tokens = f"{self.tokens[0]:,.0f}" if len(set(self.tokens)) == 1 else "uneven"
        return (
            f"moeshard plan: {self.model.name}, {where} ({self.machine.name}), {tokens} tokens a rank; "
            f"times predicted, in ms; all MoE layers {milliseconds(self.seconds)} ms"
        )

    def cells(self) -> Iterator[tuple[str, ...]]:
        """A row for each layer."""
        for layer in self.layers:
            times = layer.times
            mean = layer.ffn.mean()
            moved = float((layer.gathered + layer.combined).max())
            yield (
                layer.name,
                layer.layout,
                *(milliseconds(getattr(times, step)) for step in STEPS),
                milliseconds(times.total),
                f"{layer.ffn.max() / mean:.2f}" if mean else "-",
                size(moved),
                size(float(layer.memory.max())),
            )

    def reasons(self) -> dict[str, list[str]]:
        """Each sentence, and the layers that it is about."""
        found: dict[str, list[str]] = {}
        for layer in self.layers:
            found.setdefault(layer.why, []).append(layer.name)
        return found

    def alternatives(self) -> str:
        """The layouts that were considered for the first layer, as a plain table."""
        return str(_Alternatives(self.layers[0]))

    def __str__(self) -> str:
        """The table, then why."""
        lines = [super().__str__(), ""]
        reasons = self.reasons()
        for why, names in reasons.items():
            where = "" if len(reasons) == 1 else f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: "
            lines.append(textwrap.fill(f"{where}{why}", 120))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        import html

        reasons = "".join(f"<p>{html.escape(f'{names[0]}: {why}')}</p>" for why, names in self.reasons().items())
        return super()._repr_html_() + reasons

    def __repr__(self) -> str:
        """Short."""
        return f"ModelPlan({self.model.name}, ranks={self.ranks}, layers={len(self.layers)})"

    def plot(self, path: str | Path) -> None:
        """Draw the alternatives of every layer that differs from those before, split into steps.

        Args:
            path: of the picture.

        Raises:
            ImportError: matplotlib is missing.
            OSError: the picture cannot be written.
        """
        from .maps import plot_plan

        plot_plan(self, Path(path))

    # ---- JSON -----------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and texts. Equal layers share an entry of ``tables``."""
        tables: list[dict[str, Any]] = []
        places: dict[str, int] = {}
        layers = []
        for layer in self.layers:
            place = places.setdefault(layer.plan.digest, len(tables))
            if place == len(tables):
                tables.append(_table(layer.plan))
            layers.append(
                {
                    "shape": asdict(layer.shape),
                    "table": place,
                    "layout": layer.layout,
                    "times": asdict(layer.times),
                    **{name: getattr(layer, name).tolist() for name in _ARRAYS},
                    "alternatives": [asdict(other) for other in layer.alternatives],
                    "proven": layer.proven,
                    "why": layer.why,
                }
            )
        return {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model.name,
            "ranks": self.ranks,
            "tokens": list(self.tokens),
            "machine": self.machine.to_dict(),
            "tables": tables,
            "layers": layers,
        }

    def to_json(self) -> str:
        """As text; :meth:`from_json` reads it."""
        return json.dumps(self.to_dict())

    def save(self, path: str | Path) -> None:
        """Write it to a file.

        Raises:
            OSError: it cannot be written.
        """
        Path(path).write_text(self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file of :meth:`save`.

        Raises:
            ArgumentError: it is something else, or of a later version.
            OSError: it cannot be read.
        """
        return cls.from_json(Path(path).read_text())

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what :meth:`to_json` wrote. Every table is checked.

        Raises:
            ArgumentError: it is something else, or of a later version.

        Example:
            >>> import moeshard
            >>> found = moeshard.plan("nomic-embed-v2-moe", ranks=2, tokens=64)
            >>> ModelPlan.from_json(found.to_json()).layers[0].plan == found.layers[0].plan
            True
        """
        try:
            found = json.loads(text)
        except ValueError as error:
            raise _core.ArgumentError(f"not a plan: not JSON ({error})") from error
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise _core.ArgumentError("not a plan of moeshard: no format 'moeshard plan'")
        if found.get("version") != VERSION:
            raise _core.ArgumentError(f"plan: version {found.get('version')!r}, this moeshard reads {VERSION}")
        try:
            return cls._from_dict(found)
        except (KeyError, TypeError, IndexError, ValueError, zlib.error) as error:
            raise _core.ArgumentError(f"not a plan of moeshard ({type(error).__name__}: {error})") from error

    @classmethod
    def _from_dict(cls, found: Mapping[str, Any]) -> Self:
        tables = [_plan(table) for table in found["tables"]]
        layers = []
        for entry in found["layers"]:
            shape = LayerShape(**entry["shape"])
            others = tuple(
                Alternative(**{**other, "times": StepTimes(**other["times"])}) for other in entry["alternatives"]
            )
            arrays = {name: np.array(entry[name], np.float64) for name in _ARRAYS}
            layers.append(
                LayerPlan(
                    shape=shape,
                    plan=tables[entry["table"]],
                    layout=entry["layout"],
                    times=StepTimes(**entry["times"]),
                    alternatives=others,
                    proven=entry["proven"],
                    why=entry["why"],
                    **arrays,
                )
            )
        model = ModelShape(found["model"], tuple(layer.shape for layer in layers))
        return cls(model, found["ranks"], tuple(found["tokens"]), Machine.from_dict(found["machine"]), tuple(layers))


_ARRAYS = ("ffn", "memory", "gathered", "combined")


def _table(plan: Plan) -> dict[str, Any]:
    """A table in few bytes: zlib of the int32 columns."""
    columns = base64.b64encode(zlib.compress(plan.columns.astype("<i4").tobytes())).decode()
    return {
        "ranks": plan.ranks,
        "num_experts": plan.num_experts,
        "d_ff": plan.d_ff,
        "copies": None if (plan.copies == 1).all() else plan.copies.tolist(),
        "columns": columns,
    }


def _plan(table: Mapping[str, Any]) -> Plan:
    shape = (table["ranks"], table["num_experts"], 2)
    size = 4 * shape[0] * shape[1] * shape[2]
    data = zlib.decompressobj().decompress(base64.b64decode(table["columns"], validate=True), size + 1)
    if len(data) != size:
        raise _core.ArgumentError(f"columns: expected {size} bytes for {list(shape)}, got {len(data)}")
    columns = np.frombuffer(data, "<i4").reshape(shape)
    return Plan.from_columns(columns.astype(np.int64), table["d_ff"], table["copies"])


class _Alternatives(Tabular):
    """The layouts considered for a layer."""

    columns = ("layout", *STEPS, "total", "weights a rank", "")

    def __init__(self, layer: LayerPlan) -> None:
        self.layer = layer

    def title(self) -> str:
        """Which layer."""
        return f"layouts considered for {self.layer.name}, in ms:"

    def cells(self) -> Iterator[tuple[str, ...]]:
        """A row for each."""
        for other in self.layer.alternatives:
            mark = "chosen" if other.layout == self.layer.layout else "" if other.fits else "does not fit"
            yield (
                other.layout,
                *(milliseconds(getattr(other.times, step)) for step in STEPS),
                milliseconds(other.times.total),
                size(other.memory),
                mark,
            )


def milliseconds(seconds: float) -> str:
    """Milliseconds with three digits.

    Example:
        >>> milliseconds(0.00123456), milliseconds(12.3456)
        ('1.23', '12,346')
    """
    return f"{1e3 * seconds:,.0f}" if seconds >= 1 else f"{1e3 * seconds:.3g}"


def size(count: float) -> str:
    """Bytes in words.

    Example:
        >>> size(3 * 2**20)
        '3 MiB'
    """
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"
