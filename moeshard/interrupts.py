# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C put off while a model is between two states, neither of which it could go back to."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def interrupts_put_off() -> Iterator[None]:
    """A Ctrl-C inside the block takes effect at its end.

    An ``except KeyboardInterrupt`` would not do: it is raised between any two bytecodes, also inside the ``except``.
    Only the main thread is ever interrupted; in others this does nothing, nor where Ctrl-C raises nothing.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    frames: list[FrameType | None] = []
    signal.signal(signal.SIGINT, lambda _, frame: frames.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if frames:
            handler(signal.SIGINT, frames[-1])
