# SPDX-License-Identifier: Apache-2.0
"""Placement of whole experts: against brute force, its own bounds, unseen tokens, and models that run it."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from switch_models import batch, switch_model
from workers import on_ranks

import moeshard
from moeshard import ArgumentError, DTypeError, Placement, Plan, RangeError, ShapeError, TokenPaths, _core, place
from moeshard.layer import sharded_layers

FIRST, LAST = "encoder.block.1.layer.1.mlp", "encoder.block.3.layer.1.mlp"  # of switch_model
METHODS = ["contiguous", "balanced", "two-stage", "sweep", "exact"]


def correlated(tokens, layers, experts, follow, seed=0, choices=1):
    """Paths of tokens with a topic, which a share `follow` of the choices goes by: in each layer another expert."""
    rng = np.random.default_rng(seed)
    topic = rng.integers(0, experts, tokens)
    found = np.empty((tokens, layers, choices), np.int32)
    for layer in range(layers):
        expert_of = rng.permutation(experts)
        for choice in range(choices):
            chosen = np.where(rng.random(tokens) < follow, expert_of[topic], rng.integers(0, experts, tokens))
            found[:, layer, choice] = (chosen + choice) % experts
    return TokenPaths(found, experts)


def every_owner(experts, ranks):
    """All placements of a layer with floor(E/R) or ceil(E/R) experts a rank."""
    for owner in itertools.product(range(ranks), repeat=experts):
        held = np.bincount(owner, minlength=ranks)
        if held.min() >= experts // ranks and held.max() <= -(-experts // ranks):
            yield np.array(owner)


def local_hops(owner, transitions):
    return [
        int(table[owner[layer][:, None] == owner[layer + 1][None]].sum()) for layer, table in enumerate(transitions)
    ]


def check(placement, paths, ranks):
    """What must hold whatever the method is."""
    experts = paths.num_experts
    for owner in placement.owner:
        held = np.bincount(owner, minlength=ranks)
        assert held.min() >= experts // ranks and held.max() <= -(-experts // ranks)
    loads = np.stack([np.bincount(o, c, minlength=ranks) for o, c in zip(placement.owner, paths.counts, strict=True)])
    np.testing.assert_array_equal(placement.loads, loads)
    mean = paths.counts.sum(1) / ranks
    np.testing.assert_allclose(placement.bound, np.maximum(mean, paths.counts.max(1)))
    if placement.method != "contiguous":
        assert (placement.loads.max(1) <= placement.cap + 1e-9).all()
    if placement.hops is not None:
        local = local_hops(placement.owner, paths.transitions)
        assert placement.hops.local.tolist() == local
        assert (placement.hops.local <= placement.hops.most).all()
        assert (placement.hops.gap >= 0).all()


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(2, 6), st.integers(1, 3), st.integers(1, 2))
@settings(max_examples=40)
def test_against_brute_force(seed, layers, experts, ranks, choices):
    layers = min(layers, 2) if experts > 5 else layers
    rng = np.random.default_rng(seed)
    drops = rng.random((30, layers, choices)) < 0.1
    found = np.where(drops, -1, rng.integers(0, experts, (30, layers, choices)) % rng.integers(1, experts + 1))
    paths = TokenPaths(found, experts)
    placements = {name: place(paths, ranks, method=name, held_out=False) for name in METHODS}
    for placement in placements.values():
        check(placement, paths, ranks)
    cap, transitions = placements["exact"].cap, paths.transitions
    allowed = [
        [owner for owner in every_owner(experts, ranks) if np.bincount(owner, c, ranks).max() <= cap[layer] + 1e-9]
        for layer, c in enumerate(paths.counts)
    ]
    best = max(sum(local_hops(owners, transitions)) for owners in itertools.product(*allowed))
    assert sum(placements["exact"].hops.local) == best
    free = [list(every_owner(experts, ranks)) for _ in range(layers)]
    for layer, most in enumerate(placements["exact"].hops.most):
        pairs = itertools.product(free[layer], free[layer + 1])
        assert max(int(transitions[layer][a[:, None] == b[None]].sum()) for a, b in pairs) <= most
    assert sum(placements["two-stage"].hops.local) <= sum(placements["sweep"].hops.local) <= best
    # The gap of a layer bounds what changing it alone could win.
    owner = placements["sweep"].owner
    for layer, gap in enumerate(placements["sweep"].hops.gap):
        here = sum(local_hops(owner, transitions))
        for other in allowed[layer]:
            changed = owner.copy()
            changed[layer] = other
            assert sum(local_hops(changed, transitions)) <= here + gap


def cheapest(cost):
    """By scipy: a seat for each item. Seats that may stay empty go to items that may take no other."""
    items, bins = cost.shape
    least, wides = divmod(items, bins)
    seats = np.concatenate([np.repeat(cost, least, axis=1), cost], axis=1)
    nobody = np.full((bins - wides, seats.shape[1]), 2**40)
    nobody[:, bins * least :] = 0
    every = np.concatenate([seats, nobody])
    return int(every[linear_sum_assignment(every)].sum())


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 40),
    st.integers(1, 10),
    st.sampled_from([1, 50, 2**20]),
    st.sampled_from([0, 2**31, 2**40, 2**52, -(2**52)]),
)
@settings(max_examples=200)
def test_assignment_is_the_cheapest(seed, items, bins, spread, offset):
    cost = np.random.default_rng(seed).integers(-spread, spread + 1, (items, bins))  # a spread of 1: ties
    owner, total = _core.assign(cost + offset)
    held = np.bincount(owner, minlength=bins)
    assert held.min() >= items // bins and held.max() <= -(-items // bins)
    assert total - items * offset == cost[np.arange(items), owner].sum() == cheapest(cost)
    if bins**items <= 4096:
        assert cheapest(cost) == min(cost[np.arange(items), o].sum() for o in every_owner(items, bins))


@pytest.mark.parametrize("cost", [2**58, -(2**58), -(2**63)])
def test_costs_whose_sum_would_overflow_are_refused(cost):
    with pytest.raises(RangeError, match=rf"cost: item \d: got {cost}, .* sum to at most 2\^59"):
        _core.assign(np.full((64, 2), cost))
    assert _core.assign(np.full((2, 2), 2**58))[1] == 2**59


@pytest.mark.parametrize("size", [2**31, 2**40, 2**44 - 6])
def test_large_counts_are_balanced_exactly(size):
    found = place([[size // 2 + 1, 1, 1, size // 2 + 3]], ranks=2)
    assert sorted(found.loads[0]) == [size // 2 + 2, size // 2 + 4]
    assert found.bound.tolist() == [size // 2 + 3] and found.cap[0] <= 1.02 * (size // 2 + 3)


@pytest.mark.parametrize("seed", range(12))
def test_sweeps_are_near_the_best(seed):
    experts, ranks = (8, 2) if seed % 2 else (16, 2)
    paths = correlated(3000, 4, experts, 0.5 + 0.04 * seed, seed)
    best, found = (place(paths, ranks, method=name, held_out=False) for name in ("exact", "sweep"))
    assert (found.loads.max(1) <= found.cap).all()
    assert sum(found.hops.local) <= sum(best.hops.local) <= 1.05 * sum(found.hops.local)


def test_real_sizes_with_correlated_layers():
    paths = correlated(20000, 12, 128, 0.6)
    two, found = place(paths, 8, method="two-stage", held_out=False), place(paths, 8)
    check(found, paths, 8)
    assert found.remote <= 0.9 * two.remote
    assert found.remote_held_out <= found.remote + 0.03
    assert found.imbalance <= 1.02 * (found.bound / paths.counts.sum(1) * 8).max() + 1e-9


def test_independent_layers_promise_nothing():
    found = place(correlated(20000, 12, 128, 0.0), 8)
    assert found.remote_contiguous - found.remote_held_out <= 0.05


def test_equal_arguments_give_equal_placements():
    paths = correlated(2000, 4, 16, 0.6, choices=2)
    one, other = (place(paths, 4, seed=5) for _ in range(2))
    np.testing.assert_array_equal(one.owner, other.owner)


def test_counts_alone_balance_only():
    counts = np.array([[7, 5, 4, 3, 1, 0], [10, 10, 10, 10, 10, 10]])
    found = place(counts, 2)
    assert found.hops is found.remote is None and found.loads.tolist() == [[10, 10], [30, 30]]
    assert "only the load is balanced" in str(found)


def test_an_unbalanceable_expert_is_named_and_can_be_cut():
    counts = [[70, 10, 10, 10]]
    assert place(counts, 2).unbalanceable[0].share == 0.7
    cut = place(counts, 2, cut_unbalanceable=True)
    assert cut.owner[0, 0] == -1 and cut.loads.tolist() in ([[45, 55]], [[55, 45]])
    columns = cut.for_layer(0, d_ff=9).columns
    assert columns[:, 0].tolist() in ([[0, 5], [5, 9]], [[0, 4], [4, 9]])


@pytest.mark.parametrize("method", METHODS)
def test_no_tokens(method):
    found = place(TokenPaths(np.empty((0, 2, 1), np.int32), 4), 2, method=method)
    assert sorted(np.bincount(found.owner[0])) == [2, 2] and found.loads.sum() == 0


def test_a_layer_alone_and_a_rank_alone():
    paths = correlated(100, 1, 6, 0.5)
    assert place(paths, 3).remote == 0
    assert (place(paths, 1).owner == 0).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ranks": 0}, ArgumentError, "ranks: expected a positive integer, got 0"),
        ({"method": "best"}, ArgumentError, "method: expected one of contiguous, .*got 'best'"),
        ({"starts": 0}, ArgumentError, "starts"),
        ({"slack": -0.1}, ArgumentError, "slack"),
        ({"slack": float("nan")}, ArgumentError, "slack"),
        ({"seed": -1}, ArgumentError, "seed"),
        ({"routing": [[1.5, 2.0]]}, DTypeError, "routing: expected token paths, or counts of integers, got float64"),
        ({"routing": [1, 2]}, ShapeError, r"routing: expected counts \[layers, experts\], got \[2\]"),
        ({"routing": {"a": [1, 2], "b": [1]}}, ShapeError, "routing: expected equally many experts in all layers"),
        ({"routing": [[3, -1]]}, RangeError, "-1"),
        ({"routing": [[2**44, 1]]}, RangeError, r"expert 1: got 1, expected 0 or more, at most 2\^44 in a layer"),
        ({"routing": [[2**53, 1]]}, RangeError, rf"expert 0: got {2**53}, .*at most 2\^44 in a layer"),
        ({"routing": np.array([[2**63, 1]], np.uint64)}, RangeError, rf"routing: got {2**63}, expected at most 2\^44"),
        ({"routing": [[1] * 400], "method": "exact"}, ArgumentError, "exact"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = {"routing": correlated(50, 2, 4, 0.5), "ranks": 2, **change}
    with pytest.raises(error, match=message):
        place(arguments.pop("routing"), **arguments)


def test_files_come_back(tmp_path):
    paths = correlated(200, 3, 8, 0.5)
    paths.save(tmp_path / "paths.npz")
    np.testing.assert_array_equal(TokenPaths.load(tmp_path / "paths.npz").experts, paths.experts)
    found = place(paths, 2)
    found.save(tmp_path / "placement.json")
    back = Placement.load(tmp_path / "placement.json")
    assert back.to_dict() == found.to_dict()
    json.dumps(found.to_dict())
    for name, cls in (("paths.npz", TokenPaths), ("placement.json", Placement)):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:40])
        with pytest.raises(ArgumentError, match="that moeshard has saved|token paths"):
            cls.load(tmp_path / name)


def test_polish_is_never_worse():
    pytest.importorskip("scipy")
    paths = correlated(2000, 3, 12, 0.4)
    plain, polished = (place(paths, 3, held_out=False, starts=1, polish=on) for on in (False, True))
    check(polished, paths, 3)
    assert sum(polished.hops.local) >= sum(plain.hops.local)


@pytest.mark.parametrize("all_on_rank_0", [True, False])
def test_polish_takes_nothing_above_the_cap(monkeypatch, all_on_rank_0):
    optimize = pytest.importorskip("scipy.optimize")
    paths = TokenPaths([[[0], [1]]] * 90 + [[[1], [0]]] * 90 + [[[2], [3]]] * 10 + [[[3], [2]]] * 10, 4)

    def careless(cost, **kwargs):
        ranks = np.zeros((4, 2)) if all_on_rank_0 else np.eye(2)[[0, 0, 1, 1]]
        ranks[:, 0] += all_on_rank_0
        return SimpleNamespace(x=ranks.reshape(-1))

    monkeypatch.setattr(optimize, "milp", careless)
    plain, polished = (place(paths, 2, method="balanced", held_out=False, polish=on) for on in (False, True))
    np.testing.assert_array_equal(polished.owner, plain.owner)


# ---- models ----------------------------------------------------------------------------------------------------------


def placed(group):
    """Largest difference to the model unsharded, with every layer placed by what was recorded; who holds what."""
    model, given = switch_model(expert_capacity=64), batch(4, 9, seed=group.rank)
    with torch.no_grad():
        expected = model(**given).last_hidden_state
    paths = moeshard.record_routing(model, [batch(4, 9, seed=rank) for rank in range(group.size)])
    found = place(paths, group.size, cut_unbalanceable=True)
    moeshard.shard(model, group=group, plan=found, progress=False)
    with torch.no_grad():
        output = model(**given).last_hidden_state
    held = [(layer.plan.columns[:, :, 1] > layer.plan.columns[:, :, 0]).sum(0) for _, layer in sharded_layers(model)]
    real = given["attention_mask"].bool()
    worst = (output - expected)[real].abs().max() / expected.abs().max()
    together = moeshard.record_routing(model, [given], gather=True)
    return float(worst), found.owner, held, len(together)


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_placed_model_computes_the_same(workers, ranks):
    tokens = sum(int(batch(4, 9, seed=rank)["attention_mask"].sum()) for rank in range(ranks))
    for worst, owner, held, together in on_ranks(workers, ranks, placed):
        assert worst <= 1e-5
        assert all(((o >= 0) <= (h == 1)).all() for o, h in zip(owner, held, strict=True))
        assert together == tokens


def test_a_layer_is_found_by_number_and_name():
    found = place({"encoder.0.mlp": [1, 2, 3, 4], "encoder.1.mlp": [4, 1, 1, 4]}, 2)
    for number, names in enumerate([("encoder.0.mlp", "0.mlp"), ("encoder.1.mlp", "model.encoder.1.mlp")]):
        expected = Plan.expert_parallel(2, 4, 9, found.owner[number].tolist())
        assert all(found.for_layer(layer, d_ff=9) == expected for layer in (number, *names))
    for layer, message in (("mlp", "no layer 'mlp', only encoder.0.mlp, e"), (2, "0 to 1, got 2"), (-1, "got -1")):
        with pytest.raises(ArgumentError, match=message):
            found.for_layer(layer, d_ff=9)


def test_a_report_is_counts():
    model = switch_model(hot_expert=3)
    moeshard.shard(model, group=moeshard.init("one"), capacity=None, progress=False)
    with torch.no_grad():
        model(**batch(2, 9, padded=False))
    report = moeshard.report(model)
    found = place(report, 2)
    assert found.layers == tuple(layer.name for layer in report.layers) == (FIRST, LAST)
    assert found.counts.tolist() == [layer.histogram.tolist() for layer in report.layers]
    moeshard.unshard(model)
    moeshard.shard(model, group=moeshard.init("one"), plan=place(report, 1), progress=False)


@pytest.mark.parametrize(
    ("layers", "ranks", "error", "message"),
    [
        pytest.param({}, 1, ArgumentError, "placement: it has no layer 'encoder.block.1.* only layer 0", id="names"),
        pytest.param({FIRST: 8}, 1, ArgumentError, f"no layer '{LAST}', only {FIRST}", id="one-missing"),
        pytest.param({FIRST: 8, LAST: 8, "other": 8}, 1, ArgumentError, "the model has no other", id="one-more"),
        pytest.param({FIRST: 7, LAST: 7}, 1, ShapeError, r"block.1.*\(1, 8, 37\).*\(1, 7, 37\)", id="experts"),
        pytest.param({FIRST: 8, LAST: 8}, 2, ShapeError, r"block.1.*\(1, 8, 37\).*\(2, 8, 37\)", id="ranks"),
    ],
)
def test_a_placement_for_another_model_is_refused_before_anything_is_changed(layers, ranks, error, message):
    model, counts = switch_model(), {name: [1] * experts for name, experts in layers.items()}
    with pytest.raises(error, match=message):
        moeshard.shard(model, group=moeshard.init("one"), plan=place(counts or [[1] * 8], ranks), progress=False)
    assert not any(isinstance(module, moeshard.ShardedExperts) for module in model.modules())
