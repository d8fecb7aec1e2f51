# SPDX-License-Identifier: Apache-2.0
"""_core.PackedExperts: what goes in, comes back, and is refused. Needs no torch."""

import os
import sys

import numpy as np
import pytest
from core_cases import EPS, as_tensor, experts, normal, words
from dlpack_producers import words_of

from moeshard import _core
from moeshard._core import ArgumentError, DTypeError, ShapeError


def test_experts_say_what_they_are():
    packed = experts([[0, 3], [5, 8]], 4, 8, "bfloat16", "gelu_tanh", True, False, True)
    assert (packed.num_experts, packed.d_model, packed.d_ff, packed.dtype) == (2, 4, 8, "bfloat16")
    assert (packed.activation, packed.gated, packed.has_b_in, packed.has_b_out) == ("gelu_tanh", True, False, True)
    assert packed.columns.tolist() == [[0, 3], [5, 8]]
    packed.columns[:] = 0
    assert packed.columns.tolist() == [[0, 3], [5, 8]]
    assert packed.nbytes > 0


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("columns", [(0, 21), (0, 7), (7, 18), (21, 21)], ids=["all", "first", "middle", "none"])
def test_what_was_packed_comes_back_bit_for_bit(dtype, gated, columns):
    d_model, d_ff, halves = 19, 21, 2 if gated else 1
    start, stop = columns
    width = stop - start
    w_in, w_out = normal(halves, d_ff, d_model), normal(d_model, d_ff, seed=1)
    b_in, b_out = normal(halves, d_ff, seed=2), normal(d_model, seed=3)
    packed = experts([columns], d_model, d_ff, dtype, "silu", gated, True, True)
    packed.pack(0, as_tensor(w_in.reshape(-1, d_model), dtype), as_tensor(w_out, dtype), b_in.ravel(), b_out)
    out = [_core.Tensor(shape, dtype) for shape in ((halves * width, d_model), (d_model, width))]
    bias = [np.full(halves * width, 9, np.float32), np.full(d_model, 9, np.float32)]
    packed.unpack(0, *out, *bias)
    expected = [w_in[:, start:stop].reshape(-1, d_model), w_out[:, start:stop]]
    for found, right in zip(out, expected, strict=True):
        if dtype == "float32":
            assert (np.from_dlpack(found) == right).all()
        else:
            assert (words_of(found) == words(np.ascontiguousarray(right), dtype)).all()
    assert (bias[0] == b_in[:, start:stop].ravel()).all()
    assert (bias[1] == (b_out if width and start == 0 else 0)).all()


def test_a_released_expert_gives_its_memory_back_and_can_be_packed_again():
    packed = experts([[0, 1024]] * 3, 512, 1024)
    for expert in range(3):
        packed.pack(expert, normal(1024, 512, seed=expert), normal(512, 1024, seed=expert))
    before = resident()
    packed.release(1)
    assert before - resident() >= 0.99 * packed.nbytes / 3
    found = np.empty((1024, 512), np.float32)
    for expert in (0, 2):
        packed.unpack(expert, found)
        assert (found == normal(1024, 512, seed=expert)).all()
    packed.pack(1, normal(1024, 512, seed=1), normal(512, 1024, seed=1))
    packed.unpack(1, found)
    assert (found == normal(1024, 512, seed=1)).all()
    with pytest.raises(ArgumentError, match="expert: got 3, expected 0 to 2"):
        packed.release(3)


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("source", EPS)
def test_int8_comes_back_within_half_a_scale(source):
    start, stop = 4, 17
    w_in, w_out = (as_tensor(normal(*shape), source) for shape in ((21, 19), (19, 21)))
    read = experts([[start, stop]], 19, 21)  # the sources' values in float32
    packed = experts([[start, stop]], 19, 21, "int8")
    for each in (read, packed):
        each.pack(0, w_in, w_out)
    right, found = ([np.empty((13, 19), np.float32), np.empty((19, 13), np.float32)] for _ in range(2))
    read.unpack(0, *right)
    packed.unpack(0, *found)
    for a, b in zip(right, found, strict=True):
        scale = np.abs(a).max(1, keepdims=True) / 127  # of this rank's columns
        assert (np.abs(a - b) <= scale * (0.5 + 127 * 2.0**-23)).all()  # 127: two roundings in float32


def test_int8_is_unpacked_to_float32_only():
    packed = experts([[0, 3]], 4, 3, "int8")
    with pytest.raises(DTypeError, match="w_in: got int8, expected float32"):
        packed.unpack(0, np.empty((3, 4), np.int8))


def test_a_slice_packs_as_the_whole():
    w_in, w_out = normal(12, 5), normal(5, 12, seed=1)
    whole, part = experts([[4, 9]], 5, 12), experts([[4, 9]], 5, 12)
    whole.pack(0, w_in, w_out)
    part.pack(0, w_in[3:10], w_out[:, 3:10], first=3)
    for found in (whole, part):
        rows, columns = np.empty((5, 5), np.float32), np.empty((5, 5), np.float32)
        found.unpack(0, rows, columns)
        assert (rows == w_in[4:9]).all() and (columns == w_out[:, 4:9]).all()


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: np.asfortranarray(x), id="transposed"),
        pytest.param(lambda x: np.repeat(x, 3, 1)[:, ::3], id="every-third"),
        pytest.param(lambda x: x[::-1, ::-1].copy()[::-1, ::-1], id="backwards"),
        pytest.param(lambda x: np.broadcast_to(x[:1], x.shape), id="expanded"),
        pytest.param(lambda x: x[:, None, :][:, 0], id="through-another-dimension"),
    ],
)
def test_weights_of_any_strides_are_read(view):
    w_in, w_out = view(normal(6, 5)), view(normal(5, 6, seed=1))
    packed = experts([[0, 6]], 5, 6)
    packed.pack(0, w_in, w_out)
    rows, columns = np.empty((6, 5), np.float32), np.empty((5, 6), np.float32)
    packed.unpack(0, rows, columns)
    assert (rows == w_in).all() and (columns == w_out).all()


def test_packing_keeps_no_source():
    w_in, w_out = normal(4, 4), normal(4, 4)
    count = sys.getrefcount(w_in), sys.getrefcount(w_out)
    packed = experts()
    packed.pack(0, w_in, w_out)
    assert (sys.getrefcount(w_in), sys.getrefcount(w_out)) == count


def test_experts_without_columns_take_no_memory():
    assert experts([[0, 0]] * 8, 768, 3072).nbytes == 0
    assert experts([[0, 3072]], 768, 3072, "float32").nbytes == 2 * 768 * 3072 * 4


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        pytest.param(
            {"columns": [[0, 5]]},
            ArgumentError,
            r"columns\[0\]: got \[0, 5\), expected a range in \[0, 4\)",
            id="columns",
        ),
        pytest.param({"columns": [[3, 2]]}, ArgumentError, r"columns\[0\]: got \[3, 2\)", id="backwards"),
        pytest.param({"columns": [0, 4]}, ShapeError, r"columns: got \[2\], expected \[E, 2\]", id="shape"),
        pytest.param(
            {"columns": np.zeros((0, 2), int)}, ShapeError, r"columns: got \[0, 2\], expected \[E, 2\]", id="none"
        ),
        pytest.param({"columns": [[0.0, 4.0]]}, DTypeError, r"columns: expected integers \[E, 2\]: ", id="floats"),
        pytest.param({"d_model": 0}, ArgumentError, "d_model=0, d_ff=4: expected at least 1", id="d_model"),
        pytest.param({"d_ff": 2**40}, ArgumentError, "d_ff=1099511627776: expected less than", id="d_ff"),
        pytest.param(
            {"dtype": "int4"}, DTypeError, "dtype: got 'int4', expected float32, bfloat16, float16 or int8", id="dtype"
        ),
        pytest.param(
            {"activation": "swish"},
            ArgumentError,
            "activation: got 'swish', expected one of identity, relu, gelu, gelu_tanh, silu, clamped_swiglu",
            id="activation",
        ),
        pytest.param({"activation": None}, TypeError, "str", id="no-activation"),
    ],
)
def test_experts_that_cannot_be_are_named(change, error, message):
    with pytest.raises(error, match=message):
        experts(**change)


def test_experts_need_all_their_arguments():
    arguments = {
        "columns": [[0, 1]],
        "d_model": 1,
        "d_ff": 1,
        "dtype": "float32",
        "activation": "relu",
        "gated": False,
        "b_in": False,
        "b_out": False,
    }
    for name in arguments:
        rest = {key: value for key, value in arguments.items() if key != name}
        with pytest.raises(TypeError, match=f"missing required argument '{name}'"):
            _core.PackedExperts(**rest)
    with pytest.raises(TypeError, match="positional"):
        _core.PackedExperts([[0, 1]])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        pytest.param({"expert": 1}, ArgumentError, "expert: got 1, expected 0 to 0", id="expert"),
        pytest.param({"expert": -1}, ArgumentError, "expert: got -1, expected 0 to 0", id="negative-expert"),
        pytest.param({"expert": 2**32}, ArgumentError, "expert: got 4294967296", id="expert-wrap"),
        pytest.param({"w_in": normal(4, 5)}, ShapeError, r"w_in: got \[4, 5\], expected \[F, D=4\]", id="w_in-width"),
        pytest.param({"w_in": normal(3, 4)}, ShapeError, r"w_in: got \[3, 4\], expected \[4, 4\]", id="w_in-rows"),
        pytest.param({"w_in": normal(4)}, ShapeError, r"w_in: got \[4\], expected \[F, D=4\]", id="w_in-vector"),
        pytest.param({"gated": True}, ShapeError, r"w_in: got \[4, 4\], expected \[8, 4\]", id="gate-missing"),
        pytest.param({"w_out": normal(5, 4)}, ShapeError, r"w_out: got \[5, 4\], expected \[D=4, F\]", id="w_out"),
        pytest.param(
            {"w_in": normal(3, 4), "w_out": normal(4, 3)},
            ShapeError,
            r"expert 0: sources hold columns \[0, 3\), this rank needs \[0, 4\)",
            id="too-few-columns",
        ),
        pytest.param({"first": 1}, ShapeError, r"sources hold columns \[1, 5\), this rank needs \[0, 4\)", id="first"),
        pytest.param({"first": -1}, ArgumentError, "first: got -1, expected 0 to d_ff=4", id="negative-first"),
        pytest.param({"first": 2**62}, ArgumentError, "first: got 4611686018427387904", id="first-overflow"),
        pytest.param(
            {"w_in": np.zeros((4, 4))},
            DTypeError,
            "w_in: got float64, expected float32, bfloat16 or float16",
            id="float64",
        ),
        pytest.param({"w_in": [[1.0]]}, DTypeError, "w_in: got list, expected a tensor", id="list"),
        pytest.param(
            {"b_in": normal(4)}, ArgumentError, "b_in: unexpected, these experts were made without one", id="b_in"
        ),
        pytest.param({"b_out": normal(4)}, ArgumentError, "b_out: unexpected", id="b_out"),
        pytest.param({"has": (True, False)}, ArgumentError, "b_in: missing, these experts have one", id="no-b_in"),
        pytest.param({"has": (False, True)}, ArgumentError, "b_out: missing", id="no-b_out"),
        pytest.param(
            {"has": (True, False), "b_in": normal(5)},
            ShapeError,
            r"b_in: got \[5\], expected \[F=4\]",
            id="b_in-length",
        ),
        pytest.param(
            {"has": (False, True), "b_out": normal(3)},
            ShapeError,
            r"b_out: got \[3\], expected \[D=4\]",
            id="b_out-length",
        ),
        pytest.param(
            {"has": (True, False), "b_in": normal(8)[::2]}, ArgumentError, "b_in: .*contiguous", id="b_in-strided"
        ),
        pytest.param(
            {"has": (True, True), "b_in": normal(4), "b_out": normal(4).astype(np.float16)},
            DTypeError,
            "b_out: got float16, expected float32",
            id="two-bias-dtypes",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(arguments, error, message):
    has_b_in, has_b_out = arguments.get("has", (False, False))
    packed = experts(gated=arguments.get("gated", False), b_in=has_b_in, b_out=has_b_out)
    tensors = {"w_in": normal(4, 4), "w_out": normal(4, 4), "b_in": None, "b_out": None, "expert": 0, "first": 0}
    tensors |= {name: value for name, value in arguments.items() if name in tensors}
    with pytest.raises(error, match=message):
        packed.pack(**tensors)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        pytest.param({"expert": 1}, ArgumentError, "expert: got 1, expected 0 to 0", id="expert"),
        pytest.param(
            {"w_in": np.zeros((2, 3), np.float32)}, ShapeError, r"w_in: got \[2, 3\], expected \[F=2, D=4\]", id="w_in"
        ),
        pytest.param(
            {"w_out": np.zeros((2, 4), np.float32)},
            ShapeError,
            r"w_out: got \[2, 4\], expected \[D=4, F=2\]",
            id="w_out",
        ),
        pytest.param(
            {"w_in": np.zeros((2, 4), np.float16)}, DTypeError, "w_in: got float16, expected float32", id="dtype"
        ),
        pytest.param({"w_in": np.zeros((4, 2), np.float32).T}, ArgumentError, "w_in: .*contiguous", id="strided"),
        pytest.param({"b_in": np.zeros(2, np.float32)}, ArgumentError, "b_in: unexpected, these experts", id="b_in"),
        pytest.param(
            {"w_in": np.broadcast_to(np.zeros((2, 4), np.float32), (2, 4))},
            ArgumentError,
            "w_in: got read-only",
            id="read-only",
        ),
    ],
)
def test_places_to_unpack_to_must_fit(arguments, error, message):
    packed = experts([[1, 3]])
    packed.pack(0, normal(4, 4), normal(4, 4))
    with pytest.raises(error, match=message):
        packed.unpack(**{"expert": 0, **arguments})
    packed.unpack(0)
