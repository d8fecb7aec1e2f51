# SPDX-License-Identifier: Apache-2.0
"""The exceptions of moeshard, raised alike by the C core and the Python layers.

All are a ``MoeshardError``; those about ranks are a ``CommError`` too. After ``RankMismatch`` and ``PeerError`` all
ranks stand before the next call and the group can be used on; after the other kinds of ``CommError`` it is closed.
"""

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

__all__ = [
    "ArgumentError",
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
