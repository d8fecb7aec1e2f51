# SPDX-License-Identifier: Apache-2.0
"""What moeshard finds on this machine: for bug reports (``moeshard doctor``) and beside every measurement."""

import os
import platform
import shutil
from importlib import metadata
from pathlib import Path

from . import __version__, _core
from .cuda import extension

SHARED_MEMORY = Path("/dev/shm")


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
    for name in ("numpy", "torch", "transformers", "tokenizers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def describe() -> str:
    """The report of ``moeshard doctor``.

    Example:
        >>> print(describe())  # doctest: +ELLIPSIS
        moeshard ...
    """
    here, found = machine(), versions()
    lines = {
        "moeshard": f"{found.pop('moeshard')} in {Path(__file__).parent}",
        "system": f"{here['system']}, Python {found.pop('python')}",
        "processor": f"{here['cpu']}, {here['cores']} cores for this process",
        "memory": f"{int(here['memory_bytes']) / 2**30:.1f} GiB",
        "kernels": f"{here['isa']} (this processor runs {', '.join(_core.isa_available())}; MOESHARD_ISA forces one)",
        "threads": f"{_core.get_num_threads()}",
        "shared memory": _shared_memory(),
        "CUDA engine": _cuda_engine(),
    }
    lines |= {name: version or "not installed" for name, version in found.items()}
    if found["torch"] is None or found["transformers"] is None:
        lines["to shard models"] = "pip install 'moeshard[hf]'"
    return "\n".join(f"{name:16}{value}" for name, value in lines.items())


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cuda_engine() -> str:
    """The devices that it can use, or why it cannot."""
    try:
        engine = extension()
        devices = [engine.device_capability(device) for device in range(engine.device_count())]
    except _core.MoeshardError as error:
        return f"cannot be used: {error}"
    version = engine.runtime_version()
    listed = ", ".join(f"cuda:{number} (sm_{major}{minor})" for number, (major, minor) in enumerate(devices))
    return f"{listed}, CUDA runtime {version // 1000}.{version % 1000 // 10}"


def _shared_memory() -> str:
    try:
        room = shutil.disk_usage(SHARED_MEMORY)
    except OSError as error:
        return f"{SHARED_MEMORY}: {error.strerror} (ranks of one host need it)"
    return f"{SHARED_MEMORY}: {room.free / 2**30:.1f} of {room.total / 2**30:.1f} GiB free"
