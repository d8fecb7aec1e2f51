# SPDX-License-Identifier: Apache-2.0
"""What a layer of experts is, in float64 and one token at a time: the other side of every comparison."""

import math

import numpy as np

ACTIVATIONS = {
    "identity": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "clamped_swiglu": lambda x: np.minimum(x, 7) / (1 + np.exp(-1.702 * np.minimum(x, 7))),
}
KINDS = [(name, gated) for name in ACTIVATIONS for gated in (False, True) if gated or name != "clamped_swiglu"]


def experts_reference(hidden, index, weights, w_in, w_out, *, b_in=None, b_out=None, activation="relu", gated=False):
    """``[T, D]`` float64: sum over choices of weight * expert(token); index -1 adds nothing."""
    x, scale = np.asarray(hidden, np.float64), np.asarray(weights, np.float64)
    out = np.zeros_like(x)
    for expert in range(len(w_in)):
        tokens, choices = np.nonzero(np.asarray(index) == expert)
        if not len(tokens):
            continue
        h = x[tokens] @ np.asarray(w_in[expert], np.float64).T
        if b_in is not None:
            h += np.asarray(b_in[expert], np.float64)
        act = ACTIVATIONS[activation]
        if gated:
            gate, up = np.split(h, 2, axis=1)
            h = act(gate) * (np.clip(up, -7, 7) + 1 if activation == "clamped_swiglu" else up)
        else:
            h = act(h)
        y = h @ np.asarray(w_out[expert], np.float64).T
        if b_out is not None:
            y += np.asarray(b_out[expert], np.float64)
        np.add.at(out, tokens, scale[tokens, choices, None] * y)
    return out


def relative_error(found, expected):
    """Largest difference over largest value."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.abs(found - expected).max(initial=0) / max(np.abs(expected).max(initial=0), 1e-300))


def layer_case(tokens, d_model, d_ff, experts, choices, *, seed=0, gated=False, bias=False, dropped=0.0):
    """Random inputs and weights of a layer, scaled as a trained model's: a dictionary of float32 arrays."""
    rng = np.random.default_rng(seed)

    def normal(*shape, scale=1.0):
        return (rng.standard_normal(shape) * scale).astype(np.float32)

    columns = 2 * d_ff if gated else d_ff
    index = rng.integers(0, experts, (tokens, choices))
    index[rng.random((tokens, choices)) < dropped] = -1
    return {
        "hidden": normal(tokens, d_model),
        "index": index,
        "weights": rng.random((tokens, choices), np.float32),
        "w_in": normal(experts, columns, d_model, scale=d_model**-0.5),
        "w_out": normal(experts, d_model, d_ff, scale=d_ff**-0.5),
        "b_in": normal(experts, columns) if bias else None,
        "b_out": normal(experts, d_model) if bias else None,
    }
