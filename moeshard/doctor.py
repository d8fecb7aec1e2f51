# SPDX-License-Identifier: Apache-2.0
"""``moeshard doctor``: what moeshard finds on this machine, what is wrong with it, and how to mend it.

:func:`machine` and :func:`versions` also stand beside every measurement. Imports neither torch nor transformers.
"""

import argparse
import ctypes
import importlib.util
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Literal

from . import __version__, _core
from .cuda import extension, nccl_files
from .errors import MoeshardError
from .threads import use_threads

SUMMARY = "say what moeshard finds on this machine, and how to mend what is wrong"
SHARED_MEMORY = Path("/dev/shm")
NVIDIA_DRIVER = Path("/proc/driver/nvidia")
MIB, GIB = 2**20, 2**30

# A rank keeps its tokens and its partial outputs of all ranks' tokens there, in float32: 2 ranks with 4,096 tokens each
# and d_model 768 take 2 * (12 + 24) MiB. A container has 64 MiB unless told otherwise.
LEAST_SHARED_MEMORY = 256 * MIB

# (package, oldest version, first version that is too new, what it is for). As in pyproject.toml.
LIBRARIES = (
    ("numpy", "2.0", None, "everything"),
    ("torch", "2.6", None, "models"),
    ("transformers", "4.57", "6", "models"),
    ("tokenizers", None, None, "the demo"),
    ("cloudpickle", None, None, "functions of a notebook or script on other ranks"),
)
GET_TOOLKIT = "pip install 'cuda-toolkit[nvcc,cudart,cccl,crt,nvvm]==13.0.*'"

State = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was looked at.
        value: what was found.
        state: ``"problem"``: something will fail or be wrong; ``"note"``: something is missing or slower than need be.
        fix: what to do about it; empty if there is nothing to do.
    """

    name: str
    value: str
    state: State = "ok"
    fix: str = ""


def machine() -> dict[str, str | int]:
    """The hardware and system that a measurement was taken on.

    Returns:
        ``cpu`` (name), ``cores`` (that this process may use), ``memory_bytes``, ``isa`` (of the kernels), ``system``.

    Example:
        >>> machine()["isa"] in ("avx512bf16", "avx512", "avx2", "generic")
        True
    """
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "isa": _core.isa(),
        "system": platform.platform(),
    }


def versions() -> dict[str, str | None]:
    """Versions of moeshard, Python and the libraries it works with; ``None``: not installed. Imports none of them.

    Example:
        >>> versions()["moeshard"] == __version__
        True
    """
    found: dict[str, str | None] = {"moeshard": __version__, "python": platform.python_version()}
    return found | {name: _version(name) for name in ("numpy", "torch", "transformers", "tokenizers")}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the doctor's options.

    Args:
        parser: of the subcommand.
    """
    parser.add_argument("--json", action="store_true", help="print the report, or what was measured, as JSON")
    parser.add_argument("--calibrate", action="store_true", help="measure this machine for moeshard plan: ten seconds")


def run(options: argparse.Namespace) -> int:
    """Print the report, or calibrate.

    Args:
        options: as declared by :func:`add_options`.

    Returns:
        0, or 1 if there is a problem. What is only missing or slow is no problem.

    Raises:
        OSError: the calibration cannot be written.
    """
    if options.calibrate:
        from .planner import calibration, machines

        status = calibration.run(partial(print, file=sys.stderr) if options.json else print)
        if options.json:
            print(machines.calibration_file().read_text())
        return status
    findings = examine()
    problems = [finding for finding in findings if finding.state == "problem"]
    if options.json:
        report = {"problems": len(problems), "findings": [asdict(finding) for finding in findings]}
        print(json.dumps(report | {"versions": versions()}, indent=1))
    else:
        print(describe(findings))
    return 1 if problems else 0


def examine() -> list[Finding]:
    """Look at everything.

    Returns:
        The findings, in the order of the report.

    Example:
        >>> examine()[0].name
        'moeshard'
    """
    return [
        _moeshard(),
        Finding("system", f"{platform.platform()}, Python {platform.python_version()}"),
        Finding("processor", f"{_cpu_name()}, {_plural(len(os.sched_getaffinity(0)), 'core')} for this process"),
        Finding("memory", f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / GIB:.1f} GiB"),
        _kernels(),
        _threads(),
        _waiting(),
        _shared_memory(),
        *_cuda(),
        *_libraries(),
    ]


def describe(findings: list[Finding]) -> str:
    """The report as text: a line for each finding, below it what to do.

    Example:
        >>> print(describe([Finding("memory", "3 GiB"), Finding("torch", "missing", "note", "pip install torch")]))
          memory          3 GiB
        - torch           missing
                          -> pip install torch
        no problem found
    """
    marks = {"ok": " ", "note": "-", "problem": "!"}
    lines = []
    for finding in findings:
        lines.append(f"{marks[finding.state]} {finding.name:16}{finding.value}")
        if finding.fix:
            lines.append(f"{'':18}-> {finding.fix}")
    problems = sum(finding.state == "problem" for finding in findings)
    return "\n".join([*lines, f"{_plural(problems, 'problem')} found (!)" if problems else "no problem found"])


def _moeshard() -> Finding:
    place = Path(__file__).parent
    installed = _version("moeshard")
    if installed not in (None, __version__):
        return Finding(
            "moeshard",
            f"{__version__} in {place}, but {installed} is what pip installed",
            "problem",
            "the extension is older or newer than the package: make build, or pip install . again",
        )
    return Finding("moeshard", f"{__version__} in {place}")


def _kernels() -> Finding:
    available = _core.isa_available()
    try:
        isa = _core.isa()
    except MoeshardError as error:
        return Finding("kernels", str(error), "problem", f"unset MOESHARD_ISA, or set it to {' or '.join(available)}")
    value = f"{isa} (this processor runs {', '.join(available)}; MOESHARD_ISA forces one)"
    if isa != available[0]:
        return Finding("kernels", value, "note", f"MOESHARD_ISA holds the kernels back: unset it for {available[0]}")
    if isa == "generic":
        return Finding("kernels", f"{value}: slow, this processor has no AVX2", "note")
    return Finding("kernels", value)


def _threads() -> Finding:
    cores = len(os.sched_getaffinity(0))
    try:
        use_threads()
    except MoeshardError as error:
        return Finding("threads", str(error), "problem", f"unset MOESHARD_NUM_THREADS, or set it to {cores} or less")
    threads = _core.get_num_threads()
    if threads > cores:
        fix = f"they take turns: set MOESHARD_NUM_THREADS to {cores} or less"
        return Finding("threads", f"{threads} on {_plural(cores, 'core')}", "problem", fix)
    return Finding("threads", f"{threads}, or torch's number if that is less (MOESHARD_NUM_THREADS sets it)")


def _waiting() -> Finding:
    """Idle threads of torch spin for a while, on cores that moeshard's need."""
    policy = os.environ.get("OMP_WAIT_POLICY")
    if policy is not None and policy.lower() == "passive":
        return Finding("torch's threads", "sleep between operators (OMP_WAIT_POLICY=passive)")
    return Finding(
        "torch's threads",
        f"spin after every operator (OMP_WAIT_POLICY={policy or 'not set'})",
        "note",
        "export OMP_WAIT_POLICY=passive before Python starts; moeshard.launch does so for its ranks",
    )


def _shared_memory() -> Finding:
    name, needed = "shared memory", "ranks of one host need it; one rank does not"
    try:
        room = shutil.disk_usage(SHARED_MEMORY)
    except OSError as error:
        fix = f"mount -t tmpfs tmpfs {SHARED_MEMORY} ({needed})"
        return Finding(name, f"{SHARED_MEMORY}: {error.strerror}", "problem", fix)
    value = f"{SHARED_MEMORY}: {_size(room.free)} of {_size(room.total)} free"
    if not os.access(SHARED_MEMORY, os.W_OK | os.X_OK):
        return Finding(name, f"{value}, not writable", "problem", f"chmod 1777 {SHARED_MEMORY} ({needed})")
    if room.free < LEAST_SHARED_MEMORY:
        fix = f"mount -o remount,size=2G {SHARED_MEMORY}, in a container --shm-size=2g ({needed})"
        return Finding(name, value, "problem", fix)
    return Finding(name, value)


def _cuda() -> Iterator[Finding]:
    """GPUs as the driver sees them, moeshard's engine for them, and NCCL, which several of them need."""
    gpus = _gpus()
    driver = _driver_version()
    yield Finding("GPUs", "none" if not gpus else f"{', '.join(gpus)}{driver and f'; driver {driver}'}")
    name = "CUDA engine"
    if importlib.util.find_spec("moeshard._cuda") is None:
        if gpus:
            fix = f"{GET_TOOLKIT}; MOESHARD_CUDA=1 pip install . in moeshard's sources"
            yield Finding(name, "not built: models on these GPUs are refused", "problem", fix)
        else:
            yield Finding(name, "not built")
        return
    try:
        engine = extension()
    except MoeshardError as error:
        yield Finding(name, f"cannot be loaded: {error}", "problem" if gpus else "note", "pip install torch (CUDA 13)")
        return
    version = f"CUDA runtime {engine.runtime_version() // 1000}.{engine.runtime_version() % 1000 // 10}"
    try:
        capabilities = [engine.device_capability(device) for device in range(engine.device_count())]
    except MoeshardError as error:
        if gpus:
            fix = "the driver must be one for CUDA 13 (580 or newer): nvidia-smi shows it"
            yield Finding(name, f"{version}, cannot use these GPUs: {error}", "problem", fix)
        else:
            yield Finding(name, f"{version}, without a GPU: {error}")
        return
    devices = ", ".join(f"cuda:{number} (sm_{major}{minor})" for number, (major, minor) in enumerate(capabilities))
    yield Finding(name, f"{version}, {devices or 'no device'}")
    yield _nccl(len(capabilities))


def _nccl(devices: int) -> Finding:
    """The NCCL that the engine would load, in the order of cuda/exchange/nccl_library.c, and its version."""
    named = os.environ.get("MOESHARD_NCCL")
    why = ""
    for path in [named] if named else [*nccl_files(), "libnccl.so.2"]:
        number = ctypes.c_int()
        try:
            ctypes.CDLL(path).ncclGetVersion(ctypes.byref(number))
        except (OSError, AttributeError) as error:
            why = str(error)
            continue
        version = f"{number.value // 10000}.{number.value // 100 % 100}.{number.value % 100}"
        if number.value < 21800:
            return Finding("NCCL", f"{version} in {path}", "problem", "2.18 or newer is needed: nvidia-nccl-cu13")
        return Finding("NCCL", f"{version} in {path}")
    if devices > 1 or named:
        fix = "pip install nvidia-nccl-cu13, or set MOESHARD_NCCL to a libnccl.so.2"
        return Finding("NCCL", f"not found: {why}", "problem", fix)
    return Finding("NCCL", "not found; only several GPUs need it")


def _libraries() -> Iterator[Finding]:
    for name, oldest, too_new, purpose in LIBRARIES:
        version = _version(name)
        wanted = " and ".join([*([f">={oldest}"] if oldest else []), *([f"<{too_new}"] if too_new else [])])
        fix = "pip install 'moeshard[hf]'"
        if version is None:
            yield Finding(name, f"not installed; {purpose} need{'s' * (not purpose.endswith('s'))} it", "note", fix)
        elif (oldest and _parts(version) < _parts(oldest)) or (too_new and _parts(version) >= _parts(too_new)):
            yield Finding(name, f"{version}, expected {wanted}", "problem", fix)
        else:
            yield Finding(name, version)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _parts(version: str) -> tuple[int, ...]:
    """Numbers of a version: ``2.13.0+cpu`` is (2, 13, 0), ``2.14rc1`` is (2, 14).

    Example:
        >>> _parts("2.13.0+cpu"), _parts("2.14rc1")
        ((2, 13, 0), (2, 14))
    """
    release = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in release.group().split(".")) if release else ()


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpus() -> list[str]:
    """Models of the GPUs that NVIDIA's driver manages."""
    models = []
    for facts in sorted(NVIDIA_DRIVER.glob("gpus/*/information")):
        model = re.search(r"^Model:\s*(.+)$", facts.read_text(), re.MULTILINE)
        models.append(model[1].strip() if model else "NVIDIA GPU")
    return models


def _driver_version() -> str:
    try:
        said = (NVIDIA_DRIVER / "version").read_text()
    except OSError:
        return ""
    number = re.search(r"\b\d{3}\.[\d.]+", said)
    return number.group() if number else ""


def _size(nbytes: int) -> str:
    return f"{nbytes / GIB:.1f} GiB" if nbytes >= GIB else f"{nbytes / MIB:.0f} MiB"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"
