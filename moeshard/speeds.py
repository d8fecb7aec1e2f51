# SPDX-License-Identifier: Apache-2.0
"""measure_speed: how fast each rank computes experts while the others compute too. Needs no torch."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from . import _core
from .experts import storage_name
from .group import Group, init
from .plans import Plan
from .threads import use_threads

if TYPE_CHECKING:
    from ._core import Storage


def measure_speed(
    group: Group | None = None,
    *,
    num_experts: int = 4,
    d_model: int = 768,
    d_ff: int = 3072,
    tokens: int = 512,
    dtype: object = "float32",
    seconds: float = 0.5,
) -> NDArray[np.float64]:
    """Measure how fast each rank computes experts, all ranks at the same time. Collective; on the CPU.

    What is timed is the ``ffn`` step itself, on the columns that the rank would hold if all were alike, so the numbers
    hold what matters: threads, caches, memory that the ranks share, whatever else runs on a core. Give them to
    :meth:`moeshard.Plan.shard`, and widths follow them: ranks of different speed finish together.

    Args:
        group: the ranks. ``None``: :func:`moeshard.init`.
        num_experts: experts E of the layer to be measured for; with few tokens an expert, reading weights decides.
        d_model: width D of tokens.
        d_ff: hidden width F of each expert; at least one column a rank.
        tokens: of all ranks in one call, one expert each.
        dtype: storage of the weights, as in :func:`moeshard.shard`.
        seconds: how long each rank computes; at least two calls.

    Returns:
        ``[R]`` float64: columns per second of each rank, a column being one token's work in one column of an expert.

    Raises:
        ArgumentError, DTypeError: a bad argument, on this rank; the others raise PeerError.
        CommError: a rank is lost, late or failed.

    Example:
        >>> speed = measure_speed(d_model=64, d_ff=256, seconds=0.01)
        >>> Plan.shard(ranks=len(speed), num_experts=8, d_ff=256, speed=speed).ranks
        1
    """
    group = init() if group is None else group
    with group.all_or_none():
        for name, value in (("num_experts", num_experts), ("d_model", d_model), ("tokens", tokens)):
            if value < 1:
                raise _core.ArgumentError(f"{name}: expected at least 1, got {value}")
        if d_ff < group.size:
            raise _core.ArgumentError(f"d_ff: expected at least {group.size}, a column for each rank, got {d_ff}")
        if not seconds > 0:
            raise _core.ArgumentError(f"seconds: expected a positive number, got {seconds!r}")
        use_threads()
        columns = Plan.shard(group.size, num_experts, d_ff).columns[group.rank]
        batch, packed = _work(columns, d_model, d_ff, tokens, storage_name(dtype))
        batch.ffn(packed)  # pages, caches and clocks come up
    # all_or_none has ended in a barrier: everybody computes now, and for the same time.
    calls, start = 0, perf_counter()
    while calls < 2 or perf_counter() - start < seconds:
        batch.ffn(packed)
        calls += 1
    elapsed = perf_counter() - start
    done = calls * int(batch.counts() @ (columns[:, 1] - columns[:, 0]))
    return np.array([np.frombuffer(said)[0] for said in group.all_gather(np.float64(done / elapsed).tobytes())])


def _work(
    columns: NDArray[np.int64], d_model: int, d_ff: int, tokens: int, dtype: Storage
) -> tuple[_core.Batch, _core.PackedExperts]:
    """Experts and a batch for them, grouped: everything but ffn is done."""
    rng = np.random.default_rng(0)
    count = len(columns)
    packed = _core.PackedExperts(
        columns=columns,
        d_model=d_model,
        d_ff=d_ff,
        dtype=dtype,
        activation="relu",
        gated=False,
        b_in=False,
        b_out=False,
    )
    w_in, w_out = (rng.standard_normal(shape, np.float32) for shape in ((d_ff, d_model), (d_model, d_ff)))
    for expert in range(count):
        packed.pack(expert, w_in, w_out)
    hidden = rng.standard_normal((tokens, d_model), np.float32)
    index, weights = np.arange(tokens, dtype=np.int32)[:, None] % count, np.ones((tokens, 1), np.float32)
    batch = _core.Batch()
    batch.route(hidden, index, weights, count, np.empty_like(hidden))
    _core.exchange_one().gather(batch)
    batch.group()
    return batch, packed
