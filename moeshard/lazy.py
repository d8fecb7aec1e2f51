# SPDX-License-Identifier: Apache-2.0
"""Tensors that are not in memory: where the elements of a parameter are in a checkpoint, and how to reach a part.

A ``Lazy`` tensor is stored pieces and the stacking, joining, transposing, cutting and reshaping that make a parameter
of them. A region of it can be read, and only the bytes of that region are touched; and written, by the same way back.
It answers to torch's functions, so that transformers' own conversion code, run on lazy tensors, describes itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, cast

import torch

Region = tuple[slice, ...]  # one for each dimension, with start and stop and without a step


class Store(Protocol):
    """What holds the stored pieces."""

    def tensor(self, name: str) -> torch.Tensor:
        """A whole piece, not copied."""


class Sink(Store, Protocol):
    """What holds stored pieces and can be written to."""

    def write(self, name: str, tensor: torch.Tensor, first: int) -> None:
        """Write a run of elements of a piece, in row-major order from ``first`` on."""


class Lazy:
    """A tensor that is not in memory.

    Attributes:
        shape: its shape.
        dtype: its dtype.
        lends: whether reading any region is a view of what is stored, and copies nothing.
        pieces: the names of the stored pieces that it is made of.
    """

    def __init__(
        self, shape: Sequence[int], dtype: torch.dtype, children: Sequence[Lazy] = (), *, lends: bool = False
    ) -> None:
        """Describe it; nothing is read."""
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self.lends: bool = lends and all(child.lends for child in children)
        self.children = list(children)

    @property
    def pieces(self) -> list[str]:
        """The names of the stored pieces that it is made of."""
        return list(dict.fromkeys(name for child in self.children for name in child.pieces))

    def read(self, region: Region) -> torch.Tensor:
        """The elements of a region; a view where ``lends``."""
        raise NotImplementedError

    def write(self, region: Region, value: torch.Tensor) -> None:
        """Store the elements of a region."""
        raise NotImplementedError

    def pieces_of(self, region: Region) -> list[str]:
        """The names of the stored pieces that reading a region touches."""
        return self.pieces

    def forget(self) -> None:
        """Let go of what was computed and kept."""
        for child in self.children:
            child.forget()

    def whole(self) -> Region:
        """The region that is all of it."""
        return tuple(slice(0, size) for size in self.shape)

    # ---- what transformers' conversions call -----------------------------------------------------------

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Describe a function of torch instead of computing it."""
        describe = _FUNCTIONS.get(func)
        if describe is None:
            raise NotImplementedError(f"{getattr(func, '__name__', func)} of a lazy tensor")
        return describe(*args, **(kwargs or {}))

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        """The shape, or one size."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """Number of dimensions."""
        return self.ndim

    def contiguous(self) -> Lazy:
        """The same: how elements lie in memory is not decided yet."""
        return self

    def transpose(self, dim0: int, dim1: int) -> Lazy:
        """Two dimensions exchanged."""
        order = list(range(self.ndim))
        order[dim0], order[dim1] = order[dim1], order[dim0]
        return Permuted(self, order)

    def reshape(self, *shape: Any) -> Lazy:
        """The same elements in another shape."""
        wanted = list(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        if -1 in wanted:
            wanted[wanted.index(-1)] = math.prod(self.shape) // -math.prod(wanted)
        if math.prod(wanted) != math.prod(self.shape):
            raise RuntimeError(f"shape '{wanted}' is invalid for {list(self.shape)}")
        return self if tuple(wanted) == tuple(self.shape) else Reshaped(self, wanted)

    view = reshape

    def unsqueeze(self, dim: int) -> Lazy:
        """A dimension of size 1 more."""
        return self.reshape(*self.shape[:dim], 1, *self.shape[dim:])

    def squeeze(self, dim: int) -> Lazy:
        """Without a dimension, if its size is 1."""
        return self if self.shape[dim] != 1 else self.reshape(*self.shape[:dim], *self.shape[dim % self.ndim + 1 :])

    def split(self, sizes: int | Sequence[int], dim: int = 0) -> tuple[Lazy, ...]:
        """Pieces of given sizes."""
        total = self.shape[dim]
        widths = [min(sizes, total - at) for at in range(0, total, sizes)] if isinstance(sizes, int) else list(sizes)
        if sum(widths) != total:
            raise RuntimeError(f"split sizes {widths} do not add up to {total}")
        starts = [sum(widths[:place]) for place in range(len(widths))]
        return tuple(Cut(self, dim % self.ndim, start, width) for start, width in zip(starts, widths, strict=True))

    def chunk(self, chunks: int, dim: int = 0) -> tuple[Lazy, ...]:
        """Equal pieces."""
        return self.split(-(-self.shape[dim] // chunks), dim)

    def as_strided(self, shape: Sequence[int], strides: Sequence[int], offset: int) -> Lazy:
        """What a view of a contiguous tensor with this one's shape shows.

        Args:
            shape: of the view.
            strides: of the view, in elements.
            offset: its first element.

        Raises:
            ValueError: the view is none whose every dimension steps along one dimension of this tensor.
        """
        return Strided(self, shape, strides, offset)


class Stored(Lazy):
    """A stored piece."""

    def __init__(self, store: Store, name: str, shape: Sequence[int], dtype: torch.dtype) -> None:
        """Name it."""
        super().__init__(shape, dtype, lends=True)
        self._store = store
        self._name = name

    @property
    def pieces(self) -> list[str]:
        """Itself."""
        return [self._name]

    def read(self, region: Region) -> torch.Tensor:
        """A view of it."""
        return self._store.tensor(self._name)[region]

    def write(self, region: Region, value: torch.Tensor) -> None:
        """Write each run of elements that lie together."""
        together = self.ndim  # dimensions from here on are written in one run
        while together and (together == self.ndim or _is_all(region[together], self.shape[together])):
            together -= 1
        sink = cast(Sink, self._store)
        for index in _indices(region[:together]):
            first = 0
            for size, at in zip(self.shape, [*index, *(part.start for part in region[together:])], strict=True):
                first = first * size + at
            inside = tuple(at - part.start for at, part in zip(index, region, strict=False))
            sink.write(self._name, value[inside], first)


def _is_all(part: slice, size: int) -> bool:
    return bool(part.start == 0 and part.stop == size)


def _indices(region: Region) -> Iterator[tuple[int, ...]]:
    if not region:
        yield ()
        return
    for at in range(region[0].start, region[0].stop):
        for rest in _indices(region[1:]):
            yield (at, *rest)


class Joined(Lazy):
    """Tensors one after the other along a dimension (``torch.cat``)."""

    def __init__(self, children: Sequence[Lazy], dim: int) -> None:
        """Check what torch.cat checks."""
        first = children[0]
        dim %= first.ndim
        for child in children[1:]:
            if child.ndim != first.ndim or any(
                a != b for d, (a, b) in enumerate(zip(child.shape, first.shape, strict=True)) if d != dim
            ):
                raise RuntimeError(
                    f"sizes must match except in dimension {dim}: {list(first.shape)} {list(child.shape)}"
                )
            if child.dtype != first.dtype:
                raise RuntimeError(f"dtypes differ: {first.dtype} {child.dtype}")
        shape = list(first.shape)
        shape[dim] = sum(child.shape[dim] for child in children)
        super().__init__(shape, first.dtype, children)
        self._dim = dim

    def _parts(self, region: Region) -> Iterator[tuple[Lazy, Region, slice]]:
        """Each child that the region meets, its part of it, and where that part is in the region."""
        start = 0
        wanted = region[self._dim]
        for child in self.children:
            stop = start + child.shape[self._dim]
            low, high = max(start, wanted.start), min(stop, wanted.stop)
            if low < high:
                own = (*region[: self._dim], slice(low - start, high - start), *region[self._dim + 1 :])
                yield child, own, slice(low - wanted.start, high - wanted.start)
            start = stop

    def pieces_of(self, region: Region) -> list[str]:
        """Those of the children that the region meets."""
        return [name for child, own, _ in self._parts(region) for name in child.pieces_of(own)]

    def read(self, region: Region) -> torch.Tensor:
        """The children's parts, joined; a view if it is one."""
        parts = [child.read(own) for child, own, _ in self._parts(region)]
        if not parts:
            return torch.empty([part.stop - part.start for part in region], dtype=self.dtype)
        return parts[0] if len(parts) == 1 else torch.cat(parts, self._dim)

    def write(self, region: Region, value: torch.Tensor) -> None:
        """To each child its part."""
        for child, own, place in self._parts(region):
            child.write(own, value.narrow(self._dim, place.start, place.stop - place.start))


class Permuted(Lazy):
    """Dimensions in another order."""

    def __init__(self, child: Lazy, order: Sequence[int]) -> None:
        """Dimension i is the child's dimension order[i]."""
        super().__init__([child.shape[dim] for dim in order], child.dtype, [child], lends=True)
        self._order = list(order)
        self._inverse = sorted(range(len(order)), key=lambda dim: order[dim])

    def _own(self, region: Region) -> Region:
        return tuple(region[dim] for dim in self._inverse)

    def pieces_of(self, region: Region) -> list[str]:
        """The child's."""
        return self.children[0].pieces_of(self._own(region))

    def read(self, region: Region) -> torch.Tensor:
        """A permuted view."""
        return self.children[0].read(self._own(region)).permute(self._order)

    def write(self, region: Region, value: torch.Tensor) -> None:
        """Permuted back."""
        self.children[0].write(self._own(region), value.permute(self._inverse))


class Cut(Lazy):
    """A range of one dimension."""

    def __init__(self, child: Lazy, dim: int, start: int, width: int) -> None:
        """Elements start to start + width of a dimension."""
        shape = list(child.shape)
        shape[dim] = width
        super().__init__(shape, child.dtype, [child], lends=True)
        self._dim, self._start = dim, start

    def _own(self, region: Region) -> Region:
        part = region[self._dim]
        moved = slice(part.start + self._start, part.stop + self._start)
        return (*region[: self._dim], moved, *region[self._dim + 1 :])

    def pieces_of(self, region: Region) -> list[str]:
        """The child's."""
        return self.children[0].pieces_of(self._own(region))

    def read(self, region: Region) -> torch.Tensor:
        """The child's region."""
        return self.children[0].read(self._own(region))

    def write(self, region: Region, value: torch.Tensor) -> None:
        """To the child's region."""
        self.children[0].write(self._own(region), value)


class Reshaped(Lazy):
    """Another shape. First and last dimensions that both shapes share keep their regions, the rest is read whole."""

    def __init__(self, child: Lazy, shape: Sequence[int]) -> None:
        """Find the dimensions that are the same in both."""
        old, new = list(child.shape), list(shape)
        self._first = 0
        while self._first < min(len(old), len(new)) and old[self._first] == new[self._first]:
            self._first += 1
        self._last = 0
        while self._last < min(len(old), len(new)) - self._first and old[-1 - self._last] == new[-1 - self._last]:
            self._last += 1
        middle = len(new) - self._first - self._last
        inner = [size for size in old[self._first : len(old) - self._last] if size != 1]
        # A dimension of size 1 more or less moves nothing: the region of the one that is there can be kept.
        own = [size for size in new[self._first : len(new) - self._last] if size != 1]
        self._ones = inner == own
        self._middle = slice(self._first, self._first + middle)
        super().__init__(shape, child.dtype, [child], lends=self._ones)

    def _own(self, region: Region) -> Region:
        child = self.children[0].shape
        middle = child[self._first : len(child) - self._last]
        if self._ones:
            sizes = zip(region[self._middle], self.shape[self._middle], strict=True)
            kept = iter([part for part, size in sizes if size != 1])
            inner = [next(kept) if size != 1 else slice(0, 1) for size in middle]
        else:
            inner = [slice(0, size) for size in middle]
        return (*region[: self._first], *inner, *region[self._middle.stop :])

    def pieces_of(self, region: Region) -> list[str]:
        """The child's."""
        return self.children[0].pieces_of(self._own(region))

    def read(self, region: Region) -> torch.Tensor:
        """The child's region in this shape, then what is wanted of it."""
        if any(part.start == part.stop for part in region):  # also of a dimension that the child does not have
            return torch.empty([part.stop - part.start for part in region], dtype=self.dtype)
        found = self.children[0].read(self._own(region))
        ends = (found.shape[: self._first], found.shape[found.ndim - self._last :])
        if self._ones:
            return found.reshape([part.stop - part.start for part in region])
        whole = found.reshape(*ends[0], *self.shape[self._middle], *ends[1])
        inner = tuple(region[dim] if self._in_middle(dim) else slice(None) for dim in range(self.ndim))
        return whole[inner]

    def _in_middle(self, dim: int) -> bool:
        return self._middle.start <= dim < self._middle.stop

    def write(self, region: Region, value: torch.Tensor) -> None:
        """In the child's shape; of dimensions that change, if they are not whole, one index at a time."""
        if 0 in value.shape:
            return
        inner = [region[dim] for dim in range(self.ndim) if self._in_middle(dim)]
        sizes = self.shape[self._middle]
        if self._ones or all(_is_all(part, size) for part, size in zip(inner, sizes, strict=True)):
            own = self._own(region)
            self.children[0].write(own, value.reshape([part.stop - part.start for part in own]))
            return
        child = self.children[0].shape
        before = tuple(slice(None) for _ in range(self._first))
        for index in _indices(tuple(inner)):
            place = 0
            for at, size in zip(index, sizes, strict=True):
                place = place * size + at
            ones: list[slice] = []
            for size in reversed(child[self._first : len(child) - self._last]):
                ones.insert(0, slice(place % size, place % size + 1))
                place //= size
            own = (*region[: self._first], *ones, *region[self._middle.stop :])
            element = value[(*before, *(at - part.start for at, part in zip(index, inner, strict=True)))]
            self.children[0].write(own, element.reshape([part.stop - part.start for part in own]))


class Strided(Lazy):
    """A view whose every dimension steps along one dimension of its base; see :meth:`Lazy.as_strided`."""

    def __init__(self, base: Lazy, shape: Sequence[int], strides: Sequence[int], offset: int) -> None:
        """Find where each dimension goes."""
        super().__init__(shape, base.dtype, [base], lends=True)
        units = [math.prod(base.shape[dim + 1 :]) for dim in range(base.ndim)]  # the base's own strides
        self._start = []
        for unit in units:
            at, offset = divmod(offset, unit)
            self._start.append(at)
        self._along: list[int | None] = []  # per own dimension: the base's, None for size 1
        self._step = []
        for size, stride in zip(shape, strides, strict=True):
            along = next((dim for dim, unit in enumerate(units) if unit <= stride), None) if size > 1 else None
            self._along.append(along)
            self._step.append(1)
            if along is None and size == 1:
                continue
            if along is None or stride % units[along] or self._along.count(along) > 1:
                raise ValueError(f"no view along the dimensions of {list(base.shape)}: {list(shape)} {list(strides)}")
            self._step[-1] = stride // units[along]
            if self._start[along] + (size - 1) * self._step[-1] >= base.shape[along]:
                raise ValueError(f"a view that leaves a dimension of {list(base.shape)}: {list(shape)} {list(strides)}")

    def _own(self, region: Region) -> Region:
        own = [slice(at, at + 1) for at in self._start]
        for part, along, step in zip(region, self._along, self._step, strict=True):
            if along is not None:
                start = self._start[along] + part.start * step
                own[along] = slice(start, start + max(0, (part.stop - part.start - 1) * step + 1))
        if any(part.start == part.stop for part in region):
            own = [slice(part.start, part.start) for part in own]
        return tuple(own)

    def on_base(self) -> Region:
        """The region of the base that it is within."""
        return self._own(self.whole())

    def pieces_of(self, region: Region) -> list[str]:
        """The base's."""
        return self.children[0].pieces_of(self._own(region))

    def read(self, region: Region) -> torch.Tensor:
        """The view's region."""
        sizes = [part.stop - part.start for part in region]
        if 0 in sizes:
            return torch.empty(sizes, dtype=self.dtype)
        found = self.children[0].read(self._own(region))
        strides = [
            0 if along is None else found.stride(along) * step
            for along, step in zip(self._along, self._step, strict=True)
        ]
        return found.as_strided(sizes, strides)


class Computed(Lazy):
    """What a function makes of whole pieces, once one of its elements is wanted; kept until ``forget``."""

    def __init__(
        self, shape: Sequence[int], dtype: torch.dtype, pieces: Sequence[str], compute: Callable[[], Any]
    ) -> None:
        """Describe the result."""
        super().__init__(shape, dtype)
        self._names = list(pieces)
        self._compute = compute
        self._result: torch.Tensor | None = None

    @property
    def pieces(self) -> list[str]:
        """All of them."""
        return self._names

    def read(self, region: Region) -> torch.Tensor:
        """A view of the result."""
        if self._result is None:
            self._result = self._compute()
        return self._result[region]

    def forget(self) -> None:
        """Let go of the result."""
        self._result = None


def _stack(tensors: Sequence[Lazy], dim: int = 0) -> Lazy:
    if len({tuple(tensor.shape) for tensor in tensors}) != 1:
        raise RuntimeError(f"stack: tensors of different shapes, {sorted({tuple(tensor.shape) for tensor in tensors})}")
    return Joined([tensor.unsqueeze(dim) for tensor in tensors], dim)


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    torch.stack: _stack,
    torch.cat: lambda tensors, dim=0: Joined(tensors, dim),
    torch.transpose: lambda input, dim0, dim1: input.transpose(dim0, dim1),
    torch.chunk: lambda input, chunks, dim=0: input.chunk(chunks, dim),
    torch.split: lambda tensor, split_size_or_sections, dim=0: tensor.split(split_size_or_sections, dim),
    torch.squeeze: lambda input, dim: input.squeeze(dim),
    torch.unsqueeze: lambda input, dim: input.unsqueeze(dim),
    torch.reshape: lambda input, shape: input.reshape(shape),
}
