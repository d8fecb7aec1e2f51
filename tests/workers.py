# SPDX-License-Identifier: Apache-2.0
"""Groups of 2, 3 and 4 ranks out of one launch of four workers, so that the suite starts (and imports torch) once."""

import moeshard
from moeshard import _core, group


def subgroup(ranks, backend="shm"):
    """The group of the first ``ranks`` workers; None on the others. Kept for the next test; remade if it was closed."""
    rank = group.launched.rank
    made = moeshard.worker_state.setdefault(("groups made", ranks), 0)
    key = ("group", ranks)
    if rank >= ranks:
        return None
    kept = moeshard.worker_state.get(key)
    if kept is None or kept.closed:
        moeshard.worker_state["groups made", ranks] = made + 1
        name = f"{group.launched.name}-of-{ranks}-{made}"
        kept = group.Group(_core.exchange_shm(name, rank, ranks, group.launched.timeout), "shm")
        moeshard.worker_state[key] = kept
    return kept


def _call(ranks, function, args, kwargs):
    members = subgroup(ranks)
    return None if members is None else function(members, *args, **kwargs)


def on_ranks(workers, ranks, function, *args, **kwargs):
    """``function(group, *args, **kwargs)`` on each of the first ``ranks`` workers; the result of each."""
    return workers.run(_call, ranks, function, args, kwargs)[:ranks]
