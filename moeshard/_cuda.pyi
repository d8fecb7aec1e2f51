# SPDX-License-Identifier: Apache-2.0
"""Types of the CUDA extension. What each does, its shapes and errors: help(name)."""

from collections.abc import Sequence
from typing import Final, Self, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._core import Activation, DType, SupportsDLPack

__version__: Final[str]

def device_count() -> int: ...
def device_capability(device: int, /) -> tuple[int, int]: ...
def runtime_version() -> int: ...  # 13000: 13.0

@final
class PackedExperts:
    def __new__(
        cls,
        *,
        columns: ArrayLike,  # [E, 2], this rank's
        d_model: int,
        d_ff: int,
        dtype: DType,
        activation: Activation,
        gated: bool,
        b_in: bool,
        b_out: bool,
        device: int,
        interleaved: bool = False,
    ) -> Self: ...
    def pack(
        self,
        expert: int,
        w_in: SupportsDLPack,  # [count, D] ([2*count, D] gated), in device or host memory
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
    def seen(self, *, forget: bool = False) -> NDArray[np.int64]: ...  # [E+1]: slots of each expert, all slots
    @property
    def device(self) -> int: ...
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
    def dtype(self) -> DType: ...
    @property
    def activation(self) -> Activation: ...
    @property
    def gated(self) -> bool: ...
    @property
    def has_b_in(self) -> bool: ...
    @property
    def has_b_out(self) -> bool: ...

@final
class Layout:
    def __new__(cls, copies: ArrayLike, copy: ArrayLike, device: int) -> Self: ...  # [E] both
    def own(self, counts: ArrayLike, /) -> NDArray[np.int64]: ...  # [E]: slots of a chunk that this rank computes

@final
class Engine:
    def __new__(cls, device: int, exchange: NcclExchange | None = None, *, chunks: int = 1) -> Self: ...
    def forward(
        self,
        experts: PackedExperts,
        hidden_states: SupportsDLPack,  # [T, D]
        top_k_index: SupportsDLPack,  # [T, K] int32 or int64
        top_k_weights: SupportsDLPack,  # [T, K]
        out: SupportsDLPack,  # [T, D]
        *,
        capacity: int | None = None,
        layer: int = 0,
        replicated: bool = False,
        tf32: bool = False,
        layout: Layout | None = None,
    ) -> None: ...
    def faults(self) -> None: ...
    def start_recording(self) -> None: ...
    def stamp(self, tensor: SupportsDLPack, /) -> None: ...
    def stop_recording(
        self,
    ) -> list[
        tuple[
            int,  # layer
            int,  # tokens
            int,  # choices
            str,  # dtype
            float,  # block: ns since recording began, nan: not known
            float,  # begin
            tuple[float, float, float, float, float],  # ns in each step
            NDArray[np.int64],  # [E+1] seen
        ]
    ]: ...
    @property
    def device(self) -> int: ...

@final
class NcclExchange:
    def __new__(
        cls, unique_id: bytes, rank: int, ranks: int, device: int, timeout: float, search_paths: Sequence[str]
    ) -> Self: ...
    def check(self) -> None: ...
    def abort(self, reason: str, /) -> None: ...
    @property
    def rank(self) -> int: ...
    @property
    def ranks(self) -> int: ...
    @property
    def device(self) -> int: ...

def nccl_unique_id(search_paths: Sequence[str]) -> bytes: ...
