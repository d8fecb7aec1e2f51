# SPDX-License-Identifier: Apache-2.0
"""What the benchmark measures: layer shapes, the cases, the grids of them, and who goes to which expert. No torch."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, product
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray

DType = Literal["float32", "bfloat16"]
Routing = Literal["uniform", "skew", "one"]
Activation = Literal["relu", "gelu", "silu"]

ITEMSIZE: dict[DType, int] = {"float32": 4, "bfloat16": 2}  # bytes
HOT_SHARE, HOT_PART = 0.6, 0.1  # skew: 60 % of the tokens go to the first 10 % of the experts

ROUTINGS: tuple[Routing, ...] = ("uniform", "skew", "one")
TOKENS = (1, 16, 64, 120, 128, 512, 1024, 4096, 12000)
LAUNCHES = ((1, 1), (1, 2), (2, 1))  # (ranks, threads of each)


@dataclass(frozen=True)
class Shape:
    """The MoE layer of a model.

    Attributes:
        name: the model it is taken from.
        d_model: width D of a token.
        d_ff: hidden width F of an expert.
        activation: of an expert.
        gated: a gate matrix beside the first one.
        top_k: experts K of a token.
        normalize: the router divides a token's K probabilities by their sum.
    """

    name: str
    d_model: int
    d_ff: int
    activation: Activation
    gated: bool
    top_k: int
    normalize: bool

    @property
    def matrices(self) -> int:
        """Matrices of D x F numbers that an expert has."""
        return 3 if self.gated else 2


# Nomic's own router does not normalise. DeepSpeed's always does, and outputs must be comparable; it costs nothing.
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("switch-base", 768, 3072, "relu", gated=False, top_k=1, normalize=False),
        Shape("nomic", 768, 3072, "gelu", gated=False, top_k=2, normalize=True),
        Shape("privacy-filter", 640, 640, "silu", gated=True, top_k=4, normalize=True),
        Shape("tiny", 24, 37, "relu", gated=False, top_k=1, normalize=False),
        Shape("tiny-top2", 24, 37, "gelu", gated=False, top_k=2, normalize=True),
        Shape("tiny-gated", 24, 40, "silu", gated=True, top_k=2, normalize=True),
    )
}


@dataclass(frozen=True)
class Build:
    """What is built once, in one launch of workers, and serves many cases.

    Attributes:
        shape: a name in :data:`SHAPES`.
        num_experts: E.
        dtype: of the weights and the tokens.
        ranks: worker processes R.
    """

    shape: str
    num_experts: int
    dtype: DType
    ranks: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of all experts' weights, once."""
        shape = SHAPES[self.shape]
        return self.num_experts * shape.matrices * shape.d_model * shape.d_ff * ITEMSIZE[self.dtype]

    def __str__(self) -> str:
        """As in messages."""
        return f"{self.shape} E={self.num_experts} {self.dtype}, {plural(self.ranks, 'rank')}"


@dataclass(frozen=True)
class Case:
    """One point of a grid.

    Attributes:
        build: the layer.
        threads: of each rank.
        routing: ``"uniform"``; ``"skew"``: 60 % of the tokens to 10 % of the experts; ``"one"``: all tokens to the same
            K experts.
        tokens: T of each rank.
    """

    build: Build
    threads: int
    routing: Routing
    tokens: int

    @property
    def shape(self) -> Shape:
        """Of the layer."""
        return SHAPES[self.build.shape]

    @property
    def key(self) -> str:
        """What names the case in files and tables, and nothing else does."""
        build = self.build
        return (
            f"{build.shape} E={build.num_experts} {build.dtype} {build.ranks}x{self.threads} {self.routing} "
            f"T={self.tokens}"
        )


def choices(case: Case, rank: int) -> NDArray[np.int64]:
    """The experts of one rank's tokens, in descending preference.

    Returns:
        ``[T, K]`` int64: K different experts each. Under ``"skew"`` exactly ``round(0.6 T)`` tokens take all the hot
        experts they can, ``min(K, hot)``, and the others none; which ones among each kind is random, and seeded.

    Example:
        >>> choices(Case(Build("switch-base", 8, "float32", 1), 1, "skew", 5), rank=0)[:, 0].tolist().count(0)
        3
    """
    experts, top_k, tokens = case.build.num_experts, case.shape.top_k, case.tokens
    if case.routing == "one":
        return np.tile(np.arange(top_k), (tokens, 1))
    rng = np.random.default_rng([rank, tokens, experts, ROUTINGS.index(case.routing)])
    preference = rng.random((tokens, experts), np.float32)
    if case.routing == "skew":
        to_hot = rng.permutation(tokens) < round(HOT_SHARE * tokens)
        preference[:, : hot_experts(experts)] += np.where(to_hot, 1, -1)[:, None]
    return np.argsort(-preference, axis=1)[:, :top_k]


def hot_experts(num_experts: int) -> int:
    """How many experts, the first ones, are hot under ``"skew"``."""
    return max(1, round(HOT_PART * num_experts))


def counts(case: Case) -> NDArray[np.int64]:
    """How many (token, choice) pairs of all ranks each expert gets: ``[R, E]``, by the token's rank."""
    experts = case.build.num_experts
    return np.stack([np.bincount(choices(case, r).ravel(), minlength=experts) for r in range(case.build.ranks)])


def grid(name: str) -> list[Case]:
    """The cases of a grid, each once, those of one build together.

    Args:
        name: one of :data:`GRIDS`.
    """
    cases = dict.fromkeys(GRIDS[name]())
    return [case for _, same in by_build(cases) for case in same]


def by_build(cases: Iterable[Case]) -> Iterator[tuple[Build, list[Case]]]:
    """The cases of each build; builds in the order of their first case."""
    cases = list(cases)
    place = {build: number for number, build in enumerate(dict.fromkeys(case.build for case in cases))}
    for build, same in groupby(sorted(cases, key=lambda case: place[case.build]), key=lambda case: case.build):
        yield build, list(same)


def _cases(
    shape: str,
    experts: Iterable[int],
    dtypes: Iterable[str],
    tokens: Iterable[int],
    routings: Iterable[str] = ROUTINGS,
    launches: Iterable[tuple[int, int]] = LAUNCHES,
) -> Iterator[Case]:
    """The product of all values."""
    for count, dtype, (ranks, threads), routing, own in product(experts, dtypes, launches, routings, tokens):
        build = Build(shape, count, cast(DType, dtype), ranks)
        yield Case(build, threads, cast(Routing, routing), own)


def _full() -> Iterator[Case]:
    """Every value that matters; complete for switch-base with 8 and 128 experts in float32, thinned elsewhere."""
    both = ("float32", "bfloat16")
    usual = ("uniform", "skew")
    yield from _cases("switch-base", (8, 128), ("float32",), TOKENS)
    yield from _cases("switch-base", (64, 256), ("float32",), (16, 128, 1024))
    yield from _cases("switch-base", (256,), ("float32",), (4096,), ("uniform",))
    yield from _cases("switch-base", (8, 128), ("bfloat16",), (1, 16, 64, 128, 512, 1024, 4096), usual)
    yield from _cases("switch-base", (8, 128), ("bfloat16",), (128,), ("one",))
    yield from _cases("switch-base", (64, 256), ("bfloat16",), (16, 128, 1024), ("uniform",))
    yield from _cases("nomic", (8,), both, (1, 16, 64, 512, 1024, 4096), usual)
    yield from _cases("nomic", (8,), both, (128,), ("one",))
    yield from _cases("privacy-filter", (128,), ("bfloat16",), TOKENS, usual)
    yield from _cases("privacy-filter", (128,), both, (128,), ("one",))
    yield from _cases("privacy-filter", (128,), ("float32",), (16, 128, 1024), usual)


def _quick() -> Iterator[Case]:
    """As few cases as put a value to every bar."""
    one, two_threads, two_ranks = LAUNCHES
    switch = ("switch-base", (8,), ("float32",)), ("switch-base", (128,), ("float32",))
    for plane in switch:
        yield from _cases(*plane, (16, 64, 120, 512, 1024, 4096), ("uniform",), (one,))
        yield from _cases(*plane, (120,), ("skew", "one"), (one,))
        yield from _cases(*plane, (128, 1024), ("uniform",), (two_threads,))
        yield from _cases(*plane, (64, 120, 512), ("uniform",), (two_ranks,))
        yield from _cases(*plane, (120,), ("skew",), (two_ranks,))
    yield from _cases(*switch[0], (1024,), ("skew",), (one,))
    yield from _cases(*switch[0], (512, 1024), ("skew",), (two_ranks,))
    yield from _cases(*switch[0], (1024,), ("uniform",), (two_ranks,))
    yield from _cases("switch-base", (8,), ("bfloat16",), (16, 512), ("uniform",), (one,))
    yield from _cases("nomic", (8,), ("float32",), (512,), ("uniform",), (one,))
    yield from _cases("privacy-filter", (128,), ("bfloat16",), (16, 120, 1024), ("uniform",), (one,))


def _tiny() -> Iterator[Case]:
    """Seconds of work, for tests of the benchmark itself."""
    yield from _cases("tiny", (6,), ("float32",), (3, 16), launches=((2, 1),))
    yield from _cases("tiny-top2", (6,), ("float32",), (16,), launches=((1, 1),))
    yield from _cases("tiny-gated", (6,), ("bfloat16",), (16,), ("uniform",), ((1, 1),))


GRIDS: dict[str, Callable[[], Iterator[Case]]] = {"quick": _quick, "full": _full, "tiny": _tiny}


def plural(count: int, noun: str) -> str:
    """``1 rank``, ``2 ranks``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
