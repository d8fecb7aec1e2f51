# SPDX-License-Identifier: Apache-2.0
"""The process of one rank, started by `moeshard.launch`: runs what it is sent and exits when its parent is gone."""

import contextlib
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from queue import SimpleQueue

from moeshard import group, launcher


class _Inbox:
    """Tasks, read by a thread of their own so that the end of the parent is seen while a task runs."""

    def __init__(self, connection: "Connection", name: str) -> None:
        self._connection = connection
        self._name = name
        self._tasks: SimpleQueue[bytes | None] = SimpleQueue()
        self._received = 0
        self.done = 0
        threading.Thread(target=self._read, daemon=True).start()

    def next(self) -> bytes | None:
        """Wait for the next task; None when the parent is gone."""
        return self._tasks.get()

    def _read(self) -> None:
        try:
            while True:
                task = self._connection.recv_bytes()
                self._received += 1
                self._tasks.put(task)
        except (EOFError, OSError):
            launcher.unlink_shared_memory(self._name)
            if self._received == self.done:
                self._tasks.put(None)
                time.sleep(2)  # for the main thread to exit in order
            os._exit(1)


def main(handle: int) -> None:
    """Serve the parent at the other end of a socket."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(handle)
    group.launched = group.Launched(**pickle.loads(connection.recv_bytes()))
    inbox = _Inbox(connection, group.launched.name)
    while (task := inbox.next()) is not None:
        reply = _execute(task)
        sys.stdout.flush()
        sys.stderr.flush()
        inbox.done += 1  # before the parent may close the socket in answer
        if reply is not None:
            with contextlib.suppress(OSError):  # the parent is gone, which the inbox sees
                connection.send_bytes(reply)


def _execute(task: bytes) -> bytes | None:
    """The reply to a task; none to the request to leave all groups."""
    if task == launcher.LEAVE:
        group.close_all()
        return None
    try:
        function, args, kwargs = pickle.loads(task)
        return launcher.RESULT + launcher.dumps(function(*args, **kwargs))
    except BaseException as error:
        return launcher.FAILURE + _failure(error)


def _failure(error: BaseException) -> bytes:
    """The exception itself if it survives pickling and is no request to exit, its text and traceback."""
    inner = error.__traceback__ and error.__traceback__.tb_next
    trace = "".join(traceback.format_exception(type(error), error, inner))
    pickled = None
    if isinstance(error, Exception):
        try:
            pickled = launcher.dumps(error)
            if type(pickle.loads(pickled)) is not type(error):
                pickled = None
        except Exception:
            pickled = None
    return pickle.dumps((pickled, f"{type(error).__name__}: {error}", trace))


if __name__ == "__main__":
    main(int(sys.argv[1]))
