# SPDX-License-Identifier: Apache-2.0
"""Whole layers on one device are right under every scheduler, arithmetic and target of ptxsim (layer_cases.py)."""

import pytest

SETTINGS = [
    pytest.param({"PTXSIM_SCHED": "uniform", "PTXSIM_SEED": "1"}, id="uniform"),
    pytest.param({"PTXSIM_SCHED": "skew", "PTXSIM_SEED": "2"}, id="skew"),
    pytest.param({"PTXSIM_SCHED": "skew", "PTXSIM_SEED": "3", "PTXSIM_MMA": "ampere"}, id="ampere"),
    pytest.param({"PTXSIM_SM": "90", "PTXSIM_SEED": "4", "PTXSIM_MMA": "hopper"}, id="hopper"),
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("settings", SETTINGS)
def test_layers_are_right_on_the_device(script, simdev, settings):
    if not simdev.simulated and settings is not SETTINGS[0].values[0]:
        pytest.skip("a real device has one scheduler and one arithmetic")
    lines = script("layer_cases.py", timeout=590, **settings).splitlines()
    assert len(lines) > 40 and all(line.startswith("ok") for line in lines)
