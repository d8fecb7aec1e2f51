# SPDX-License-Identifier: Apache-2.0
"""Lazy tensors are torch's, read and written in regions."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from moeshard.lazy import Computed, Lazy, Stored


class Memory:
    """A store of real tensors that notes what is asked for."""

    def __init__(self, tensors):
        self.tensors, self.asked = tensors, []

    def tensor(self, name):
        self.asked.append(name)
        return self.tensors[name]

    def write(self, name, tensor, first):
        self.tensors[name].view(-1)[first : first + tensor.numel()] = tensor.reshape(-1)

    def lazy(self, name):
        return Stored(self, name, self.tensors[name].shape, self.tensors[name].dtype)


@st.composite
def recipes(draw):
    """What to do to stored tensors of one shape, as functions that torch tensors and lazy ones both understand."""
    shape = draw(st.lists(st.integers(1, 5), min_size=2, max_size=3))
    count = draw(st.integers(1, 4))
    steps = []
    for _ in range(draw(st.integers(0, 5))):
        steps.append(
            (
                draw(st.sampled_from(["stack", "cat", "transpose", "chunk", "split", "interleave", "squeeze"])),
                draw(st.integers(0, 3)),
                draw(st.integers(0, 3)),
            )
        )
    return shape, count, steps


def apply(tensors, steps):
    """Run the steps on a list of tensors; one is left."""
    for step, first, second in steps:
        ndim = len(tensors[0].shape)
        dim, other = first % ndim, second % ndim
        if step == "stack":
            tensors = [torch.stack(tensors, dim=dim)]
        elif step == "cat":
            tensors = [torch.cat(tensors, dim=dim)]
        elif step == "transpose":
            tensors = [torch.transpose(tensor, dim0=dim, dim1=other).contiguous() for tensor in tensors]
        elif step == "chunk":
            tensors = [torch.chunk(tensor, 2, dim=dim)[-1].contiguous() for tensor in tensors]
        elif step == "split" and tensors[0].shape[dim] > 1:
            sizes = [1, tensors[0].shape[dim] - 1]
            tensors = [torch.split(tensor, sizes, dim=dim)[1].contiguous() for tensor in tensors]
        elif step == "interleave" and tensors[0].shape[dim] % 2 == 0:
            wide = list(tensors[0].shape)
            wide[dim : dim + 1] = [wide[dim] // 2, 2]
            tensors = [
                tensor.reshape(wide).transpose(dim, dim + 1).reshape(tensor.shape).contiguous() for tensor in tensors
            ]
        elif step == "squeeze" and ndim > 2 and tensors[0].shape[dim] == 1:
            tensors = [tensor.squeeze(dim) for tensor in tensors]
    return torch.cat(tensors, dim=0)


@given(recipes(), st.randoms(use_true_random=False))
def test_every_region_of_every_recipe_is_what_torch_computes(recipe, random):
    shape, count, steps = recipe
    size = math.prod(shape)
    stored = {str(i): torch.arange(i * size, (i + 1) * size).view(shape) for i in range(count)}
    memory = Memory(stored)
    expected = apply([tensor.clone() for tensor in stored.values()], steps)
    lazy = apply([memory.lazy(name) for name in stored], steps)
    assert tuple(lazy.shape) == tuple(expected.shape) and lazy.dtype == expected.dtype
    assert not memory.asked  # describing it reads nothing
    assert torch.equal(lazy.read(lazy.whole()), expected)
    for _ in range(5):
        region = tuple(slice(start := random.randint(0, size), random.randint(start, size)) for size in expected.shape)
        assert torch.equal(lazy.read(region), expected[region])
        memory.asked.clear()
        lazy.read(region)
        assert set(memory.asked) <= set(lazy.pieces_of(region)) <= set(lazy.pieces)
    if lazy.lends and expected.numel():
        held = {tensor.untyped_storage().data_ptr() for tensor in stored.values()}
        assert lazy.read(lazy.whole()).untyped_storage().data_ptr() in held


@given(recipes())
def test_what_is_written_is_read_back(recipe):
    shape, count, steps = recipe
    memory = Memory({str(i): torch.zeros(shape, dtype=torch.long) for i in range(count)})
    lazy = apply([memory.lazy(name) for name in memory.tensors], steps)
    value = torch.arange(1, 1 + math.prod(lazy.shape)).view(lazy.shape)
    for first in range(lazy.shape[0]):  # expert by expert
        region = (slice(first, first + 1), *lazy.whole()[1:])
        lazy.write(region, value[region])
    assert torch.equal(lazy.read(lazy.whole()), value)


def views(parameter):
    """Views of a parameter [E, 2F, D] as adapters make them."""
    yield parameter[1]
    yield parameter[2].T
    yield parameter.transpose(1, 2)[0]
    yield parameter[1, 2:6]
    yield parameter[2, ::2]
    yield parameter[0, 1::2, 1:3].T
    yield parameter[:, 3]
    yield parameter[1, 3]


@pytest.mark.parametrize("number", range(8))
def test_a_view_of_a_parameter_is_found_in_what_it_is_made_of(number):
    memory = Memory({str(i): torch.randn(8, 5) for i in range(3)})
    lazy = torch.stack([memory.lazy(name) for name in memory.tensors])
    parameter = torch.stack(list(memory.tensors.values()))
    view = list(views(parameter))[number]
    found = lazy.as_strided(view.shape, view.stride(), view.storage_offset())
    assert torch.equal(found.read(found.whole()), view)
    part = tuple(slice(size // 3, size - size // 4) for size in view.shape)
    assert torch.equal(found.read(part), view[part])
    none = tuple(slice(1, 1) for _ in view.shape)
    assert found.read(none).shape == torch.Size([0] * view.ndim)


def test_a_view_of_one_expert_touches_the_pieces_of_that_expert():
    memory = Memory({f"{kind}{i}": torch.randn(4, 5) for kind in "ab" for i in range(3)})
    stacks = [torch.stack([memory.lazy(f"{kind}{i}") for i in range(3)]) for kind in "ab"]
    lazy = torch.cat(stacks, dim=1)
    assert lazy.as_strided((8, 5), (5, 1), 40).pieces_of((slice(0, 8), slice(0, 5))) == ["a1", "b1"]
    assert lazy.as_strided((8, 5), (5, 1), 40).pieces_of((slice(5, 7), slice(0, 5))) == ["b1"]


def test_a_view_across_dimensions_is_refused():
    lazy = Lazy((4, 3), torch.float32)
    for shape, strides, offset in [((12,), (1,), 0), ((2, 2), (4, 1), 0), ((3,), (1,), 1)]:
        with pytest.raises(ValueError, match="view"):
            lazy.as_strided(shape, strides, offset)


def test_what_torch_would_refuse_is_refused():
    memory = Memory({"a": torch.zeros(2, 3), "b": torch.zeros(3, 3), "c": torch.zeros(2, 3).half()})
    a, b, c = (memory.lazy(name) for name in "abc")
    for call in (
        lambda: torch.stack([a, b]),
        lambda: torch.cat([a, b], dim=1),
        lambda: torch.cat([a, c]),
        lambda: a.reshape(4, 2),
        lambda: torch.split(a, [1, 1], dim=1),
    ):
        with pytest.raises(RuntimeError):
            call()
    with pytest.raises(NotImplementedError, match="add"):
        torch.add(a, b)


def test_a_computed_tensor_is_computed_once_and_forgotten():
    calls = []

    def compute():
        calls.append(1)
        return torch.arange(6).view(2, 3)

    lazy = Computed((2, 3), torch.int64, ["x", "y"], compute).transpose(0, 1)
    assert lazy.read((slice(1, 2), slice(0, 2))).tolist() == [[1, 4]] and lazy.read(lazy.whole()).shape == (3, 2)
    assert len(calls) == 1 and lazy.pieces == ["x", "y"]
    lazy.forget()
    lazy.read(lazy.whole())
    assert len(calls) == 2
