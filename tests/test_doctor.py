# SPDX-License-Identifier: Apache-2.0
"""`moeshard doctor`: what it finds here, what it calls a problem, and that every problem comes with a fix."""

import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest

import moeshard
from moeshard import cli, doctor


def state_of(name: str) -> doctor.Finding:
    (finding,) = [finding for finding in doctor.examine() if finding.name == name]
    return finding


def test_the_report_has_every_fact(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["doctor"])
    said = capsys.readouterr().out
    for fact in (
        moeshard.__version__,
        moeshard._core.isa(),
        "/dev/shm",
        "CUDA engine",
        "GPUs",
        "NCCL" if doctor._gpus() else "none",
        metadata.version("numpy"),
    ):
        assert fact in said, fact


def test_json_is_the_same_report(capsys: pytest.CaptureFixture[str]) -> None:
    status = cli.main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert [finding["name"] for finding in report["findings"]] == [finding.name for finding in doctor.examine()]
    assert report["problems"] == sum(finding["state"] == "problem" for finding in report["findings"])
    assert status == (1 if report["problems"] else 0)
    assert report["versions"]["moeshard"] == moeshard.__version__


@pytest.mark.parametrize(
    ("environment", "name", "said"),
    [
        pytest.param({"MOESHARD_ISA": "sse"}, "kernels", "unset MOESHARD_ISA", id="unknown-isa"),
        pytest.param({"MOESHARD_NUM_THREADS": "many"}, "threads", "MOESHARD_NUM_THREADS", id="no-number"),
        pytest.param({"MOESHARD_NUM_THREADS": "999"}, "threads", "MOESHARD_NUM_THREADS", id="too-many-threads"),
    ],
)
def test_a_bad_environment_is_a_problem_with_a_fix_and_status_1(
    environment: dict[str, str], name: str, said: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "moeshard", "doctor", "--json"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
    )
    report = json.loads(done.stdout)
    (problem,) = [finding for finding in report["findings"] if finding["name"] == name]
    assert (done.returncode, problem["state"]) == (1, "problem")
    assert said in problem["fix"]


def test_kernels_that_are_held_back_are_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    if moeshard._core.isa_available()[0] == "generic":
        pytest.skip("this processor has the generic kernels only")
    monkeypatch.setenv("MOESHARD_ISA", "generic")
    found = state_of("kernels")
    assert found.state == "note" and "unset" in found.fix


@pytest.mark.parametrize(("policy", "state"), [("passive", "ok"), ("ACTIVE", "note"), (None, "note")])
def test_spinning_threads_are_a_note(policy: str | None, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if policy is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    assert state_of("torch's threads").state == state


def no_room(path: object) -> SimpleNamespace:
    return SimpleNamespace(total=64 * 2**20, used=0, free=64 * 2**20)


def test_the_shared_memory_of_a_container_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", no_room)
    found = state_of("shared memory")
    assert found.state == "problem" and "64 MiB of 64 MiB free" in found.value and "--shm-size" in found.fix


def test_no_shared_memory_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr(doctor, "SHARED_MEMORY", tmp_path / "nowhere")
    found = state_of("shared memory")
    assert found.state == "problem" and "No such file" in found.value and "mount" in found.fix


@pytest.mark.parametrize(
    ("name", "version", "state"),
    [
        pytest.param("torch", None, "note", id="missing"),
        pytest.param("torch", "2.5.1", "problem", id="too-old"),
        pytest.param("torch", "2.13.0+cpu", "ok", id="right"),
        pytest.param("transformers", "6.0.0", "problem", id="too-new"),
        pytest.param("transformers", "4.57.6", "ok", id="older-line"),
        pytest.param("transformers", "5.9rc1", "ok", id="candidate"),
    ],
)
def test_libraries_are_held_to_the_versions_that_moeshard_takes(
    name: str, version: str | None, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda package: version if package == name else true(package))
    found = state_of(name)
    assert found.state == state
    assert bool(found.fix) == (state != "ok")


def test_the_versions_are_those_of_the_package() -> None:
    import tomllib
    from pathlib import Path

    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    declared = " ".join([*project["dependencies"], *project["optional-dependencies"]["hf"]])
    for name, oldest, too_new, _ in doctor.LIBRARIES:
        for sign, bound in ((">=", oldest), ("<", too_new)):
            assert bound is None or f"{sign}{bound}" in declared.partition(name)[2].split()[0], name


def gpus_of(tmp_path, count):
    for number in range(count):
        facts = tmp_path / f"gpus/0000:0{number}:00.0/information"
        facts.parent.mkdir(parents=True)
        facts.write_text("Model: \t\t NVIDIA H100\nIRQ: 5\n")
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.04  Tue\n")
    return tmp_path


def test_gpus_without_the_engine_are_a_problem_with_the_build_as_fix(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(doctor, "NVIDIA_DRIVER", gpus_of(tmp_path, 2))
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert state_of("GPUs").value == "NVIDIA H100, NVIDIA H100; driver 580.159.04"
    found = state_of("CUDA engine")
    assert found.state == "problem" and "MOESHARD_CUDA=1" in found.fix and "cuda-toolkit" in found.fix


def engine_with(capabilities=None, error=None):
    """Stands in for moeshard._cuda."""

    def device_count():
        if error:
            raise moeshard.CudaError(error)
        return len(capabilities)

    return SimpleNamespace(
        runtime_version=lambda: 13000, device_count=device_count, device_capability=lambda device: capabilities[device]
    )


def test_an_engine_that_cannot_use_the_driver_is_a_problem_only_with_gpus(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(doctor, "extension", lambda: engine_with(error="driver too old"))
    monkeypatch.setattr(doctor, "NVIDIA_DRIVER", tmp_path)
    assert state_of("CUDA engine") == doctor.Finding(
        "CUDA engine", "CUDA runtime 13.0, without a GPU: driver too old", "ok"
    )
    gpus_of(tmp_path, 1)
    found = state_of("CUDA engine")
    assert found.state == "problem" and "580" in found.fix


def test_several_gpus_need_nccl_and_one_does_not(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("MOESHARD_NCCL", raising=False)
    monkeypatch.setattr(doctor, "nccl_files", lambda: [])
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(doctor, "NVIDIA_DRIVER", gpus_of(tmp_path, 2))
    monkeypatch.setattr(doctor.ctypes, "CDLL", failing_library)
    for devices, state in ((1, "ok"), (2, "problem")):
        monkeypatch.setattr(doctor, "extension", lambda count=devices: engine_with([(9, 0)] * count))
        assert "cuda:0 (sm_90)" in state_of("CUDA engine").value
        found = state_of("NCCL")
        assert found.state == state and bool(found.fix) == (state == "problem")


def failing_library(path):
    raise OSError(f"{path}: cannot open shared object file")


@pytest.mark.parametrize(("number", "version", "state"), [(22907, "2.29.7", "ok"), (21501, "2.15.1", "problem")])
def test_an_old_nccl_is_a_problem(number, version, state, tmp_path, monkeypatch) -> None:
    def get_version(pointer):
        pointer._obj.value = number

    monkeypatch.setenv("MOESHARD_NCCL", "/somewhere/libnccl.so.2")
    monkeypatch.setattr(doctor.ctypes, "CDLL", lambda path: SimpleNamespace(ncclGetVersion=get_version))
    found = doctor._nccl(2)
    assert (found.value, found.state) == (f"{version} in /somewhere/libnccl.so.2", state)


def test_a_stale_extension_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda package: "9.9.9")
    found = state_of("moeshard")
    assert found.state == "problem" and "make build" in found.fix


def test_every_problem_and_note_of_a_report_is_marked_and_counted() -> None:
    findings = [
        doctor.Finding("a", "fine"),
        doctor.Finding("b", "slow", "note", "do this"),
        doctor.Finding("c", "broken", "problem", "do that"),
    ]
    assert doctor.describe(findings).splitlines() == [
        "  a               fine",
        "- b               slow",
        "                  -> do this",
        "! c               broken",
        "                  -> do that",
        "1 problem found (!)",
    ]
