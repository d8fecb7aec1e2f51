# SPDX-License-Identifier: Apache-2.0
"""On aligned shapes, no bank conflicts in shared memory and no stray accesses in global memory, as ptxsim counts."""

import json

import counters
import pytest


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return {target: tmp_path_factory.mktemp("counters") / f"sm_{target}.jsonl" for target in (80, 90)}


def test_memory_accesses_are_within_their_limits(script, simdev, files):
    if not simdev.simulated:
        pytest.skip("ptxsim counts, a GPU does not")
    for target, file in files.items():
        script("layer_cases.py", "--aligned", PTXSIM_SM=str(target), PTXSIM_COUNTERS=str(file))
    assert not list(counters.excess(counters.ratios(files.values()), json.loads(counters.TABLE.read_text())))


def test_a_sort_by_many_blocks_is_within_the_limits(script, simdev, tmp_path):
    if not simdev.simulated:
        pytest.skip("ptxsim counts, a GPU does not")
    file = tmp_path / "counters.jsonl"
    script("layer_cases.py", "many-slots", PTXSIM_COUNTERS=str(file))
    found = counters.ratios([file])["ms_group_large"]
    assert all(found[space] <= limit for space, limit in counters.LIMITS.items()), found


def test_a_conflict_a_stray_access_and_a_new_kernel_would_be_seen():
    table = {"a": {"shared": 1.0, "global": 1.0}, "b": {"global": 1.1}}
    now = {"a": {"shared": 2.0, "global": 1.02}, "c": {"global": 1.0}}
    assert list(counters.excess(now, table)) == [
        "a: shared 2.0, at most 1.05 is allowed",
        "a: shared 2.0, the table says 1.0",
        "a: global 1.02, the table says 1.0",
        "b: was not launched",
        "c: is not in the table",
    ]
