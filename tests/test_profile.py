# SPDX-License-Identifier: Apache-2.0
"""profile: the five steps in order, amounts as computed by hand, and nothing left behind."""

import io
import json
from itertools import pairwise
from time import perf_counter_ns

import pytest
import torch
from reference import layer_case
from switch_models import batch, run, switch_model
from test_layer import forward, layer_of
from workers import on_ranks

import moeshard
from moeshard import Plan, ShardedExperts, _core
from moeshard.group import Group
from moeshard.layer import unobserved
from moeshard.profiles import STEPS, Call, Limits, Profile, RankProfile

RANKS = pytest.mark.parametrize("ranks", [1, 2])


def each_rank(workers, ranks, function, *args):
    """``function(group, *args)`` on each rank; alone, in this process."""
    return [function(moeshard.init("one"), *args)] if ranks == 1 else on_ranks(workers, ranks, function, *args)


def unprofiled(model):
    layers = [module for module in model.modules() if isinstance(module, ShardedExperts)]
    return all(layer.on_step is unobserved for layer in layers) and not any(
        module._forward_pre_hooks for module in model.modules()
    )


# ---- times --------------------------------------------------------------------------------------------


class Spy:
    """A batch that says what is called."""

    def __init__(self, real, log):
        self.real, self.log = real, log

    def __getattr__(self, name):
        self.log.append(f"batch.{name}")
        return getattr(self.real, name)


def test_a_layer_announces_each_step_right_before_it():
    group, log = Group(_core.exchange_one(), "one"), []
    case = layer_case(12, 8, 12, 3, 2)
    layer = layer_of(case, group)
    gather, combine = group.gather, group.combine
    group.batch, layer.on_step = Spy(group.batch, log), log.append
    group.gather = lambda spy: (log.append("exchange.gather"), gather(spy.real))
    group.combine = lambda spy: (log.append("exchange.combine"), combine(spy.real))
    forward(layer, case, slice(None))
    counting = {"batch.tokens_per_rank", "batch.counts"}
    assert [line for line in log if line not in counting] == [
        *("route", "batch.route", "gather", "exchange.gather", "group", "batch.group"),
        *("ffn", "batch.ffn", "combine", "exchange.combine", "done"),
    ]


def timed(group):
    model = moeshard.shard(switch_model(), group=group, progress=False)
    inputs, spans = batch(2, 9, seed=group.rank), []
    expected = run(model, inputs).outputs[0]
    with moeshard.profile(model, limits=False) as profile:
        for _ in range(3):
            start = perf_counter_ns()
            same = torch.equal(run(model, inputs).outputs[0], expected)
            spans.append((start, perf_counter_ns()))
    return profile.to_dict(), spans, same, unprofiled(model)


@RANKS
def test_steps_follow_each_other_and_fill_the_layer(workers, ranks):
    results = each_rank(workers, ranks, timed)
    for rank, (profile, spans, same, clean) in enumerate(results):
        assert same and clean
        assert profile == results[0][0], "each rank has all ranks' records"
        calls = profile["calls"][rank]
        assert [call["layer"] for call in calls] == 3 * [0, 1]
        for call in calls:
            assert len(call["stamps"]) == len(STEPS) + 1
        for span, (first, second) in zip(spans, zip(calls[::2], calls[1::2], strict=True), strict=True):
            moments = [span[0], first["block"], *first["stamps"], second["block"], *second["stamps"], span[1]]
            assert all(before < after for before, after in pairwise(moments))
        for row in [row for row in profile["rows"] if row["rank"] == rank]:
            mine = [call for call in calls if row["layer"] in ("all layers", profile["layers"][call["layer"]])]
            inside = sum(call["stamps"][-1] - call["stamps"][0] for call in mine)
            assert tuple(row["seconds"]) == STEPS and row["calls"] == len(mine)
            assert sum(row["seconds"].values()) == pytest.approx(inside / 1e9, rel=1e-12)
            assert row["router_seconds"] == pytest.approx(
                sum(call["stamps"][0] - call["block"] for call in mine) / 1e9, rel=1e-12
            )


# ---- amounts, by hand: 3 tokens, D = 6, F = 5, 3 experts; expert 0 has 2 slots, 1 none, 2 one, 3 are dropped ----

INDEX = [[0, -1], [2, 0], [-1, -1]]
COLUMNS = [[[0, 3], [0, 2], [0, 1]], [[3, 5], [2, 5], [1, 5]]]


def amounts(group, *, gated=False, storage=torch.float32, dtype=torch.float32, tokens="local"):
    """A call in which rank 1 has no tokens, unless they are replicated."""
    layer = ShardedExperts.from_weights(
        torch.ones(3, 10 if gated else 5, 6),
        torch.ones(3, 6, 5),
        gated=gated,
        dtype=storage,
        group=group,
        tokens=tokens,
        plan=Plan.from_columns(COLUMNS, 5) if group.size == 2 else "auto",
    )
    mine = slice(0, 3 if group.rank == 0 or tokens == "replicated" else 0)
    with moeshard.profile(layer, limits=False) as profile:
        layer(torch.ones(3, 6, dtype=dtype)[mine], torch.tensor(INDEX)[mine], torch.ones(3, 2)[mine])
    return profile.to_dict()


def of_ranks(profile, name):
    return [calls[0][name] for calls in profile["calls"]]


def test_amounts_of_one_rank():
    profile = amounts(moeshard.init("one"))
    assert of_ranks(profile, "flops") == [2 * 6 * 2 * (2 * 5 + 1 * 5)]
    assert of_ranks(profile, "ffn_bytes") == [4 * 6 * 2 * (5 + 5)]
    assert of_ranks(profile, "gather_bytes") == of_ranks(profile, "combine_bytes") == [0]
    assert of_ranks(profile, "block") == [None]


@pytest.mark.parametrize(
    ("options", "matrices", "weight", "token", "bfloat16"),
    [
        pytest.param({}, 2, 4, 4, False, id="float32"),
        pytest.param({"gated": True}, 3, 4, 4, False, id="gated"),
        pytest.param({"storage": torch.bfloat16}, 2, 2, 4, False, id="bfloat16-weights"),
        pytest.param({"dtype": torch.bfloat16}, 2, 4, 2, False, id="bfloat16-tokens"),
        pytest.param({"storage": torch.bfloat16, "dtype": torch.bfloat16}, 2, 2, 2, True, id="bfloat16"),
        pytest.param({"storage": torch.float16, "dtype": torch.float16}, 2, 2, 2, False, id="float16"),
    ],
)
def test_amounts_of_ragged_columns_dropped_slots_and_a_rank_without_tokens(
    workers, options, matrices, weight, token, bfloat16
):
    for profile in on_ranks(workers, 2, amounts, **options):
        assert of_ranks(profile, "tokens") == [3, 0]
        assert of_ranks(profile, "flops") == [2 * 6 * matrices * (2 * 3 + 1 * 1), 2 * 6 * matrices * (2 * 2 + 1 * 4)]
        assert of_ranks(profile, "ffn_bytes") == [weight * 6 * matrices * (3 + 1), weight * 6 * matrices * (2 + 4)]
        assert of_ranks(profile, "gather_bytes") == [0, 3 * (token * 6 + 2 * (4 + 4))]
        assert of_ranks(profile, "combine_bytes") == [3 * 4 * 6, 0]
        assert of_ranks(profile, "bfloat16") == [bfloat16, bfloat16]
        for row, share in zip(profile["rows"], 2 * [7 / 15, 8 / 15], strict=True):
            assert row["share_of_work"] == pytest.approx(share)


def test_amounts_of_replicated_tokens(workers):
    for profile in on_ranks(workers, 2, amounts, tokens="replicated"):
        assert of_ranks(profile, "tokens") == [3, 3]
        assert of_ranks(profile, "gather_bytes") == [0, 0]
        assert of_ranks(profile, "combine_bytes") == [3 * 4 * 6, 3 * 4 * 6]


def test_a_layer_without_work_has_no_share_of_it():
    layer = layer_of(layer_case(1, 8, 12, 3, 1), moeshard.init("one"))
    with moeshard.profile(layer, limits=False) as profile:
        layer(torch.ones(2, 8), torch.full((2, 1), -1), torch.ones(2, 1))
    assert [(row.flops, row.share_of_work) for row in profile.rows] == [(0, 0.0)] * 2


# ---- against the limits -----------------------------------------------------------------------------------


def call(layer=0, *, start=0, ffn=10**9, flops=0, weights=0, bfloat16=False):
    """A call by hand: each step takes 1 us, ffn as told."""
    stamps = [start, start + 1000, start + 2000, start + 3000, start + 3000 + ffn, start + 4000 + ffn]
    return Call(layer, start - 500, stamps, 7, flops, 0, weights, 0, bfloat16)


def by_hand(*ranks, layers=("first", "second")):
    profile = Profile(layers)
    profile.by_rank = ranks
    return profile


LIMITS = Limits(flops=1000.0, dot_flops=4000.0, bandwidth=100.0)


def test_the_roofline_is_the_longer_of_flops_and_bytes_call_by_call():
    calls = (call(flops=500, weights=20), call(flops=100, weights=30), call(1, flops=800, bfloat16=True))
    profile = by_hand(RankProfile("here", 0, LIMITS, calls))
    found = [(row.layer, row.of_peak_flops, row.of_bandwidth, row.of_roofline) for row in profile.rows]
    assert found == [
        ("first", pytest.approx(0.6 / 2), pytest.approx(0.5 / 2), pytest.approx((0.5 + 0.3) / 2)),
        ("second", pytest.approx(0.2), 0.0, pytest.approx(0.2)),
        ("all layers", pytest.approx(0.8 / 3), pytest.approx(0.5 / 3), pytest.approx(1 / 3)),
    ]


def test_without_dot_products_bfloat16_is_held_against_multiply_adds():
    limits = LIMITS._replace(dot_flops=0.0)
    profile = by_hand(RankProfile("here", 0, limits, (call(flops=500, bfloat16=True),)))
    assert profile.rows[0].of_peak_flops == pytest.approx(0.5)


def test_a_layer_that_was_not_called_and_limits_not_measured_have_no_fractions():
    profile = by_hand(RankProfile("here", 0, LIMITS, (call(),)), RankProfile("here", 0, None, (call(),)))
    assert [row.of_roofline for row in profile.rows] == [0.0, None, None, None, 0.0, None]
    assert "second" in str(profile)


def with_limits(group):
    model = moeshard.shard(switch_model(), group=group, progress=False)
    with moeshard.profile(model) as profile:
        run(model, batch(2, 9))
    return profile.to_dict()


@RANKS
def test_limits_of_every_rank_are_measured(workers, ranks):
    for profile in each_rank(workers, ranks, with_limits):
        assert len(profile["limits"]) == ranks
        for limits in profile["limits"]:
            assert limits["flops"] > 1e8 and limits["bandwidth"] > 1e8 and limits["dot_flops"] >= 0
        for row in profile["rows"]:
            assert row["of_roofline"] >= max(row["of_peak_flops"], row["of_bandwidth"]) > 0


# ---- nothing is left behind ----------------------------------------------------------------------------------


def raising(group):
    """Rank 0 passes a bad index in the body: all ranks raise there. Then a good profile."""
    case = layer_case(12, 8, 12, 3, 2)
    layer = layer_of(case, group)
    try:
        with moeshard.profile(layer, limits=False) as profile:
            forward(layer, case, slice(None))
            forward(layer, {**case, "index": case["index"] + 100 * (group.rank == 0)}, slice(None))
    except moeshard.MoeshardError as error:
        said = type(error).__name__
    dropped = profile.by_rank == () and "nothing recorded" in str(profile)
    clean = unprofiled(layer)
    with moeshard.profile(layer, limits=False) as profile:
        forward(layer, case, slice(None))
    return said, dropped, clean, [len(rank.calls) for rank in profile.by_rank]


@RANKS
def test_an_exception_in_the_body_drops_the_records_and_leaves_the_model_unprofiled(workers, ranks):
    for rank, result in enumerate(each_rank(workers, ranks, raising)):
        assert result == ("PeerError" if rank else "RangeError", True, True, ranks * [1])


def test_an_exception_in_the_body_removes_the_hooks_of_a_model():
    model = moeshard.shard(switch_model(), progress=False)
    with pytest.raises(ZeroDivisionError), moeshard.profile(model, limits=False):
        assert not unprofiled(model)
        raise ZeroDivisionError
    assert unprofiled(model)


def raising_alone(group):
    layer = layer_of(layer_case(1, 8, 12, 3, 2), group)
    with moeshard.profile(layer, limits=False):
        if group.rank == 1:
            raise ZeroDivisionError


@pytest.mark.timeout(30)  # half of the group's own timeout
def test_an_exception_on_one_rank_does_not_keep_the_others_waiting(workers):
    with pytest.raises(ZeroDivisionError):
        on_ranks(workers, 2, raising_alone)


def failing_call(group):
    case = layer_case(12, 8, 12, 3, 2)
    layer = layer_of(case, group)
    with moeshard.profile(layer, limits=False) as profile:
        with pytest.raises(moeshard.MoeshardError):
            forward(layer, {**case, "index": case["index"] + 100 * (group.rank == 0)}, slice(None))
        forward(layer, case, slice(None))
    return [[len(call.stamps) for call in rank.calls] for rank in profile.by_rank]


@RANKS
def test_a_call_that_fails_is_not_recorded(workers, ranks):
    assert each_rank(workers, ranks, failing_call) == ranks * [ranks * [[6]]]


def nested(group):
    model = moeshard.shard(switch_model(), group=group, progress=False)
    with moeshard.profile(model, limits=False) as profile:
        with (
            pytest.raises(moeshard.ArgumentError, match=r"block\.1.*profiled already.*nested"),
            moeshard.profile(model, limits=False),
        ):
            raise AssertionError("entered")
        run(model, batch(2, 9))
    return [len(rank.calls) for rank in profile.by_rank], unprofiled(model)


@RANKS
def test_a_nested_profile_is_refused_and_the_outer_one_goes_on(workers, ranks):
    assert each_rank(workers, ranks, nested) == ranks * [(ranks * [2], True)]


def test_a_sharded_model_is_unprofiled_by_default():
    assert unprofiled(moeshard.shard(switch_model(), progress=False))


# ---- what cannot be profiled ------------------------------------------------------------------------------------


def test_a_model_that_is_not_sharded_cannot_be_profiled():
    with (
        pytest.raises(moeshard.ArgumentError, match="not sharded.*moeshard.shard"),
        moeshard.profile(switch_model()),
    ):
        raise AssertionError("entered")


def test_layers_of_different_groups_cannot_be_profiled_together():
    groups = [Group(_core.exchange_one(), "one") for _ in range(2)]
    model = torch.nn.Sequential(*(layer_of(layer_case(1, 8, 12, 3, 1), group) for group in groups))
    with (
        pytest.raises(moeshard.ArgumentError, match="1: has another group than 0"),
        moeshard.profile(model, limits=False),
    ):
        raise AssertionError("entered")
    assert unprofiled(model)


def disagreeing(group, how):
    layers = [layer_of(layer_case(1, 8, 12, 3, 1), group) for _ in range(2)]
    model = torch.nn.Sequential(*layers)
    with moeshard.profile(
        layers[1] if how == "layers" and group.rank else model, limits=how == "limits" and group.rank == 1
    ):
        raise AssertionError("entered")


@pytest.mark.parametrize(("how", "name"), [("layers", "the profiled layers"), ("limits", "limits")])
def test_ranks_that_profile_differently_are_a_mismatch(workers, how, name):
    with pytest.raises(moeshard.RankMismatch, match=f"about {name}: .* on rank 0 but .* on rank 1"):
        on_ranks(workers, 2, disagreeing, how)


# ---- what is shown -----------------------------------------------------------------------------------------------


def traced(group, path):
    model = moeshard.shard(switch_model(), group=group, progress=False)
    with moeshard.profile(model, limits=False) as profile:
        for _ in range(2):
            run(model, batch(2, 9))
    if group.rank == 0:
        profile.trace(path)
    return profile.layers


@RANKS
def test_a_trace_has_the_layers_of_each_rank_and_the_steps_in_them(workers, ranks, tmp_path):
    path = tmp_path / "trace.json"
    layers = each_rank(workers, ranks, traced, path)[0]
    events = json.loads(path.read_text())["traceEvents"]
    names = [(e["pid"], e["args"]["name"]) for e in events if e["name"] == "process_name"]
    assert names == [(rank, f"rank {rank}") for rank in range(ranks)]
    for rank in range(ranks):
        slices = [event for event in events if event["ph"] == "X" and event["pid"] == rank]
        assert [event["name"] for event in slices] == [
            name for _ in range(2) for layer in layers for name in ("router", layer, *STEPS)
        ]
        assert {event["tid"] for event in slices} == {0}
        moment = 0
        for router, layer, *steps in (slices[at : at + 7] for at in range(0, len(slices), 7)):
            assert router["ts"] >= moment and router["dur"] > 0
            moment = router["ts"]
            for inner in (router, *steps):
                assert inner["ts"] == pytest.approx(moment, abs=1e-3)  # us: times are whole ns
                moment = inner["ts"] + inner["dur"]
            assert steps[0]["ts"] == layer["ts"] and moment == pytest.approx(layer["ts"] + layer["dur"], abs=1e-3)
            assert layer["args"] == {"tokens": 18} and steps[3]["args"]["flops"] > 0


def test_ranks_of_one_host_keep_their_clock_and_hosts_are_set_to_the_moment_they_entered(tmp_path):
    profile = by_hand(
        RankProfile("a", 5_000, None, (call(start=9_000),)),
        RankProfile("a", 4_000, None, (call(start=9_000),)),
        RankProfile("a", 4_500, None, (call(start=9_000),)),
        RankProfile("b", 7_002_000, None, (call(start=7_009_000),)),
    )
    profile.trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [event["ts"] for event in events if event["name"] == "first"] == [5.0, 5.0, 5.0, 7.0]


def test_a_profile_prints_as_text_html_and_rich():
    from rich.console import Console

    profile = by_hand(
        *(RankProfile("here", 0, LIMITS, (call(flops=flops), call(1, ffn=2_000_000))) for flops in (250, 750))
    )
    lines = str(profile).splitlines()
    assert lines[0].startswith("moeshard profile: 2 MoE layers on 2 ranks") and len(lines) == 2 + 3 * 2
    assert [word for word in lines[1].split() if word in STEPS] == list(STEPS)
    assert lines[2].split()[:8] == ["first", "0", "1", "0.001", "0.001", "0.001", "0.001", "1000.000"]
    assert "25.0%" in lines[2] and "75.0%" in lines[3] and lines[3].endswith("75%")
    assert profile._repr_html_().count("<tr>") == 1 + 6
    console = Console(record=True, width=250, file=io.StringIO())
    console.print(profile)
    assert "of roofline" in console.export_text()
    json.dumps(profile.to_dict())


@pytest.mark.parametrize("limits", [LIMITS, None], ids=["limits", "no-limits"])
def test_a_plot_is_a_picture(tmp_path, limits):
    by_hand(*(RankProfile("here", 0, limits, (call(flops=250),)) for _ in range(2))).plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_profile_without_records_says_so(tmp_path):
    profile = by_hand()
    assert "nothing recorded" in str(profile) and profile.to_dict()["rows"] == []
    for show in (profile.plot, profile.trace):
        with pytest.raises(moeshard.ArgumentError, match="nothing was recorded.*moeshard.profile"):
            show(tmp_path / "never")
    assert not list(tmp_path.iterdir())
