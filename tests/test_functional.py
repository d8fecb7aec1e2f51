# SPDX-License-Identifier: Apache-2.0
"""pack and fused_experts: any library with DLPack, against float64."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from reference import KINDS, experts_reference, layer_case, relative_error

import moeshard

EPS = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}


class Foreign:
    """A tensor of a library that moeshard has never heard of: DLPack and an array namespace, nothing else."""

    def __init__(self, array):
        self._array = array
        self.shape = array.shape

    def __dlpack__(self, **kwargs):
        return self._array.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()

    def __len__(self):
        return len(self._array)

    def __getitem__(self, expert):
        return Foreign(self._array[expert])

    def __array_namespace__(self):
        class Namespace:
            @staticmethod
            def from_dlpack(tensor):
                return Foreign(np.from_dlpack(tensor))

        return Namespace

    def reshape(self, *shape):
        return Foreign(self._array.reshape(*shape))


LIBRARIES = {"numpy": lambda x: x, "torch": torch.from_numpy, "foreign": Foreign}


def arguments(case, convert=lambda x: x):
    names = ("hidden", "index", "weights", "w_in", "w_out")
    return [convert(case[name]) for name in names]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("choices", [1, 2, 5])
def test_any_library_gets_its_own_kind_of_tensor_back(library, choices):
    case = layer_case(33, 24, 37, 5, choices, dropped=0.2)
    out = moeshard.fused_experts(*arguments(case, LIBRARIES[library]))
    assert type(out) is type(LIBRARIES[library](case["hidden"]))
    assert relative_error(np.from_dlpack(out), experts_reference(*arguments(case))) < 2e-6


@pytest.mark.parametrize(("activation", "gated"), KINDS)
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_every_kind_of_expert_equals_the_formula(activation, gated, bias):
    case = layer_case(50, 33, 19, 4, 2, gated=gated, bias=bias)
    kind = {"activation": activation, "gated": gated, "b_in": case["b_in"], "b_out": case["b_out"]}
    out = moeshard.fused_experts(*arguments(case), **kind)
    assert relative_error(out, experts_reference(*arguments(case), **kind)) < 2e-6


def test_clamped_swiglu_clamps():
    case = layer_case(50, 33, 19, 4, 2, gated=True, bias=True)
    case["w_in"] *= 8  # gates and ups beyond 7 and -7
    kind = {"activation": "clamped_swiglu", "gated": True, "b_in": case["b_in"]}
    right = experts_reference(*arguments(case), **kind)
    assert relative_error(right, experts_reference(*arguments(case), **kind | {"activation": "silu"})) > 0.5
    assert relative_error(moeshard.fused_experts(*arguments(case), **kind), right) < 2e-6


def test_clamped_swiglu_keeps_nan_and_is_for_gated_experts():
    case = layer_case(3, 8, 8, 1, 1, gated=True)
    case["hidden"][1, 2] = np.nan
    out = moeshard.fused_experts(*arguments(case), activation="clamped_swiglu", gated=True)
    assert np.isnan(out[1]).all() and np.isfinite(out[[0, 2]]).all()
    with pytest.raises(moeshard.ArgumentError, match="clamped_swiglu.*gated"):
        moeshard.fused_experts(*arguments(layer_case(3, 8, 8, 1, 1)), activation="clamped_swiglu")


def test_float32_error_at_the_real_size():
    case = layer_case(64, 768, 3072, 2, 1)
    out = moeshard.fused_experts(*arguments(case))
    assert relative_error(out, experts_reference(*arguments(case))) <= 2e-6


def torch_experts(hidden, index, weights, w_in, w_out, activation, gated):
    """The layer in torch, every operation in the tensors' own dtype."""
    act = {"relu": torch.relu, "silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu}[activation]
    out = torch.zeros_like(hidden)
    for choice in range(index.shape[1]):
        for t, e in enumerate(index[:, choice]):
            h = hidden[t] @ w_in[e].T
            h = act(h[: len(h) // 2]) * h[len(h) // 2 :] if gated else act(h)
            out[t] += h @ w_out[e].T * weights[t, choice]
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("sizes", "kind"),
    [
        pytest.param((96, 128, 256, 3, 1), {"activation": "relu", "gated": False}, id="relu"),
        pytest.param((50, 37, 70, 3, 2), {"activation": "gelu", "gated": False}, id="odd-d_model"),
        pytest.param((50, 64, 51, 3, 1), {"activation": "silu", "gated": True}, id="odd-d_ff"),
        pytest.param((24, 640, 640, 8, 4), {"activation": "silu", "gated": True}, id="640-gated-top-4"),
        pytest.param((16, 768, 3072, 2, 1), {"activation": "relu", "gated": False}, id="768x3072"),
    ],
)
def test_16_bit_error_is_at_most_one_and_a_half_times_torchs(sizes, kind, dtype):
    case = layer_case(*sizes, gated=kind["gated"])
    hidden, index, weights, w_in, w_out = (
        tensor if tensor.dtype == torch.int64 else tensor.to(dtype) for tensor in arguments(case, torch.from_numpy)
    )
    expected = experts_reference(
        *(x.double() if x.is_floating_point() else x for x in (hidden, index, weights, w_in, w_out)), **kind
    )
    naive = torch_experts(hidden, index, weights, w_in, w_out, **kind)
    out = moeshard.fused_experts(hidden, index, weights, w_in, w_out, **kind)
    assert out.dtype == dtype
    assert relative_error(out.double(), expected) <= 1.5 * relative_error(naive.double(), expected)


def kept_as_int8(weights):
    """What int8 storage keeps of ``[E, rows, K]``: integers times a scale of each row, float64."""
    scale = np.abs(weights.astype(np.float64)).max(-1, keepdims=True) / 127
    return np.rint(weights / scale) * scale


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_int8_storage_computes_with_integers_times_scales(activation, gated):
    case = layer_case(40, 37, 51, 3, 2, gated=gated, bias=True)
    kind = {"activation": activation, "gated": gated, "b_in": case["b_in"], "b_out": case["b_out"]}
    packed = moeshard.pack(case["w_in"], case["w_out"], dtype=np.int8, **kind)
    assert packed.dtype == "int8"
    hidden, index, weights, w_in, w_out = arguments(case)
    expected = experts_reference(hidden, index, weights, kept_as_int8(w_in), kept_as_int8(w_out), **kind)
    assert relative_error(packed(hidden, index, weights), expected) < 2e-6


def test_int8_storage_takes_a_quarter_of_the_memory():
    case = layer_case(1, 256, 512, 3, 1)
    sizes = {dtype: moeshard.pack(case["w_in"], case["w_out"], dtype=dtype).nbytes for dtype in ("float32", "int8")}
    assert sizes["int8"] < 0.27 * sizes["float32"]


def test_int8_columns_of_zeros_stay_zero_and_one_not_finite_shows():
    case = layer_case(30, 16, 24, 3, 1)
    case["w_in"][0] = 0
    case["w_out"][1, 5] = 0
    case["w_out"][2, 4, 3] = np.inf
    hidden, index, weights, w_in, w_out = arguments(case)
    out = moeshard.pack(w_in, w_out, dtype="int8")(hidden, index, weights)
    expert = index[:, 0]
    assert (out[expert == 0] == 0).all() and (out[expert == 1][:, 5] == 0).all()
    broken = np.zeros_like(out, bool)
    broken[expert == 2, 4] = True
    assert (np.isnan(out) == broken).all()


def test_a_bfloat16_tokens_bits_do_not_depend_on_its_neighbours():
    case = layer_case(40, 37, 51, 3, 2)
    hidden, index, weights, w_in, w_out = arguments(case, torch.from_numpy)
    packed = moeshard.pack(w_in.bfloat16(), w_out.bfloat16())
    together = packed(hidden.bfloat16(), index, weights)
    for t in range(40):
        assert (packed(hidden[t : t + 1].bfloat16(), index[t : t + 1], weights[t : t + 1]) == together[t]).all()


def test_packed_experts_can_be_called_again_with_other_shapes():
    case = layer_case(40, 16, 24, 3, 2)
    packed = moeshard.pack(case["w_in"], case["w_out"])
    for tokens in (40, 1, 0, 17):
        rows = [case[name][:tokens] for name in ("hidden", "index", "weights")]
        assert relative_error(packed(*rows), experts_reference(*rows, case["w_in"], case["w_out"])) < 2e-6
    assert packed.nbytes >= case["w_in"].nbytes + case["w_out"].nbytes
    assert "num_experts=3, d_model=16, d_ff=24, dtype='float32', activation='relu'" in repr(packed)


def test_leading_dimensions_are_kept():
    case = layer_case(24, 8, 12, 3, 2)
    flat = moeshard.fused_experts(*arguments(case))
    shaped = [case[name].reshape(2, 3, 4, -1) for name in ("hidden", "index", "weights")]
    out = moeshard.fused_experts(*shaped, case["w_in"], case["w_out"])
    assert out.shape == (2, 3, 4, 8)
    assert (out.reshape(24, 8) == flat).all()


@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_strided_inputs_equal_contiguous_ones(convert):
    case = layer_case(24, 8, 12, 3, 2)
    expected = np.asarray(moeshard.fused_experts(*arguments(case)))
    hidden = convert(np.repeat(case["hidden"], 2, axis=1))[:, ::2]
    index = convert(np.asfortranarray(case["index"]))
    w_in = convert(np.ascontiguousarray(case["w_in"].transpose(0, 2, 1))).swapaxes(1, 2)
    rest = convert(case["weights"]), w_in, convert(case["w_out"])
    assert (np.asarray(moeshard.fused_experts(hidden, index, *rest)) == expected).all()


def test_weights_may_be_a_sequence_of_tensors_or_of_parameters():
    case = layer_case(24, 8, 12, 3, 2)
    expected = moeshard.fused_experts(*arguments(case))
    parameters = [[torch.nn.Parameter(torch.from_numpy(w)) for w in case[name]] for name in ("w_in", "w_out")]
    rows = [torch.from_numpy(case[name]) for name in ("hidden", "index", "weights")]
    assert (moeshard.fused_experts(*rows, *parameters).numpy() == expected).all()


def test_out_is_filled_and_returned():
    case = layer_case(24, 8, 12, 3, 2)
    out = np.empty_like(case["hidden"])
    assert moeshard.fused_experts(*arguments(case), out=out) is out
    assert (out == moeshard.fused_experts(*arguments(case))).all()


def test_inputs_are_not_written():
    case = layer_case(24, 8, 12, 3, 2, dropped=0.3)
    before = {name: array.copy() for name, array in case.items() if array is not None}
    moeshard.fused_experts(*arguments(case))
    assert all((case[name] == before[name]).all() for name in before)


def test_functional_needs_no_torch():
    code = (
        "import sys, numpy as np, moeshard\n"
        "x, w1, w2 = np.ones((4, 8), np.float32), np.ones((2, 3, 8), np.float32), np.ones((2, 8, 3), np.float32)\n"
        "y = moeshard.fused_experts(x, np.zeros((4, 1), np.int64), np.ones((4, 1), np.float32), w1, w2)\n"
        "assert (y == 24).all() and 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def changed(**changes):
    case = layer_case(6, 8, 12, 3, 2)
    return arguments({**case, **{name: change(case[name]) for name, change in changes.items()}})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        pytest.param({"hidden": lambda x: x[:, :7]}, moeshard.ShapeError, r"hidden.*8.*\[6, 7\]", id="width"),
        pytest.param({"hidden": np.float64}, moeshard.DTypeError, "float64", id="float64"),
        pytest.param({"index": lambda x: x[:5]}, moeshard.ShapeError, "top_k_index.*5", id="fewer-index-rows"),
        pytest.param({"weights": lambda x: x[:, :1]}, moeshard.ShapeError, "top_k_weights", id="fewer-choices"),
        pytest.param({"index": np.float32}, moeshard.DTypeError, "top_k_index.*float32", id="float-index"),
        pytest.param({"index": lambda x: x + 3}, moeshard.RangeError, "top_k_index", id="index-too-large"),
        pytest.param({"index": lambda x: x - 4}, moeshard.RangeError, "top_k_index", id="index-too-small"),
        pytest.param({"weights": lambda x: x * np.nan}, moeshard.RangeError, "top_k_weights.*nan", id="nan-weight"),
        pytest.param(
            {"w_out": lambda x: x[:, :, :5]}, moeshard.ShapeError, r"w_out\[0\].*\[8, 12\].*\[8, 5\]", id="w_out"
        ),
        pytest.param({"w_out": lambda x: x[:2]}, moeshard.ShapeError, "w_out.*3 experts.*2", id="fewer-experts"),
        pytest.param(
            {"w_in": lambda x: x[0]}, moeshard.ShapeError, r"w_in\[0\].*\[8\]", id="one-expert-less-dimension"
        ),
        pytest.param({"w_in": lambda x: x[:0]}, moeshard.ShapeError, "at least one expert", id="no-expert"),
        pytest.param({"w_in": np.int32}, moeshard.DTypeError, r"w_in\[0\].*int32", id="integer-weights"),
        pytest.param({"w_out": np.float16}, moeshard.DTypeError, r"w_out\[0\].*float32.*float16", id="mixed-dtypes"),
    ],
)
def test_bad_input_names_argument_and_both_values(change, error, message):
    with pytest.raises(error, match=message):
        moeshard.fused_experts(*changed(**change))


def test_unknown_activation_and_dtype_name_the_known_ones():
    case = layer_case(6, 8, 12, 3, 2)
    with pytest.raises(moeshard.ArgumentError, match="activation.*gelu_tanh.*'swish'"):
        moeshard.pack(case["w_in"], case["w_out"], activation="swish")
    with pytest.raises(moeshard.DTypeError, match="dtype.*bfloat16.*int8.*'int4'"):
        moeshard.pack(case["w_in"], case["w_out"], dtype="int4")


def test_wrong_out_is_refused():
    case = layer_case(6, 8, 12, 3, 2)
    for out in (np.empty((6, 7), np.float32), np.empty((8, 6), np.float32).T):
        with pytest.raises(moeshard.ShapeError, match=r"out: expected contiguous \[6, 8\]"):
            moeshard.fused_experts(*arguments(case), out=out)
    with pytest.raises(moeshard.DTypeError, match="out"):
        moeshard.fused_experts(*arguments(case), out=np.empty((6, 8), np.float16))


def test_a_tensor_that_requires_grad_is_refused_unless_grad_is_off():
    hidden, *rest = arguments(layer_case(6, 8, 12, 3, 2), torch.from_numpy)
    hidden.requires_grad_()
    with pytest.raises(moeshard.ArgumentError, match="hidden: requires grad.*no_grad"):
        moeshard.fused_experts(hidden, *rest)
    with torch.no_grad():
        assert not moeshard.fused_experts(hidden, *rest).requires_grad


def test_a_tensor_on_another_device_is_refused():
    hidden, *rest = arguments(layer_case(6, 8, 12, 3, 2), torch.from_numpy)
    with pytest.raises(moeshard.MoeshardError, match="meta|CPU|device"):
        moeshard.fused_experts(hidden.to("meta"), *rest)
