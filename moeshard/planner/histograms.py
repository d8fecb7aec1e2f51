# SPDX-License-Identifier: Apache-2.0
"""How the tokens of a layer spread over its experts: loads, from whatever a user has."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from .. import _core
from ..paths import TokenPaths
from ..plans import find_layer
from .shapes import LayerShape, ModelShape

Load = NDArray[np.float64]


def skewed(num_experts: int, share: float, part: float) -> Load:
    """A popularity of which `share` goes to the first `part` of the experts, evenly, and the rest to the others.

    Args:
        num_experts: E.
        share: of the choices, 0 to 1.
        part: of the experts, above 0 to 1: at least one of them.

    Returns:
        ``[E]`` numbers with sum 1.

    Raises:
        ArgumentError: a number out of range.

    Example:
        >>> skewed(4, 0.7, 0.25).round(3).tolist()
        [0.7, 0.1, 0.1, 0.1]
    """
    if not 0 <= share <= 1 or not 0 < part <= 1:
        raise _core.ArgumentError(
            f"skew: expected SHARE:PART with 0 <= SHARE <= 1 and 0 < PART <= 1, such as 0.6:0.1 (60 % of the tokens go "
            f"to 10 % of the experts), got {share:g}:{part:g}"
        )
    hot = max(1, round(part * num_experts))
    popularity = np.full(num_experts, (1 - share) / max(num_experts - hot, 1))
    popularity[:hot] = share / hot
    popularity /= popularity.sum()
    return popularity


def parse_skew(text: str) -> tuple[float, float]:
    """Read ``"0.6:0.1"``.

    Raises:
        ArgumentError: it is not two numbers with a colon.
    """
    share, colon, part = text.partition(":")
    try:
        return float(share), float(part if colon else "nothing")
    except ValueError:
        raise _core.ArgumentError(f"skew: expected SHARE:PART such as 0.6:0.1, got {text!r}") from None


def loads(model: ModelShape, histogram: object, tokens: float) -> list[Load]:
    """The (token, choice) pairs that want each expert, for each layer.

    Args:
        model: the layers.
        histogram: popularity of the experts, in any unit. ``None``: uniform; ``"0.6:0.1"``: 60 % of the choices go to
            10 % of the experts; ``[E]`` for all layers or ``[L, E]``; a mapping from layer names to ``[E]``; what
            :func:`moeshard.report` returned; or what :func:`moeshard.record_routing` did, of which only the counts
            are used. Names count as in :meth:`moeshard.ModelPlan.for_layer`.
        tokens: of all ranks.

    Returns:
        ``[E]`` float64 for each layer: sum ``tokens * top_k``.

    Raises:
        ShapeError: a histogram for another number of layers or experts.
        ArgumentError: negative or not finite, all zero, a layer without one, or an expert with more choices than there
            are tokens (a token chooses an expert once).

    Example:
        >>> paths = TokenPaths([[[0]], [[0]], [[0]], [[1]]], num_experts=2, layers=("mlp",))
        >>> loads(ModelShape("model", (LayerShape("block.0.mlp", 2, 64, 256),)), paths, 100)[0].tolist()
        [75.0, 25.0]
    """
    found: list[Load]
    if histogram is None:
        found = [np.ones(layer.num_experts) for layer in model.layers]
    elif isinstance(histogram, str):
        skew = parse_skew(histogram)
        found = [skewed(layer.num_experts, *skew) for layer in model.layers]
    elif isinstance(histogram, TokenPaths):
        found = _by_name(model, dict(zip(histogram.layers, histogram.counts, strict=True)))
    elif hasattr(histogram, "layers"):
        found = _by_name(model, {layer.name: layer.histogram for layer in histogram.layers})
    elif isinstance(histogram, Mapping):
        found = _by_name(model, histogram)
    else:
        found = _by_shape(model, histogram)
    return [_scaled(layer, popularity, tokens) for layer, popularity in zip(model.layers, found, strict=True)]


def _by_name(model: ModelShape, histograms: Mapping[str, object]) -> list[Load]:
    names = list(histograms)
    return [_numbers(histograms[names[find_layer(names, layer.name, "histogram")]]) for layer in model.layers]


def _by_shape(model: ModelShape, histogram: object) -> list[Load]:
    table = _numbers(histogram)
    if table.ndim == 1:
        return [table] * len(model.layers)
    if table.ndim != 2 or len(table) != len(model.layers):
        raise _core.ShapeError(
            f"histogram: expected [experts] or [{len(model.layers)} layers, experts], got {list(table.shape)}"
        )
    return list(table)


def _numbers(like: object) -> Load:
    try:
        return np.asarray(like, np.float64)
    except (TypeError, ValueError) as error:
        raise _core.DTypeError(f"histogram: expected numbers, got {type(like).__name__} ({error})") from error


def _scaled(layer: LayerShape, popularity: Load, tokens: float) -> Load:
    where = f"histogram of layer {layer.name!r}"
    if popularity.shape != (layer.num_experts,):
        raise _core.ShapeError(
            f"{where}: expected [{layer.num_experts}] numbers, one for each expert, got {list(popularity.shape)}"
        )
    if not np.isfinite(popularity).all() or (popularity < 0).any():
        expert = int(np.flatnonzero(~(np.isfinite(popularity) & (popularity >= 0)))[0])
        raise _core.ArgumentError(f"{where}: expert {expert}: expected a number >= 0, got {popularity[expert]}")
    if not popularity.sum():
        raise _core.ArgumentError(f"{where}: all numbers are 0")
    share: Load = popularity / popularity.sum()
    if share.max() * layer.top_k > 1 + 1e-9:
        expert = int(share.argmax())
        raise _core.ArgumentError(
            f"{where}: expert {expert} gets {share[expert]:.0%} of the choices, but a token chooses an expert at most "
            f"once, with top_k={layer.top_k} at most {1 / layer.top_k:.0%}"
        )
    share *= tokens * layer.top_k
    return share
