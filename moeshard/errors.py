# SPDX-License-Identifier: Apache-2.0
"""The exceptions of moeshard, raised alike by the C core and the Python layers.

All are a ``MoeshardError``; those about ranks are a ``CommError`` too. After ``RankMismatch`` and ``PeerError`` all
ranks stand before the next call and the group can be used on; after the other kinds of ``CommError`` it is closed.
"""

from ._core import (
    ArgumentError,
    CommError,
    CommTimeout,
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
    "DTypeError",
    "MoeshardError",
    "PeerError",
    "RangeError",
    "RankLost",
    "RankMismatch",
    "ShapeError",
]

_DOCS = {
    MoeshardError: "Base of all exceptions of moeshard.",
    ArgumentError: "An argument cannot be used; says what it was and what is accepted. Also a ValueError.",
    ShapeError: "A shape does not fit the others; names both. Also a ValueError.",
    DTypeError: "A dtype is not accepted; names those that are. Also a TypeError.",
    RangeError: "An expert index is out of range, or a routing weight not finite. Also a ValueError.",
    CommError: "The exchange could not be set up, or is closed or broken. Also a RuntimeError.",
    RankLost: "Another rank died or left.",
    CommTimeout: "Another rank did not arrive in time.",
    RankMismatch: "The ranks disagree about a call: the same message on all of them.",
    PeerError: "Another rank failed in this call, and says why.",
}
for _exception, _doc in _DOCS.items():
    _exception.__doc__ = _doc
