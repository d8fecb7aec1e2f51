# SPDX-License-Identifier: Apache-2.0
"""cuda/exchange/nccl.c by itself: tests/cuda/nccl_rank.c as one process a rank, on ptxsim's NCCL or the real one."""

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("device")  # ptxsim's, or a real one

ROOT = Path(__file__).parents[2]
SOURCES = (
    *(f"cuda/{name}.c" for name in ("exchange/nccl", "exchange/nccl_library", "status")),
    "csrc/base/error.c",
    "tests/cuda/nccl_rank.c",
)
ECOMM, ELOST, ETIMEOUT = 6, 7, 8  # ms_status


def _toolkit():
    """The folder that nvcc itself calls its own: the one on PATH may be a wrapper."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    said = subprocess.run(["nvcc", "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True, check=True)
    return Path(re.search(r"TOP=(.*)", said.stderr)[1])


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    try:
        ctypes.CDLL("libcudart.so.13")
    except OSError as error:
        pytest.skip(f"no CUDA runtime, real or ptxsim's: {error}")
    out = tmp_path_factory.mktemp("nccl") / "nccl_rank"
    include = _toolkit() / "include"
    where = [f"-L{folder}" for folder in os.environ.get("LD_LIBRARY_PATH", "").split(":") if folder]
    flags = ["-std=c11", "-O1", "-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Werror", "-isystem", include]
    libraries = [*where, f"-L{include.parent / 'lib64'}", "-l:libcudart.so.13", "-ldl", "-lpthread"]
    subprocess.run(["gcc", *flags, *(ROOT / source for source in SOURCES), *libraries, "-o", out], check=True)
    return out


@pytest.fixture
def start(program, tmp_path, need_devices):
    """Start one process a rank; they are gone when the test is over."""
    started = []

    def run(ranks, deed, timeout, wait=lambda rank: True, **environment):
        need_devices(ranks)
        for rank in range(ranks):
            command = [program, str(rank), str(ranks), tmp_path / "id", deed, str(timeout)]
            started.append(
                subprocess.Popen(
                    command,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    env={**os.environ, "PTXSIM_DEVICES": str(ranks), **environment},
                )
            )
        said = [process.communicate(timeout=60)[0] for rank, process in enumerate(started) if wait(rank)]
        return [(int(text.partition(":")[0]), text.partition(": ")[2].strip()) if text else None for text in said]

    yield run
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("launch", ["eager", "lazy"])
def test_collectives_are_right_on_two_streams_and_in_a_graph(start, ranks, launch):
    assert start(ranks, "work", 30, PTXSIM_LAUNCH=launch) == [(0, "done")] * ranks


def test_a_killed_rank_is_reported_and_nothing_hangs(start):
    alive, killed = start(2, "die", 5)
    assert killed is None
    assert alive[0] in (ECOMM, ELOST, ETIMEOUT)  # NCCL may not know what it was that failed


def test_a_rank_that_comes_no_more_is_reported_within_the_timeout(start):
    (code, message), *_ = start(2, "stall", 1, wait=lambda rank: rank == 0)
    assert code == ETIMEOUT
    assert "rank 0 of 2" in message and "within 1 s" in message


def test_ranks_that_do_not_meet_time_out(start):
    first, second, absent = start(3, "absent", 1)
    assert absent is None
    assert first == (ETIMEOUT, "ncclCommInitRankConfig: not all of 3 ranks came within 1 s (this is rank 0)")
    assert second[0] == ETIMEOUT


def test_a_named_library_that_is_missing_is_not_replaced_by_another(start):
    ((code, message),) = start(1, "work", 5, MOESHARD_NCCL="/nowhere/libnccl.so.2")
    assert code == ECOMM
    assert "MOESHARD_NCCL=/nowhere/libnccl.so.2 cannot be loaded" in message and "No such file" in message


def test_a_library_that_is_not_nccl_says_which_function_it_lacks(start):
    ((code, message),) = start(1, "work", 5, MOESHARD_NCCL="libm.so.6")
    assert code == ECOMM
    assert "has no ncclGetVersion" in message


def test_our_constants_agree_with_the_real_header(tmp_path):
    """NVIDIA's header, where it is installed: numbers and layouts that nccl_library.h writes down."""
    nvidia = importlib.util.find_spec("nvidia")
    homes = [Path(place) / "nccl/include" for place in nvidia.submodule_search_locations] if nvidia else []
    header = next((home for home in (*homes, Path("/usr/include")) if (home / "nccl.h").exists()), None)
    if header is None:
        pytest.skip("no nccl.h")
    check = tmp_path / "check.c"
    facts = {
        "ncclUint8": 1,
        "ncclFloat32": 7,
        "ncclSum": 0,
        "ncclRemoteError": 6,
        "ncclInProgress": 7,
        "ncclTimeout": 8,
        "sizeof(ncclUniqueId)": 128,
        "__builtin_offsetof(ncclConfig_t, blocking)": 16,
        "__builtin_offsetof(ncclConfig_t, netName)": 32,
        "__builtin_offsetof(ncclConfig_t, splitShare)": 40,
    }
    asserts = "".join(f'_Static_assert({name} == {value}, "{name}");\n' for name, value in facts.items())
    check.write_text(f'#include "{header}/nccl.h"\n{asserts}')
    subprocess.run(["gcc", "-isystem", _toolkit() / "include", "-fsyntax-only", check], check=True)
