# SPDX-License-Identifier: Apache-2.0
"""What Python gives to the CUDA engine is checked before anything is enqueued, and messages say where a tensor is."""

import gc
import pickle
import threading

import numpy as np
import pytest
import torch

import moeshard
from moeshard import cuda

E, F, D, T, K = 3, 32, 64, 5, 2


@pytest.fixture(scope="module")
def _cuda(device):
    return cuda.extension()


def experts(_cuda, **change):
    """E experts [F, D] of bfloat16 without weights yet."""
    columns = np.tile([0, F], (E, 1))
    kind = {"dtype": "bfloat16", "activation": "relu", "gated": False, "b_in": False, "b_out": False, "device": 0}
    return _cuda.PackedExperts(**{"columns": columns, "d_model": D, "d_ff": F, **kind, **change})


@pytest.fixture
def packed(_cuda, simdev):
    made = experts(_cuda)
    for e in range(E):
        w_in, w_out = simdev.empty((F, D), "bfloat16").fill_bytes(0), simdev.empty((D, F), "bfloat16").fill_bytes(0)
        made.pack(e, w_in, w_out)
    return made


@pytest.fixture
def call(simdev):
    """Tensors of a forward pass: hidden_states, top_k_index, top_k_weights, out."""
    return {
        "hidden_states": simdev.empty((T, D), "bfloat16").fill_bytes(0),
        "top_k_index": simdev.to_device(np.zeros((T, K), np.int32)),
        "top_k_weights": simdev.to_device(np.ones((T, K), np.float32)),
        "out": simdev.empty((T, D), "bfloat16"),
    }


def test_a_forward_writes_out_and_nothing_else(_cuda, packed, call):
    _cuda.Engine(0).forward(packed, **call)
    assert not call["out"].numpy().any() and not call["hidden_states"].numpy().any()


def test_experts_say_what_they_hold(_cuda):
    made = experts(_cuda, dtype="float16", activation="silu", gated=True, b_in=True)
    assert (made.num_experts, made.d_model, made.d_ff, made.device) == (E, D, F, 0)
    assert (made.dtype, made.activation, made.gated, made.has_b_in, made.has_b_out) == (
        "float16", "silu", True, True, False)  # fmt: skip
    assert made.columns.tolist() == [[0, F]] * E and made.nbytes >= E * 3 * F * D * 2


@pytest.mark.parametrize("source", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "float16"])
def test_weights_of_another_dtype_are_rounded_once(_cuda, simdev, source, storage):
    seed = torch.Generator().manual_seed(0)
    made = experts(_cuda, dtype=storage)
    given = [torch.randn(shape, generator=seed).to(getattr(torch, source)) for shape in ((F, D), (D, F))]
    found = [simdev.empty(tensor.shape, storage) for tensor in given]
    made.pack(1, *map(simdev.to_device, given))
    made.unpack(1, *found)
    for one, other in zip(given, found, strict=True):
        assert torch.equal(other.torch(), one.to(getattr(torch, storage)))


@pytest.mark.parametrize("place", ["host", "device"])
def test_unpack_returns_what_was_packed_bit_for_bit(_cuda, simdev, place):
    rng = np.random.default_rng(0)
    there = (lambda array: array) if place == "host" else simdev.to_device
    back = (lambda array: array) if place == "host" else (lambda tensor: tensor.numpy())
    made = experts(_cuda, dtype="float32", columns=[[3, 20], [0, 32], [7, 7]], b_in=True, b_out=True)
    for e, (first, stop) in enumerate(made.columns.tolist()):
        sources = [rng.standard_normal(shape, np.float32) for shape in ((F, D), (D, F), F, D)]
        made.pack(e, *map(there, sources))
        wanted = [sources[0][first:stop], sources[1][:, first:stop], sources[2][first:stop], sources[3] * (first == 0)]
        found = [there(np.full(part.shape, np.nan, np.float32)) for part in wanted]
        made.unpack(e, *found)
        for name, one, other in zip(("w_in", "w_out", "b_in", "b_out"), map(back, found), wanted, strict=True):
            assert np.array_equal(one, other), (e, name)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        pytest.param(lambda s: {"hidden_states": np.zeros((T, D), np.float32)}, moeshard.ArgumentError,
                     "hidden_states: got a tensor in CPU memory, expected CUDA device 0", id="host-hidden"),
        pytest.param(lambda s: {"top_k_index": np.zeros((T, K), np.int64)}, moeshard.ArgumentError,
                     "top_k_index: got a tensor in CPU memory, expected CUDA device 0", id="host-index"),
        pytest.param(lambda s: {"top_k_weights": s.empty((T, K + 1), "float32")}, moeshard.ShapeError,
                     r"top_k_weights: got \[5, 3\], expected \[T=5, K=2\]", id="shape"),
        pytest.param(lambda s: {"hidden_states": s.empty((T, D), "int32")}, moeshard.DTypeError,
                     "hidden_states: got int32, expected float32, bfloat16 or float16", id="dtype"),
        pytest.param(lambda s: {"out": s.empty((T, D), "float32")}, moeshard.DTypeError,
                     "out: got float32, expected bfloat16", id="out-dtype"),
        pytest.param(lambda s: {"hidden_states": s.empty((T, D + 8), "bfloat16"),
                                "out": s.empty((T, D + 8), "bfloat16")}, moeshard.ShapeError,
                     r"hidden_states: got \[T=5, D=72\], expected D=64 as the experts", id="width"),
        pytest.param(lambda s: {"hidden_states": s.empty((T, 2 * D), "bfloat16").view((T, D), (2 * D, 1))},
                     moeshard.ArgumentError, "hidden_states: .* expected a contiguous tensor", id="strided"),
        pytest.param(lambda s: {"out": None}, moeshard.DTypeError, "out: got None", id="no-out"),
        pytest.param(lambda s: {"capacity": T - 1}, moeshard.ArgumentError, "capacity: got 4, expected at least T=5",
                     id="capacity"),
        pytest.param(lambda s: {"experts": 7}, moeshard.DTypeError, "experts: expected", id="experts"),
        pytest.param(lambda s: {"layout": 7}, moeshard.DTypeError, "layout: expected", id="layout"),
        pytest.param(lambda s: {"layout": cuda.extension().Layout([1] * 5, [0] * 5, 0)}, moeshard.ArgumentError,
                     "layout: it has 5 experts on device 0, expected 3 on device 0", id="layout-of-others"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(_cuda, packed, call, simdev, change, error, message):
    with pytest.raises(error, match=message):
        _cuda.Engine(0).forward(**{"experts": packed, **call, **change(simdev)})


@pytest.mark.parametrize(
    ("copies", "copy", "error", "message"),
    [
        pytest.param([2, 1], [2, 0], moeshard.ArgumentError, "copy 2 of the 2 of expert 0", id="copy"),
        pytest.param([2, 1], [0, -2], moeshard.ArgumentError, "copy -2 of the 1 of expert 1", id="negative"),
        pytest.param([1, -1], [0, -1], moeshard.ArgumentError, "the -1 of expert 1", id="copies"),
        pytest.param([1, 1], [0], moeshard.ShapeError, r"copy: got \[1\], expected \[E=2\]", id="shape"),
        pytest.param([1, 1], [0, 0.5], moeshard.DTypeError, "copy", id="dtype"),
        pytest.param(np.zeros(0, int), np.zeros(0, int), moeshard.ArgumentError, "0 experts", id="empty"),
    ],
)
def test_a_layout_that_cannot_be_is_named(_cuda, copies, copy, error, message):
    with pytest.raises(error, match=message):
        _cuda.Layout(copies, copy, 0)


def test_a_pruned_expert_adds_nothing_on_one_rank_too(_cuda, packed, call, simdev):
    index = np.array([[0, 1], [1, 1], [-1, 2], [-1, -1], [1, 0]], np.int32)
    call["top_k_index"] = simdev.to_device(index)
    _cuda.Engine(0).forward(packed, **call, layout=_cuda.Layout([1, 0, 1], [0, -1, 0], 0))
    assert not call["out"].numpy().any() and packed.seen().tolist() == [2, 4, 1, 10]


def test_experts_that_stand_in_for_those_of_a_checkpoint_are_checked_without_memory(_cuda, simdev):
    """from_pretrained packs parameters whose rows are all the same one, into no columns."""
    nothing = experts(_cuda, columns=np.zeros((E, 2), np.int64), b_in=True, b_out=True)

    def rows(*shape):
        return simdev.empty(shape[-1:], "bfloat16").view(shape, (0,) * (len(shape) - 1) + (1,))

    for e in range(E):
        nothing.pack(e, rows(F, D), rows(D, F), rows(F), rows(D))
    with pytest.raises(moeshard.ShapeError, match="w_out"):
        nothing.pack(0, rows(F, D), rows(D + 1, F), rows(F), rows(D))


def test_out_may_not_overlap_hidden_states(_cuda, packed, call):
    with pytest.raises(moeshard.ArgumentError, match="out: got memory that overlaps hidden_states"):
        _cuda.Engine(0).forward(packed, **{**call, "out": call["hidden_states"]})


def test_a_device_that_does_not_exist_is_named(_cuda):
    for make in (lambda: _cuda.Engine(99), lambda: experts(_cuda, device=99)):
        with pytest.raises(moeshard.CudaError, match="cuda.*: cudaErrorInvalidDevice|invalid device ordinal"):
            make()


def test_an_index_out_of_range_is_raised_by_faults(_cuda, packed, call, simdev):
    engine = _cuda.Engine(0)
    with pytest.raises(moeshard.RangeError, match=r"top_k_index\[0, 0\]: got 3, expected -1 \(no expert\) to 2"):
        engine.forward(packed, **{**call, "top_k_index": simdev.to_device(np.full((T, K), E, np.int32))})
        engine.faults()
    engine.forward(packed, **call)
    engine.faults()
    assert not call["out"].numpy().any()


def test_a_weight_that_is_not_finite_is_raised_by_the_next_call_at_the_latest(_cuda, packed, call, simdev):
    engine, nans = _cuda.Engine(0), simdev.to_device(np.full((T, K), np.nan, np.float32))
    with pytest.raises(moeshard.RangeError, match=r"top_k_weights\[0, 0\]: expected a finite number"):
        engine.forward(packed, **{**call, "top_k_weights": nans})  # by this one already, if the device was quick
        simdev.synchronize()
        engine.forward(packed, **call)


def test_slots_are_counted_on_the_device_and_forgotten_when_asked(_cuda, packed, call, simdev):
    engine, index = _cuda.Engine(0), np.array([[0, 1], [1, 1], [-1, 2], [-1, -1], [1, 0]], np.int32)
    for _ in range(3):
        engine.forward(packed, **{**call, "top_k_index": simdev.to_device(index)})
    assert packed.seen().tolist() == [6, 12, 3, 30]
    with pytest.raises(moeshard.RangeError):
        engine.forward(packed, **{**call, "top_k_index": simdev.to_device(np.full((T, K), E, np.int32))})
        engine.faults()
    assert packed.seen(forget=True).tolist() == [6, 12, 3, 30]
    assert packed.seen().tolist() == [0, 0, 0, 0]


def test_a_fault_makes_out_nan(_cuda, packed, call, simdev):
    engine, out = _cuda.Engine(0), call["out"].fill_bytes(0)
    with pytest.raises(moeshard.RangeError):
        engine.forward(packed, **{**call, "top_k_index": simdev.to_device(np.full((T, K), -2, np.int32))})
        engine.faults()
    assert out.torch().isnan().all()


def test_recorded_calls_tell_when_their_steps_began_and_what_came_in(_cuda, packed, call):
    engine = _cuda.Engine(0)
    engine.forward(packed, **call)  # not recorded
    assert engine.stop_recording() == []
    engine.start_recording()
    engine.start_recording()
    engine.forward(packed, **call, layer=7)
    engine.stamp(call["hidden_states"])
    engine.forward(packed, **call, layer=8)
    first, second = engine.stop_recording()
    assert first[:4] == (7, T, K, "bfloat16") and second[:4] == (8, T, K, "bfloat16")
    for layer, tokens, choices, dtype, block, begin, steps, seen in (first, second):  # noqa: B007
        assert np.isnan(block) if layer == 7 else 0 < block <= begin
        assert len(steps) == 5 and min(steps) >= 0 < steps[3] and steps[1] == 0  # nothing travels
        assert seen.tolist() == [T * K, 0, 0, T * K]
    assert second[5] >= first[5] + sum(first[6]) * 0.999
    engine.forward(packed, **call)
    assert engine.stop_recording() == []


def test_int8_weights_are_refused_on_cuda(simdev):
    weights = simdev.empty((E, F, D), "float32"), simdev.empty((E, D, F), "float32")
    with pytest.raises(moeshard.DTypeError, match="dtype: int8 weights are for CPUs so far"):
        moeshard.pack(*weights, dtype="int8")


def test_an_engine_belongs_to_one_thread_at_a_time(_cuda, packed, call):
    engine, failures = _cuda.Engine(0), []

    def work():
        for _ in range(5):
            try:
                engine.forward(packed, **call)
            except moeshard.ArgumentError as error:
                failures.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(failures) <= {"engine is in use by another thread"}
    engine.faults()
    assert not call["out"].numpy().any()


def test_memory_of_the_tensors_is_let_go(_cuda, packed, call, simdev):
    engine = _cuda.Engine(0)
    engine.forward(packed, **call)
    wrong = simdev.empty((T, K + 1), "float32")
    before = len(simdev._live)
    for _ in range(10):
        engine.forward(packed, **call)
        with pytest.raises(moeshard.ShapeError):
            engine.forward(packed, **{**call, "top_k_weights": wrong})
    gc.collect()
    assert len(simdev._live) <= before


def test_classes_are_final_and_do_not_travel(_cuda):
    for kind in (_cuda.Engine, _cuda.PackedExperts, _cuda.NcclExchange):
        with pytest.raises(TypeError, match="not an acceptable base type"):
            type("Sub", (kind,), {})
    with pytest.raises(TypeError, match="cannot pickle"):
        pickle.dumps(_cuda.Engine(0))


def test_functions_take_device_tensors_and_return_one(simdev):
    ones = lambda *shape: simdev.to_device(np.ones(shape, np.float32))  # noqa: E731
    index = simdev.to_device(np.zeros((2, 3, 1), np.int64))
    y = moeshard.fused_experts(ones(2, 3, 2), index, ones(2, 3, 1), ones(1, 4, 2), ones(1, 2, 4))
    assert y.shape == (2, 3, 2) and y.numpy().tolist() == [[[8.0, 8.0]] * 3] * 2


def test_tensors_on_different_devices_are_refused(simdev):
    host = np.ones((1, 4, 2), np.float32), np.ones((1, 2, 4), np.float32)
    there = [simdev.to_device(array) for array in host]
    with pytest.raises(moeshard.ArgumentError, match="(?i)cpu.*cuda|cuda.*cpu"):
        moeshard.pack(host[0], there[1])
    with pytest.raises(moeshard.ArgumentError, match="(?i)hidden.*cuda"):
        moeshard.pack(*there)(np.ones((1, 2), np.float32), np.zeros((1, 1), np.int64), np.ones((1, 1), np.float32))
