# SPDX-License-Identifier: Apache-2.0
"""Plans: tables that are checked, compared and measured."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import moeshard
from moeshard import Plan
from moeshard.plans import plan_for

sizes = st.tuples(st.integers(1, 9), st.integers(1, 12), st.integers(1, 70))


def widths(plan):
    return plan.columns[:, :, 1] - plan.columns[:, :, 0]


@given(sizes)
def test_shard_gives_every_rank_a_near_equal_slice_of_every_expert(size):
    ranks, experts, d_ff = size
    plan = Plan.shard(ranks, experts, d_ff)
    assert (widths(plan).sum(axis=0) == d_ff).all()
    assert np.ptp(widths(plan), axis=0).max() <= 1
    assert np.ptp(widths(plan).sum(axis=1)) <= 1 + experts * d_ff % ranks


@given(sizes, st.data())
def test_shard_widths_follow_the_speed_of_the_ranks(size, data):
    ranks, experts, d_ff = size
    speed = data.draw(st.lists(st.floats(0.01, 100), min_size=ranks, max_size=ranks))
    plan = Plan.shard(ranks, experts, d_ff, speed)
    exact = d_ff * np.array(speed) / sum(speed)
    assert np.abs(widths(plan) - exact[:, None]).max() < 1 + 1e-9


@given(sizes, st.data())
def test_expert_parallel_gives_each_expert_whole_to_its_owner(size, data):
    ranks, experts, d_ff = size
    owner = data.draw(st.none() | st.lists(st.integers(0, ranks - 1), min_size=experts, max_size=experts))
    plan = Plan.expert_parallel(ranks, experts, d_ff, owner)
    assert set(np.unique(widths(plan))) <= {0, d_ff}
    if owner is not None:
        assert (widths(plan).argmax(axis=0) == owner).all()


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 9), st.integers(1, 40))
def test_hybrid_of_all_ranks_is_shard_and_of_one_is_expert_parallel(groups, group, experts, d_ff):
    plan = Plan.hybrid(groups * group, experts, d_ff, group)
    assert (widths(plan).sum(axis=0) == d_ff).all()
    if groups == 1:
        assert (np.sort(widths(plan), axis=0) == np.sort(widths(Plan.shard(group, experts, d_ff)), axis=0)).all()
    if group == 1:
        assert plan == Plan.expert_parallel(groups, experts, d_ff)


@given(sizes, st.data())
def test_work_of_the_ranks_sums_to_all_token_columns(size, data):
    ranks, experts, d_ff = size
    counts = data.draw(st.lists(st.integers(0, 1000), min_size=experts, max_size=experts))
    for plan in (Plan.shard(*size), Plan.expert_parallel(*size)):
        assert plan.work(counts).sum() == pytest.approx(sum(counts) * d_ff)
        assert plan.share(counts).sum() == pytest.approx(1 if sum(counts) else 0)
    np.testing.assert_allclose(Plan.shard(ranks, experts, ranks * d_ff).work(counts), sum(counts) * d_ff)


@given(sizes, st.data())
def test_any_table_is_accepted_exactly_when_each_column_has_one_owner(size, data):
    ranks, experts, d_ff = size
    plan = Plan.shard(*size)
    columns = plan.columns[data.draw(st.permutations(range(ranks)))].copy()
    assert Plan.from_columns(columns, d_ff).ranks == ranks
    rank, expert = data.draw(st.integers(0, ranks - 1)), data.draw(st.integers(0, experts - 1))
    columns[rank, expert, data.draw(st.integers(0, 1))] += data.draw(st.sampled_from([-1, 1]))
    with pytest.raises(moeshard.ArgumentError, match=f"expert {expert}\\b"):
        Plan.from_columns(columns, d_ff)


def test_equal_plans_are_equal_and_hash_alike():
    assert Plan.shard(2, 3, 10) == Plan.hybrid(2, 3, 10, 2)
    assert hash(Plan.shard(2, 3, 10)) == hash(Plan.hybrid(2, 3, 10, 2))
    assert Plan.shard(2, 3, 10) != Plan.expert_parallel(2, 3, 10)
    assert Plan.shard(2, 3, 10) != "shard"


def test_a_plan_cannot_be_changed():
    table = Plan.shard(2, 2, 8).columns.copy()
    plan = Plan.from_columns(table, 8)
    table[:] = 0
    assert plan == Plan.shard(2, 2, 8)
    with pytest.raises(ValueError, match="read-only"):
        plan.columns[0, 0, 0] = 1
    with pytest.raises(AttributeError):
        plan.d_ff = 4


def test_repr_tells_widths_and_experts():
    assert repr(Plan.shard(2, 4, 37)) == "Plan(ranks=2, num_experts=4, d_ff=37, 18..19 columns of 4 experts a rank)"
    assert repr(Plan.expert_parallel(2, 5, 8)).endswith("8 columns of 2..3 experts a rank)")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        pytest.param(lambda: Plan.shard(0, 1, 1), moeshard.ArgumentError, "0", id="no-rank"),
        pytest.param(lambda: Plan.shard(1, 1, 0), moeshard.ArgumentError, "0", id="no-column"),
        pytest.param(lambda: Plan.shard(2, 1, 8, [1, -1]), moeshard.ArgumentError, "speed", id="negative-speed"),
        pytest.param(lambda: Plan.shard(2, 1, 8, [1, float("nan")]), moeshard.ArgumentError, "speed", id="nan-speed"),
        pytest.param(
            lambda: Plan.expert_parallel(2, 1, 8, [2]), moeshard.ArgumentError, "owner", id="owner-out-of-range"
        ),
        pytest.param(lambda: Plan.hybrid(4, 2, 8, 3), moeshard.ArgumentError, "4.*3|3.*4", id="group-does-not-divide"),
        pytest.param(
            lambda: Plan.from_columns([[0, 8]], 8), moeshard.ShapeError, r"columns.*\[1, 2\]", id="flat-table"
        ),
        pytest.param(lambda: Plan.from_columns([[[0.0, 8.0]]], 8), moeshard.DTypeError, "float64", id="float-table"),
        pytest.param(
            lambda: Plan.from_columns([[[0, 8]]], 8, [1, 1]), moeshard.ShapeError, r"copies.*\[2\]", id="copies"
        ),
        pytest.param(lambda: Plan.shard(2, 3, 8).work([1, 2]), moeshard.ShapeError, r"\[3\].*\[2\]", id="short-counts"),
    ],
)
def test_bad_plans_name_the_argument(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_plan_for_other_sizes_names_both():
    with pytest.raises(moeshard.ShapeError, match=r"\(2, 4, 16\).*\(2, 4, 8\)"):
        plan_for(Plan.shard(2, 4, 8), 2, 4, 16)
    with pytest.raises(moeshard.ArgumentError, match="expert_parallel.*'tensor'"):
        plan_for("tensor", 2, 4, 16)


def test_planning_needs_no_torch():
    code = "import sys, moeshard; moeshard.Plan.shard(2, 8, 37).share(range(8)); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
