# SPDX-License-Identifier: Apache-2.0
"""The ranks on which rivals are compared: two workers in one torch.distributed world.

Without DeepSpeed the comparisons are skipped; with MOESHARD_COMPARE=required (`make test-compare`) they fail.
"""

import os

import pytest

import moeshard
from moeshard.bench import rival_deepspeed

RANKS = 2


def join():
    rival_deepspeed.join_world(moeshard.init())


@pytest.fixture(scope="session")
def pair():
    """Two workers that can build DeepSpeed's layer."""
    reason = rival_deepspeed.unavailable()
    if reason is not None and os.environ.get("MOESHARD_COMPARE") == "required":
        pytest.fail(reason)
    if reason is not None:
        pytest.skip(reason)
    with moeshard.launch(RANKS, threads=1, timeout=60) as ranks:
        ranks.run(join)
        yield ranks
