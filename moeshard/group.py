# SPDX-License-Identifier: Apache-2.0
"""The group: the ranks that share the experts of a model, and how this process finds them (`init`)."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import secrets
import socket
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from . import _core

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from ._core import SupportsDLPack
    from .cuda import CudaEngine

Backend = Literal["one", "shm", "torch"]

_CONTROL_LAYER = -1  # the layer that calls between layers claim to be, so that a rank inside a layer is told apart
_CONTROL_WIDTH = 1024  # float32 words a row: messages travel as rows of 4 KiB
_NO_CHOICES, _NO_WEIGHTS = np.empty((1, 0), np.int32), np.empty((1, 0), np.float32)


class Exchange(Protocol):
    """What carries rows between ranks: ``_core.Exchange`` in C, or :class:`moeshard.exchange_torch.TorchExchange`."""

    def gather(self, batch: _core.Batch, /) -> None:
        """Step 2: every rank's tokens and choices."""

    def combine(self, batch: _core.Batch, /) -> None:
        """Step 5: the sum of the choices, then of the ranks."""

    def refuse(self, message: str, /) -> None:
        """In place of the gather or combine the other ranks are in: they raise PeerError with this message."""

    def close(self) -> None:
        """Leave: other ranks then see RankLost."""

    @property
    def rank(self) -> int:
        """This rank."""

    @property
    def ranks(self) -> int:
        """Number of ranks."""

    @property
    def name(self) -> str:
        """What carries the rows."""


class Group:
    """The ranks that share a model's experts. Made by :func:`moeshard.init`; all methods but ``close`` are collective.

    A context manager: leaving it closes the group. A rank that dies or times out closes it too, because the ranks are
    out of step then; every later call raises ``CommError`` and the next ``moeshard.init()`` makes a new group.

    Args:
        exchange: what carries rows between the ranks; owned by the group from now on.
        backend: what ``init(backend=...)`` calls it.
        release: called once after the exchange is closed.
        timeout: seconds that a rank may be late.

    Attributes:
        reserved: tokens per rank that the CUDA ranks have reserved room for; ``None``: they agree in every call.

    Example:
        >>> import moeshard
        >>> with moeshard.init("one") as group:
        ...     group.all_gather(b"hello")
        [b'hello']
    """

    def __init__(
        self,
        exchange: Exchange,
        backend: Backend,
        release: Callable[[], object] | None = None,
        timeout: float = 60.0,
    ) -> None:
        """Take an exchange; :func:`moeshard.init` makes one."""
        self.exchange = exchange
        self.backend: Backend = backend
        self.batch = _core.Batch()  # one forward pass's state, shared by all layers of the group
        self.rank = exchange.rank
        self.size = exchange.ranks
        self.timeout = timeout
        self.reserved: int | None = None
        self._engine: CudaEngine | None = None
        self._turn = threading.RLock()  # a call on CUDA starts with an all_gather of its own
        self._release = release
        self._closed = ""
        self._layers = 0
        _groups.add(self)

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """One call from route to combine: threads of this rank take turns.

        Interrupted in the middle (Ctrl-C), it leaves the ranks out of step, so the group is closed; alone, the call is
        forgotten.
        """
        with self._turn:
            try:
                yield
            except Exception:
                raise
            except BaseException as error:
                self._interrupted(error)
                raise

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        """Work that stands before a gather or combine: if it fails here, the other ranks get PeerError, not silence."""
        try:
            yield
        except Exception as error:
            if not self._closed:
                with contextlib.suppress(_core.CommError), self.in_step():
                    self.exchange.refuse(f"{type(error).__name__}: {error}")
            raise
        except BaseException as error:
            self._interrupted(error)
            raise

    def gather(self, batch: _core.Batch) -> None:
        """Step 2 through the exchange; the group is closed if the ranks are out of step afterwards."""
        with self.in_step():
            self.exchange.gather(batch)

    def combine(self, batch: _core.Batch) -> None:
        """Step 5 through the exchange; the group is closed if the ranks are out of step afterwards."""
        with self.in_step():
            self.exchange.combine(batch)

    @contextlib.contextmanager
    def all_or_none(self) -> Iterator[None]:
        """Work that must succeed on every rank: raises on all of them if it fails on one (there its own error)."""
        with self.refusing():
            yield
        self.barrier()

    def all_gather(self, data: bytes) -> list[bytes]:
        """Every rank's bytes, on every rank.

        Args:
            data: any length, also none; ranks may differ.

        Returns:
            One ``bytes`` per rank, in rank order.

        Raises:
            CommError: the group is closed, or a rank is lost, late or elsewhere.
        """
        framed = len(data).to_bytes(8, "little") + data
        framed += bytes(-len(framed) % (4 * _CONTROL_WIDTH))
        messages = self.gather_rows(np.frombuffer(framed, np.float32).reshape(-1, _CONTROL_WIDTH))
        return [frame[8:][: int.from_bytes(frame[:8], "little")] for frame in map(np.ndarray.tobytes, messages)]

    def gather_rows(self, rows: SupportsDLPack) -> list[NDArray[Any]]:
        """Every rank's rows, on every rank, copied bit for bit.

        Args:
            rows: ``[T, D]`` float32, bfloat16 or float16; T may differ between ranks.

        Returns:
            ``[T, D]`` of each rank, in rank order; 16-bit dtypes as uint16 words.

        Raises:
            CommError: as :meth:`all_gather`.
        """
        with self.call():
            with self.refusing():
                self.check_open()
                nothing = np.empty((_core.tensor_info(rows)[0][0], 0), np.int32)
                self.batch.route(rows, nothing, nothing.view(np.float32), 1, layer=_CONTROL_LAYER)
            self.gather(self.batch)
            gathered, counts = self.batch.rows(), self.batch.tokens_per_rank
            self.combine(self.batch)
        return np.split(gathered, counts.cumsum()[:-1])

    def gather_row(self, row: NDArray[Any]) -> NDArray[Any]:
        """Every rank's row, by the shortest way, within :meth:`call`.

        Args:
            row: ``[D]`` of an 8-byte dtype; D is the same on all ranks.

        Returns:
            ``[R, D]``.

        Raises:
            CommError: as :meth:`all_gather`.
        """
        self.batch.route(row.view(np.float32)[None], _NO_CHOICES, _NO_WEIGHTS, 1, layer=_CONTROL_LAYER)
        self.gather(self.batch)
        rows = self.batch.rows()
        self.combine(self.batch)
        return rows.view(row.dtype)

    def barrier(self) -> None:
        """Wait for all ranks.

        Raises:
            CommError: as :meth:`all_gather`; PeerError if a rank failed in its part of :meth:`all_or_none`.
        """
        self.all_gather(b"")

    def agree(self, facts: Mapping[str, str]) -> None:
        """Check that all ranks say the same.

        Args:
            facts: names and values.

        Raises:
            RankMismatch: on all ranks, naming the first fact that differs, the ranks and both values.
        """
        said: list[dict[str, str]] = [json.loads(message) for message in self.all_gather(json.dumps(facts).encode())]
        for name in dict.fromkeys(name for rank in said for name in rank):
            values = [rank.get(name, "missing") for rank in said]
            other = next((rank for rank in range(self.size) if values[rank] != values[0]), None)
            if other is not None:
                raise _core.RankMismatch(
                    f"ranks disagree about {name}: {values[0]} on rank 0 but {values[other]} on rank {other}"
                )

    def engine(self, device: int) -> CudaEngine:
        """The CUDA engine of this rank. Collective the first time, when the ranks meet through NCCL.

        Args:
            device: the number of the CUDA device; each rank of a host has its own.

        Raises:
            ArgumentError: this rank has another device already.
            CommError: NCCL is missing, or a rank could not be reached; see :mod:`moeshard.errors`.
        """
        if self._engine is None:
            from .cuda import CudaEngine

            self._engine = CudaEngine(self, device)
            atexit.register(close_all)  # before the CUDA runtime is torn down under a communicator's thread
        if self._engine.device != device:
            raise _core.ArgumentError(
                f"device: this rank has cuda:{self._engine.device}, it cannot use cuda:{device} too"
            )
        return self._engine

    def reserve(self, tokens: int | None) -> None:
        """Fix the room that the CUDA ranks exchange in every call, so that their hosts need not agree. Collective.

        Without it every call of a layer starts with a message between the hosts (:meth:`gather_row`):
        the ranks agree on the largest number of tokens. With it a layer is enqueued without waiting for anybody, and
        can be captured in a CUDA graph; rows that a rank does not use travel all the same. On CPUs nothing changes.

        Args:
            tokens: the most that any rank will have in one call; ``None``: agree in every call again.

        Raises:
            RankMismatch: the ranks say different numbers.
        """
        if tokens is not None and tokens < 1:
            raise _core.ArgumentError(f"tokens: expected a positive number or None, got {tokens}")
        self.agree({"the tokens to reserve": str(tokens)})
        self.reserved = tokens

    def new_layer(self) -> int:
        """A number for a layer, the same on all ranks: they check it in every forward pass."""
        self._layers += 1
        return self._layers - 1

    def check_open(self) -> None:
        """Raise CommError if the group is closed."""
        if self._closed:
            raise _core.CommError(
                f"the group is closed ({self._closed}): moeshard.init() makes a new one, for a model loaded anew"
            )

    @property
    def closed(self) -> bool:
        """Whether the group was closed or broken."""
        return bool(self._closed)

    def close(self) -> None:
        """Leave the group. Not collective: other ranks that call it afterwards see RankLost. Legal twice."""
        if self._engine is not None:
            self._engine.close()
        self._leave(f"by close() on rank {self.rank}")

    def abandon(self, reason: str) -> None:
        """Close the group because the ranks are out of step: what they wait for will not come."""
        if self._engine is not None:
            self._engine.abort(reason)
        self._leave(reason)

    def _leave(self, reason: str) -> None:
        if not self._closed:
            self._closed = reason
            self.exchange.close()
            if self._release is not None:
                self._release()

    def _interrupted(self, error: BaseException) -> None:
        if self.size > 1:
            self.abandon(f"{type(error).__name__} on rank {self.rank}")
        else:
            self.exchange.refuse("interrupted")

    @contextlib.contextmanager
    def in_step(self) -> Iterator[None]:
        """A call that other ranks take part in: the group is closed if the ranks are out of step afterwards."""
        self.check_open()
        try:
            yield
        except (_core.RankMismatch, _core.PeerError):
            raise  # every rank raises and stands before the next call
        except _core.CommError as error:
            self.abandon(f"{type(error).__name__}: {error}")
            raise

    def __enter__(self) -> Group:
        """Return the group itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the group."""
        self.close()

    def __repr__(self) -> str:
        """Rank, size and exchange."""
        state = ", closed" if self._closed else ""
        return f"Group(rank={self.rank}, size={self.size}, exchange={self.exchange.name!r}{state})"


@dataclass
class Launched:
    """What :func:`moeshard.launch` told this worker process."""

    name: str
    rank: int
    ranks: int
    timeout: float
    groups: int = 0  # made so far: each needs a name of its own, the same on all ranks

    def connect(self, timeout: float) -> Group:
        """The group of all workers, through shared memory."""
        if self.ranks == 1:
            return _alone()
        self.groups += 1
        return _over_shm(f"{self.name}-{self.groups}", self.rank, self.ranks, timeout)


# Which process is which rank is a fact about the process, as torch.distributed's default group is: hence these globals,
# and no others. A layer keeps the group it was made with and never looks here.
launched: Launched | None = None
_default: Group | None = None
_groups: weakref.WeakSet[Group] = weakref.WeakSet()


def init(
    backend: Literal["auto", "one", "shm", "torch"] = "auto",
    timeout: float | None = None,
    *,
    process_group: ProcessGroup | None = None,
) -> Group:
    """Find the other ranks. Collective; kept as the default group of this process until it is closed.

    Ranks are found in this order: the workers of :func:`moeshard.launch`; ``torch.distributed`` if it is initialised;
    the environment that ``torchrun`` sets (then ``torch.distributed`` is initialised, with gloo); else this process is
    the only rank. Ranks of one host (same boot id, host name, ``/dev/shm``) share memory, others use torch.distributed.

    Args:
        backend: ``"auto"``, or force ``"one"`` (this process alone), ``"shm"`` (shared memory) or ``"torch"``.
        timeout: seconds a rank may be late, here and in every later call. ``None``: 60, or what ``launch`` was given.
        process_group: only the ranks of this ``torch.distributed`` group; the result is not kept as the default. A gloo
            group carries the rows itself, with its own timeout; for any other a gloo group is made.

    Returns:
        The group; the default one, if it is open and of the backend asked for.

    Raises:
        ArgumentError: an unknown backend, or one that needs ranks where none can be found.
        CommError: the ranks do not share a host (``"shm"``), or could not be reached.
        CommTimeout: a rank did not call ``init`` in time.

    Example:
        >>> init("one")
        Group(rank=0, size=1, exchange='one')
    """
    global _default
    if backend not in ("auto", "one", "shm", "torch"):
        raise _core.ArgumentError(f"backend: expected 'auto', 'one', 'shm' or 'torch', got {backend!r}")
    if process_group is not None:
        return _over_torch(process_group, backend, _seconds(timeout))
    if _default is not None and not _default.closed and backend in ("auto", _default.backend):
        return _default
    _default = _find(backend, _seconds(timeout))
    return _default


def close_all() -> None:
    """Leave every group of more than one rank, so that ranks that wait for this one see it and all start afresh."""
    for group in list(_groups):
        if group.size > 1:
            group.close()


def _seconds(timeout: float | None) -> float:
    if timeout is None:
        return launched.timeout if launched is not None else 60.0
    if not timeout > 0:
        raise _core.ArgumentError(f"timeout: expected a positive number of seconds, got {timeout!r}")
    return float(timeout)


def _find(backend: str, timeout: float) -> Group:
    if backend == "one":
        return _alone()
    if launched is not None and backend != "torch":
        return launched.connect(timeout)
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return _over_torch(None, backend, timeout)
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        return _from_environment(backend, timeout)
    if backend == "auto":
        return _alone()
    raise _core.ArgumentError(
        f"backend: {backend!r} needs ranks and none were found: start the processes with torchrun or "
        "moeshard.launch, or call torch.distributed.init_process_group first"
    )


def _alone() -> Group:
    return Group(_core.exchange_one(), "one")


def _over_shm(name: str, rank: int, ranks: int, timeout: float) -> Group:
    return Group(_core.exchange_shm(name, rank, ranks, timeout), "shm", timeout=timeout)


def _from_environment(backend: str, timeout: float) -> Group:
    try:
        import torch.distributed as dist
    except ImportError as error:
        raise _core.CommError(
            "RANK, WORLD_SIZE and MASTER_ADDR are set (torchrun), but finding the other ranks needs torch: "
            "pip install torch, or unset them"
        ) from error
    from .exchange_torch import translated

    with translated("init"):
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    atexit.register(_destroy, None)
    return _over_torch(None, backend, timeout)


def _over_torch(process_group: ProcessGroup | None, backend: str, timeout: float) -> Group:
    import torch
    import torch.distributed as dist

    from .exchange_torch import TorchExchange, translated

    with translated("init"):
        if process_group is None:  # a group of our own: our timeout, no mixing with the program's traffic
            carrier = dist.new_group(timeout=timedelta(seconds=timeout), backend="gloo")
        elif dist.get_backend(process_group) == "gloo":
            carrier = process_group
        else:  # kept until the end: torch cannot make it twice
            members = dist.get_process_group_ranks(process_group)
            carrier = dist.new_group(
                members, timeout=timedelta(seconds=timeout), backend="gloo", use_local_synchronization=True
            )
        rank, size = dist.get_rank(carrier), dist.get_world_size(carrier)
        card = torch.frombuffer(bytearray(_host_digest() + secrets.token_bytes(16)), dtype=torch.uint8)
        cards = [torch.empty_like(card) for _ in range(size)]
        dist.all_gather(cards, card, group=carrier)
    hosts = [bytes(card[:32].tolist()) for card in cards]
    name = bytes(cards[0][32:].tolist()).hex()
    stranger = next((r for r in range(size) if hosts[r] != hosts[0]), None)
    if backend == "torch" or (backend == "auto" and stranger is not None):
        release = partial(_destroy, carrier) if process_group is None else None
        group = Group(TorchExchange(carrier), "torch", release, timeout)
        atexit.register(group.close)
        return group
    if process_group is None:
        _destroy(carrier)
    if stranger is not None:
        raise _core.CommError(f"backend: 'shm' needs all ranks on one host, but rank {stranger} is not on rank 0's")
    return _alone() if size == 1 else _over_shm(name, rank, size, timeout)


def _destroy(process_group: ProcessGroup | None) -> None:
    """Destroy a process group (None: the default one). Gloo's threads abort a process that exits while they run."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group(process_group)


def _host_digest() -> bytes:
    facts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        facts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        facts.append(str(Path("/dev/shm").stat().st_dev))
    return hashlib.sha256("\0".join(facts).encode()).digest()
