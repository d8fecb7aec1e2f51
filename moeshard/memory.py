# SPDX-License-Identifier: Apache-2.0
"""Memory of this process: taken page by page, and given back to the system."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
from collections.abc import Sequence

import torch

NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # newer Pythons name it; Linux on x86 and ARM

# glibc returns a block above a size to the system when it is freed. It raises that size, to 32 MiB at most, with each
# such block; the rest stays with the process until malloc_trim (about 2 ms for 32 MiB).
RETURNED_AT_ONCE = 32 << 20


class Canvas:
    """Tensors that take memory page by page when they are written to, and can give it back.

    Args:
        like: shape and dtype of each.

    Attributes:
        tensors: them.
    """

    def __init__(self, like: Sequence[tuple[Sequence[int], torch.dtype]]) -> None:
        """Take addresses, and no memory."""
        ends = [0]
        for shape, dtype in like:
            size = math.prod(shape) * dtype.itemsize
            ends.append(ends[-1] + -(-size // mmap.PAGESIZE) * mmap.PAGESIZE)
        # NORESERVE: a layer may be larger than the memory of this machine
        self._map = mmap.mmap(-1, max(ends[-1], 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
        self.tensors = []
        for (shape, dtype), start in zip(like, ends[:-1], strict=True):
            count = math.prod(shape)
            flat = torch.frombuffer(self._map, dtype=dtype, count=count, offset=start) if count else torch.empty(0)
            self.tensors.append(flat.to(dtype).view(*shape))

    def release(self) -> None:
        """Give all memory back; the tensors are zeros then."""
        self._map.madvise(mmap.MADV_DONTNEED)


def return_freed_memory() -> None:
    """Give freed weights back to the system."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
