# SPDX-License-Identifier: Apache-2.0
"""The exceptions of moeshard, raised alike by the C core and the Python layers.

==================  ===============================================================  =================
exception           raised when                                                      is also a
==================  ===============================================================  =================
``MoeshardError``   never itself: the base of all others                             ``Exception``
``ArgumentError``   an argument cannot be used                                       ``ValueError``
``ShapeError``      a shape does not fit the others; both are named                  ``ValueError``
``DTypeError``      a dtype is not accepted; the accepted ones are named             ``TypeError``
``RangeError``      an expert index is out of range, or a routing weight not finite  ``ValueError``
``CommError``       the exchange could not be set up, or is closed or broken         ``RuntimeError``
``RankLost``        another rank died or left; the group cannot be used again        ``CommError``
``CommTimeout``     another rank did not arrive in time; as above                    ``CommError``
``RankMismatch``    ranks disagree about a call: the same message on all of them     ``CommError``
``PeerError``       another rank failed in this call and says why                    ``CommError``
==================  ===============================================================  =================

After ``RankMismatch`` and ``PeerError`` all ranks stand before the next call and the group can be used on.
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
