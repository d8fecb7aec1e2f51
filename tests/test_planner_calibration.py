# SPDX-License-Identifier: Apache-2.0
"""The calibration measures something sensible and leaves the machine's settings alone; its times are not judged."""

import json
import math

import pytest

import moeshard
from moeshard import _core
from moeshard.cli import main
from moeshard.planner import calibration
from moeshard.planner.machines import calibration_file, machine


@pytest.fixture
def small(monkeypatch, tmp_path):
    """So small that it takes little time; the numbers are then worth nothing."""
    changes = {
        "SECONDS": 0.0,
        "TRIES": 2,
        "D_MODEL": 48,
        "D_FF": 64,
        "MANY_ROWS": 8,
        "COLD_EXPERTS": 2,
        "MANY_TRIES": 3,
    }
    for name, value in changes.items():
        monkeypatch.setattr(calibration, name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_doctor_calibrates_and_plan_uses_it(small, capsys):
    threads = _core.get_num_threads()
    assert main(["doctor", "--calibrate"]) == 0
    assert _core.get_num_threads() == threads
    said = capsys.readouterr().out
    assert "GFLOP/s" in said and "exchange of two ranks" in said and str(calibration_file()) in said
    document = json.loads(calibration_file().read_text())
    assert document["cpu"] and document["cores"] > 0
    found = machine()
    assert found.name == "this machine" and "measured by moeshard" in found.source
    for value in (found.step, found.slot, found.flops_share, found.inside.bandwidth, found.devices[0].flops):
        assert 0 < value < math.inf
    assert 0 < found.bandwidth_share <= 1
    assert moeshard.plan("switch-base-8", ranks=2, tokens=100).machine == found
    assert main(["doctor", "--calibrate", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == json.loads(calibration_file().read_text()) and "GFLOP/s" in said.err
    document["isa"] = None
    calibration_file().write_text(json.dumps(document))
    assert moeshard.plan("switch-base-8", ranks=2, tokens=100).machine == found
