# SPDX-License-Identifier: Apache-2.0
"""The exceptions of moeshard, raised alike by the C core and the Python layers.

All are a ``MoeshardError``; those about ranks are a ``CommError`` too. After ``RankMismatch`` and ``PeerError`` all
ranks stand before the next call and the group can be used on; after the other kinds of ``CommError`` it is closed.
"""

from collections.abc import Sequence

from ._core import (
    ArgumentError,
    CommError,
    CommTimeout,
    CudaError,
    DTypeError,
    MoeshardError,
    PeerError,
    RangeError,
    RankLost,
    RankMismatch,
    ShapeError,
)


class CheckpointError(ArgumentError):
    """A checkpoint that does not fit its model.

    Attributes:
        path: where it is.
        problems: all of them, a line each, with the names of the tensors.
    """

    def __init__(self, path: str, problems: Sequence[str]) -> None:
        """Take all problems."""
        super().__init__(path, list(problems))
        self.path = path
        self.problems = list(problems)

    def __str__(self) -> str:
        """All problems, one a line."""
        count = f"{len(self.problems)} problems" if len(self.problems) != 1 else "1 problem"
        return "\n  ".join([f"path: {count} with the checkpoint {self.path}:", *self.problems])


__all__ = [
    "ArgumentError",
    "CheckpointError",
    "CommError",
    "CommTimeout",
    "CudaError",
    "DTypeError",
    "MoeshardError",
    "PeerError",
    "RangeError",
    "RankLost",
    "RankMismatch",
    "ShapeError",
]
