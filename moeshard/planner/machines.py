# SPDX-License-Identifier: Apache-2.0
"""What ranks and their links can do: presets with their sources, and this machine as `moeshard doctor` measured it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from .. import _core, doctor

FORMAT = "moeshard machine"
VERSION = 1

Arrays = tuple[
    NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.int32], NDArray[np.float64]
]  # what _core.plan_cost takes


@dataclass(frozen=True)
class Device:
    """What one rank computes with: an accelerator, or one core of a CPU.

    Attributes:
        name: of the product.
        flops: peak, float32 arithmetic, flops per second.
        flops_16: the same for 16-bit dtypes, fp32 accumulation, without sparsity.
        bandwidth: bytes per second from its memory.
        memory: bytes.
        source: where the numbers are from.
    """

    name: str
    flops: float
    flops_16: float
    bandwidth: float
    memory: float
    source: str = ""

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("flops", "flops_16", "bandwidth", "memory"):
            _positive(f"{name} of device {self.name!r}", getattr(self, name))


@dataclass(frozen=True)
class Link:
    """Between two ranks, in one direction.

    Attributes:
        latency: seconds of a message of no bytes.
        message: seconds more for each further message at the same time.
        bandwidth: bytes per second of one rank.
    """

    latency: float
    message: float
    bandwidth: float

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("latency", "message"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise _core.ArgumentError(f"{name} of a link: expected a number of seconds >= 0, got {value!r}")
        _positive("bandwidth of a link", self.bandwidth)


@dataclass(frozen=True)
class Machine:
    """Ranks and links. The numbers after ``between`` are properties of moeshard's engine there (``docs/planner.md``).

    Attributes:
        name: what it is.
        devices: of each rank; a single one: all ranks have it.
        inside: the link between ranks of one host.
        between: the link between ranks of different hosts.
        step: seconds that each of the five steps costs whatever its size.
        expert: seconds that each expert with rows costs a rank.
        slot: seconds of group for each (token, choice).
        router: seconds that the model's router costs whatever its size.
        logit: seconds of route for each (token, expert), beside the router's product.
        flops_share: of the peak, that large products reach.
        bandwidth_share: of the bandwidth, that streaming float32 weights reaches; the same for narrower ones in
            ``bandwidth_share_16``.
        idle_rows: an expert's rows cost arithmetic as if they were so many more: tiles are not full.
        panel: columns are computed and stored in multiples of this many.
        cores: of a host, shared by its ranks; ``devices`` are then one core, with the memory of the whole host. 0: the
            devices are whole accelerators.
        host_bandwidth: bytes per second that all ranks of a host read together; infinite: each has its own memory.
        ranks_per_host: ``None``: all on one host.
        copies: whether tables with several copies of an expert are planned.
        source: where the numbers of the engine and the links are from.
    """

    name: str
    devices: tuple[Device, ...]
    inside: Link
    between: Link
    step: float
    expert: float
    slot: float
    router: float
    logit: float
    flops_share: float
    bandwidth_share: float
    bandwidth_share_16: float
    idle_rows: float
    panel: int
    cores: int = 0
    host_bandwidth: float = math.inf
    ranks_per_host: int | None = None
    copies: bool = True
    source: str = ""

    def on_hosts(self, ranks: int, hosts: int | None) -> Machine:
        """The same with the ranks on so many hosts; ``None``: as it is.

        Raises:
            ArgumentError: the hosts cannot have equally many ranks.
        """
        if hosts is None:
            return self
        if not isinstance(hosts, int) or hosts < 1 or ranks % hosts:
            raise _core.ArgumentError(f"hosts: expected a divisor of ranks={ranks}, got {hosts!r}")
        return replace(self, ranks_per_host=ranks // hosts)

    def with_links(self, inside: Link | None = None, between: Link | None = None) -> Machine:
        """The same with other links."""
        return replace(self, inside=inside or self.inside, between=between or self.between)

    def hosts(self, ranks: int) -> NDArray[np.int32]:
        """``[R]`` int32: the host of each rank."""
        return (np.arange(ranks) // (self.ranks_per_host or ranks)).astype(np.int32)

    def devices_of(self, ranks: int) -> tuple[Device, ...]:
        """The device of each rank.

        Raises:
            ArgumentError: there are neither one nor R devices.
        """
        if len(self.devices) not in (1, ranks):
            raise _core.ArgumentError(
                f"devices: expected one, or one for each of {ranks} ranks, got {len(self.devices)}"
            )
        return self.devices * ranks if len(self.devices) == 1 else self.devices

    def memory(self, ranks: int) -> NDArray[np.float64]:
        """``[R]`` float64: bytes that each rank has."""
        bytes_ = np.array([device.memory for device in self.devices_of(ranks)])
        return bytes_ / self._on_host(ranks) if self.cores else bytes_

    def _on_host(self, ranks: int) -> NDArray[np.float64]:
        """``[R]``: how many ranks there are on each rank's host."""
        hosts = self.hosts(ranks)
        return np.bincount(hosts)[hosts].astype(np.float64)

    def arrays(self, ranks: int, dtype: str, memory: NDArray[np.float64]) -> Arrays:
        """What the C core wants to know.

        Args:
            ranks: R.
            dtype: of the weights.
            memory: ``[R]`` bytes that a layer's weights may take.
        """
        devices = self.devices_of(ranks)
        narrow = dtype in ("bfloat16", "float16")
        flops = np.array([device.flops_16 if narrow else device.flops for device in devices])
        bandwidth = np.array([device.bandwidth for device in devices])
        if self.cores:
            cores = self.cores / self._on_host(ranks)
            flops *= cores
            bandwidth = np.minimum(bandwidth * np.maximum(cores, 1), self.host_bandwidth)
        share = self.bandwidth_share if dtype == "float32" else self.bandwidth_share_16
        links = [x for link in (self.inside, self.between) for x in (link.latency, link.message, link.bandwidth)]
        times = (self.step, self.expert, self.slot, self.router, self.logit)
        constants = (self.host_bandwidth, *links, *times, self.flops_share, share, self.idle_rows, self.panel)
        return flops, bandwidth, memory, self.hosts(ranks), np.array(constants, np.float64)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and texts, for JSON; an infinite bandwidth is ``None``."""
        found = asdict(self)
        found["devices"] = list(found["devices"])
        if math.isinf(self.host_bandwidth):
            found["host_bandwidth"] = None
        return found

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Self:
        """Read what :meth:`to_dict` wrote.

        Raises:
            ArgumentError: it is something else.
        """
        try:
            values = dict(found)
            values["devices"] = tuple(Device(**device) for device in values["devices"])
            values["inside"], values["between"] = Link(**values["inside"]), Link(**values["between"])
            if values["host_bandwidth"] is None:
                values["host_bandwidth"] = math.inf
            return cls(**values)
        except (KeyError, TypeError) as error:
            raise _core.ArgumentError(f"not a description of a machine ({type(error).__name__}: {error})") from error


def _positive(name: str, value: object) -> None:
    if not isinstance(value, (int, float)) or not value > 0 or math.isnan(value):
        raise _core.ArgumentError(f"{name}: expected a positive number, got {value!r}")


# ---- presets --------------------------------------------------------------------------------------------

TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True)
class _Accelerator:
    """A line of a data sheet: TFLOP/s, GB/s and GB."""

    name: str
    flops: float
    flops_16: float
    bandwidth: float
    memory: float
    link: float  # GB/s in one direction to the other ranks of its host
    network: float  # GB/s to ranks of other hosts
    source: str


# Dense figures, without sparsity. float32 is that of the vector units: the engine multiplies float32 in float32.
# fmt: off
_DATA_SHEETS = {
    "t4": _Accelerator("NVIDIA T4", 8.1, 65, 320, 16, 16, 3.1, "T4 data sheet (2019); PCIe 3 x16; 25 GbE"),
    "v100": _Accelerator("NVIDIA V100 SXM2", 15.7, 125, 900, 32, 150, 12.5, "V100 data sheet (2020); DGX-1: 100 Gb/s"),
    "a10": _Accelerator("NVIDIA A10", 31.2, 125, 600, 24, 32, 12.5, "A10 data sheet (2021); PCIe 4 x16; 100 GbE"),
    "a100-40": _Accelerator("NVIDIA A100 SXM 40 GB", 19.5, 312, 1555, 40, 300, 25,
                            "A100 data sheet (2021); DGX A100: 200 Gb/s a GPU"),
    "a100": _Accelerator("NVIDIA A100 SXM 80 GB", 19.5, 312, 2039, 80, 300, 25,
                         "A100 data sheet (2021); DGX A100: 200 Gb/s a GPU"),
    "l4": _Accelerator("NVIDIA L4", 30.3, 121, 300, 24, 32, 12.5, "L4 data sheet (2023); PCIe 4 x16; 100 GbE"),
    "l40s": _Accelerator("NVIDIA L40S", 91.6, 362, 864, 48, 32, 25, "L40S data sheet (2023); PCIe 4 x16; 200 GbE"),
    "rtx4090": _Accelerator("NVIDIA GeForce RTX 4090", 82.6, 165, 1008, 24, 32, 1.25,
                            "Ada architecture white paper (2022); PCIe 4 x16; 10 GbE"),
    "h100": _Accelerator("NVIDIA H100 SXM", 67, 989, 3350, 80, 450, 50,
                         "H100 data sheet (2023); DGX H100: 400 Gb/s a GPU"),
    "h200": _Accelerator("NVIDIA H200 SXM", 67, 989, 4800, 141, 450, 50,
                         "H200 data sheet (2024); DGX H200: 400 Gb/s a GPU"),
    "b200": _Accelerator("NVIDIA B200", 75, 2250, 7700, 180, 900, 50,
                         "DGX B200 data sheet (2024), an eighth of it; 400 Gb/s a GPU"),
}
# fmt: on

# The engine's share of what a data sheet promises: fitted to the 16 layers of benchmarks/results/gpu-h200-layers.json.
_CUDA = {
    "step": 12e-6,
    "expert": 0.0,
    "slot": 3e-10,
    "router": 30e-6,  # some kernels of torch: assumed
    "logit": 1e-11,
    "flops_share": 0.58,
    "bandwidth_share": 0.88,
    "bandwidth_share_16": 0.88,
    "idle_rows": 64.0,  # half a tile of 128 rows
    "panel": 64,
    "copies": False,
}
# Seconds of a message and of each further one: orders of magnitude of NCCL, not measured by this project.
_CUDA_INSIDE, _CUDA_BETWEEN = (5e-6, 0.5e-6), (10e-6, 1e-6)


def _accelerators(name: str) -> Machine:
    found = _DATA_SHEETS[name]
    device = Device(
        found.name,
        found.flops * TERA,
        found.flops_16 * TERA,
        found.bandwidth * GIGA,
        found.memory * GIGA,
        found.source,
    )
    return Machine(
        name,
        (device,),
        Link(*_CUDA_INSIDE, found.link * GIGA),
        Link(*_CUDA_BETWEEN, found.network * GIGA),
        ranks_per_host=8,
        source="engine: fitted to one H200 (benchmarks/results/gpu-h200-layers.json); latencies of links: assumed",
        **_CUDA,  # type: ignore[arg-type]
    )


# One core of the machine of benchmarks/results/layer-quick.json, and what fits its times; between hosts: assumed.
CPU = Machine(
    "cpu",
    (
        Device(
            "a core of an AMD EPYC (Zen 5)",
            290e9,
            555e9,
            41e9,
            25e9,
            "benchmarks/results/layer-quick.json: medians of the peaks beside each case",
        ),
    ),
    Link(25e-6, 1e-6, 9e9),  # ranks of a host meet all at once
    Link(100e-6, 10e-6, 1.25e9),
    step=12e-6,
    expert=2e-6,
    slot=10e-9,
    router=80e-6,
    logit=8e-9,
    flops_share=0.84,
    bandwidth_share=0.84,
    bandwidth_share_16=0.74,
    idle_rows=2.6,
    panel=16,
    cores=2,
    host_bandwidth=50e9,
    source="fitted to benchmarks/results/layer-quick.json; 10 GbE between hosts: assumed",
)

PRESETS = ("cpu", *_DATA_SHEETS)


# ---- this machine -----------------------------------------------------------------------------------------


def calibration_file() -> Path:
    """Where ``moeshard doctor --calibrate`` writes: ``$XDG_CACHE_HOME/moeshard/machine.json``, else in ``~/.cache``."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(cache) if os.path.isabs(cache) else Path.home() / ".cache") / "moeshard" / "machine.json"


def save(found: Machine, path: Path) -> None:
    """Write a machine and which processor it was measured on, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    here = doctor.machine()
    document = {"format": FORMAT, "version": VERSION, "cpu": here["cpu"], "cores": here["cores"], "isa": here["isa"]}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(document | {"machine": found.to_dict()}, indent=1) + "\n")
    partial.replace(path)


def load(path: Path) -> tuple[Machine, dict[str, Any]]:
    """Read a machine, and what it was measured on.

    Raises:
        ArgumentError: the file is something else, or of a later version.
        OSError: it cannot be read.
    """
    try:
        document = json.loads(path.read_text())
    except ValueError as error:
        raise _core.ArgumentError(f"{path}: not JSON ({error})") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise _core.ArgumentError(f"{path}: not a file of moeshard doctor --calibrate")
    if document.get("version") != VERSION:
        raise _core.ArgumentError(
            f"{path}: version {document.get('version')!r}, this moeshard reads {VERSION}: moeshard doctor --calibrate"
        )
    try:
        return Machine.from_dict(document["machine"]), document
    except (KeyError, TypeError, _core.ArgumentError) as error:
        raise _core.ArgumentError(f"{path}: {error}") from error


def this_machine() -> Machine:
    """This machine, as it was calibrated; else the CPU preset with this machine's cores and memory.

    A calibration of another processor, of another number of cores or that cannot be read counts for nothing, and
    ``source`` says so.
    """
    here = doctor.machine()
    cores, memory = int(here["cores"]), float(here["memory_bytes"])
    path, why = calibration_file(), "not calibrated"
    if path.exists():
        try:
            found, about = load(path)
            if (about.get("cpu"), about.get("cores")) == (here["cpu"], cores):
                return found
            why = (
                f"calibrated for {about.get('cpu')} with {about.get('cores')} cores, this is {here['cpu']} with {cores}"
            )
        except (OSError, _core.ArgumentError) as error:
            why = str(error)
    device = replace(CPU.devices[0], memory=memory)
    source = f"{why}, so numbers of {device.name}: run moeshard doctor --calibrate"
    # A core's part of the memory's bandwidth was measured with two cores.
    host_bandwidth = CPU.host_bandwidth * max(cores, CPU.cores) / CPU.cores
    return replace(CPU, devices=(device,), cores=cores, host_bandwidth=host_bandwidth, source=source)


def machine(devices: object = None) -> Machine:
    """The machine that a user means.

    Args:
        devices: ``None``: this machine; a preset's name (``"h100"``, ``"cpu"`` ...); the path of a calibration file; a
            :class:`Machine`; a :class:`Device`; or a sequence of presets' names and Devices, one for each rank, with
            the slowest links and the engine of the first.

    Returns:
        The machine.

    Raises:
        ArgumentError: none of these, or an unknown name.
        OSError: the file cannot be read.

    Example:
        >>> machine("h100").devices[0].name
        'NVIDIA H100 SXM'
    """
    if devices is None:
        return this_machine()
    if isinstance(devices, Machine):
        return devices
    if isinstance(devices, Path):
        return load(devices)[0]
    if isinstance(devices, str):
        if devices == "cpu":
            return CPU
        if devices in _DATA_SHEETS:
            return _accelerators(devices)
        if devices.endswith(".json"):
            return load(Path(devices))[0]
        raise _core.ArgumentError(
            f"devices: no preset {devices!r}, expected one of {', '.join(PRESETS)}, or a calibration file (.json)"
        )
    if isinstance(devices, Device):
        return replace(this_machine(), name=devices.name, devices=(devices,), cores=0, host_bandwidth=math.inf)
    if isinstance(devices, Sequence) and devices:
        return _mixed(devices)
    raise _core.ArgumentError(
        f"devices: expected a preset's name, a Machine or one entry for each rank, got {devices!r}"
    )


def _mixed(devices: Sequence[object]) -> Machine:
    machines = [machine(each) for each in devices]
    first = machines[0]
    if any(bool(each.cores) for each in machines):
        raise _core.ArgumentError(
            "devices: a CPU is described by its cores, which ranks share: expected Devices or accelerators in a list "
            "(moeshard.planner.Device describes anything)"
        )
    inside = min((each.inside for each in machines), key=lambda link: link.bandwidth)
    between = min((each.between for each in machines), key=lambda link: link.bandwidth)
    names = ", ".join(dict.fromkeys(each.name for each in machines))
    found = tuple(device for each in machines for device in each.devices)
    return replace(first, name=names, devices=found, inside=inside, between=between)
