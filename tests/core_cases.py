# SPDX-License-Identifier: Apache-2.0
"""What the tests of _core share: experts, tensors in 16-bit dtypes, the five steps. Needs no torch."""

import contextlib

import numpy as np
from dlpack_producers import words_of

from moeshard import _core

EPS = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}


def experts(
    columns=((0, 4),), d_model=4, d_ff=4, dtype="float32", activation="relu", gated=False, b_in=False, b_out=False
):
    return _core.PackedExperts(
        columns=columns,
        d_model=d_model,
        d_ff=d_ff,
        dtype=dtype,
        activation=activation,
        gated=gated,
        b_in=b_in,
        b_out=b_out,
    )


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def words(array, dtype):
    """A float32 array as the words of a 16-bit dtype, rounded to nearest even."""
    if dtype == "float16":
        return array.astype(np.float16).view(np.uint16)
    bits = array.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def widened(array, dtype):
    """The words back as float32."""
    return (
        array.view(np.float16).astype(np.float32)
        if dtype == "float16"
        else (array.astype(np.uint32) << 16).view(np.float32)
    )


def as_tensor(array, dtype):
    """A float32 array as a tensor of ours of that dtype."""
    tensor = _core.Tensor(array.shape, dtype)
    if dtype == "float32":
        np.from_dlpack(tensor)[...] = array
    else:
        words_of(tensor)[...] = words(array, dtype)
    return tensor


def layer(hidden, index, weights, packed, out, batch=None, exchange=None):
    """The five steps."""
    batch, exchange = batch or _core.Batch(), exchange or _core.exchange_one()
    batch.route(hidden, index, weights, packed.num_experts, out)
    exchange.gather(batch)
    batch.group()
    batch.ffn(packed)
    exchange.combine(batch)
    return out


def pack_case(case, dtype="float32", columns=None, **kind):
    count, rows, d_model = case["w_in"].shape
    d_ff = case["w_out"].shape[2]
    biases = {name: case[name] is not None for name in ("b_in", "b_out")}
    packed = experts([columns or (0, d_ff)] * count, d_model, d_ff, dtype, gated=rows != d_ff, **kind, **biases)
    for expert in range(count):
        packed.pack(
            expert,
            *(case[name] if case[name] is None else case[name][expert] for name in ("w_in", "w_out", "b_in", "b_out")),
        )
    return packed


@contextlib.contextmanager
def threads_put_back():
    """The number of threads is afterwards what it was."""
    before = _core.get_num_threads()
    try:
        yield
    finally:
        _core.set_num_threads(before)
