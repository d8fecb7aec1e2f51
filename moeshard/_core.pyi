# SPDX-License-Identifier: Apache-2.0
"""Types of the C extension, in the order of csrc/moeshard.h. What each does, its shapes and errors: help(name)."""

from collections.abc import Sequence
from typing import Any, Final, Literal, Protocol, Self, final, type_check_only

import numpy as np
from numpy.typing import ArrayLike, NDArray

@type_check_only
class SupportsDLPack(Protocol):
    def __dlpack__(self, *, stream: Any = None) -> Any: ...
    def __dlpack_device__(self) -> tuple[Any, Any]: ...

DType = Literal["float32", "bfloat16", "float16"]
Storage = Literal["float32", "bfloat16", "float16", "int8"]  # of packed weights
Activation = Literal["identity", "relu", "gelu", "gelu_tanh", "silu", "clamped_swiglu"]

__version__: Final[str]

# chapter 0: errors, threads, tensors
class MoeshardError(Exception): ...
class ArgumentError(MoeshardError, ValueError): ...
class ShapeError(MoeshardError, ValueError): ...
class DTypeError(MoeshardError, TypeError): ...
class RangeError(MoeshardError, ValueError): ...
class CommError(MoeshardError, RuntimeError): ...
class RankLost(CommError): ...
class CommTimeout(CommError): ...
class RankMismatch(CommError): ...
class PeerError(CommError): ...
class CudaError(MoeshardError, RuntimeError): ...

def isa() -> str: ...
def isa_available() -> tuple[str, ...]: ...
def set_num_threads(count: int, /) -> None: ...
def get_num_threads() -> int: ...
def measure_machine(seconds: float = 0.2, /) -> tuple[float, float, float]: ...  # flops, bf16 dot flops, bytes / s

@final
class Tensor:
    def __new__(cls, shape: tuple[int, ...], dtype: DType) -> Self: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> DType: ...
    def __dlpack__(
        self,
        *,
        stream: None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...  # not for bfloat16

def tensor_info(tensor: SupportsDLPack, /) -> tuple[tuple[int, ...], str, tuple[int, int], bool]: ...

# chapter P: plan. Columns are [R, E, 2].
def plan_shard(ranks: int, num_experts: int, d_ff: int, speed: ArrayLike | None = None) -> NDArray[np.int64]: ...
def plan_expert_parallel(
    ranks: int, num_experts: int, d_ff: int, owner: ArrayLike | None = None
) -> NDArray[np.int64]: ...
def plan_hybrid(ranks: int, num_experts: int, d_ff: int, group: int) -> NDArray[np.int64]: ...
def plan_check(columns: ArrayLike, d_ff: int, copies: ArrayLike | None = None) -> None: ...
def plan_work(columns: ArrayLike, counts: ArrayLike, copies: ArrayLike | None = None) -> NDArray[np.float64]: ...

@final
class Layout:  # a table made ready for the steps of one rank
    def __new__(cls, columns: ArrayLike, d_ff: int, copies: ArrayLike, rank: int) -> Self: ...
    @property
    def copy_of(self) -> NDArray[np.int32]: ...  # [R, E]; -1: holds no column
    @property
    def sparse(self) -> bool: ...
    @property
    def rank(self) -> int: ...

# chapter L: placement. Owners are [L, E] int32, -1: no rank. Hops are a capsule.
_PlaceMethod = Literal["contiguous", "balanced", "two-stage", "sweep", "exact"]

@final
@type_check_only
class Hops: ...

def count_hops(paths: NDArray[np.int32], num_experts: int) -> Hops: ...
def hops_table(hops: Hops, /) -> NDArray[np.int64]: ...
def hops_totals(hops: Hops, /) -> NDArray[np.int64]: ...
def place(
    method: _PlaceMethod,
    counts: ArrayLike,
    ranks: int,
    slack: float = 0.02,
    hops: Hops | None = None,
    apart: NDArray[np.bool_] | None = None,
    starts: int = 4,
    seed: int = 0,
) -> NDArray[np.int32]: ...
def place_measure(
    owner: NDArray[np.int32],
    counts: ArrayLike,
    ranks: int,
    slack: float = 0.02,
    hops: Hops | None = None,
    apart: NDArray[np.bool_] | None = None,
    gap: bool = True,
) -> tuple[
    NDArray[np.int64],  # load [L, R]
    NDArray[np.float64],  # bound [L]
    NDArray[np.int64],  # cap [L]
    NDArray[np.int64],  # local [L - 1]
    NDArray[np.int64],  # most [L - 1]
    NDArray[np.int64],  # gap [L]
]: ...
def assign(cost: ArrayLike, /) -> tuple[NDArray[np.int32], int]: ...

# chapter W: experts
@final
class PackedExperts:
    def __new__(
        cls,
        *,
        columns: ArrayLike,  # [E, 2], this rank's
        d_model: int,
        d_ff: int,
        dtype: Storage,
        activation: Activation,
        gated: bool,
        b_in: bool,
        b_out: bool,
        interleaved: bool = False,
    ) -> Self: ...
    def pack(
        self,
        expert: int,
        w_in: SupportsDLPack,  # [count, D] ([2*count, D] gated)
        w_out: SupportsDLPack,  # [D, count]
        b_in: SupportsDLPack | None = None,
        b_out: SupportsDLPack | None = None,
        *,
        first: int = 0,
    ) -> None: ...
    def unpack(
        self,
        expert: int,
        w_in: SupportsDLPack | None = None,  # [Fr, D] ([2*Fr, D] gated)
        w_out: SupportsDLPack | None = None,  # [D, Fr]
        b_in: SupportsDLPack | None = None,
        b_out: SupportsDLPack | None = None,
    ) -> None: ...
    def release(self, expert: int, /) -> None: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def columns(self) -> NDArray[np.int64]: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def d_model(self) -> int: ...
    @property
    def d_ff(self) -> int: ...
    @property
    def dtype(self) -> Storage: ...
    @property
    def activation(self) -> Activation: ...
    @property
    def gated(self) -> bool: ...
    @property
    def has_b_in(self) -> bool: ...
    @property
    def has_b_out(self) -> bool: ...

# the batch: steps 1, 3, 4; steps 2 and 5 belong to the exchange
# step 1: route. Probabilities [T, E], sequences of S tokens; mask [T, E] int64 and best [T] are written.
def route_top1(
    probabilities: SupportsDLPack,
    sequence: int,
    capacity: int,
    mask: SupportsDLPack,
    best: SupportsDLPack,
    /,
) -> None: ...

@final
class Batch:
    def __new__(cls) -> Self: ...
    def route(
        self,
        hidden_states: SupportsDLPack,  # [T, D]
        top_k_index: SupportsDLPack,  # [T, K] int32 or int64
        top_k_weights: SupportsDLPack,  # [T, K]
        num_experts: int,
        out: SupportsDLPack | None = None,  # [T, D]
        *,
        layer: int = 0,
        replicated: bool = False,
        layout: Layout | None = None,
    ) -> None: ...
    def group(self) -> None: ...
    def ffn(self, experts: PackedExperts, /) -> None: ...
    # the halves of gather and combine, for a transport written in Python
    def header(self, call: int) -> NDArray[np.int64]: ...  # [9]
    def gather_from(
        self,
        rank: int,
        tokens: ArrayLike,  # [R]
        hidden_states: SupportsDLPack,  # [N, D]
        top_k_index: SupportsDLPack,  # [N, K] int32
        top_k_weights: SupportsDLPack,  # [N, K] float32
    ) -> None: ...
    def gather_routing(
        self,
        rank: int,
        tokens: ArrayLike,  # [R]
        top_k_index: SupportsDLPack,  # [N, K] int32
        top_k_weights: SupportsDLPack,  # [N, K] float32
    ) -> None: ...
    def needed(self, source: int, reader: int) -> NDArray[np.int32]: ...  # tokens of source
    def gather_rows(self, hidden_states: SupportsDLPack, /) -> None: ...  # [M, D]
    def take(self, tokens: ArrayLike | None = None, /) -> NDArray[Any]: ...  # [n, D]; uint16 words for 16-bit dtypes
    def combine_choices(self) -> NDArray[np.float32]: ...  # [N, D], not a copy
    def combine_ranks(self, parts: Sequence[SupportsDLPack], /) -> None: ...  # R times [T, D] or [M, D] float32
    def routing(self) -> tuple[NDArray[np.int32], NDArray[np.float32]]: ...  # [T, K] each
    def rows(self) -> NDArray[Any]: ...  # [N, D]; uint16 words for 16-bit dtypes
    def counts(self, own: bool = False, /) -> NDArray[np.int64]: ...  # [E]
    @property
    def rows_read(self) -> tuple[int, int]: ...  # tokens, partial outputs of other ranks
    @property
    def sparse(self) -> bool: ...
    @property
    def tokens_per_rank(self) -> NDArray[np.int64]: ...  # [R]
    @property
    def shape(self) -> tuple[int, int, int]: ...  # (T, D, K)
    @property
    def dtype(self) -> DType: ...  # of hidden_states
    @property
    def nbytes(self) -> int: ...

def header_check(headers: ArrayLike, /) -> None: ...  # [R, 9]

# chapter X: exchange
@final
class Exchange:
    def gather(self, batch: Batch, /) -> None: ...
    def combine(self, batch: Batch, /) -> None: ...
    def refuse(self, message: str, /) -> None: ...
    def close(self) -> None: ...
    @property
    def rank(self) -> int: ...
    @property
    def ranks(self) -> int: ...
    @property
    def name(self) -> str: ...

def exchange_one() -> Exchange: ...
def exchange_shm(name: str, rank: int, ranks: int, timeout: float) -> Exchange: ...

# the planner
# The cost model's arguments; help(plan_cost) says what is where, moeshard/planner makes them.
_Machine = tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike, ArrayLike]
_Layer = tuple[ArrayLike, ArrayLike, int, int, int, int, int, int, bool]
_Cost = tuple[float, float, float, float, float, float, bool]
_Candidate = tuple[int, int, int, int, bool, float, _Cost]

def plan_cost(
    columns: ArrayLike, copies: ArrayLike | None, machine: _Machine, layer: _Layer, /
) -> tuple[_Cost, NDArray[np.float64]]: ...
def plan_search(
    machine: _Machine, layer: _Layer, kinds: int, /
) -> tuple[NDArray[np.int64], NDArray[np.int32], list[_Candidate], int, bool]: ...
def plan_simulate(
    columns: ArrayLike,
    copies: ArrayLike | None,
    machine: _Machine,
    layer: _Layer,
    simulation: tuple[int, int, float, float, float, bool, int],
    /,
) -> tuple[NDArray[np.float64], float]: ...
