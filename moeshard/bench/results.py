# SPDX-License-Identifier: Apache-2.0
"""Rows: what was measured at each case, their file while a run goes on, and the report at its end. No torch."""

import json
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import numpy as np

from moeshard import doctor
from moeshard.errors import ArgumentError

from .grid import Build, Case, DType

# Largest error of an output. Sums of 2048 to 3072 products in another order differ by less than 1e-6 in float32. In
# bfloat16 tokens, weights, hidden columns and outputs are each rounded to 2^-9 of their size.
TOLERANCES: dict[DType, float] = {"float32": 1e-5, "bfloat16": 2**-6}

TORCH = ("hf", "grouped_mm", "loop")  # replicated on every rank
EXACT = (*TORCH, "published", "deepspeed")  # rivals that drop no token
DROPPING = "deepspeed-cf1.25"
CONTESTANTS = ("moeshard", *EXACT, DROPPING)

DISTURBED = 1.03  # a share of what the machine can do that is above this was measured while the machine changed

Circumstances = dict[str, Any]  # JSON: grid, date, commit, machine, versions


@dataclass(frozen=True)
class Timing:
    """The times of one contestant at one case.

    Attributes:
        median: seconds; of every round its slowest rank counts.
        p90: seconds, the same.
        rounds: how many.
        per_rank: median seconds of each rank.
    """

    median: float
    p90: float
    rounds: int
    per_rank: list[float]

    @classmethod
    def of(cls, seconds: Sequence[Sequence[float]]) -> Self:
        """Sum up the seconds of each round, of each rank: ``[R][rounds]``."""
        slowest = [max(ranks) for ranks in zip(*seconds, strict=True)]
        return cls(
            statistics.median(slowest),
            float(np.quantile(slowest, 0.9)),
            len(slowest),
            [statistics.median(of_rank) for of_rank in seconds],
        )


@dataclass(frozen=True)
class Row:
    """What was measured at one case.

    Attributes:
        case: the case.
        hit: experts with at least one token.
        rows: (token, choice) pairs of all ranks.
        work: each rank's share of moeshard's arithmetic.
        flops: that each rank's columns take, in moeshard.
        bytes: of the weights of the experts hit, each rank's columns of them.
        flops_per_second: peak of each rank beside this case, all ranks at once, for the dtype of the case.
        bytes_per_second: the same for reading memory.
        timings: of each contestant, and of moeshard's ``experts`` alone, ``experts-bf16`` (weights stored in bfloat16)
            and ``exchange`` (all steps but the products).
        errors: of each contestant's output, ``max|difference| / max|reference|``: in float32 against ``loop``, in
            bfloat16 against float32 arithmetic on the same numbers.
        wrong: contestants whose error is above the tolerance.
        absent: why a contestant was not timed.
    """

    case: Case
    hit: int
    rows: int
    work: list[float]
    flops: list[float]
    bytes: list[float]
    flops_per_second: list[float]
    bytes_per_second: list[float]
    timings: dict[str, Timing] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)

    @property
    def bound(self) -> float:
        """Seconds that no implementation can beat: the slower of arithmetic and streaming weights, slowest rank."""
        arithmetic = (work / peak for work, peak in zip(self.flops, self.flops_per_second, strict=True))
        streaming = (size / peak for size, peak in zip(self.bytes, self.bytes_per_second, strict=True))
        return max(*arithmetic, *streaming)

    @property
    def share(self) -> float:
        """Bound over the time of moeshard's experts: 1 is the roofline."""
        return self.bound / self.timings["experts"].median

    @property
    def disturbed(self) -> bool:
        """The machine was not the same while peak and layer were measured."""
        return self.share > DISTURBED

    def best(self, rivals: Sequence[str]) -> float | None:
        """How many times moeshard's block is as fast as the fastest of these; None: none was timed."""
        ratios = [ratio for rival in rivals if (ratio := self.ratio(rival)) is not None]
        return min(ratios, default=None)

    def ratio(self, rival: str) -> float | None:
        """How many times moeshard's block is as fast as a rival's; None: the rival was not timed."""
        timing = self.timings.get(rival)
        return timing.median / self.timings["moeshard"].median if timing else None

    def to_dict(self) -> dict[str, Any]:
        """For JSON; what follows from the rest is there to be read, and not read back."""
        derived = {"bound": self.bound, "share": self.share, "disturbed": self.disturbed}
        return {"key": self.case.key, **asdict(self), **derived}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Self:
        """Read what :meth:`to_dict` wrote."""
        values = {name: found[name] for name in cls.__dataclass_fields__}
        case = found["case"]
        values["case"] = Case(**{**case, "build": Build(**case["build"])})
        values["timings"] = {name: Timing(**timing) for name, timing in found["timings"].items()}
        return cls(**values)


class Journal:
    """The file of a run that goes on: a line of circumstances, then a line for each row. Survives Ctrl-C.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        """Name the file; nothing is read or written."""
        self.path = path

    def start(self, circumstances: Circumstances) -> None:
        """Begin a run.

        Raises:
            ArgumentError: there is an unfinished run.
        """
        if self.path.exists():
            raise ArgumentError(f"{self.path}: an unfinished run; go on with --resume {self.path}, or delete it")
        self.path.write_text(json.dumps(circumstances) + "\n")

    def resume(self, circumstances: Circumstances) -> list[Row]:
        """Go on with a run.

        Returns:
            The rows that are there.

        Raises:
            ArgumentError: it was made on another machine, with other versions or another grid.
        """
        before, rows = read(self.path)
        for name in ("grid", "machine", "versions", "commit"):
            if before.get(name) != circumstances[name]:
                raise ArgumentError(
                    f"{self.path}: cannot go on with another {name}: expected {circumstances[name]}, "
                    f"got {before.get(name)}"
                )
        # without the line that an interruption may have cut
        self.path.write_text(
            "".join(f"{line}\n" for line in (json.dumps(before), *(json.dumps(row.to_dict()) for row in rows)))
        )
        return rows

    def add(self, row: Row) -> None:
        """Append a row."""
        with self.path.open("a") as file:
            file.write(json.dumps(row.to_dict()) + "\n")

    def finish(self, report: Mapping[str, Any], path: Path) -> None:
        """Write the report of a complete run, and remove the journal."""
        path.write_text(json.dumps(report, indent=1) + "\n")
        self.path.unlink()


def read(path: Path) -> tuple[Circumstances, list[Row]]:
    """Read a report, or the journal of a run that has not ended.

    Raises:
        ArgumentError: it is neither.
        OSError: it cannot be read.
    """
    text = path.read_text()
    try:
        if path.suffix == ".json":
            report = json.loads(text)
            rows = report.pop("rows")
            report.pop("bars", None)
            return report, [Row.from_dict(row) for row in rows]
        first, *lines = text.splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        return json.loads(first), [Row.from_dict(json.loads(line)) for line in whole]
    except (KeyError, TypeError, ValueError) as error:
        raise ArgumentError(f"{path}: not a file of moeshard bench ({type(error).__name__}: {error})") from error


def circumstances(grid: str) -> Circumstances:
    """When, where and of what a run is made."""
    return {
        "grid": grid,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": doctor.machine(),
        "versions": doctor.versions(),
    }


def _commit() -> str | None:
    """Of the source tree that this is run from, if it is one."""
    root = Path(__file__).parent.parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
