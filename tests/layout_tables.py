# SPDX-License-Identifier: Apache-2.0
"""Random valid column tables: copies that overlap anyhow, ranks without columns, pruned experts."""

import numpy as np
from hypothesis import strategies as st

from moeshard import Plan


def random_plan(rng, ranks, experts, d_ff, pruned=False):
    """Of each expert: ranks in random order, dealt to copies, each copy cut anywhere (often where another one is)."""
    columns, copies = np.zeros((ranks, experts, 2), np.int64), np.zeros(experts, np.int32)
    for expert in range(experts):
        copies[expert] = rng.integers(0 if pruned else 1, ranks + 1)
        owners = rng.permutation(ranks)[: rng.integers(copies[expert], ranks + 1)]
        for copy in range(copies[expert]):
            members = owners[copy :: copies[expert]]
            inner = rng.choice([0, d_ff // 2, d_ff, rng.integers(0, d_ff + 1)], len(members) - 1)
            cuts = [0, *np.sort(inner), d_ff]
            columns[members, expert] = np.stack([cuts[:-1], cuts[1:]], axis=1)
    return Plan.from_columns(columns, d_ff, copies)


@st.composite
def plans(draw, least=1):
    seed, ranks = draw(st.integers(0, 2**32 - 1)), draw(st.integers(least, 4))
    return random_plan(np.random.default_rng(seed), ranks, draw(st.integers(1, 7)), draw(st.integers(1, 40)))


def fixed_plans(ranks, experts, d_ff):
    """By name: the layouts that have one."""
    everywhere = Plan.from_columns(np.tile([0, d_ff], (ranks, experts, 1)), d_ff, [ranks] * experts)
    mixed = Plan.shard(ranks, experts, d_ff).columns.copy()
    mixed[:, 0], mixed[:, 1] = (0, 0), (0, d_ff)  # expert 0 whole on the last rank, expert 1 on all
    mixed[-1, 0] = (0, d_ff)
    copies = [1, ranks] + [1] * (experts - 2)
    shifted = np.roll(
        Plan.expert_parallel(ranks, experts, d_ff).columns, 1, axis=0
    )  # the first rank owns the last block
    return {
        "shard": Plan.shard(ranks, experts, d_ff),
        "uneven": Plan.shard(ranks, experts, d_ff, speed=range(1, ranks + 1)),
        "expert parallel": Plan.expert_parallel(ranks, experts, d_ff),
        "hybrid": Plan.hybrid(ranks, experts, d_ff, group=2 if ranks % 2 == 0 else 1),
        "one rank has all": Plan.expert_parallel(ranks, experts, d_ff, [ranks - 1] * experts),
        "copies everywhere": everywhere,
        "a mixture": Plan.from_columns(mixed, d_ff, copies),
        "shifted owners": Plan.from_columns(shifted, d_ff),
    }
