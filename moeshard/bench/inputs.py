# SPDX-License-Identifier: Apache-2.0
"""What every contestant gets: one set of weights, a router, and tokens that the router sends where the case says."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from .grid import Build, Case, Shape, choices

# A chosen feature is TOP, TOP - STEP, ...: a softmax of these is decided, and they are exact in bfloat16. Noise in the
# features that the router reads stays below.
TOP, STEP, NOISE = 12.0, 0.5, 4.0


@dataclass(frozen=True)
class Weights:
    """The stacked weights of all experts, shared by all contestants of a process, in ``nn.Linear`` layout.

    Attributes:
        shape: of the layer.
        w_in: ``[E, F, D]``, gated ``[E, 2F, D]`` with the gate's rows first.
        w_out: ``[E, D, F]``.
        router: ``[E, D]``, the identity on the first E features.
    """

    shape: Shape
    w_in: Tensor
    w_out: Tensor
    router: Tensor

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.w_in)


def make_weights(build: Build, shape: Shape) -> Weights:
    """Random weights, the same on every rank, drawn in place: no second copy at any time.

    They are uniform (the cheapest to draw) with variance 1/D and 1/F, so that outputs are of the size of the inputs.
    """
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, build.dtype)
    experts, width, hidden = build.num_experts, shape.d_model, shape.d_ff
    rows = 2 * hidden if shape.gated else hidden

    def draw(*sizes: int) -> Tensor:
        bound = (3 / sizes[-1]) ** 0.5
        return torch.empty(sizes, dtype=dtype).uniform_(-bound, bound, generator=generator)

    return Weights(shape, draw(experts, rows, width), draw(experts, width, hidden), torch.eye(experts, width).to(dtype))


def make_tokens(case: Case, rank: int) -> Tensor:
    """Tokens of a rank, ``[1, T, D]`` in the case's dtype, that the router sends where the case says.

    Any router with the weight :attr:`Weights.router` chooses :func:`moeshard.bench.grid.choices`.
    """
    wanted = choices(case, rank)
    experts = case.build.num_experts
    rng = np.random.default_rng([rank, case.tokens])
    hidden = rng.standard_normal((case.tokens, case.shape.d_model), np.float32)
    np.clip(hidden[:, :experts], -NOISE, NOISE, out=hidden[:, :experts])
    np.put_along_axis(hidden, wanted, TOP - STEP * np.arange(wanted.shape[1], dtype=np.float32), axis=1)
    return torch.from_numpy(hidden).to(getattr(torch, case.build.dtype)).unsqueeze(0)


class Router(nn.Module):
    """The router of Switch and Mixtral in plain torch: softmax in float32, the K largest.

    Args:
        weight: ``[E, D]``.
        top_k: K.
        normalize: divide the K probabilities by their sum.
    """

    def __init__(self, weight: Tensor, *, top_k: int, normalize: bool) -> None:
        """Keep the weight in float32, as HuggingFace's Switch does."""
        super().__init__()
        self.weight = nn.Parameter(weight.float(), requires_grad=False)
        self.top_k = top_k
        self.normalize = normalize

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Route tokens.

        Args:
            hidden: ``[T, D]``.

        Returns:
            ``[T, K]`` int64 experts and ``[T, K]`` weights: normalised ones in float32, as Mixtral's router leaves
            them, others in the dtype of ``hidden``, as Switch's does.
        """
        probabilities = (hidden.float() @ self.weight.T).softmax(-1)
        weights, index = probabilities.topk(self.top_k)
        if self.normalize:
            return index, weights / weights.sum(-1, keepdim=True)
        return index, weights.to(hidden.dtype)
