# SPDX-License-Identifier: Apache-2.0
"""Layers over 1 to 4 CUDA ranks, NCCL between them: the formula, whoever has the tokens or the columns, and errors.

Every rank is a process. On ptxsim they have a device each; elsewhere the machine must have as many.
"""

import dataclasses
import os
import signal
import time

import numpy as np
import pytest
import torch
from layout_tables import fixed_plans, random_plan
from workers import on_ranks

import moeshard
from moeshard import Plan, cuda

RANKS = pytest.mark.parametrize("ranks", [1, 2, 3, 4])
UNEVEN = {1: [23], 2: [21, 2], 3: [0, 23, 0], 4: [10, 0, 1, 12]}  # tokens of each rank


@pytest.fixture(scope="module")
def cuda_workers(simdev):
    """Four processes; ptxsim is slow, so a busy machine must not look like a lost rank."""
    if not simdev.simulated and cuda.extension().device_count() < 4:
        pytest.skip("needs a CUDA device for each of 4 ranks")
    with moeshard.launch(4, timeout=100, env={"PTXSIM_DEVICES": "4"}) as ranks:
        yield ranks


def case_of(tokens, **change):
    from layer_cases import Case

    kind = {"tokens": sum(tokens), "d_model": 32, "d_ff": 37, "experts": 5, "choices": 2, "routing": "dropped"}
    return Case("ranks", **{**kind, **change})


def device_rows():
    """simdev's tensors, that also slice rows."""
    import simdev

    class Tensor(simdev.Tensor):
        def __getitem__(self, rows):
            start, stop, _ = rows.indices(self.shape[0])
            return Tensor((stop - start, *self.shape[1:]), self.dtype, self.storage, self.strides, self.offset)

    return Tensor


class Layer:
    """This rank's columns and the tensors of its calls, on its device."""

    def __init__(self, group, case, plan="shard", number=0, chunks=1):
        import simdev
        from layer_cases import inputs

        from moeshard.plans import plan_for

        simdev.set_device(group.rank)
        self.group, self.case, self.number = group, case, number
        self.given = inputs(case)
        table = plan_for(plan, group.size, case.experts, case.d_ff)
        layout = moeshard._core.Layout(table.columns, table.d_ff, table.copies, group.rank)
        self.layout = None
        if layout.sparse:
            self.layout = cuda.extension().Layout(table.copies, layout.copy_of[group.rank], group.rank)
        self.packed = cuda.extension().PackedExperts(
            columns=table.columns[group.rank],
            d_model=case.d_model,
            d_ff=case.d_ff,
            dtype=case.dtype,
            activation=case.activation,
            gated=case.gated,
            b_in=case.bias,
            b_out=case.bias,
            device=group.rank,
        )
        for expert in range(case.experts):
            stacks = (self.given[name] for name in ("w_in", "w_out", "b_in", "b_out"))
            self.packed.pack(expert, *(None if stack is None else stack[expert] for stack in stacks))
        kept = moeshard.worker_state.setdefault((group, "engines"), {})  # one for each number of chunks
        if chunks not in kept:
            kept[chunks] = cuda.CudaEngine(group, group.rank, chunks=chunks)
        self.engine = group._engine = kept[chunks]

    def enqueue(self, tokens, replicated=False, **change):
        """A call with this rank's share of the tokens, or with all; the tensor that it writes."""
        make = device_rows()
        first = 0 if replicated else sum(tokens[: self.group.rank])
        own = slice(first, first + tokens[self.group.rank])
        given = {**self.given, **change}
        hidden, index, weights = (
            make(given[name][own].shape, given[name].dtype).copy_(given[name][own].contiguous())
            for name in ("hidden", "index", "weights")
        )
        out = make(hidden.shape, hidden.dtype)  # NaN: what is not written shows
        with self.group.call():
            with self.engine.checking():
                pass
            self.engine.forward(
                self.packed, hidden, index, weights, out,
                layer=self.number, replicated=replicated, layout=self.layout,
            )  # fmt: skip
        return out

    def forward(self, tokens, **change):
        return self.enqueue(tokens, **change).torch()


def outputs(group, case, tokens, plan="shard", chunks=1, repeat=1):
    layer = Layer(group, case, plan, chunks=chunks)
    found = [layer.forward(tokens) for _ in range(repeat)]
    assert all(torch.equal(bits(one), bits(found[0])) for one in found), "other bits on a repeated call"
    return found[0]


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def expected_of(case, plan="shard"):
    """The output in float64 and the bound of its error; the slots of experts that the plan prunes add nothing."""
    from layer_cases import inputs, reference

    given = inputs(case)
    if isinstance(plan, Plan):
        pruned = torch.from_numpy(plan.copies == 0)
        given["index"] = given["index"].masked_fill(pruned[given["index"].clamp(min=0)], -1)
    return reference(case, given)


def check(workers, ranks, case, tokens, **options):
    """Run on the ranks, compare every element with its bound in float64; the outputs of all, together."""
    found = torch.cat(on_ranks(workers, ranks, outputs, case, tokens, **options))
    expected, bound = expected_of(case, options.get("plan"))
    error = np.abs(found.double().numpy() - expected)
    assert (error <= bound).all(), f"{(~(error <= bound)).sum()} of {error.size} off, worst {np.nanmax(error / bound)}"
    return found


@RANKS
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_ragged_columns_and_uneven_tokens_equal_float64(cuda_workers, ranks, dtype):
    tokens = UNEVEN[ranks]
    check(cuda_workers, ranks, case_of(tokens, dtype=dtype), tokens, repeat=2 if ranks < 3 else 1)


@pytest.mark.parametrize("ranks", [2, 3])
def test_float32_equals_float64(cuda_workers, ranks):
    tokens = [7, 2, 0][:ranks]
    check(cuda_workers, ranks, case_of(tokens, dtype="float32"), tokens)


@RANKS
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_biases_are_added_once_whatever_the_number_of_ranks(cuda_workers, ranks, gated):
    tokens = UNEVEN[ranks]
    check(cuda_workers, ranks, case_of(tokens, gated=gated, bias=True, activation="silu"), tokens)


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("layout", ["expert_parallel", "whole", "reverse", "uneven"])
def test_every_valid_table_is_right(cuda_workers, ranks, layout):
    case = case_of([6] * ranks)
    plan = {
        "expert_parallel": "expert_parallel",
        "whole": Plan.expert_parallel(ranks, case.experts, case.d_ff, [ranks - 1] * case.experts),
        "reverse": Plan.from_columns(Plan.shard(ranks, case.experts, case.d_ff).columns[::-1], case.d_ff),
        "uneven": Plan.shard(ranks, case.experts, case.d_ff, speed=list(range(1, ranks + 1))),
    }[layout]
    check(cuda_workers, ranks, case, [6] * ranks, plan=plan)


def assorted(ranks, d_ff):
    """5 experts: on all ranks, on one, cut over all, on two (of 3 or more), on two and cut differently (of 4)."""
    columns, whole = Plan.shard(ranks, 5, d_ff).columns.copy(), [0, d_ff]
    columns[:, (0, 1, 3)] = 0
    columns[:, 0] = columns[ranks - 1, 1] = columns[0, 3] = columns[1, 3] = whole
    copies = [ranks, 1, 1, 2, 1]
    if ranks == 4:
        columns[:, 4] = [[0, 9], [0, 20], [20, d_ff], [9, d_ff]]
        copies[4] = 2
    return Plan.from_columns(columns, d_ff, copies)


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("choices", [1, 2])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_copies_of_experts_share_their_slots(cuda_workers, ranks, choices, dtype):
    tokens = UNEVEN[ranks]
    case = case_of(tokens, choices=choices, dtype=dtype, bias=True, gated=ranks == 3)
    check(cuda_workers, ranks, case, tokens, plan=assorted(ranks, case.d_ff), repeat=2 if ranks < 3 else 1)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_random_tables_with_copies_and_pruned_experts_are_right(cuda_workers, ranks, seed):
    case = case_of(UNEVEN[ranks], bias=True, choices=3, experts=7)
    plan = random_plan(np.random.default_rng(seed), ranks, case.experts, case.d_ff, pruned=True)
    check(cuda_workers, ranks, case, UNEVEN[ranks], plan=plan, chunks=seed)


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("name", ["hybrid", "copies everywhere", "a mixture", "shifted owners"])
def test_layouts_with_a_name_are_right(cuda_workers, ranks, name):
    case = case_of([6] * ranks)
    check(cuda_workers, ranks, case, [6] * ranks, plan=fixed_plans(ranks, case.experts, case.d_ff)[name])


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_copies_that_all_ranks_have_share_evenly_and_add_up(simdev, ranks):
    plan = assorted(ranks, 37)
    counts = np.array([11, 7, 5, 8, 3])
    own = []
    for rank in range(ranks):
        copy_of = moeshard._core.Layout(plan.columns, plan.d_ff, plan.copies, rank).copy_of
        own.append(cuda.extension().Layout(plan.copies, copy_of[rank], 0).own(counts))
    assert sum(columns[0] for columns in own) == 11
    assert {count for columns in own for count in [columns[0]]} <= {11 // ranks, 11 // ranks + 1}
    assert [columns[1] for columns in own] == [0] * (ranks - 1) + [7]
    assert all(columns[2] == 5 for columns in own)
    assert [columns[3] for columns in own] == [4, 4, 0, 0][:ranks]


@pytest.mark.parametrize("ranks", [1, 2])
def test_chunks_do_not_change_a_bit(cuda_workers, ranks):
    """With more ranks NCCL, and ptxsim's too, is free to sum in another order."""
    tokens = UNEVEN[ranks]
    case = case_of(tokens)
    whole, *others = (check(cuda_workers, ranks, case, tokens, chunks=chunks) for chunks in (1, 2, 3))
    assert all(torch.equal(bits(whole), bits(other)) for other in others)


def replicated(group, case, chunks, plan):
    """All ranks have all tokens. Also the slots that were counted."""
    layer = Layer(group, case, plan, chunks=chunks)
    found = [layer.forward([case.tokens] * group.size, replicated=True) for _ in range(2)]
    assert torch.equal(bits(found[0]), bits(found[1])), "other bits on a repeated call"
    return found[0], layer.packed.seen(forget=True).tolist(), layer.packed.seen().tolist()


@pytest.mark.parametrize("copied", [False, True], ids=["shard", "copied"])
@pytest.mark.parametrize(("ranks", "chunks"), [(1, 1), (2, 1), (2, 3), (3, 2), (4, 1)])
def test_replicated_tokens_give_every_rank_the_whole_result_and_are_counted_once(cuda_workers, ranks, chunks, copied):
    from layer_cases import inputs, reference

    case = case_of([23], bias=True, gated=ranks == 3, dtype="float16" if ranks == 2 else "bfloat16")
    expected, bound = reference(case, given := inputs(case))
    plan = assorted(ranks, case.d_ff) if copied and ranks > 1 else "shard"
    whole, *others = on_ranks(cuda_workers, ranks, replicated, case, chunks, plan)
    assert (np.abs(whole[0].double().numpy() - expected) <= bound).all()
    assert all(torch.equal(bits(whole[0]), bits(out)) for out, *_ in others)
    index = given["index"].numpy()
    counts = [2 * int((index == expert).sum()) for expert in range(case.experts)]  # in two calls
    for _, seen, after in (whole, *others):
        assert seen == [*counts, 2 * index.size] and not any(after)


def not_the_same(group, case):
    """Rank 1's router chose otherwise: found by the device, in a digest."""
    layer = Layer(group, case)
    other = layer.given["index"].clone()
    if group.rank == 1:
        other[5, 0] = (other[5, 0] + 1) % case.experts
    out, said = layer.enqueue([case.tokens] * group.size, replicated=True, index=other), None
    try:
        layer.engine._engine.faults()
    except moeshard.RankMismatch as error:
        said = str(error)
    return said, bool(out.torch().isnan().all()), layer.packed.seen().tolist()


def test_replicated_tokens_that_differ_are_found_and_make_nan(cuda_workers):
    case = case_of([8], routing="random")
    first, second = on_ranks(cuda_workers, 2, not_the_same, case)
    assert first == second and "digest" in first[0] and first[1] and not any(first[2])


def not_even_as_many(group, case):
    layer = Layer(group, case)
    try:
        layer.forward([case.tokens, case.tokens - 1], replicated=True)
    except moeshard.RankMismatch as error:
        return str(error)


def test_replicated_tokens_are_as_many_on_every_rank(cuda_workers):
    first, second = on_ranks(cuda_workers, 2, not_even_as_many, case_of([8]))
    assert first == second and "replicated tokens T is 8 on rank 0 but 7 on rank 1" in first


def several_calls(group, case):
    """Other numbers of tokens in every call, none too, and two layers of one group."""
    layers = [Layer(group, case, number=0), Layer(group, case, "expert_parallel", number=1)]
    shares = ([8, 0], [3, 5], [0, 0], [1, 7], [8, 0])
    return [[layer.forward(tokens) for layer in layers] for tokens in shares]


def test_the_numbers_of_tokens_may_change_with_every_call(cuda_workers):
    case = case_of([8])
    expected, *_ = (check(cuda_workers, 1, case, [8]),)
    first, second = on_ranks(cuda_workers, 2, several_calls, case)
    from layer_cases import inputs, reference

    _, bound = reference(case, inputs(case))
    for call, tokens in enumerate(([8, 0], [3, 5], [0, 0], [1, 7], [8, 0])):
        for layer in (0, 1):
            found = torch.cat([first[call][layer], second[call][layer]])
            assert found.shape[0] == sum(tokens)
            difference = (found.double() - expected.double()[: sum(tokens)]).abs().numpy()
            assert (difference <= 2 * bound[: sum(tokens)]).all()


def reserved(group, case):
    layer = Layer(group, case)
    group.reserve(6)
    fits = layer.forward([6, 2])
    try:
        layer.forward([1, 7])
        said = ""
    except moeshard.ArgumentError as error:
        said = str(error)
    again = layer.forward([6, 2])
    group.reserve(None)
    return said, torch.equal(bits(fits), bits(again)), fits


def test_a_rank_with_more_than_is_reserved_raises_and_the_ranks_stay_in_step(cuda_workers):
    case = case_of([8])
    (said, same, first), (said_too, same_too, second) = on_ranks(cuda_workers, 2, reserved, case)
    assert said == "" and "7 tokens" in said_too and "room for 6" in said_too
    assert same and same_too
    from layer_cases import inputs, reference

    expected, bound = reference(case, inputs(case))
    assert (np.abs(torch.cat([first, second]).double().numpy() - expected) <= bound).all()


def disagree(group, case, reserve, chunks):
    """Ranks call different layers. Agreed on the host: at once. Reserved: found by the device, raised by `faults`."""
    layers = [Layer(group, case, number=number, chunks=chunks) for number in (0, 1)]
    group.reserve(8 if reserve else None)
    said = None
    try:
        layers[group.rank].forward([4, 4])
        layers[group.rank].engine._engine.faults()
    except moeshard.RankMismatch as error:
        said = str(error)
    group.reserve(None)
    return said, layers[0].forward([4, 4])


@pytest.mark.parametrize(
    ("reserve", "chunks"),
    [pytest.param(False, 1, id="agreed"), pytest.param(True, 1, id="reserved"), pytest.param(True, 3, id="in-chunks")],
)
def test_ranks_that_disagree_raise_the_same_error_once_and_go_on(cuda_workers, reserve, chunks):
    case = case_of([8])
    (said, first), (said_too, second) = on_ranks(cuda_workers, 2, disagree, case, reserve, chunks)
    assert said is not None and said == said_too and "layer" in said
    from layer_cases import inputs, reference

    expected, bound = reference(case, inputs(case))
    assert (np.abs(torch.cat([first, second]).double().numpy() - expected) <= bound).all()


def bad_router(group, case, chunks):
    layer = Layer(group, case, chunks=chunks)
    bad = layer.given["index"].clone()
    bad[-1, -1] = 77  # the last token is the last rank's
    said = []
    try:
        layer.forward([4, 4], index=bad)
        layer.engine._engine.faults()
    except moeshard.MoeshardError as error:
        said = [type(error).__name__, str(error)]
    return said, layer.forward([4, 4])


@pytest.mark.parametrize("chunks", [1, 3])
def test_a_bad_index_of_one_rank_is_raised_once_on_every_rank(cuda_workers, chunks):
    case = case_of([8])
    (said, first), (said_too, second) = on_ranks(cuda_workers, 2, bad_router, case, chunks)
    assert said_too[0] == "RangeError" and "77" in said_too[1]
    assert said[0] == "PeerError" and "rank 1" in said[1]
    from layer_cases import inputs, reference

    expected, bound = reference(case, inputs(case))
    assert (np.abs(torch.cat([first, second]).double().numpy() - expected) <= bound).all()


def station(group, monkeypatch):
    """Let a model of CPU tensors have its MoE layers on this rank's device: torch here may know no CUDA.

    ``shard`` is told that the weights are there, and the layer's tensors are carried to the device and back.
    """
    from moeshard import api

    site = api._site

    def on_device(*arguments):
        made = site(*arguments)
        return dataclasses.replace(made, sizes=dataclasses.replace(made.sizes, device=f"cuda:{group.rank}"))

    def forward(layer, hidden, index, weights):
        make, engine = device_rows(), layer.group.engine(group.rank)
        rows = [tensor.flatten(0, -2).contiguous() for tensor in (hidden, index, weights)]
        with layer.group.call():
            with engine.checking():
                *there, out = (make(tensor.shape, tensor.dtype).copy_(tensor) for tensor in (*rows, rows[0]))
            engine.forward(
                layer.packed, *there, out, layer=layer.layer, replicated=layer.replicated, layout=layer.shares
            )
        return out.torch().view(hidden.shape)

    monkeypatch.setattr(api, "_site", on_device)
    monkeypatch.setattr(moeshard.ShardedExperts, "forward", forward)


def sharded_model(group, tokens, copied):
    import simdev
    from switch_models import batch, compare, run, switch_model

    simdev.set_device(group.rank)
    Layer(group, case_of([1]))  # the engine that the other tests use
    inputs = batch(3, 5, seed=1) if tokens == "replicated" else batch(2 + group.rank, 5, seed=group.rank)
    plan = "auto"
    if copied:
        experts = switch_model("encoder", num_experts=3).config
        plan = fixed_plans(group.size, experts.num_experts, experts.d_ff)["a mixture"]
    model, whole = switch_model("encoder", num_experts=3), switch_model("encoder", num_experts=3)
    with pytest.MonkeyPatch.context() as patch:
        station(group, patch)
        model = moeshard.shard(model, group=group, tokens=tokens, plan=plan, progress=False)
        with moeshard.profile(model, limits=False) as profile:
            difference, flips = compare(run(whole, inputs), run(model, inputs))
        found = moeshard.report(model)
        model = moeshard.unshard(model)
    pairs = zip(model.state_dict().values(), whole.state_dict().values(), strict=True)
    same = all(torch.equal(bits(one), bits(other)) for one, other in pairs)
    # The CPU engine counts the same.
    model = moeshard.shard(model, group=group, tokens=tokens, plan=plan, progress=False)
    with moeshard.profile(model, limits=False) as on_cpu:
        run(model, inputs)
    for layer, other in zip(found.layers, moeshard.report(model).layers, strict=True):
        assert layer.slots == other.slots > 0 and layer.histogram.tolist() == other.histogram.tolist()
    return difference, flips, same, profile, on_cpu


@pytest.mark.parametrize(
    ("ranks", "tokens", "copied"),
    [(1, "local", False), (2, "local", False), (2, "replicated", False), (2, "local", True), (2, "replicated", True)],
)
def test_a_sharded_encoder_equals_the_whole_one_and_comes_back_bit_for_bit(cuda_workers, ranks, tokens, copied):
    # With copies the engines exchange other bytes, and deal tokens of ranks otherwise.
    facts = {"layer", "rank", "calls", "tokens", "flops", "bytes", "share_of_work"}
    facts -= {"bytes"} if copied else set()
    facts -= {"flops", "share_of_work"} if copied and tokens == "local" else set()
    for difference, flips, same, profile, on_cpu in on_ranks(cuda_workers, ranks, sharded_model, tokens, copied):
        assert difference < 1e-5 and not flips
        assert same
        assert len(profile.rows) == len(on_cpu.rows)
        for row, other in zip(profile.rows, on_cpu.rows, strict=True):
            for fact in facts:
                assert getattr(row, fact) == getattr(other, fact), fact
            assert min(row.seconds.values()) >= 0 < row.seconds["ffn"]


def loaded_model(group, family, folder, plan):
    """Experts from the files into device memory; the model's other weights stay on the CPU, where torch has them."""
    import simdev
    from family_models import FAMILIES, inputs, tokens

    simdev.set_device(group.rank)
    Layer(group, case_of([1]))  # the engine that the other tests use
    whole = FAMILIES[family]()
    options = {"group": group, "progress": False, "config": whole.config}
    if plan is not None:
        config = whole.config
        experts = getattr(config, "num_local_experts", None) or config.num_experts
        d_ff = getattr(config, "encoder_ffn_dim", None) or config.intermediate_size
        options["plan"] = fixed_plans(group.size, experts, d_ff)[plan]
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        station(group, patch)
        mine = moeshard.from_pretrained(type(whole), folder, **options)
        devices = {module.device.type for module in mine.modules() if isinstance(module, moeshard.ShardedExperts)}
        given = inputs(mine)
        found, expected = tokens(mine, given), tokens(whole, given)
        mine = moeshard.unshard(mine)
    pairs = zip(mine.state_dict().values(), whole.state_dict().values(), strict=True)
    same = all(torch.equal(bits(one), bits(other)) for one, other in pairs)
    return devices, float((found - expected).abs().max() / expected.abs().max()), same


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("family", "plan"), [("nllb", None), ("privacy_filter", None), ("mixtral", "a mixture")])
def test_a_checkpoint_is_read_into_device_memory(cuda_workers, tmp_path, family, plan, ranks):
    from family_models import FAMILIES

    if family not in FAMILIES:
        pytest.skip("transformers 4 has no such model")
    FAMILIES[family]().save_pretrained(tmp_path)
    for devices, difference, same in on_ranks(cuda_workers, ranks, loaded_model, family, tmp_path, plan):
        assert devices == {"cuda"} and difference < 1e-5 and same


def survive(victim, case, reserve):
    """Rank `victim` kills itself between two calls: what the others raise, and after how long."""
    group = moeshard.init(timeout=4)
    layer = Layer(group, case)
    tokens = [4] * group.size
    layer.forward(tokens)
    group.reserve(4 if reserve else None)
    if group.rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    start, said = time.monotonic(), None
    try:
        for _ in range(100):
            layer.enqueue(tokens)
            time.sleep(0.1)
    except (moeshard.CommError, moeshard.CudaError) as error:
        said = type(error).__name__
    print(f"rank {group.rank} raised {said} after {time.monotonic() - start:.1f} s, closed: {group.closed}")


@pytest.mark.parametrize("reserve", [False, True], ids=["agreed", "reserved"])
def test_a_killed_rank_raises_on_the_others_and_nothing_hangs(simdev, capfd, reserve):
    if not simdev.simulated and cuda.extension().device_count() < 3:
        pytest.skip("needs a CUDA device for each of 3 ranks")
    with moeshard.launch(3, timeout=8, env={"PTXSIM_DEVICES": "3"}) as ranks:
        with pytest.raises(moeshard.RankLost):
            ranks.run(survive, 2, case_of([12]), reserve)


def without_nccl():
    os.environ["MOESHARD_NCCL"] = "/nowhere/libnccl.so.2"
    group = moeshard.init()
    try:
        group.engine(group.rank)
    except moeshard.CommError as error:
        return type(error).__name__, str(error)


def test_a_wrong_nccl_path_is_named_on_every_rank(simdev):
    with moeshard.launch(2, timeout=20, env={"PTXSIM_DEVICES": "2"}) as ranks:
        (kind, text), (kind_too, text_too) = ranks.run(without_nccl)
    assert kind == "CommError" and "MOESHARD_NCCL=/nowhere/libnccl.so.2 cannot be loaded" in text
    assert kind_too == "PeerError" and "/nowhere/libnccl.so.2" in text_too
