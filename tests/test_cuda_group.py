# SPDX-License-Identifier: Apache-2.0
"""How CUDA ranks agree before they enqueue (moeshard/cuda.py), with a stand-in for the extension: no device is needed.

The stand-in notes what it is asked for. tests/cuda/test_ranks.py runs the real one.
"""

import types

import numpy as np
import pytest
import torch
from workers import on_ranks, subgroup

import moeshard
from moeshard import Plan, ShardedExperts, _core, cuda

EXPERTS = types.SimpleNamespace(d_model=4, num_experts=8)


class Exchange:
    def __init__(self, unique_id, rank, ranks, device, timeout, search_paths):
        self.made_with = (unique_id, rank, ranks, device)
        self.aborted = []

    def abort(self, reason):
        self.aborted.append(reason)


class Engine:
    def __init__(self, device, exchange, *, chunks):
        self.device, self.exchange = device, exchange
        self.calls = []
        self.fails = None

    def forward(self, experts, hidden, index, weights, out, *, capacity, layer, replicated=False, layout=None):
        if self.fails is not None and not isinstance(self.fails, _core.RangeError):
            raise self.fails
        assert len(hidden) == len(index) == len(weights) == len(out) <= capacity
        self.calls.append((len(hidden), capacity, layer))
        if self.fails is not None:  # found by the device in an earlier call
            raise self.fails


def stand_in():
    return types.SimpleNamespace(
        Engine=Engine, NcclExchange=Exchange, nccl_unique_id=lambda search_paths: b"name of the group"
    )


def engine_of(group):
    cuda.extension = stand_in
    group.reserved = None
    group._engine = None  # a new one for each test
    return group.engine(group.rank)


def forward(group, engine, tokens, layer=0, choices=2):
    hidden = np.zeros((tokens, 4), np.float32)
    index, weights = np.zeros((tokens, choices), np.int32), np.zeros((tokens, choices), np.float32)
    with group.call():
        with engine.checking():
            out = hidden.copy()
        engine.forward(EXPERTS, hidden, index, weights, out, layer=layer)


def noted(group, *counts):
    engine = engine_of(group)
    for layer, tokens in enumerate(counts):
        forward(group, engine, tokens[group.rank], layer)
    inner = engine._engine
    return inner.calls, inner.exchange and inner.exchange.made_with


def test_every_rank_reserves_what_the_largest_has(workers):
    results = on_ranks(workers, 3, noted, (5, 2, 0), (0, 0, 0), (1, 0, 9))
    for rank, (calls, made_with) in enumerate(results):
        assert calls == [((5, 2, 0)[rank], 5, 0), ((1, 0, 9)[rank], 9, 2)]  # nothing to do: nothing enqueued
        assert made_with == (b"name of the group", rank, 3, rank)


def test_one_rank_reserves_its_tokens_and_needs_no_exchange():
    with moeshard.init("one") as group:
        calls, made_with = noted(group, (3,), (0,), (7,))
    assert calls == [(3, 3, 0), (7, 7, 2)]
    assert made_with is None


def disagree(group):
    engine = engine_of(group)
    with pytest.raises(moeshard.RankMismatch) as raised:
        forward(group, engine, 2, layer=group.rank)
    forward(group, engine, 2)
    return str(raised.value), engine._engine.calls


def test_ranks_in_different_layers_all_raise_the_same_and_enqueue_nothing(workers):
    (first, calls), (second, _) = on_ranks(workers, 2, disagree)
    assert first == second and "layer" in first
    assert calls == [(2, 2, 0)]


def refuse(group):
    engine = engine_of(group)
    error = moeshard.ShapeError if group.rank else moeshard.PeerError
    with pytest.raises(error, match="too flat"):
        if group.rank:
            with group.call(), engine.checking():
                raise moeshard.ShapeError("too flat")
        forward(group, engine, 2)
    forward(group, engine, 2)
    return engine._engine.calls


def test_a_bad_argument_on_one_rank_is_a_peer_error_on_the_others(workers):
    assert on_ranks(workers, 2, refuse) == [[(2, 2, 0)]] * 2


def reserve(group, tokens):
    engine = engine_of(group)
    group.reserve(4)
    messages = []
    for layer, count in enumerate(tokens[group.rank]):
        try:
            forward(group, engine, count, layer)
        except moeshard.ArgumentError as error:
            messages.append(str(error))
    group.reserve(None)
    return engine._engine.calls, messages, group.closed


def test_a_rank_with_more_than_is_reserved_takes_part_without_tokens_and_raises(workers):
    fits, exceeds = on_ranks(workers, 2, reserve, ([4, 1, 0], [2, 5, 4]))
    assert fits == ([(4, 4, 0), (1, 4, 1), (0, 4, 2)], [], False)
    calls, (message,), closed = exceeds
    assert calls == [(2, 4, 0), (0, 4, 1), (4, 4, 2)] and not closed
    assert "5 tokens" in message and "room for 4" in message


def reserve_otherwise(group):
    with pytest.raises(moeshard.RankMismatch, match="the tokens to reserve: 1 on rank 0 but 2 on rank 1"):
        group.reserve(1 + group.rank)
    with pytest.raises(moeshard.ArgumentError, match="positive"):
        group.reserve(0)
    return group.reserved


def test_ranks_must_reserve_the_same(workers):
    assert on_ranks(workers, 2, reserve_otherwise) == [None, None]


def fail(group, error):
    engine = engine_of(group)
    inner = engine._engine
    if group.rank == 1:
        inner.fails = error
        with pytest.raises(type(error)):
            forward(group, engine, 1)
    else:
        forward(group, engine, 1)
    lost = None
    try:
        if not group.closed:
            inner.fails = None
            forward(group, engine, 1)
    except moeshard.CommError as caught:
        lost = type(caught).__name__
    return lost, group.closed, inner.exchange.aborted


def test_a_rank_that_could_not_enqueue_takes_the_others_out_of_their_wait(workers):
    (lost, closed, aborted), (_, closed_too, aborted_too) = on_ranks(workers, 2, fail, MemoryError("device"))
    assert lost == "RankLost" and closed and "RankLost" in aborted[0]
    assert closed_too and aborted_too == ["MemoryError: device"]


def test_a_fault_of_an_earlier_call_leaves_the_ranks_in_step(workers):
    for lost, closed, aborted in on_ranks(workers, 2, fail, moeshard.RangeError("index 9 of an earlier call")):
        assert lost is None and not closed and aborted == []


class OnCuda(torch.Tensor):
    """A tensor that says it is on a CUDA device."""

    number = 0
    device = property(lambda self: torch.device("cuda", self.number))


class PackedExperts:
    """Experts that say they are on a CUDA device."""

    num_experts, d_model, d_ff, dtype, activation, gated, nbytes = 8, 4, 2, "float32", "relu", False, 0

    def __init__(self, device, columns):
        self.device, self.columns = device, columns


def layer_on(group, **options):
    engine_of(group)
    plan = Plan.shard(group.size, 8, 2)
    return ShardedExperts(PackedExperts(group.rank, plan.columns[group.rank]), plan, group, layer=7, **options)


def test_the_layer_enqueues_where_its_experts_are():
    with moeshard.init("one") as group:
        layer = layer_on(group)
        hidden = torch.randn(2, 3, 4).as_subclass(OnCuda)
        index = torch.zeros(2, 3, 2, dtype=torch.int64).as_subclass(OnCuda)
        out = layer(hidden, index, torch.ones(2, 3, 2).as_subclass(OnCuda))
        assert out.shape == (2, 3, 4) and out.device == layer.device == torch.device("cuda", 0)
        assert group.engine(0)._engine.calls == [(6, 6, 7)]


@pytest.mark.parametrize("stranger", [0, 1, 2], ids=["hidden_states", "top_k_index", "top_k_weights"])
def test_a_tensor_on_the_cpu_is_refused_by_name(stranger):
    with moeshard.init("one") as group:
        layer = layer_on(group)
        inputs = [torch.randn(3, 4), torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2)]
        given = [tensor if i == stranger else tensor.as_subclass(OnCuda) for i, tensor in enumerate(inputs)]
        name = ("hidden_states", "top_k_index", "top_k_weights")[stranger]
        with pytest.raises(moeshard.ArgumentError, match=f"{name}: expected a tensor on cuda:0 .*, got cpu"):
            layer(*given)
        assert group.engine(0)._engine.calls == []


def replicated(group):
    layer = layer_on(group, replicated=True)
    rows = torch.randn(3, 4), torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2)
    OnCuda.number = group.rank  # of this worker process
    layer(*(tensor.as_subclass(OnCuda) for tensor in rows))
    with pytest.raises(moeshard.RankMismatch, match="replicated tokens T is 3 on rank 0 but 2 on rank 1"):
        layer(*(tensor[: 3 - group.rank].as_subclass(OnCuda) for tensor in rows))
    return group.engine(group.rank)._engine.calls


def test_replicated_tokens_are_as_many_on_every_device(workers):
    for calls in on_ranks(workers, 2, replicated):
        assert calls == [(3, 3, 7)]  # the second was found to be wrong before anything was enqueued


def two_devices(group):
    engine_of(group)
    with pytest.raises(moeshard.ArgumentError, match="has cuda:0, it cannot use cuda:1"):
        group.engine(1)


def test_a_rank_has_one_device():
    with moeshard.init("one") as group:
        two_devices(group)


def name_fails(group):
    def no_nccl(search_paths):
        raise moeshard.CommError("NCCL not found")

    cuda.extension = lambda: types.SimpleNamespace(Engine=Engine, NcclExchange=Exchange, nccl_unique_id=no_nccl)
    group._engine = None
    with pytest.raises(moeshard.CommError, match="NCCL not found") as raised:
        group.engine(group.rank)
    return type(raised.value).__name__, group.closed


def test_a_missing_nccl_is_told_to_every_rank(workers):
    assert on_ranks(workers, 2, name_fails) == [("CommError", False), ("PeerError", False)]


@pytest.fixture(autouse=True)
def real_extension_afterwards(workers):
    yield
    cuda.extension = cuda.__dict__["extension"]
    workers.run(_restore)


def _restore():
    import importlib

    importlib.reload(cuda)
    for ranks in (2, 3):
        group = subgroup(ranks)
        if group is not None:
            group._engine = None
