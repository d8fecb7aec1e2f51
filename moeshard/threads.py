# SPDX-License-Identifier: Apache-2.0
"""How many threads the kernels of this process use: MOESHARD_NUM_THREADS, else torch's number, else its cores."""

import os
import sys

from . import _core


def use_threads() -> None:
    """Set the number of kernel threads, if it has changed. Results do not depend on it.

    Raises:
        ArgumentError: ``MOESHARD_NUM_THREADS`` is not a positive integer.
    """
    count = _wanted()
    if count != _core.get_num_threads():
        _core.set_num_threads(count)


def _wanted() -> int:
    asked = os.environ.get("MOESHARD_NUM_THREADS")
    if asked:
        if not asked.isdecimal() or int(asked) < 1:
            raise _core.ArgumentError(f"MOESHARD_NUM_THREADS: expected a positive integer, got {asked!r}")
        return int(asked)
    cores = len(os.sched_getaffinity(0))  # torch counts the machine's, not those this process may use
    torch = sys.modules.get("torch")
    return cores if torch is None else min(cores, torch.get_num_threads())
