# SPDX-License-Identifier: Apache-2.0
"""Any valid table runs and gives the same outputs: through shared memory, through torch.distributed, whole models."""

import numpy as np
import pytest
import torch
from core_cases import EPS, as_tensor, experts
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_tables import fixed_plans, plans, random_plan
from reference import experts_reference, layer_case, relative_error
from switch_models import batch as model_batch
from switch_models import compare, run, switch_model
from test_core_exchange import on_ranks
from test_group import over_gloo
from transformers import SwitchTransformersEncoderModel
from workers import on_ranks as on_workers
from workers import subgroup

import moeshard
from moeshard import Plan, ShardedExperts, _core, speeds

INPUTS = ("hidden", "index", "weights")


def expected_of(case, plan):
    """The layer in float64; the slots of pruned experts add nothing."""
    pruned = plan.copies[case["index"]] == 0
    index = np.where(pruned, -1, case["index"])
    return experts_reference(**{**case, "index": index})


def off(found, expected):
    """Largest difference over the largest value, or over 1, the size of all operands: single numbers may cancel."""
    return np.abs(found - expected).max(initial=0) / np.abs(expected).max(initial=1)


def packed_for(case, plan, rank):
    has = {name: case[name] is not None for name in ("b_in", "b_out")}
    packed = experts(plan.columns[rank], case["hidden"].shape[1], plan.d_ff, **has)
    for expert in range(plan.num_experts):
        packed.pack(
            expert, *(case[n] if case[n] is None else case[n][expert] for n in ("w_in", "w_out", "b_in", "b_out"))
        )
    return packed


def parts_of(case, tokens):
    limits = np.cumsum([0, *tokens])
    return [[case[name][a:b] for name in INPUTS] for a, b in zip(limits[:-1], limits[1:], strict=True)]


# ---- ranks as threads, through shared memory and by hand ----------------------------------------------


def through_shared_memory(case, plan, tokens, calls=2, replicated=False):
    """Outputs of all ranks, each [calls, T, D], and what each says it has read."""
    parts = [[case[name] for name in INPUTS]] * plan.ranks if replicated else parts_of(case, tokens)

    def work(rank, exchange):
        hidden, index, weights = parts[rank]
        packed, batch, outs = packed_for(case, plan, rank), _core.Batch(), []
        layout = _core.Layout(plan.columns, plan.d_ff, plan.copies, rank)
        for _ in range(calls):
            outs.append(np.full_like(hidden, np.nan))
            batch.route(hidden, index, weights, plan.num_experts, outs[-1], layout=layout, replicated=replicated)
            exchange.gather(batch)
            batch.group()
            batch.ffn(packed)
            exchange.combine(batch)
        return np.array(outs), batch.counts().tolist(), batch.counts(True), batch.rows_read

    results = on_ranks(plan.ranks, work)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


cases = st.fixed_dictionaries(
    {"d_model": st.integers(1, 20), "choices": st.integers(1, 3), "seed": st.integers(0, 99), "bias": st.booleans()}
)


def case_for(plan, tokens, d_model, choices, seed, bias):
    return layer_case(tokens, d_model, plan.d_ff, plan.num_experts, choices, seed=seed, bias=bias, dropped=0.1)


@given(plans(), cases, st.data())
@settings(max_examples=60)
def test_any_valid_table_gives_the_same_outputs(plan, sizes, data):
    tokens = data.draw(st.lists(st.sampled_from([0, 1, 5, 17]), min_size=plan.ranks, max_size=plan.ranks))
    case = case_for(plan, sum(tokens), **sizes)
    results = through_shared_memory(case, plan, tokens)
    found = np.concatenate([outs for outs, *_ in results], axis=1)
    assert (found[0] == found[1]).all(), "other bits on a repeated call"
    assert off(found[0], expected_of(case, plan)) <= 2e-6
    counts = np.bincount(case["index"][case["index"] >= 0], minlength=plan.num_experts)
    for rank, (_, counted, own, _) in enumerate(results):
        assert counted == counts.tolist()
        even = counts / np.maximum(plan.copies, 1) * (np.diff(plan.columns[rank])[:, 0] > 0)
        assert (np.abs(own - even) < 1).all(), "a copy gets its share, within a slot"


@given(plans(least=2), cases)
@settings(max_examples=20)
def test_replicated_tokens_are_computed_by_one_copy(plan, sizes):
    case = case_for(plan, 9, **sizes)
    for outs, *_ in through_shared_memory(case, plan, None, calls=1, replicated=True):
        assert off(outs[0], expected_of(case, plan)) <= 2e-6


class Post:
    """What a transport in Python does for a sparse layout, between batches of one process."""

    def __init__(self, batches, tokens):
        self.batches, self.tokens = batches, tokens

    def gather(self):
        routing = [batch.routing() for batch in self.batches]
        index, weights = (np.concatenate(parts) for parts in zip(*routing, strict=True))
        for rank, batch in enumerate(self.batches):
            batch.gather_routing(rank, self.tokens, index, weights)
        for rank, batch in enumerate(self.batches):
            others = [(r, other) for r, other in enumerate(self.batches) if r != rank]
            rows = np.concatenate(
                [batch.take(np.empty(0, int))] + [other.take(other.needed(r, rank)) for r, other in others]
            )
            batch.gather_rows(torch.from_numpy(rows.view(np.uint8)).view(getattr(torch, batch.dtype)))

    def combine(self):
        first = np.cumsum([0, *self.tokens])
        partials = [batch.combine_choices() for batch in self.batches]
        for rank, batch in enumerate(self.batches):
            own = [partial[first[rank] : first[rank + 1]] for partial in partials]
            needed = [batch.needed(rank, reader) for reader in range(len(own))]
            batch.combine_ranks([part if r == rank else part[needed[r]] for r, part in enumerate(own)])


@given(plans(), cases, st.sampled_from(["float32", "bfloat16", "float16"]))
@settings(max_examples=40)
def test_rows_that_are_needed_are_all_that_travels_and_the_bits_stay(plan, sizes, dtype):
    tokens = [7, 0, 12, 3][: plan.ranks]
    case = case_for(plan, sum(tokens), **sizes)
    parts, batches, outs = parts_of(case, tokens), [], []
    packed = [packed_for(case, plan, rank) for rank in range(plan.ranks)]
    for rank, (hidden, index, weights) in enumerate(parts):
        batches.append(_core.Batch())
        outs.append(torch.empty(hidden.shape, dtype=getattr(torch, dtype)))
        layout = _core.Layout(plan.columns, plan.d_ff, plan.copies, rank)
        batches[-1].route(as_tensor(hidden, dtype), index, weights, plan.num_experts, outs[-1], layout=layout)
    sparse = {batch.sparse for batch in batches}
    assert sparse == {bool((plan.copies != 1).any() or (np.diff(plan.columns) == 0).any())}
    post = Post(batches, tokens)
    post.gather()
    for rank, batch in enumerate(batches):
        batch.group()
        batch.ffn(packed[rank])
    post.combine()
    found = torch.cat(outs).float().numpy()
    if dtype == "float32":
        direct = np.concatenate([outs[0] for outs, *_ in through_shared_memory(case, plan, tokens, calls=1)])
        assert (found == direct).all(), "other bits than through shared memory"
    else:
        rounded = torch.from_numpy(case["hidden"]).to(getattr(torch, dtype)).float().numpy()
        right = expected_of({**case, "hidden": rounded}, plan)
        assert off(found, right) <= 2 * EPS[dtype]


def test_expert_parallel_reads_no_rows_of_ranks_that_computed_nothing():
    plan = Plan.expert_parallel(3, 3, 8)
    case = layer_case(6, 4, 8, 3, 1)
    case["index"] = np.array([[0], [1], [1], [2], [-1], [2]])
    results = through_shared_memory(case, plan, [3, 2, 1], calls=1)
    assert [read for *_, read in results] == [(0, 2), (2, 1), (1, 0)]
    assert [own.tolist() for _, _, own, _ in results] == [[1, 0, 0], [0, 2, 0], [0, 0, 2]]


def test_copies_that_all_ranks_have_keep_tokens_at_home_and_share_what_one_rank_has_too_many():
    plan = Plan.from_columns([[[0, 8]], [[0, 8]]], 8, [2])
    case = layer_case(10, 4, 8, 1, 1)
    for tokens, travels in (([5, 5], 0), ([9, 1], 4), ([10, 0], 5)):
        (_, _, first, here), (_, _, second, there) = through_shared_memory(case, plan, tokens, calls=1)
        assert (first.tolist(), second.tolist()) == ([5], [5])
        assert here == (0, travels) and there == (travels, 0)


# ---- what is refused ----------------------------------------------------------------------------------------


ONE = np.ones((1, 4), np.float32), np.zeros((1, 1), np.int64), np.ones((1, 1), np.float32)


def halved(tokens=(1, 2), copies=None):
    """A batch of rank 0 of two, expert parallel, with the routing of all ranks; rank 1 has both tokens of expert 0."""
    plan = Plan.expert_parallel(2, 2, 8)
    batch = _core.Batch()
    batch.route(*ONE, 2, np.empty((1, 4), np.float32), layout=_core.Layout(plan.columns, 8, plan.copies, 0))
    batch.gather_routing(0, tokens, np.zeros((sum(tokens), 1), np.int32), np.ones((sum(tokens), 1), np.float32))
    return batch


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        pytest.param(lambda: _core.Layout([[[0, 7]]], 8, [1], 0), "ArgumentError", "expert 0, columns", id="table"),
        pytest.param(lambda: _core.Layout([[[0, 8]]], 8, [1], 1), "ArgumentError", "rank: got 1, expected", id="rank"),
        pytest.param(lambda: _core.Layout([[[0, 8]]], 0, [1], 0), "ArgumentError", "d_ff: got 0", id="width"),
        pytest.param(lambda: _core.Layout([[[0.0, 8.0]]], 8, [1], 0), "DTypeError", "columns", id="floats"),
        pytest.param(lambda: _core.Layout([[[0, 8]]], 8, [1, 1], 0), "ShapeError", "copies", id="copies"),
        pytest.param(
            lambda: _core.Batch().route(*ONE, 2, layout=_core.Layout([[[0, 8]]], 8, [1], 0)),
            "ShapeError", "layout: it has 1 experts, expected num_experts=2", id="experts",
        ),
        pytest.param(lambda: _core.Batch().needed(0, 0), "ArgumentError", "needed: gather_routing or", id="early"),
        pytest.param(lambda: _core.Batch().take(), "ArgumentError", "take: the batch holds no tokens", id="unrouted"),
        pytest.param(lambda: halved().take([1]), "RangeError", r"tokens\[0\]: got 1, expected 0 to 0", id="token"),
        pytest.param(lambda: halved().take([0.5]), "DTypeError", "tokens: expected integers", id="half-a-token"),
        pytest.param(lambda: halved().needed(2, 0), "ArgumentError", "source: got 2, expected 0 to 1", id="source"),
        pytest.param(lambda: halved().needed(0, -1), "ArgumentError", "reader: got -1, expected 0 to 1", id="reader"),
        pytest.param(lambda: halved().group(), "ArgumentError", "group: nothing was gathered", id="no-rows"),
        pytest.param(
            lambda: halved().gather_rows(np.ones((1, 4), np.float32)),
            "ShapeError", r"hidden_states: got \[1, 4\], expected \[M=2, D=4\]", id="rows",
        ),
        pytest.param(lambda: halved().gather_rows(np.ones((2, 4), np.float16)), "DTypeError", "float16", id="dtype"),
        pytest.param(lambda: _core.Batch().gather_rows(ONE[0]), "ArgumentError", "gather_routing", id="order"),
    ],
)  # fmt: skip
def test_bad_calls_name_what_is_wrong(call, error, message):
    with pytest.raises(getattr(_core, error), match=message):
        call()


def test_a_layout_is_one():
    with pytest.raises(TypeError, match="layout: expected moeshard._core.Layout or None, got <class 'list'>"):
        _core.Batch().route(*ONE, 2, layout=[[0, 8]])


def test_parts_of_other_ranks_have_only_the_rows_they_computed():
    batch = halved()
    batch.gather_rows(np.ones((2, 4), np.float32))
    batch.group()
    batch.ffn(experts([(0, 8), (0, 0)], 4, 8))
    own = batch.combine_choices()[:1]
    assert batch.needed(0, 1).tolist() == [] and batch.needed(1, 0).tolist() == [0, 1]
    with pytest.raises(_core.ShapeError, match=r"parts: got \[1, 4\], expected \[M=0, D=4\]"):
        batch.combine_ranks([own, own])
    batch.combine_ranks([own, own[:0]])


def test_a_layout_of_other_ranks_is_refused_when_it_is_used():
    batch, exchange = _core.Batch(), _core.exchange_one()
    plan = Plan.expert_parallel(2, 2, 8)
    batch.route(*ONE, 2, layout=_core.Layout(plan.columns, 8, plan.copies, 0))
    exchange.gather(batch)
    with pytest.raises(_core.ShapeError, match="layout: it is rank 0's of 2 and has 2 experts, expected rank 0 of 1"):
        batch.group()


# ---- layers and models on processes --------------------------------------------------------------------------


def run_plans(group, case, plans, tokens):
    """Each plan's output of this rank."""
    hidden, index, weights = (torch.from_numpy(np.ascontiguousarray(x)) for x in parts_of(case, tokens)[group.rank])
    stacks = {name: torch.from_numpy(case[name]) for name in ("w_in", "w_out", "b_in", "b_out")}
    outputs = []
    for plan in plans:
        layer = ShardedExperts.from_weights(**stacks, plan=plan, group=group, activation="relu")
        outputs.append(layer(hidden, index, weights).numpy())
    return outputs


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_layer_runs_every_layout(workers, ranks):
    case = layer_case(30, 24, 37, 5, 2, bias=True, dropped=0.1)
    named = fixed_plans(ranks, 5, 37)
    tokens = {2: [30, 0], 3: [11, 19, 0], 4: [0, 8, 21, 1]}[ranks]
    outputs = zip(*on_workers(workers, ranks, run_plans, case, list(named.values()), tokens), strict=True)
    for (name, plan), parts in zip(named.items(), outputs, strict=True):
        assert relative_error(np.concatenate(parts), expected_of(case, plan)) <= 2e-6, name


def sharded_models(group, plans):
    """For each plan: the largest difference from the model before, flips, and whether unshard brought all bits back."""
    found = []
    for number, plan in enumerate(plans):
        model = switch_model("encoder", num_experts=5, seed=number)
        inputs = model_batch(2 + group.rank, 6 + 3 * group.rank, seed=group.rank)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        expected = run(model, inputs)
        moeshard.shard(model, group=group, plan=plan, progress=False)
        worst, flips = compare(expected, run(model, inputs))
        moeshard.unshard(model)
        restored = all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        found.append((worst, len(flips), restored))
    return found


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_model_sharded_by_any_table_equals_huggingface(workers, ranks):
    rng = np.random.default_rng(ranks)
    tables = [*fixed_plans(ranks, 5, 37).values(), *(random_plan(rng, ranks, 5, 37) for _ in range(4))]
    for results in on_workers(workers, ranks, sharded_models, tables):
        for worst, flips, restored in results:
            assert worst < 1e-5 and flips == 0 and restored


def pruned_model(group, folder, how):
    """What is said by everything that would need all weights; whether the model then works as before; slots run."""
    columns = Plan.shard(group.size, 5, 37).columns.copy()
    columns[:, [1, 3]] = 0
    plan, inputs = Plan.from_columns(columns, 37, [1, 0, 1, 0, 1]), model_batch(2, 5)
    if how == "loaded":
        model = moeshard.from_pretrained(
            SwitchTransformersEncoderModel, folder / "original", group=group, plan=plan, progress=False
        )
    else:
        model = moeshard.shard(switch_model(num_experts=5), group=group, plan=plan, progress=False)
    before, said = run(model, inputs).outputs[0], []
    for refused in (
        lambda: moeshard.save_pretrained(model, folder / "new", progress=False),
        lambda: moeshard.state_dict(model, rank0_only=True),
        lambda: moeshard.unshard(model),
    ):
        try:
            refused()
        except moeshard.ArgumentError as error:
            said.append(str(error))
    same = torch.equal(before, run(model, inputs).outputs[0])
    return said, same, moeshard.report(model).layers[0].slots


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("how", ["sharded", "loaded"])
def test_pruned_experts_do_not_come_back_and_all_ranks_say_why(workers, tmp_path, ranks, how):
    switch_model(num_experts=5).save_pretrained(tmp_path / "original")
    results = (
        [pruned_model(moeshard.init("one"), tmp_path, how)]
        if ranks == 1
        else on_workers(workers, ranks, pruned_model, tmp_path, how)
    )
    for said, same, slots in results:
        assert len(set(said)) == 1 and len(said) == 3 and said == results[0][0]
        assert "experts [1, 3] of encoder.block.1.layer.1.mlp" in said[0] and "every expert has a copy" in said[0]
        assert same and slots > 0
    assert [path.name for path in tmp_path.iterdir()] == ["original"], "nothing was written"


def other_tables(group):
    """A layer on ranks that were given different tables behind agree's back; then another one."""
    case = layer_case(6, 8, 12, 4, 2)
    stacks = [torch.from_numpy(case[name]) for name in ("w_in", "w_out")]
    good = ShardedExperts.from_weights(*stacks, group=group)
    bad = Plan.expert_parallel(2, 4, 12, [0, 1, group.rank, 1])
    weights = moeshard.ExpertWeights(*stacks)
    packed = weights.pack(bad.columns[group.rank], weights.sizes(), "float32")
    inputs = [torch.from_numpy(case[name]) for name in INPUTS]
    try:
        ShardedExperts(packed, bad, group, layer=7)(*inputs)
        said = "nothing"
    except moeshard.RankMismatch as error:
        said = str(error)
    return said, float(good(*inputs).abs().max()) > 0


def test_ranks_that_disagree_about_the_table_all_say_the_same(workers):
    (said, works), (echo, works_too) = on_workers(workers, 2, other_tables)
    assert said == echo and works and works_too
    assert "the plan, which rank holds which columns (its digest) is" in said and "on rank 0 but" in said


def test_a_plan_that_is_not_the_packed_ones_is_refused():
    group = moeshard.init("one")
    packed = experts([(0, 4), (4, 8)], 4, 8)
    with pytest.raises(moeshard.ArgumentError, match="packed: they are not the columns that the plan gives rank 0"):
        ShardedExperts(packed, Plan.shard(1, 2, 8), group, layer=0)
    with pytest.raises(moeshard.ShapeError, match="plan: expected 1 ranks as the group, got 2"):
        ShardedExperts(packed, Plan.shard(2, 2, 8), group, layer=0)


# ---- through torch.distributed ---------------------------------------------------------------------------------


def over_both(ranks, path, case, plans, tokens, dtype, replicated):
    """Each plan over gloo, compared bit by bit with shared memory; this rank's outputs."""
    group, outputs = over_gloo(ranks, path), []
    rows = [case[name] for name in INPUTS] if replicated else parts_of(case, tokens)[group.rank]
    inputs = [torch.from_numpy(np.ascontiguousarray(x)) for x in rows]
    inputs[0] = inputs[0].to(dtype)
    stacks = {name: torch.from_numpy(case[name]) for name in ("w_in", "w_out", "b_in", "b_out")}
    for plan in plans:
        mode = "replicated" if replicated else "local"
        layer = ShardedExperts.from_weights(**stacks, plan=plan, group=group, tokens=mode)
        outputs.append(layer(*inputs))
        layer.group = subgroup(ranks)
        assert torch.equal(layer(*inputs), outputs[-1]), "other bits than through shared memory"
    return [output.float().numpy() for output in outputs]


@pytest.fixture(scope="module")
def gloo(tmp_path_factory):
    with moeshard.launch(3, timeout=30) as ranks:
        yield ranks, tmp_path_factory.mktemp("gloo") / "store"


@pytest.mark.parametrize("replicated", [False, True], ids=["local", "replicated"])
@pytest.mark.parametrize("tokens", [(9, 0, 21), (0, 0, 0), (1, 28, 1)], ids=str)
def test_every_layout_runs_over_gloo_with_the_same_bits(gloo, tokens, replicated):
    ranks, path = gloo
    rng = np.random.default_rng(7)
    case = layer_case(sum(tokens), 24, 37, 5, 2, bias=True, dropped=0.1)
    named = {**fixed_plans(3, 5, 37), **{f"random {n}": random_plan(rng, 3, 5, 37, pruned=n > 3) for n in range(6)}}
    dtype = torch.bfloat16 if tokens[0] == 1 else torch.float32
    case["hidden"] = torch.from_numpy(case["hidden"]).to(dtype).float().numpy()
    found = ranks.run(over_both, 3, path, case, list(named.values()), tokens, dtype, replicated)
    bound = 2e-6 if dtype == torch.float32 else 2**-8
    for (name, plan), parts in zip(named.items(), zip(*found, strict=True), strict=True):
        for output in parts if replicated else [np.concatenate(parts)]:
            assert relative_error(output, expected_of(case, plan)) <= bound, name


# ---- what reports and profiles say -------------------------------------------------------------------------------


def observed(group):
    """One expert on both ranks, one sharded, one whole on rank 1; six slots of the first, two and one of the others."""
    plan = Plan.from_columns([[[0, 4], [0, 2], [0, 0]], [[0, 4], [2, 4], [0, 4]]], 4, [2, 1, 1])
    layer = ShardedExperts.from_weights(torch.ones(3, 4, 6), torch.ones(3, 6, 4), group=group, plan=plan)
    index = torch.tensor([[0], [0], [0], [0], [0], [1], [2]] if group.rank == 0 else [[0], [1]])
    with moeshard.profile(layer, limits=False) as profile:
        layer(torch.ones(len(index), 6), index, torch.ones(len(index), 1))
    return profile.to_dict(), moeshard.report(layer).to_dict()


def test_reports_and_profiles_count_what_each_rank_computes(workers):
    for profile, report in on_workers(workers, 2, observed):
        first, second = (calls[0] for calls in profile["calls"])
        # Token-columns: half of expert 0's six slots each, then halves of expert 1, and expert 2 on rank 1.
        assert [first["flops"], second["flops"]] == [2 * 6 * 2 * (3 * 4 + 2 * 2), 2 * 6 * 2 * (3 * 4 + 2 * 2 + 1 * 4)]
        assert [row["share_of_work"] for row in profile["rows"]] == pytest.approx(2 * [16 / 36, 20 / 36])
        np.testing.assert_allclose(report["share_of_work"], [16 / 36, 20 / 36])
        assert [first["ffn_bytes"], second["ffn_bytes"]] == [4 * 6 * 2 * (4 + 2), 4 * 6 * 2 * (4 + 2 + 4)]
        # Rank 1 reads two slots of expert 0 (too many on rank 0), one of expert 1, one of 2; rank 0 one of expert 1.
        assert first["gather_bytes"] == 1 * 6 * 4 + 2 * 8 and second["gather_bytes"] == 4 * 6 * 4 + 7 * 8
        assert first["combine_bytes"] == 4 * 4 * 6 and second["combine_bytes"] == 1 * 4 * 6


# ---- ranks of different speed --------------------------------------------------------------------------------------


class Clock:
    """Runs `rate` seconds ahead each time it is read."""

    def __init__(self, rate):
        self.rate, self.now = rate, 0.0

    def __call__(self):
        self.now += self.rate
        return self.now


def clocked(group, rates):
    real, speeds.perf_counter = speeds.perf_counter, Clock(rates[group.rank])
    try:
        return moeshard.measure_speed(group, num_experts=2, d_model=16, d_ff=33, tokens=8, seconds=1.0)
    finally:
        speeds.perf_counter = real


def test_shares_of_work_follow_measured_speeds(workers):
    """Each call of ffn takes one tick of a rank's clock: a rank whose tick is three times as long is as much slower."""
    results = on_workers(workers, 3, clocked, [0.01, 0.01, 0.03])
    for speed in results:
        np.testing.assert_array_equal(speed, results[0])
    np.testing.assert_allclose(
        speed / speed[0], [1, 1, 1 / 3], rtol=0.05
    )  # the clock is read once more than ffn is called
    plan = Plan.shard(3, 8, 3072, speed)
    np.testing.assert_allclose(plan.share([100] * 8), speed / speed.sum(), atol=1 / 3072)


def bad_speed(group):
    try:
        moeshard.measure_speed(group, d_ff=1 if group.rank else 64, seconds=0.01)
    except moeshard.MoeshardError as error:
        return f"{type(error).__name__}: {error}"


def test_a_rank_that_cannot_measure_tells_the_others(workers):
    first, second = on_workers(workers, 2, bad_speed)
    assert second == "ArgumentError: d_ff: expected at least 2, a column for each rank, got 1"
    assert first.startswith("PeerError: rank 1: ArgumentError: d_ff")


@pytest.mark.parametrize("argument", ["num_experts", "d_model", "tokens", "d_ff", "seconds"])
def test_bad_arguments_of_measure_speed_are_named(argument):
    with pytest.raises(moeshard.ArgumentError, match=f"{argument}: expected"):
        moeshard.measure_speed(moeshard.init("one"), **{argument: 0})


def test_speed_of_one_rank_is_one_positive_number():
    speed = moeshard.measure_speed(moeshard.init("one"), d_model=8, d_ff=16, tokens=4, seconds=0.01, dtype="bfloat16")
    assert speed.shape == (1,) and speed.dtype == np.float64 and speed[0] > 0
