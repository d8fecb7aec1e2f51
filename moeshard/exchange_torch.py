# SPDX-License-Identifier: Apache-2.0
"""The exchange over any `torch.distributed` group: several hosts, CPU tensors.

What goes to all ranks travels point to point (``isend``/``irecv``), so that rows are sent from where they lie and
received where they are needed, whatever their number, and a failure names the rank. On gloo, 2 ranks of one host, 12
MiB a rank: 7 ms, against 8.3 ms for ``all_to_all_single`` (which needs R copies of the rows first), 11 ms for
``all_gather_into_tensor``.

With a sparse layout (a rank holds no column of some expert, or an expert has copies) a row goes only to the ranks that
compute something of it. The routing goes to all ranks first: from it each knows which rows every other will send, so
rows travel in one ``all_to_all_single`` without a word about sizes, and so do the partial outputs on their way back.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from . import _core

# ms_header of csrc/moeshard.h, which Batch.header gives as int64 words.
_HEADER = np.dtype(
    [(name, np.int64) for name in ("call", "layer", "T", "D", "K", "E")]
    + [("dtype", np.int32), ("replicated", np.int32), ("digest", np.int64), ("layout", np.int64)]
)
_WORDS = _HEADER.itemsize // 8
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # by ms_dtype
_NONE = np.empty(0, np.int32)


class TorchExchange:
    """Carries rows through a process group.

    Every gather and combine starts with a small header from all ranks to all ranks. Headers that disagree, or a rank
    that refuses, raise on all ranks before anything else is sent: the ranks stay in step.

    Args:
        process_group: any group whose backend sends CPU tensors (gloo, mpi). ``close`` does not destroy it.
    """

    def __init__(self, process_group: dist.ProcessGroup) -> None:
        """Find this rank's place in the group."""
        self._group = process_group
        self.rank: int = dist.get_rank(process_group)
        self.ranks: int = dist.get_world_size(process_group)
        self.name = f"torch.distributed ({dist.get_backend(process_group)})"
        self._peers = [dist.get_global_rank(process_group, rank) for rank in range(self.ranks)]
        self._header = np.zeros((), _HEADER)  # of the call that is open
        self._tokens = np.zeros(self.ranks, np.int64)
        self._calls = 0
        self._open = False

    def gather(self, batch: _core.Batch, /) -> None:
        """Step 2: every rank's tokens and choices."""
        if self._open:
            raise _core.ArgumentError("gather: the last call is still open, combine (or refuse) it first")
        self._calls += 1
        words = self._announce(batch.header(self._calls))
        _core.header_check(words)
        headers = words.view(_HEADER)[:, 0]
        self._header, self._tokens = headers[self.rank], headers["T"].copy()
        with translated("gather"):
            index, weights = batch.routing()
            if self._header["replicated"]:  # nothing travels: the rows are this rank's own
                self._tokens[np.arange(self.ranks) != self.rank] = 0
                batch.gather_from(self.rank, self._tokens, self._typed(batch.take()), index, weights)
            elif batch.sparse:
                (routing,) = self._from_all(_routing_bytes(index, weights))
                batch.gather_routing(self.rank, self._tokens, *_routing_of(routing))
                batch.gather_rows(self._typed(self._rows_needed(batch)))
            else:
                routing, rows = self._from_all(_routing_bytes(index, weights), batch.take().view(np.uint8))
                batch.gather_from(self.rank, self._tokens, self._typed(rows), *_routing_of(routing))
        self._open = True

    def combine(self, batch: _core.Batch, /) -> None:
        """Step 5: the sum of the choices, then of the ranks; a gather without choices is only closed."""
        if not self._open:
            raise _core.ArgumentError("combine: no call is open on this exchange, gather first")
        try:
            partial = torch.from_numpy(batch.combine_choices()) if self._header["K"] else None
        except Exception as error:
            self.refuse(str(error))
            raise
        self._open = False
        self._announce(np.zeros(_WORDS, np.int64))
        if partial is None:
            return
        with translated("combine"):
            if batch.sparse:
                parts = self._parts_computed(batch, partial)
            else:
                parts = list(torch.empty((self.ranks, *batch.shape[:2])))
                self._send([self._shares(partial)], [parts])
            parts[self.rank] = self._shares(partial)[self.rank]
            batch.combine_ranks([part.numpy() for part in parts])

    def refuse(self, message: str, /) -> None:
        """In place of the gather or combine the other ranks are in: they raise PeerError with this message."""
        self._calls += not self._open
        self._open = False
        with contextlib.suppress(_core.PeerError):  # this rank's own message, and those of others that refuse too
            self._announce(np.zeros(_WORDS, np.int64), message or "no reason given")

    def close(self) -> None:
        """Nothing: the process group belongs to the caller."""

    def _announce(self, words: NDArray[np.int64], refusal: str = "") -> NDArray[np.int64]:
        """Every rank's header words [R, words], or PeerError on all ranks when one of them refuses."""
        text = refusal.encode()
        cards = torch.from_numpy(np.empty((self.ranks, 1 + _WORDS), np.int64))
        cards[self.rank] = torch.from_numpy(np.concatenate([[len(text)], words]))
        self._send([[cards[self.rank]] * self.ranks], [list(cards)])
        lengths = cards[:, 0].tolist()
        if any(lengths):
            texts = [torch.empty(length, dtype=torch.uint8) for length in lengths]
            texts[self.rank] = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else texts[self.rank]
            self._send([[texts[self.rank]] * self.ranks], [texts])
            rank = next(rank for rank, length in enumerate(lengths) if length)
            raise _core.PeerError(f"rank {rank}: {bytes(texts[rank].tolist()).decode()}")
        return cards[:, 1:].contiguous().numpy()

    def _typed(self, rows: NDArray[Any]) -> torch.Tensor:
        """Rows as bytes or words, as the tensor of the call's dtype that they are."""
        dtype = _DTYPES[self._header["dtype"]]
        if not rows.size:  # NumPy's strides are 0 then, which torch's view does not take
            return torch.empty((len(rows), int(self._header["D"])), dtype=dtype)
        return torch.from_numpy(rows.view(np.uint8)).view(dtype)

    def _shares(self, partial: torch.Tensor) -> list[torch.Tensor]:
        """Of this rank's partial outputs [N, D], what each rank's tokens get."""
        if self._header["replicated"]:
            return [partial] * self.ranks
        return list(torch.split(partial, self._tokens.tolist()))

    def _rows_needed(self, batch: _core.Batch) -> NDArray[np.uint8]:
        """The rows of other ranks that this one computes something of: [M, bytes]."""
        sends = [batch.needed(self.rank, reader) if reader != self.rank else _NONE for reader in range(self.ranks)]
        counts = [len(batch.needed(source, self.rank)) if source != self.rank else 0 for source in range(self.ranks)]
        rows = batch.take(np.concatenate(sends)).view(np.uint8)
        return self._all_to_all(torch.from_numpy(rows), [len(tokens) for tokens in sends], counts).numpy()

    def _parts_computed(self, batch: _core.Batch, partial: torch.Tensor) -> list[torch.Tensor]:
        """Of every other rank, the partial outputs [M, D] of this rank's tokens that it computed something of."""
        sends = [batch.needed(source, self.rank) for source in range(self.ranks)]
        counts = [len(batch.needed(self.rank, reader)) for reader in range(self.ranks)]
        if self._header["replicated"]:  # the same rows to all: no copy for each
            parts = [torch.empty((count, partial.shape[1])) for count in counts]
            mine = partial.index_select(0, torch.from_numpy(sends[self.rank]))
            self._send([[mine] * self.ranks], [parts])
            return parts
        sends[self.rank], counts[self.rank] = _NONE, 0
        first = self._tokens.cumsum() - self._tokens
        rows = np.concatenate([tokens + start for tokens, start in zip(sends, first, strict=True)])
        computed = partial.index_select(0, torch.from_numpy(rows))
        back = self._all_to_all(computed, [len(tokens) for tokens in sends], counts)
        return list(torch.split(back, counts))

    def _all_to_all(self, rows: torch.Tensor, sends: list[int], receives: list[int]) -> torch.Tensor:
        """Send sends[r] of the rows to each rank r, in order; returns the receives[r] rows of each, in order."""
        received = rows.new_empty((sum(receives), rows.shape[1]))
        dist.all_to_all_single(received, rows, receives, sends, group=self._group)
        return received

    def _from_all(self, *own: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
        """For each [T, bytes] of this rank: [N, bytes] of all ranks, in rank order."""
        sends, receives, everything = [], [], []
        for mine in map(torch.from_numpy, own):
            rows = torch.empty((int(self._tokens.sum()), mine.shape[1]), dtype=torch.uint8)
            parts = list(torch.split(rows, self._tokens.tolist()))
            parts[self.rank].copy_(mine)
            sends.append([mine] * self.ranks)
            receives.append(parts)
            everything.append(rows.numpy())
        self._send(sends, receives)
        return everything

    def _send(self, sends: Sequence[Sequence[torch.Tensor]], receives: Sequence[Sequence[torch.Tensor]]) -> None:
        """Send sends[message][rank] to each other rank and fill receives[message][rank]; empty ones do not travel."""
        pending: list[tuple[int, Any]] = []
        for step in range(1, self.ranks):  # everybody's neighbour first: no rank is a bottleneck
            for post, side, rank in (
                (dist.irecv, receives, (self.rank - step) % self.ranks),
                (dist.isend, sends, (self.rank + step) % self.ranks),
            ):
                for tag, message in enumerate(side):
                    if message[rank].numel():
                        with translated(f"rank {rank}"):
                            pending.append((rank, post(message[rank], self._peers[rank], self._group, tag)))
        for rank, work in pending:
            with translated(f"rank {rank}"):
                work.wait()


def _routing_bytes(index: NDArray[np.int32], weights: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Index and weights [T, K] as one message [T, bytes]."""
    return np.concatenate([index, weights.view(np.int32)], axis=1).view(np.uint8)


def _routing_of(message: NDArray[np.uint8]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Index and weights [N, K] out of such messages."""
    index, weights = np.split(message.view(np.int32), 2, axis=1)
    return np.ascontiguousarray(index), np.ascontiguousarray(weights).view(np.float32)


@contextlib.contextmanager
def translated(where: str) -> Iterator[None]:
    """Raise the errors of torch.distributed as CommError, CommTimeout or RankLost, with the original as the cause."""
    try:
        yield
    except _core.MoeshardError:
        raise
    except (RuntimeError, MemoryError) as error:
        text = str(error)
        known: type[_core.CommError] = _core.CommError
        if "timed out" in text.lower() or "timeout" in text.lower():
            known = _core.CommTimeout
        elif any(sign in text for sign in ("losed by peer", "eset by peer", "roken pipe", "refused")):
            known = _core.RankLost
        raise known(f"{where}: {text.splitlines()[0] if text else type(error).__name__}") from error
