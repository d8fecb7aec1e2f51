# SPDX-License-Identifier: Apache-2.0
"""A folder of safetensors files, read as mapped memory and written tensor by tensor, in any order.

Reading maps the files: a tensor is a view of its file, a page of it is read when it is first touched and can be let go
again. (``safetensors.safe_open`` maps too, but what it has once read stays counted as this process's memory.) Writing
fixes the header first, from names, shapes and dtypes, so that no more than the piece that is written is in memory.

Format: 8 bytes, the length of a JSON header; the header, name -> dtype, shape, bytes [start, stop) of the data; then
the data. Nothing here can run code from a file. Source: https://huggingface.co/docs/safetensors, "Format".
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import mmap
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import _core
from .memory import NORESERVE

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_LONGEST_HEADER = 100 << 20  # bytes, as in the safetensors library

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "I64": torch.int64,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """Where a tensor is: its bytes [start, stop) of a file."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class Checkpoint:
    """The tensors of a checkpoint, and what is wrong with its files.

    A context manager: after it, a file stays mapped as long as there are tensors of it.

    Args:
        folder: with ``model.safetensors``, or with ``model.safetensors.index.json`` and the files it names.

    Raises:
        ArgumentError: there is neither; a ``pytorch_model.bin`` is refused, it is a pickle.

    Attributes:
        entries: every tensor whose shape and dtype are known, by name.
        broken: names of tensors of which they are not known.
        problems: of the files: what is missing, truncated, doubled or of an unknown dtype, a line each.
    """

    def __init__(self, folder: Path) -> None:
        """Read the headers; nothing else."""
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        self.broken: list[str] = []
        self.problems: list[str] = []
        self._maps: dict[tuple[Path, bool], mmap.mmap] = {}
        named: dict[str, str] = {}
        if (folder / WEIGHTS).is_file():
            files = [folder / WEIGHTS]
        elif (folder / INDEX).is_file():
            named = self._index(folder / INDEX)
            files = [folder / name for name in sorted(set(named.values()))]
        else:
            raise _core.ArgumentError(_no_weights(folder))
        for file in files:
            self._read(file, [name for name, holder in named.items() if holder == file.name])

    def _index(self, path: Path) -> dict[str, str]:
        """Which file the index says a tensor is in."""
        try:
            named = json.loads(path.read_text())["weight_map"]
            if not all(isinstance(item, str) for pair in named.items() for item in pair):
                raise ValueError("weight_map: expected names of files")
        except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
            self.problems.append(f"{path.name}: cannot be read: {type(error).__name__}: {error}")
            return {}
        outside = sorted({file for file in named.values() if file != os.path.basename(file)})
        self.problems += [f"{path.name}: names a file outside the folder, {file}" for file in outside]
        return {name: file for name, file in named.items() if file not in outside}

    def _read(self, file: Path, expected: Sequence[str]) -> None:
        """Take the entries of one file, and note what is wrong with it."""
        try:
            header, size = _header(file)
        except (OSError, ValueError) as error:
            lost = f" (it should hold {len(expected)} tensors: {', '.join(expected)})" if expected else ""
            reason = "missing" if isinstance(error, FileNotFoundError) else str(error)
            self.problems.append(f"{file.name}: {reason}{lost}")
            self.broken += expected
            return
        for name, entry in header.items():
            if isinstance(entry, str):
                self.problems.append(f"{name}: {entry}")
                self.broken.append(name)
                continue
            if entry.stop > size:
                self.problems.append(
                    f"{name}: truncated, {file.name} ends at byte {size} but the tensor at byte {entry.stop}"
                )
            if name in self.entries:
                self.problems.append(f"{name}: twice, in {self.entries[name].file.name} and in {file.name}")
            self.entries[name] = entry
        missing = [name for name in expected if name not in header]
        self.problems += [f"{name}: missing, {INDEX} says it is in {file.name}" for name in missing]
        self.broken += missing

    def tensor(self, name: str, *, keep: bool = False) -> torch.Tensor:
        """A tensor, as a view of its file. Nothing is read before it is looked at.

        Args:
            name: one of ``entries``.
            keep: the tensor is a part of the model, which may write to it (the file is not changed).
        """
        entry = self.entries[name]
        size = entry.stop - entry.start
        if not size:
            return torch.empty(entry.shape, dtype=entry.dtype)
        mapped = self._map(entry.file, keep)
        count = size // entry.dtype.itemsize
        if entry.start % entry.dtype.itemsize:  # an odd header: its length is not rounded up in old files
            return torch.frombuffer(bytearray(mapped[entry.start : entry.stop]), dtype=entry.dtype).view(entry.shape)
        return torch.frombuffer(mapped, dtype=entry.dtype, count=count, offset=entry.start).view(entry.shape)

    def digest(self, count: int) -> str:
        """What tells this checkpoint from others: every header, and the first ``count`` bytes of every tensor."""
        digest = hashlib.blake2b(digest_size=8)
        for entry in sorted(self.entries.values(), key=lambda entry: (entry.file.name, entry.start)):
            digest.update(repr((entry.name, entry.file.name, entry.dtype, entry.shape)).encode())
        for file in sorted({entry.file for entry in self.entries.values()}):
            with file.open("rb") as opened:
                for entry in sorted(self.entries.values(), key=lambda entry: entry.start):
                    if entry.file == file:
                        digest.update(os.pread(opened.fileno(), min(count, entry.stop - entry.start), entry.start))
        return digest.hexdigest()

    def intact(self) -> list[str]:
        """The tensors that are wholly there."""
        sizes = {file: file.stat().st_size for file in {entry.file for entry in self.entries.values()}}
        return [name for name, entry in self.entries.items() if entry.stop <= sizes[entry.file]]

    def forget(self, names: Sequence[str]) -> None:
        """Let go of the pages of tensors that have been read; reading them again is allowed, and slower."""
        for name in names:
            entry = self.entries[name]
            mapped = self._maps.get((entry.file, False))
            if mapped is not None and entry.stop > entry.start:
                start = entry.start // mmap.PAGESIZE * mmap.PAGESIZE
                mapped.madvise(mmap.MADV_DONTNEED, start, entry.stop - start)

    def _map(self, file: Path, keep: bool) -> mmap.mmap:
        # Two maps of a file: what the model keeps may be written to, so its pages must not be let go.
        if (file, keep) not in self._maps:
            with file.open("rb") as opened:
                # Private and writable both: torch knows no read-only tensors, and nothing reaches the file. Without
                # NORESERVE the system would refuse a file that is larger than its memory.
                self._maps[file, keep] = mmap.mmap(
                    opened.fileno(), 0, mmap.MAP_PRIVATE | NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
                )
        return self._maps[file, keep]

    def __enter__(self) -> Checkpoint:
        """Return the checkpoint itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Let go of the maps; each goes with its last tensor."""
        # Not closed: torch keeps a reference to a map, but no hold that close() would see, and would read freed pages.
        self._maps.clear()


def _no_weights(folder: Path) -> str:
    pickled = next((name for name in _PICKLED if (folder / name).is_file()), None)
    if pickled is None:
        return f"path: no {WEIGHTS} and no {INDEX} in {folder}"
    return (
        f"path: {folder} has only {pickled}, a pickle, which can run any code and is never loaded. Convert it once, "
        "where you trust it: cls.from_pretrained(path).save_pretrained(new_path) writes safetensors"
    )


def _header(file: Path) -> tuple[dict[str, Entry | str], int]:
    """Every entry of a file, or what is wrong with it; and the size of the file."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > min(_LONGEST_HEADER, size - 8):
            raise ValueError(f"not a safetensors file, or truncated in its header ({size} bytes)")
        try:
            header = json.loads(opened.read(length))
            if not isinstance(header, dict):
                raise ValueError("not an object")
        except ValueError as error:
            raise ValueError(f"not a safetensors file: its header is not JSON: {error}") from error
    header.pop("__metadata__", None)
    return {name: _entry(name, file, 8 + length, facts) for name, facts in header.items()}, size


def _entry(name: str, file: Path, data: int, facts: Any) -> Entry | str:
    try:
        kind, shape, (start, stop) = facts["dtype"], tuple(facts["shape"]), facts["data_offsets"]
        if not all(isinstance(number, int) and number >= 0 for number in (*shape, start, stop)):
            raise ValueError("expected numbers from 0 up")
    except (KeyError, TypeError, ValueError) as error:
        return f"its entry in the header of {file.name} is broken: {type(error).__name__}: {error}"
    if kind not in _DTYPES:
        return f"dtype {kind} is not supported, expected one of {', '.join(_DTYPES)}"
    if stop - start != math.prod(shape) * _DTYPES[kind].itemsize:
        return f"{kind} {list(shape)} does not take the {stop - start} bytes that {file.name} has for it"
    return Entry(name, file, _DTYPES[kind], shape, data + start, data + stop)


# ---- writing ---------------------------------------------------------------------------------------------


class Writer:
    """A checkpoint that is written piece by piece. Its files are in place when ``commit`` returns, or not at all.

    Everything is written to a folder beside ``folder`` first. A folder that is not there yet appears as a whole; in one
    that is there, each file is replaced at once, and weights that an earlier checkpoint left are removed.

    Args:
        folder: where the checkpoint will be.
        tensors: name -> (shape, dtype), in the order of the files.
        files: name of a file -> names of its tensors; more than one file gets an index.
        metadata: what the index says about the whole.

    Attributes:
        staging: the folder where everything is until ``commit``: for other files of the checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, tuple[Sequence[int], torch.dtype]],
        files: Mapping[str, Sequence[str]],
        metadata: Mapping[str, Any],
    ) -> None:
        """Make the files, with their headers and room for every tensor."""
        self.folder = folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        self.staging = folder.parent / f".{folder.name}.saving-{os.getpid()}-{os.urandom(4).hex()}"
        self.staging.mkdir()
        self.entries: dict[str, Entry] = {}
        self._opened: dict[Path, int] = {}
        try:
            for name, members in files.items():
                self._begin(self.staging / name, {member: tensors[member] for member in members})
            if len(files) > 1:
                holders = {member: name for name, members in files.items() for member in members}
                index = {"metadata": dict(metadata), "weight_map": holders}
                (self.staging / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        except BaseException:
            self.discard()
            raise

    def _begin(self, path: Path, tensors: Mapping[str, tuple[Sequence[int], torch.dtype]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        # Widest first, so that every tensor is aligned, as the safetensors library writes them.
        for name, (shape, dtype) in sorted(tensors.items(), key=lambda item: (-item[1][1].itemsize, item[0])):
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        self._opened[path] = descriptor
        os.pwrite(descriptor, len(text).to_bytes(8, "little") + text, 0)
        os.truncate(descriptor, 8 + len(text) + end)
        for name, (shape, dtype) in tensors.items():
            start, stop = (8 + len(text) + offset for offset in header[name]["data_offsets"])
            self.entries[name] = Entry(name, path, dtype, tuple(shape), start, stop)

    def write(self, name: str, tensor: torch.Tensor, first: int = 0) -> None:
        """Write a whole tensor, or a run of its elements.

        Args:
            name: which.
            tensor: on any device, of its dtype.
            first: the element, in row-major order, where the run begins.

        Raises:
            ArgumentError: another dtype, or more elements than there are.
            OSError: the disk is full, for example.
        """
        entry = self.entries[name]
        if tensor.dtype != entry.dtype or first + tensor.numel() > math.prod(entry.shape):
            raise _core.ArgumentError(
                f"{name}: expected {entry.dtype} {list(entry.shape)}, got {tensor.dtype} {list(tensor.shape)}"
            )
        if not tensor.numel():
            return
        data = memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        offset = entry.start + first * entry.dtype.itemsize
        while data:  # a call writes at most 2 GiB
            written = os.pwrite(self._opened[entry.file], data, offset)
            data, offset = data[written:], offset + written

    def commit(self) -> None:
        """Put everything in place."""
        self._close(sync=True)
        if not self.folder.exists():
            os.rename(self.staging, self.folder)
            return
        new = sorted(path.name for path in self.staging.iterdir())
        # The index last of all: until then an older one still leads to older files, or there is none.
        for name in sorted(new, key=lambda name: (name == INDEX, name)):
            os.replace(self.staging / name, self.folder / name)
        self.staging.rmdir()
        for path in self.folder.iterdir():
            if path.name not in new and (path.name in (WEIGHTS, INDEX) or _SHARD.fullmatch(path.name)):
                path.unlink()

    def discard(self) -> None:
        """Leave nothing behind. Legal after ``commit``."""
        self._close(sync=False)
        with contextlib.suppress(OSError):
            for path in self.staging.iterdir():
                path.unlink()
            self.staging.rmdir()

    def _close(self, *, sync: bool) -> None:
        while self._opened:
            _, descriptor = self._opened.popitem()
            try:
                if sync:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)


_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
