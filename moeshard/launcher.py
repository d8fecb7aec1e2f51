# SPDX-License-Identifier: Apache-2.0
"""launch: ranks as worker processes of this one, for notebooks and scripts.

Workers are new interpreters (never forks: torch's threads do not survive one, and nothing of this process's memory is
wanted), so that a script or notebook needs no ``if __name__ == "__main__"``. Functions reach them by value, through
cloudpickle, over one socket each; what they print comes back through one pipe each and is shown by the thread that
waits in ``run``, so that it lands under the notebook cell that called. A worker whose socket closes exits, whatever
this process died of.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import secrets
import selectors
import signal
import subprocess
import sys
import time
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, TypeVar

from . import _core

P = ParamSpec("P")
T = TypeVar("T")

# Messages on a worker's socket. To it: a pickled (function, args, kwargs), or LEAVE. From it, one per task:
# RESULT + the pickled result, or FAILURE + a pickled (exception or None, its text, its traceback).
LEAVE = b""
RESULT, FAILURE = b"R", b"F"

_GRACE = 1.0  # seconds that the other ranks have to end by themselves after one has failed
_EXIT = 5.0  # seconds that workers have to leave when asked


class WorkerState(dict[str, Any]):
    """A dictionary of each process that outlives a ``Ranks.run``: keep a sharded model here between runs.

    A function that names it gets the worker's own, wherever it was imported.
    """

    def __reduce__(self) -> str:
        """Pickle as a name."""
        return "worker_state"


worker_state = WorkerState()


class Ranks:
    """Worker processes, one per rank. Made by :func:`moeshard.launch`; a context manager that ends them.

    Attributes:
        size: number of ranks.
        pids: process id of each rank.
    """

    def __init__(self, workers: Sequence[_Worker], name: str) -> None:
        """Take started workers; :func:`moeshard.launch` starts them."""
        self._workers = list(workers)
        self._busy = False
        self.size = len(self._workers)
        self.pids = [worker.process.pid for worker in self._workers]
        self._end = weakref.finalize(self, _end, self._workers, name)

    def run(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> list[T]:
        """Call ``function(*args, **kwargs)`` on every rank at once.

        In the function, :func:`moeshard.init` gives the group of these ranks, and ``moeshard.worker_state`` is a
        dictionary of the worker that outlives the call; so do the modules it imports. What it prints is shown here.

        Args:
            function: any function, also a lambda or one defined in a notebook.
            args: its arguments; they are copied to every rank.
            kwargs: its keyword arguments.

        Returns:
            The result of each rank, in rank order, copied back.

        Raises:
            Exception: what the function raised on a rank, with a note that tells the rank and its traceback. If it
                raised on several, the one that is not the echo of another.
            RankLost: a worker died; the others are ended.
            ArgumentError: the function cannot be sent (is cloudpickle installed?), or ``run`` is running already.
            CommError: the ranks were closed.

        Example:
            >>> import moeshard
            >>> with moeshard.launch(2) as ranks:
            ...     ranks.run(lambda x: moeshard.init().rank + x, 10)
            [10, 11]
        """
        if not self._end.alive:
            raise _core.CommError("the ranks were closed: call moeshard.launch again")
        if self._busy:
            raise _core.ArgumentError("run: the ranks are busy with another call")
        task = dumps((function, args, kwargs))
        self._busy = True
        try:
            replies = self._replies(task)
        except BaseException:  # interrupted, or a worker died: no process is left behind
            self.close()
            raise
        finally:
            self._busy = False
        failures = {rank: reply[1:] for rank, reply in enumerate(replies) if reply[:1] == FAILURE}
        if failures:
            _raise_cause(failures, self.size)
        return [pickle.loads(reply[1:]) for reply in replies]

    def close(self) -> None:
        """End the workers: they have 5 seconds, then they are killed. Legal twice."""
        self._end()

    def _replies(self, task: bytes) -> list[bytes]:
        """Send the task, show what is printed, wait for every reply."""
        replies: dict[int, bytes] = {}
        failed_at = 0.0
        left = False
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                worker.send(task)
                selector.register(worker.connection, selectors.EVENT_READ, worker)
                selector.register(worker.output, selectors.EVENT_READ, worker)
            while len(replies) < self.size:
                for key, _ in selector.select(timeout=0.1):
                    worker = key.data
                    if key.fileobj is worker.connection:
                        replies[worker.rank] = worker.receive()
                    elif not worker.show():
                        selector.unregister(worker.output)
                for worker in self._workers:
                    worker.check_alive()
                failed = [rank for rank, reply in replies.items() if reply[:1] == FAILURE]
                failed_at = failed_at or (time.monotonic() if failed else 0.0)
                if failed and not left and time.monotonic() - failed_at > _GRACE:
                    left = True  # the others may wait for the failed ranks in a collective call: these leave it
                    for rank in failed:
                        self._workers[rank].send(LEAVE)
        for worker in self._workers:
            if left:
                worker.send(LEAVE)  # all ranks make a new group afterwards
            worker.show(everything=True)
        return [replies[rank] for rank in range(self.size)]

    def __len__(self) -> int:
        """Count the ranks."""
        return self.size

    def __enter__(self) -> Ranks:
        """Return the ranks themselves."""
        return self

    def __exit__(self, *exception: object) -> None:
        """End the workers."""
        self.close()

    def __repr__(self) -> str:
        """Size, and whether they were closed."""
        return f"Ranks(size={self.size}{'' if self._end.alive else ', closed'})"


def launch(n: int, *, timeout: float = 60.0, threads: int | None = None, env: Mapping[str, str] | None = None) -> Ranks:
    """Start n worker processes on this host, one per rank.

    The cores that this process may use are divided between them, and so are threads: ``OMP_NUM_THREADS`` (torch,
    NumPy) and ``MOESHARD_NUM_THREADS`` are set to a worker's number of cores, ``OMP_WAIT_POLICY`` to ``passive``.

    Args:
        n: number of ranks, 1 to 1024.
        timeout: seconds that a rank may be late in a collective call.
        threads: threads of each worker. ``None``: as many as its cores, at least 1.
        env: environment variables for the workers, over this process's own.

    Returns:
        The ranks: a context manager with ``run``.

    Raises:
        ArgumentError: a bad argument.
        RankLost: a worker did not start; what it printed is shown.

    Example:
        >>> import moeshard
        >>> with moeshard.launch(2) as ranks:
        ...     ranks.run(lambda: moeshard.init().size)
        [2, 2]
    """
    for argument, value in (("n", n), ("threads", threads)):
        if (argument, value) != ("threads", None) and (not isinstance(value, int) or not 1 <= value <= 1024):
            raise _core.ArgumentError(f"{argument}: expected an integer from 1 to 1024, got {value!r}")
    if not timeout > 0:
        raise _core.ArgumentError(f"timeout: expected a positive number of seconds, got {timeout!r}")
    name = secrets.token_hex(8)
    cores = sorted(os.sched_getaffinity(0))
    workers: list[_Worker] = []
    try:
        for rank in range(n):
            own = cores[rank * len(cores) // n : (rank + 1) * len(cores) // n] or [cores[rank % len(cores)]]
            count = str(threads or len(own))
            variables = {
                "OMP_NUM_THREADS": count,
                "MOESHARD_NUM_THREADS": count,
                "OMP_WAIT_POLICY": "passive",
                # the same modules as here, wherever they come from
                "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            }
            with _running_on(own):
                workers.append(_Worker(rank, n, {**os.environ, **variables, **(env or {})}))
            workers[-1].send(pickle.dumps({"name": name, "rank": rank, "ranks": n, "timeout": float(timeout)}))
    except BaseException:
        _end(workers, name)
        raise
    ranks = Ranks(workers, name)
    ranks.run(os.getpid)  # all have started, or their error is shown
    return ranks


class _Worker:
    """One worker process, its socket and what it prints."""

    def __init__(self, rank: int, ranks: int, env: Mapping[str, str]) -> None:
        self.rank = rank
        self.ranks = ranks
        self.connection, theirs = Pipe()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "moeshard._worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,  # a terminal's Ctrl-C is for this process, which ends the workers
            )
        assert self.process.stdout is not None
        self.output = self.process.stdout
        os.set_blocking(self.output.fileno(), False)
        self._line = b""

    def send(self, message: bytes) -> None:
        """Send a message, or raise RankLost."""
        try:
            self.connection.send_bytes(message)
        except OSError:
            self._raise_lost()

    def receive(self) -> bytes:
        """Receive a reply, or raise RankLost."""
        try:
            return self.connection.recv_bytes()
        except (EOFError, OSError):
            self._raise_lost()

    def show(self, *, everything: bool = False) -> bool:
        """Print what the worker has printed, in whole lines (then the rest too); False at the end of its output."""
        open_still = True
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self.output.fileno(), 1 << 16):
                self._line += data
            open_still = False
        end = len(self._line) if everything or not open_still else 1 + max(map(self._line.rfind, (b"\n", b"\r")))
        if end:
            sys.stdout.write(self._line[:end].decode(errors="replace"))
            sys.stdout.flush()
            self._line = self._line[end:]
        return open_still

    def check_alive(self) -> None:
        """Raise RankLost if the process has ended."""
        if self.process.poll() is not None:
            self._raise_lost()

    def _raise_lost(self) -> NoReturn:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1)  # its socket closes a moment before it has ended
        self.show(everything=True)
        code = self.process.returncode
        how = "left"
        if code is not None:
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"
        raise _core.RankLost(f"rank {self.rank} of {self.ranks} (process {self.process.pid}) {how}") from None


def unlink_shared_memory(name: str) -> None:
    """Remove what a killed group of this name may have left in /dev/shm."""
    for path in Path("/dev/shm").glob(f"moeshard-{name}-*"):
        path.unlink(missing_ok=True)


def dumps(value: object) -> bytes:
    """Pickle anything that cloudpickle can, or what pickle can if that is not installed."""
    try:
        import cloudpickle  # type: ignore[import-untyped]
    except ImportError:
        return _plain_dumps(value)

    class Pickler(cloudpickle.CloudPickler):  # type: ignore[misc]
        def reducer_override(self, obj: object) -> Any:
            # Since 3.1.3 code forgets its file: keep it, so that a rank's traceback shows lines of source.
            if not isinstance(obj, types.CodeType):
                return super().reducer_override(obj)
            make, parts = self.dispatch_table[types.CodeType](obj)
            return make, tuple(obj.co_filename if part == "<dynamic-code>" else part for part in parts)

    buffer = io.BytesIO()
    try:
        Pickler(buffer).dump(value)
        return buffer.getvalue()
    except Exception as error:
        raise _core.ArgumentError(f"run: cannot be sent between processes: {error}") from error


def _plain_dumps(value: object) -> bytes:
    function = value[0] if isinstance(value, tuple) else None
    try:
        if getattr(function, "__module__", None) == "__main__":
            raise pickle.PicklingError(f"{function} is defined in __main__")
        return pickle.dumps(value)
    except Exception as error:
        raise _core.ArgumentError(
            f"run: cannot be sent between processes: {error}. Functions defined in a notebook, a script or another "
            "function can be if cloudpickle is installed: pip install cloudpickle"
        ) from error


def _raise_cause(failures: Mapping[int, bytes], ranks: int) -> NoReturn:
    errors: dict[int, BaseException] = {}
    for rank, failure in failures.items():
        pickled, text, trace = pickle.loads(failure)
        error = RuntimeError(text) if pickled is None else pickle.loads(pickled)
        error.add_note(f"This was raised on rank {rank} of {ranks}:\n{trace}")
        errors[rank] = error
    cause = min(errors, key=lambda rank: (_echo(errors[rank]), rank))
    others = [f"rank {rank}: {type(error).__name__}: {error}" for rank, error in errors.items() if rank != cause]
    if others:
        errors[cause].add_note("\n".join(["Other ranks raised too.", *others]))
    raise errors[cause]


def _echo(error: BaseException) -> int:
    """How likely an error is the consequence of another rank's."""
    order = (_core.PeerError, _core.CommTimeout, _core.RankLost)
    if not isinstance(error, _core.CommError):
        return 0
    return next((2 + place for place, kind in enumerate(order) if isinstance(error, kind)), 1)


@contextlib.contextmanager
def _running_on(cores: Sequence[int]) -> Iterator[None]:
    """Let what this thread starts run on these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _end(workers: Sequence[_Worker], name: str) -> None:
    for worker in workers:
        worker.connection.close()
    deadline = time.monotonic() + _EXIT
    for worker in workers:
        try:
            worker.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait()
        worker.output.close()
    unlink_shared_memory(name)
