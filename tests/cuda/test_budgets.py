# SPDX-License-Identifier: Apache-2.0
"""The compiled kernels cost what tests/cuda/budgets.json says: a change of them is a change of the table."""

import shutil
from pathlib import Path

import budgets
import pytest

from moeshard import cuda

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")


@pytest.fixture(scope="module")
def found(device):
    return budgets.kernels(Path(cuda.extension().__file__))


def test_every_kernel_is_within_its_budget(found):
    assert not budgets.excess(found)


def test_the_targets_are_those_of_the_table(found):
    assert set(found) == {"sm_80", "sm_90", "sm_100"}


def test_a_spill_and_a_lost_tensor_core_would_be_seen():
    spilled = {"registers": 255, "STL": 2, "HMMA": 4, "LDSM": 4, "LDGSTS": 4}
    found = {"sm_80": {"ms_ffn<1>": spilled, "ms_ffn<2>": {"registers": 64, "LDSM": 4}}}
    assert list(budgets.broken_rules(found)) == [
        "sm_80 ms_ffn<1>: 2 STL, expected none",
        "sm_80 ms_ffn<2>: no HMMA, LDGSTS",
    ]


def test_a_changed_number_and_a_new_kernel_would_be_seen():
    table = {"sm_80": {"a": {"registers": 32, "STG": 1, "STG.128": 1}}}
    now = {"sm_80": {"a": {"registers": 32, "STG": 1, "STG.32": 1}, "b": {"registers": 8}}}
    assert list(budgets.differences(now, table)) == [
        "sm_80 a: STG.128 0, the table says 1",
        "sm_80 a: STG.32 1, the table says 0",
        "sm_80 b: new, not in the table",
    ]
