# SPDX-License-Identifier: Apache-2.0
"""_core: tensors in from any library without a copy, and out; who keeps what alive, and for how long."""

import ctypes
import gc
import sys
import threading
import weakref

import numpy as np
import pytest
from dlpack_producers import CUDA, IS_COPIED, READ_ONLY, Crafted, Foreign, capsule, with_table
from hypothesis import given
from hypothesis import strategies as st

from moeshard import _core

DTYPES = ("float32", "bfloat16", "float16")


def route(hidden, out=None, *, batch=None, choices=1):
    """One step of a batch, to see what it does with its tensors."""
    batch = batch or _core.Batch()
    tokens = 3
    batch.route(hidden, np.zeros((tokens, choices), np.int32), np.ones((tokens, choices), np.float32), 1, out)
    return batch


def floats(*shape):
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


# ---- what a tensor is ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        pytest.param(floats(2, 3), ((2, 3), "float32", (1, 0), True), id="float32"),
        pytest.param(floats(2, 3).T, ((3, 2), "float32", (1, 0), False), id="transposed"),
        pytest.param(floats(2, 1).T, ((1, 2), "float32", (1, 0), True), id="transposed-vector"),
        pytest.param(floats(4, 6)[:, ::2], ((4, 3), "float32", (1, 0), False), id="every-other-column"),
        pytest.param(np.broadcast_to(np.float32(1), (2, 3)), ((2, 3), "float32", (1, 0), False), id="broadcast"),
        pytest.param(np.zeros((0, 3)).T, ((3, 0), "float64", (1, 0), True), id="empty"),
        pytest.param(np.array(1, np.int64), ((), "int64", (1, 0), True), id="scalar"),
        pytest.param(np.zeros(2, np.float16), ((2,), "float16", (1, 0), True), id="float16"),
        pytest.param(np.zeros(2, np.uint8), ((2,), "uint8", (1, 0), True), id="uint8"),
        pytest.param(np.zeros(2, bool), ((2,), "bool", (1, 0), True), id="bool"),
        pytest.param(np.zeros(2, np.complex64), ((2,), "complex64", (1, 0), True), id="complex64"),
    ],
)
@pytest.mark.parametrize(
    "producer", [lambda x: x, Foreign, Crafted, with_table(1)], ids=["numpy", "foreign", "crafted", "table"]
)
def test_tensor_info_says_what_it_is_whatever_the_library(array, expected, producer):
    if array.flags.writeable or producer is not Foreign:  # NumPy exports no read-only array to old consumers
        assert _core.tensor_info(producer(array)) == expected


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        pytest.param({"code": 4, "bits": 16}, "bfloat16", id="bfloat16"),
        pytest.param({"code": 10, "bits": 8}, "float8_e4m3fn", id="float8"),
        pytest.param({"code": 17, "bits": 4}, "float4_e2m1fn", id="float4"),
        pytest.param({"lanes": 4}, "float32x4", id="vectors"),
        pytest.param({"code": 200, "bits": 3}, "DLPack dtype 200 of 3 bits", id="unknown"),
    ],
)
def test_tensor_info_names_dtypes_that_numpy_lacks(fields, dtype):
    assert _core.tensor_info(Crafted(floats(2), **fields))[1] == dtype


def test_tensor_info_touches_nothing_on_other_devices():
    assert _core.tensor_info(Crafted(floats(2, 3), device=(2, 5), data=8)) == ((2, 3), "float32", (2, 5), True)


def test_missing_strides_mean_row_major():
    assert _core.tensor_info(Crafted(floats(2, 3), strides=None)) == ((2, 3), "float32", (1, 0), True)


@pytest.mark.parametrize(
    ("tensor", "error", "message"),
    [
        pytest.param([1.0], _core.DTypeError, "tensor: got list, expected a tensor: torch, NumPy or any", id="list"),
        pytest.param(None, _core.DTypeError, "tensor: got NoneType", id="none"),
        pytest.param(1.0, _core.DTypeError, "tensor: got float", id="number"),
        pytest.param(np.array(["a"]), _core.DTypeError, "tensor: got NumPy dtype <U1", id="text"),
        pytest.param(np.array([None]), _core.DTypeError, "tensor: got NumPy dtype object", id="objects"),
        pytest.param(np.zeros(2, ">f4"), _core.DTypeError, "tensor: got NumPy dtype >f4", id="foreign-byte-order"),
        pytest.param(
            np.zeros((1,) * 33), _core.ShapeError, "tensor: got 33 dimensions, expected at most 32", id="33-dims"
        ),
        pytest.param(Crafted(floats(2), ndim=-1), _core.ShapeError, "tensor: got -1 dimensions", id="negative-dims"),
        pytest.param(
            np.zeros(4, [("a", "f4"), ("b", "i2")])["a"],
            _core.ArgumentError,
            "tensor: its elements lie 6 bytes apart, expected a multiple of their 4 bytes: copy it",
            id="field-of-a-record",
        ),
    ],
)
def test_what_is_no_tensor_is_refused_by_name(tensor, error, message):
    with pytest.raises(error, match=message):
        _core.tensor_info(tensor)


class Raises:
    def __init__(self, error):
        self.error = error

    def __dlpack__(self, **kwargs):
        raise self.error


def test_a_library_that_refuses_is_the_cause_of_our_error():
    error = BufferError("cannot export")
    with pytest.raises(_core.ArgumentError, match="^tensor: its library cannot share it: cannot export$") as caught:
        _core.tensor_info(Raises(error))
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError("full"), _core.ShapeError("ours")], ids=repr)
def test_errors_that_are_no_fault_of_the_tensor_pass_through(error):
    with pytest.raises(type(error)) as caught:
        _core.tensor_info(Raises(error))
    assert caught.value is error


@pytest.mark.parametrize(
    "returned", [None, capsule(8, b"used_dltensor"), capsule(8, b"other")], ids=["none", "used", "other"]
)
def test_something_else_than_a_capsule_is_refused(returned):
    class Odd:
        def __dlpack__(self, **kwargs):
            return returned

    with pytest.raises(_core.ArgumentError, match="returned something else than an unused DLPack capsule"):
        _core.tensor_info(Odd())


# ---- no copy, and who owns what --------------------------------------------------------------------

WAYS = {
    "numpy": lambda x: x,
    "foreign": Foreign,
    "versioned": Crafted,
    "legacy": lambda x: Crafted(x, legacy=True),
    "old-signature": lambda x: Crafted(x, legacy=True, old_signature=True),
    "no-deleter": lambda x: Crafted(x, deleter=False),
    "table": with_table(1),
    "table-managed-only": with_table(1, borrowed=False),
    "older-table-behind-a-newer": with_table(2, 1),
}


@pytest.mark.parametrize("way", WAYS)
def test_tokens_and_results_are_not_copied(way):
    hidden, out = floats(3, 4), np.zeros((3, 4), np.float32)
    batch, exchange = route(WAYS[way](hidden), WAYS[way](out)), _core.exchange_one()
    hidden += 100  # what later steps see is the memory itself
    exchange.gather(batch)
    assert (batch.rows() == hidden).all() and hidden[0, 0] == 100
    batch.group()
    identity = _core.PackedExperts(
        columns=[[0, 4]],
        d_model=4,
        d_ff=4,
        dtype="float32",
        activation="identity",
        gated=False,
        b_in=False,
        b_out=False,
    )
    eye = np.eye(4, dtype=np.float32)
    identity.pack(0, WAYS[way](eye), WAYS[way](eye))
    batch.ffn(identity)
    exchange.combine(batch)
    assert (out == hidden).all()


def test_byte_offset_is_added():
    array = floats(4, 4)
    batch = route(Crafted(array, shape=(3, 4), byte_offset=16))
    _core.exchange_one().gather(batch)
    assert (batch.rows() == array[1:]).all()


@pytest.mark.parametrize("legacy", [False, True], ids=["versioned", "legacy"])
def test_every_export_is_deleted_exactly_once(legacy):
    tensor = Crafted(floats(3, 4), legacy=legacy)
    batch = route(tensor)
    assert (tensor.exported, tensor.deleted) == (1, 0)
    batch.route(tensor, np.zeros((3, 1), np.int32), np.ones((3, 1), np.float32), 1)
    assert (tensor.exported, tensor.deleted) == (2, 1)
    del batch
    assert (tensor.exported, tensor.deleted) == (2, 2)
    _core.tensor_info(tensor)
    assert (tensor.exported, tensor.deleted) == (3, 3)


def test_tokens_live_until_combine_and_no_longer():
    class Watched(np.ndarray):
        pass

    hidden, out = floats(3, 4).view(Watched), floats(3, 4).view(Watched)
    batch, exchange = route(hidden, out, choices=0), _core.exchange_one()
    hidden, out = weakref.ref(hidden), weakref.ref(out)
    exchange.gather(batch)
    assert hidden() is not None and out() is not None
    exchange.combine(batch)
    assert hidden() is None and out() is None


def test_a_route_that_fails_keeps_nothing():
    tensor = Crafted(floats(3, 4))
    batch = _core.Batch()
    with pytest.raises(_core.RangeError):
        batch.route(tensor, np.ones((3, 1), np.int32), np.ones((3, 1), np.float32), 1)
    assert (tensor.exported, tensor.deleted) == (1, 1)
    with pytest.raises(_core.ArgumentError, match="header: the batch holds no tokens, call route first"):
        batch.header(1)


def test_a_batch_in_a_cycle_is_collected():
    class Node(np.ndarray):
        pass

    hidden = floats(3, 4).view(Node)
    hidden.batch = route(hidden)
    watched = weakref.ref(hidden)
    del hidden
    gc.collect()
    assert watched() is None


def test_the_table_of_a_type_is_looked_up_once():
    looked_up = []

    class Meta(type):
        @property
        def __dlpack_c_exchange_api__(cls):
            looked_up.append(cls)
            return table

    Base = with_table(1)
    table = vars(Base)["__dlpack_c_exchange_api__"]
    Cached = Meta("Cached", (Crafted,), {"ways": []})
    for _ in range(3):
        _core.tensor_info(Cached(floats(2)))
    assert looked_up == [Cached]
    assert Cached.ways == ["tensor"] * 3


def test_many_tabled_types_leave_the_cache_in_order():
    types = [with_table(1) for _ in range(30)]
    for _ in range(2):
        for kind in types:
            assert _core.tensor_info(kind(floats(2)))[0] == (2,)
    dead = weakref.ref(types.pop(0))
    gc.collect()
    assert dead() is None  # pushed out by younger ones, and not kept alive


def test_a_table_is_asked_for_the_managed_form_only_to_write():
    kind = with_table(1)
    hidden, out = kind(floats(3, 4)), kind(floats(3, 4))
    route(hidden, out)
    assert kind.ways == ["tensor", "managed"]
    assert (out.exported, out.deleted) == (1, 1)


def test_a_table_of_an_unknown_version_is_passed_by():
    kind = type("Newer", (Crafted,), {"__dlpack_c_exchange_api__": vars(with_table(7))["__dlpack_c_exchange_api__"]})
    assert _core.tensor_info(kind(floats(2)))[0] == (2,)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(-3, 3).filter(bool)), min_size=1, max_size=5), st.randoms())
def test_contiguous_means_what_numpy_means(dims, random):
    array = np.zeros([size * abs(step) for size, step in dims], np.float32)[
        tuple(slice(None, None, s) for _, s in dims)
    ]
    axes = list(range(len(dims)))
    random.shuffle(axes)
    array = array.transpose(axes)
    expected = (array.shape, "float32", (1, 0), array.flags.c_contiguous)
    assert _core.tensor_info(array) == _core.tensor_info(Crafted(array)) == expected


# ---- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        pytest.param(
            {"device": CUDA},
            _core.ArgumentError,
            "hidden_states: got a tensor on CUDA device 0, expected CPU memory",
            id="cuda",
        ),
        pytest.param(
            {"bits": 64},
            _core.DTypeError,
            "hidden_states: got float64, expected float32, bfloat16 or float16",
            id="float64",
        ),
        pytest.param({"lanes": 2}, _core.DTypeError, "hidden_states: got float32x2", id="vectors"),
        pytest.param(
            {"shape": (3, 2, 2)}, _core.ShapeError, r"hidden_states: got \[3, 2, 2\], expected \[T, D\]", id="3-dims"
        ),
        pytest.param(
            {"strides": (1, 3)},
            _core.ArgumentError,
            r"hidden_states: got \[3, 4\] with strides \[1, 3\], expected a contiguous tensor: call .contiguous\(\)",
            id="strided",
        ),
        pytest.param({"strides": (0, 1)}, _core.ArgumentError, r"strides \[0, 1\]", id="expanded"),
        pytest.param(
            {"byte_offset": 2},
            _core.ArgumentError,
            "hidden_states: got an address.*4-byte elements.*copy it",
            id="unaligned",
        ),
        pytest.param(
            {"version": (2, 0)},
            _core.ArgumentError,
            "hidden_states: got a tensor of DLPack 2, expected DLPack 1",
            id="version",
        ),
        pytest.param(
            {"shape": (10**18,) * 30, "strides": (0,) * 30},
            _core.ShapeError,
            r"got \[1000000000000000000, .*, \.\.\.\]",
            id="enormous",
        ),
    ],
)
def test_a_refused_tensor_is_named_and_given_back(fields, error, message):
    tensor = Crafted(floats(4, 4), **{"shape": (3, 4), **fields})
    with pytest.raises(error, match=message):
        route(tensor)
    assert (tensor.exported, tensor.deleted) == (1, 1)


@pytest.mark.parametrize("kind", [Crafted, with_table(1)], ids=["capsule", "table"])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        pytest.param(READ_ONLY, "out: got read-only memory, expected memory to write to", id="read-only"),
        pytest.param(IS_COPIED, "out: its library shares a copy only", id="copied"),
    ],
)
def test_memory_that_cannot_be_written_is_no_output(kind, flags, message):
    tensor = kind(floats(3, 4), flags=flags)
    with pytest.raises(_core.ArgumentError, match=message):
        route(floats(3, 4), tensor)
    assert (tensor.exported, tensor.deleted) == (1, 1)
    route(tensor)  # but it may be read


def test_a_read_only_array_is_no_output():
    out = floats(3, 4)
    out.flags.writeable = False
    with pytest.raises(_core.ArgumentError, match="out: got read-only memory"):
        route(floats(3, 4), out)
    route(out)


def test_pinned_host_memory_is_cpu_memory():
    route(Crafted(floats(3, 4), device=(3, 0)))


def test_failures_leak_nothing():
    batch, hidden = _core.Batch(), floats(3, 4)
    bad = [
        [1.0],
        floats(3),
        hidden.T,
        Crafted(hidden, device=CUDA),
        Raises(BufferError),
        with_table(1)(hidden, bits=64),
    ]

    def fail():
        for tensor in bad:
            with pytest.raises(_core.MoeshardError):
                route(tensor, batch=batch)
            with pytest.raises(_core.MoeshardError):
                route(hidden, tensor, batch=batch)

    for _ in range(3):
        fail()
    gc.collect()
    before = sys.getallocatedblocks()
    for _ in range(100):
        fail()
        gc.collect()
    assert sys.getallocatedblocks() - before < 100 * len(bad)  # a leak of one block would be twice that


# ---- our own memory --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (2**62, 2**62, 0), (1,), (5, 7), (1,) * 32], ids=str)
def test_our_tensor_is_what_it_says(shape, dtype):
    tensor = _core.Tensor(shape, dtype)
    assert (tensor.shape, tensor.dtype) == (shape, dtype)
    assert _core.tensor_info(tensor) == (shape, dtype, (1, 0), True)
    assert _core.tensor_info(Foreign(tensor)) == _core.tensor_info(tensor)
    assert tensor.__dlpack_device__() == (1, 0)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_all_exports_share_one_aligned_memory(dtype):
    tensor = _core.Tensor((5, 7), dtype)
    versioned, buffer = np.from_dlpack(tensor), np.asarray(memoryview(tensor))
    assert versioned.dtype == buffer.dtype == np.dtype(dtype)
    assert versioned.shape == buffer.shape == (5, 7)
    versioned[:] = 3
    assert (buffer == 3).all() and buffer.strides == versioned.strides
    assert versioned.ctypes.data == buffer.ctypes.data
    assert versioned.ctypes.data % 64 == 0


def test_the_buffer_answers_simple_requests():
    tensor = _core.Tensor((2, 3), "float32")
    view = memoryview(tensor)
    assert (view.format, view.nbytes, view.shape, view.strides, view.readonly) == ("f", 24, (2, 3), (12, 4), False)
    ctypes.c_char.from_buffer(tensor)  # a request without shape, format or strides
    assert len(bytes(tensor)) == 24


def test_bfloat16_has_no_buffer():
    with pytest.raises(BufferError, match="bfloat16 has no buffer format: use DLPack"):
        memoryview(_core.Tensor((2,), "bfloat16"))


def test_memory_outlives_the_tensor():
    tensor = _core.Tensor((1000, 1000), "float32")
    array = np.from_dlpack(tensor)
    array[:] = 7
    del tensor
    gc.collect()
    others = [_core.Tensor((1000, 1000), "float32") for _ in range(4)]
    for other in others:
        np.from_dlpack(other)[:] = 1
    assert (array == 7).all()


def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096


@pytest.mark.parametrize("version", [None, (0, 8), (1, 0), (1, 3), (2, 0)], ids=str)
def test_exports_that_nobody_takes_are_freed(version):
    before = resident()
    for _ in range(100):
        array = np.asarray(memoryview(tensor := _core.Tensor((1 << 20,), "float32")))
        array[:] = 1
        exported = tensor.__dlpack__(max_version=version)
        assert ('"dltensor_versioned"' if version and version[0] >= 1 else '"dltensor"') in repr(exported)
        del array, tensor, exported
    assert resident() - before < 40 << 20  # of 400 MiB


def test_memory_may_be_freed_by_another_thread():
    arrays = [np.from_dlpack(_core.Tensor((1 << 20,), "float32")) for _ in range(8)]
    thread = threading.Thread(target=arrays.clear)
    thread.start()
    thread.join()
    assert not arrays


def test_a_copy_is_a_copy_and_says_so():
    tensor = _core.Tensor((3, 4), "float32")
    array = np.from_dlpack(tensor)
    array[:] = 5
    copied = np.from_dlpack(tensor, copy=True)
    assert (copied == 5).all() and not np.shares_memory(copied, array)

    class Copies(Foreign):
        def __dlpack__(self, **kwargs):
            return self.tensor.__dlpack__(copy=True, **kwargs)

    with pytest.raises(_core.ArgumentError, match="out: its library shares a copy only"):
        route(floats(3, 4), Copies(tensor))


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        pytest.param({"stream": 1}, BufferError, "stream: expected None", id="stream"),
        pytest.param({"dl_device": (2, 0)}, BufferError, r"dl_device: got \(2, 0\), expected \(1, 0\)", id="device"),
        pytest.param({"dl_device": 1}, TypeError, "dl_device", id="device-type"),
        pytest.param({"max_version": 1}, TypeError, "max_version", id="version-type"),
        pytest.param({"colour": 1}, TypeError, "colour", id="unknown"),
    ],
)
def test_an_export_that_cannot_be_is_refused(kwargs, error, message):
    with pytest.raises(error, match=message):
        _core.Tensor((2,), "float32").__dlpack__(**kwargs)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        pytest.param(
            ((2,), "int8"), _core.DTypeError, "dtype: got 'int8', expected float32, bfloat16 or float16", id="dtype"
        ),
        pytest.param(((2, -1), "float32"), _core.ShapeError, r"shape\[1\]: got -1, expected at least 0", id="negative"),
        pytest.param(
            ((1,) * 33, "float32"), _core.ShapeError, "shape: got 33 dimensions, expected at most 32", id="33-dims"
        ),
        pytest.param(((2**40, 2**40), "float32"), MemoryError, "shape: no memory for a float32 tensor", id="overflow"),
        pytest.param(((2**60,), "float32"), MemoryError, "shape: no memory for a float32 tensor", id="too-large"),
        pytest.param(((2**70,), "float32"), OverflowError, "int", id="no-index"),
        pytest.param((("2",), "float32"), TypeError, "str", id="text"),
        pytest.param(([2], "float32"), TypeError, "tuple", id="list"),
    ],
)
def test_a_tensor_that_cannot_be_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        _core.Tensor(*arguments)


# ---- torch, when it is there -----------------------------------------------------------------------


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def test_torch_reads_our_memory_in_all_dtypes(torch):
    for dtype in DTYPES:
        tensor = _core.Tensor((5, 7), dtype)
        taken = torch.from_dlpack(tensor)
        assert taken.dtype == getattr(torch, dtype) and taken.shape == (5, 7)
        taken.fill_(2)
        assert taken.data_ptr() == torch.from_dlpack(tensor).data_ptr()
        assert _core.tensor_info(taken) == _core.tensor_info(tensor)


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_by_table_and_by_capsule_is_the_same(torch, dtype):
    base = torch.arange(48, dtype=torch.float32).to(getattr(torch, dtype))
    for tensor in (base.view(6, 8), base.view(6, 8).T, base.view(6, 8)[::2, 1:5], base[:0].view(0, 8), base[3]):
        assert _core.tensor_info(tensor) == _core.tensor_info(Foreign(tensor))
    hidden = base[:12].view(3, 4)
    found = []
    for way in (lambda x: x, Foreign):
        batch = route(way(hidden))
        _core.exchange_one().gather(batch)
        found.append(batch.rows())
    assert (found[0] == found[1]).all()
    words = hidden.view(torch.int16).numpy().view(np.uint16) if dtype != "float32" else hidden.numpy()
    assert (found[0] == words).all()


def test_a_parameter_is_read_by_the_table_and_refused_by_the_capsule(torch):
    parameter = torch.nn.Parameter(torch.ones(3, 4))
    assert _core.tensor_info(parameter)[0] == (3, 4)
    with pytest.raises(_core.ArgumentError, match="tensor: its library cannot share it: .*detach"):
        _core.tensor_info(Foreign(parameter))


def test_a_torch_tensor_is_held_until_combine(torch):
    hidden, out = torch.ones(3, 4), torch.ones(3, 4)
    count = sys.getrefcount(hidden), sys.getrefcount(out)
    batch, exchange = route(hidden, out, choices=0), _core.exchange_one()
    assert sys.getrefcount(hidden) == count[0] + 1
    exchange.gather(batch)
    exchange.combine(batch)
    assert (sys.getrefcount(hidden), sys.getrefcount(out)) == count


def test_a_torch_tensor_elsewhere_is_refused(torch):
    with pytest.raises(_core.ArgumentError, match="hidden_states: its library cannot share it: .*meta"):
        route(torch.ones(3, 4, device="meta"))


def test_ml_dtypes_bfloat16_is_bfloat16():
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    hidden = floats(3, 4).astype(bfloat16)
    assert _core.tensor_info(hidden) == ((3, 4), "bfloat16", (1, 0), True)
    batch = route(hidden, np.zeros((3, 4), bfloat16))
    _core.exchange_one().gather(batch)
    assert (batch.rows() == hidden.view(np.uint16)).all()
