# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the layer: what it measures is verified, a run can be resumed, bars are judged as they read."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import moeshard
from moeshard.bench import bars, grid, plots, results, summarize, worker
from moeshard.bench.grid import Build, Case
from moeshard.bench.inputs import Router, make_tokens, make_weights
from moeshard.bench.results import Row, Timing
from moeshard.cli import main

CASE = Case(Build("switch-base", 8, "float32", 2), 1, "skew", 120)


def row(case=CASE, share=0.9, **seconds):
    """A made-up row: moeshard takes 1 s unless told otherwise, and its experts have this share of the roofline."""
    seconds = {"moeshard": 1.0, "experts": 1.0, **seconds}
    ranks = case.build.ranks
    return Row(
        case=case,
        hit=8,
        rows=240,
        work=[1 / ranks] * ranks,
        flops=[share * 100.0] * ranks,
        bytes=[1.0] * ranks,
        flops_per_second=[100.0] * ranks,
        bytes_per_second=[100.0] * ranks,
        timings={name: Timing.of([[value]] * ranks) for name, value in seconds.items()},
        errors={"moeshard": 1e-7},
    )


# ---- a whole run ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder and report of a run of the tiny grid."""
    folder = tmp_path_factory.mktemp("bench")
    assert main(["bench", "--grid", "tiny", "--output", str(folder)]) == 0
    return folder, json.loads((folder / "layer-tiny.json").read_text())


@pytest.mark.timeout(300)
def test_every_contestant_of_every_case_is_verified_and_timed_or_says_why_not(finished):
    _, report = finished
    assert [row["key"] for row in report["rows"]] == [case.key for case in grid.grid("tiny")]
    for found in map(Row.from_dict, report["rows"]):
        names = set(results.CONTESTANTS) - ({"published"} if found.case.build.ranks == 1 else set())
        assert set(found.timings) & names | set(found.absent) == names
        assert not set(found.timings) & set(found.absent)
        assert all(len(reason) > 10 for reason in found.absent.values())
        timed = set(found.timings) - {"exchange", "experts-bf16"}
        assert set(found.errors) == timed
        assert found.wrong == []
        assert all(timing.rounds >= 1 and timing.median > 0 for timing in found.timings.values())
    assert {"cpu", "cores", "isa"} <= set(report["machine"])


def test_a_run_leaves_a_report_and_plots_and_no_journal(finished):
    folder, _ = finished
    names = {path.name for path in folder.iterdir()}
    assert names >= {"layer-tiny.json", "layer-tiny-skew.png", "layer-tiny-ranks.png"}
    assert not any(name.endswith("jsonl") for name in names)


def test_growth_with_experts_is_drawn_only_where_it_was_measured(tmp_path):
    def uniform(experts, ranks, tokens):
        return row(Case(Build("switch-base", experts, "float32", ranks), 1, "uniform", tokens))

    def drawn(rows):
        paths = plots.draw(results.circumstances("quick"), rows, tmp_path, "made-up")
        return [path for path in paths if path.stem == "made-up-experts"]

    single = [uniform(8, 1, 16), uniform(128, 1, 64), uniform(8, 2, 16)]
    assert not drawn(single)
    assert drawn([*single, uniform(128, 1, 16)])


def interrupted(finished, tmp_path, **changes):
    """The journal of the same run, killed while it wrote the last row but one."""
    _, report = finished
    about = {name: value for name, value in report.items() if name not in ("rows", "bars")} | changes
    lines = [json.dumps(about), *(json.dumps(row) for row in report["rows"][:-1])]
    path = tmp_path / "layer-tiny.jsonl"
    path.write_text("\n".join(lines)[:-30])
    return path


@pytest.mark.timeout(120)
def test_an_interrupted_run_goes_on_where_it_was_cut(finished, tmp_path, capsys):
    _, report = finished
    path = interrupted(finished, tmp_path)
    assert main(["bench", "--grid", "tiny", "--resume", str(path)]) == 0
    again = json.loads((tmp_path / "layer-tiny.json").read_text())
    assert [row["key"] for row in again["rows"]] == [row["key"] for row in report["rows"]]
    same = [new == old for new, old in zip(again["rows"], report["rows"], strict=True)]
    assert same == [True] * (len(same) - 2) + [False] * 2
    assert not path.exists()


def test_a_run_is_not_resumed_on_another_machine(finished, tmp_path, capsys):
    path = interrupted(finished, tmp_path, machine={"cpu": "another"})
    assert main(["bench", "--grid", "tiny", "--resume", str(path)]) == 1
    assert "another machine" in capsys.readouterr().err


def test_results_are_shown_again_without_measuring(finished, tmp_path, capsys, monkeypatch):
    folder, _ = finished
    monkeypatch.setattr(worker, "measure", None)
    assert main(["bench", "--table", str(folder / "layer-tiny.json"), "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "tiny E=6 float32, 2 ranks" in shown and "never slower than the best rival" in shown


# ---- who goes where ------------------------------------------------------------------------------------


@pytest.mark.parametrize("routing", grid.ROUTINGS)
@pytest.mark.parametrize(
    ("shape", "dtype"), [("tiny", "float32"), ("tiny-top2", "bfloat16"), ("tiny-gated", "float32")]
)
def test_the_router_sends_tokens_where_the_case_says(shape, dtype, routing):
    case = Case(Build(shape, 7, dtype, 1), 1, routing, 50)
    weights = make_weights(case.build, case.shape)
    index, _ = Router(weights.router, top_k=case.shape.top_k, normalize=True)(make_tokens(case, rank=3)[0])
    assert np.array_equal(index.numpy(), grid.choices(case, rank=3))


@pytest.mark.parametrize("tokens", [1, 5, 120])
@pytest.mark.parametrize("experts", [8, 128])
def test_skew_sends_sixty_percent_to_a_tenth_of_the_experts(experts, tokens):
    chosen = grid.choices(replace(CASE, build=replace(CASE.build, num_experts=experts), tokens=tokens), rank=0)
    assert (chosen < round(experts / 10)).sum() == round(0.6 * tokens)


def test_grids_hold_each_case_once_and_the_full_one_every_value():
    for name in grid.GRIDS:
        keys = [case.key for case in grid.grid(name)]
        assert len(keys) == len(set(keys))
    full = grid.grid("full")
    assert {case.tokens for case in full} == set(grid.TOKENS)
    assert {case.routing for case in full} == set(grid.ROUTINGS)
    assert {case.build.num_experts for case in full} == {8, 64, 128, 256}


# ---- what is wrong, absent, disturbed --------------------------------------------------------------------


def measured(case, **errors):
    return worker.Measured(
        seconds=dict.fromkeys(("moeshard", "experts", "hf"), [1.0, 3.0, 2.0]),
        errors=errors,
        absent={},
        columns=[1536] * case.build.num_experts,
        flops_per_second=1e9,
        bytes_per_second=1e9,
    )


def test_an_output_that_differs_on_one_rank_is_wrong_and_nan_too():
    ranks = [measured(CASE, moeshard=1e-7, hf=1e-7), measured(CASE, moeshard=float("nan"), hf=2e-5)]
    assert summarize(CASE, ranks).wrong == ["moeshard", "hf"]
    assert summarize(CASE, ranks[:1] * 2).wrong == []


def test_of_every_round_the_slowest_rank_counts():
    timing = Timing.of([[1.0, 5.0, 1.0], [2.0, 2.0, 4.0]])
    assert (timing.median, timing.rounds, timing.per_rank) == (4.0, 3, [1.0, 2.0])


def test_padding_without_end_is_left_out_with_its_reason(monkeypatch):
    monkeypatch.setitem(moeshard.worker_state, "bench", SimpleNamespace(group=moeshard.init("one")))
    case = Case(Build("switch-base", 128, "float32", 1), 1, "one", 12000)
    padded = SimpleNamespace(padded=True, capacity_factor=None)
    reason = worker._endless(padded, case, worker.LIMITS["quick"], 1e11)
    assert reason and "1,536,000 rows" in reason
    assert worker._endless(padded, replace(case, routing="uniform", tokens=16), worker.LIMITS["quick"], 1e11) is None
    assert worker._endless(SimpleNamespace(padded=False), case, worker.LIMITS["quick"], 1e11) is None


def test_a_share_above_what_the_machine_can_do_is_disturbed_and_judged_by_no_bar():
    fast, slow = row(share=1.2), row(share=0.5)
    assert fast.disturbed and not slow.disturbed
    assert bars.share_of_roof(fast) is None and bars.share_of_roof(slow) == pytest.approx(0.5)


# ---- bars -----------------------------------------------------------------------------------------------


def verdicts(*rows):
    return {verdict.claim: verdict for verdict in bars.judge(rows)}


def test_bars_are_met_missed_or_not_measured_and_missed_ones_come_first():
    found = verdicts(row(deepspeed=3.6, hf=0.9, loop=1.5, published=2.0, exchange=0.5))
    assert found["2 ranks, skewed, E=8, T=120: times DeepSpeed"].state == "met"
    slower = found["never slower than the best rival"]
    assert (slower.state, slower.worst, slower.where) == ("missed", 0.9, CASE.key)
    assert found["1 rank, E=8, T=120: times the best torch"].state == "not measured"
    states = [verdict.state for verdict in found.values()]
    assert states == sorted(states, key=["missed", "met", "not measured"].index)


@pytest.mark.parametrize(("seconds", "state"), [(1.04, "met"), (1.06, "missed")])
def test_two_ranks_are_held_against_one_rank_with_as_many_cores_and_tokens(seconds, state):
    one = replace(CASE, build=replace(CASE.build, ranks=1), threads=2, tokens=240)
    found = verdicts(row(moeshard=seconds), row(one, moeshard=1.0))
    assert found["2 ranks of 1 thread: time over 1 rank of 2"].state == state


def test_every_bar_that_is_about_others_or_the_machine_can_be_missed():
    slow = {"hf": 0.1, "loop": 0.1, "deepspeed": 0.1, "published": 0.1, "exchange": 1.0, "experts-bf16": 2.0}
    rows = [row(case, share=0.01, **slow) for case in grid.grid("quick")]
    rows[0] = replace(rows[0], rows=64)  # 8 tokens an expert
    rows[-1] = replace(row(replace(CASE, tokens=32), share=0.01), rows=64)
    for found in rows:
        found.errors.update(hf=1e-9)
        found.work[0] += 1.0
    lenient = [verdict.claim for verdict in bars.judge(rows) if verdict.state != "missed"]
    assert all("time over" in claim or "time per token" in claim for claim in lenient)
    assert len(lenient) <= 5
