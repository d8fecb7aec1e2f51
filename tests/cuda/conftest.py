# SPDX-License-Identifier: Apache-2.0
"""The CUDA engine's tests run on a GPU, or on ptxsim in its place (`make test-gpu`); elsewhere they are skipped."""

import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SIMULATOR = HERE.parent / "ptxsim"
sys.path.append(str(SIMULATOR))

import moeshard  # noqa: E402
from moeshard import cuda  # noqa: E402


def why_no_device():
    """None, or why there is no CUDA device to test on."""
    try:
        cuda.extension().device_count()
    except moeshard.MoeshardError as error:
        return str(error)
    return None


@pytest.fixture(scope="session")
def device():
    """A CUDA device, real or ptxsim's: its number."""
    if reason := why_no_device():
        pytest.skip(reason)
    return 0


@pytest.fixture(scope="session")
def simdev(device):
    """Makes device tensors without a library that knows CUDA."""
    import simdev

    return simdev


@pytest.fixture
def script(device):
    """Run a Python file of this folder by itself, with other settings of the simulator: its output."""
    import subprocess

    def run(name, *arguments, timeout=280, **settings):
        paths = [str(Path(moeshard.__file__).parents[1]), str(HERE), str(HERE.parent), str(SIMULATOR)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **settings}
        command = [sys.executable, str(HERE / name), *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, f"{settings}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run


@pytest.fixture
def need_devices():
    """Skip the test if this machine has too few GPUs for its ranks; ptxsim has as many as are asked for."""

    def check(ranks):
        if ranks > 1 and "ptxsim" not in os.environ.get("LD_LIBRARY_PATH", "") and why_no_device() is None:
            found = cuda.extension().device_count()
            if found < ranks:
                pytest.skip(f"{ranks} ranks need as many GPUs, there are {found}")

    return check


@pytest.fixture(autouse=True)
def enough_devices(request, need_devices):
    """Of tests with a parameter `ranks`."""
    if hasattr(request.node, "callspec"):
        need_devices(request.node.callspec.params.get("ranks", 1))
