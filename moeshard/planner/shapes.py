# SPDX-License-Identifier: Apache-2.0
"""The shapes that the planner plans for: MoE layers and models, by preset, from a HuggingFace config or model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .. import _core
from ..experts import STORAGES

SIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}  # bytes


@dataclass(frozen=True)
class LayerShape:
    """One MoE layer.

    Attributes:
        name: in the model, as :func:`moeshard.shard` calls it.
        num_experts: E.
        d_model: width D of a token.
        d_ff: hidden width F of an expert.
        top_k: experts K of a token.
        gated: a gate matrix beside the first one.
        dtype: of the stored weights: ``"float32"``, ``"bfloat16"``, ``"float16"`` or ``"int8"``.
    """

    name: str
    num_experts: int
    d_model: int
    d_ff: int
    top_k: int = 1
    gated: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Check the numbers."""
        for field in ("num_experts", "d_model", "d_ff", "top_k"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise _core.ArgumentError(f"{field} of layer {self.name!r}: expected a positive integer, got {value!r}")
        if self.top_k > self.num_experts:
            raise _core.ArgumentError(
                f"top_k of layer {self.name!r}: expected at most num_experts={self.num_experts}, got {self.top_k}"
            )
        if self.dtype not in STORAGES:
            raise _core.ArgumentError(
                f"dtype of layer {self.name!r}: expected one of {', '.join(STORAGES)}, got {self.dtype!r}"
            )

    @property
    def matrices(self) -> int:
        """Matrices of D x F weights that an expert has."""
        return 3 if self.gated else 2

    @property
    def weight_bytes(self) -> int:
        """Bytes of all experts, once."""
        return self.num_experts * self.matrices * self.d_model * self.d_ff * SIZES[self.dtype]

    @property
    def token_size(self) -> int:
        """Bytes of an element of a token: activations are 16 bits wide beside 16-bit weights, else 32."""
        return 2 if self.dtype in ("bfloat16", "float16") else 4


@dataclass(frozen=True)
class ModelShape:
    """The MoE layers of a model, in its order.

    Attributes:
        name: of the model.
        layers: its MoE layers, whose names differ.
    """

    name: str
    layers: tuple[LayerShape, ...]

    def __post_init__(self) -> None:
        """Check that there are layers, and that names differ."""
        names = [layer.name for layer in self.layers]
        if not names:
            raise _core.ArgumentError(f"model: {self.name} has no MoE layer")
        if len(set(names)) < len(names):
            raise _core.ArgumentError(f"model: the names of its layers are not all different: {', '.join(names)}")

    @property
    def weight_bytes(self) -> int:
        """Bytes of all experts of all layers, once."""
        return sum(layer.weight_bytes for layer in self.layers)

    def with_dtype(self, dtype: str) -> ModelShape:
        """The same with weights stored in another dtype."""
        return replace(self, layers=tuple(replace(layer, dtype=dtype) for layer in self.layers))


# ---- presets: names of encoder layers as in transformers -------------------------------------------------


def _layers(names: Iterable[str], *sizes: int, gated: bool = False, dtype: str = "float32") -> tuple[LayerShape, ...]:
    experts, d_model, d_ff, top_k = sizes
    return tuple(LayerShape(name, experts, d_model, d_ff, top_k, gated, dtype) for name in names)


def _switch(blocks: Iterable[int]) -> list[str]:
    return [f"encoder.block.{block}.layer.1.mlp" for block in blocks]


# Sizes: the models' configurations on the HuggingFace hub, and for Switch table 9 of arXiv 2101.03961.
PRESETS: dict[str, tuple[LayerShape, ...]] = {
    **{
        f"switch-base-{experts}": _layers(_switch(range(1, 12, 2)), experts, 768, 3072, 1)
        for experts in (8, 16, 32, 64, 128, 256)
    },
    "switch-c-2048": _layers(_switch(range(15)), 2048, 2080, 6144, 1, dtype="bfloat16"),
    "nllb-moe-54b": _layers([f"encoder.layers.{i}.ffn" for i in range(3, 24, 4)], 128, 2048, 8192, 2),
    "nomic-embed-v2-moe": _layers([f"encoder.layers.{i}.mlp" for i in range(1, 12, 2)], 8, 768, 3072, 2),
    "privacy-filter": _layers([f"layers.{i}.mlp" for i in range(8)], 128, 640, 640, 4, gated=True, dtype="bfloat16"),
}


# ---- from HuggingFace ------------------------------------------------------------------------------------


def model_shape(model: object) -> ModelShape:
    """The shape of a model.

    Args:
        model: the name of a preset; a :class:`ModelShape`, a :class:`LayerShape` or a sequence of those; a HuggingFace
            config (an object, or a mapping as in ``config.json``); or a model that :func:`moeshard.shard` takes,
            sharded or not.

    Returns:
        The shape.

    Raises:
        ArgumentError: none of these, an unknown preset, or a config without experts.

    Example:
        >>> model_shape("switch-base-8").layers[0].num_experts
        8
    """
    if isinstance(model, ModelShape):
        return model
    if isinstance(model, LayerShape):
        return ModelShape(model.name, (model,))
    if isinstance(model, str):
        if model not in PRESETS:
            raise _core.ArgumentError(f"model: no preset {model!r}, expected one of {', '.join(PRESETS)}")
        return ModelShape(model, PRESETS[model])
    if isinstance(model, Sequence) and model and all(isinstance(layer, LayerShape) for layer in model):
        return ModelShape("model", tuple(model))
    if isinstance(model, Mapping):
        return _from_config(model)
    if hasattr(model, "named_modules"):
        return _from_model(model)
    if hasattr(model, "model_type") and hasattr(model, "to_dict"):
        return _from_config(model.to_dict())
    raise _core.ArgumentError(
        "model: expected a preset's name, LayerShapes, a HuggingFace config or a model, got " + type(model).__name__
    )


def _from_config(config: Mapping[str, Any]) -> ModelShape:
    """From the entries of a config.json. dtype: of the checkpoint, as the config says."""
    kind = config.get("model_type")
    known = _CONFIGS.get(str(kind))
    if known is None:
        raise _core.ArgumentError(
            f"model: no MoE layers known for a config of model_type {kind!r}, expected one of {', '.join(_CONFIGS)}; "
            "describe them with moeshard.planner.LayerShape"
        )
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    try:
        layers = known(config, dtype)
    except KeyError as error:
        raise _core.ArgumentError(f"model: the config has no {error.args[0]!r}") from error
    return ModelShape(str(config.get("_name_or_path") or kind), layers)


def _switch_config(c: Mapping[str, Any], dtype: str) -> tuple[LayerShape, ...]:
    step = c.get("encoder_sparse_step") or c["num_layers"] // max(c["num_sparse_encoder_layers"], 1)
    blocks = [i for i in range(c["num_layers"]) if (i % step == 1 or step == 1)]
    return _layers(_switch(blocks), c["num_experts"], c["d_model"], c["d_ff"], 1, dtype=dtype)


def _nllb_config(c: Mapping[str, Any], dtype: str) -> tuple[LayerShape, ...]:
    step = c["encoder_sparse_step"]
    names = [f"encoder.layers.{i}.ffn" for i in range(c["encoder_layers"]) if step > 0 and (i + 1) % step == 0]
    return _layers(names, c["num_experts"], c["d_model"], c["encoder_ffn_dim"], 2, dtype=dtype)


def _nomic_config(c: Mapping[str, Any], dtype: str) -> tuple[LayerShape, ...]:
    step = c["moe_every_n_layers"]
    names = [f"encoder.layers.{i}.mlp" for i in range(c["n_layer"]) if step > 0 and i % step == 1 % step]
    d_ff = c.get("n_inner") or 4 * c["n_embd"]
    return _layers(names, c["num_experts"], c["n_embd"], d_ff, c["moe_top_k"], dtype=dtype)


def _privacy_config(c: Mapping[str, Any], dtype: str) -> tuple[LayerShape, ...]:
    names = [f"layers.{i}.mlp" for i in range(c["num_hidden_layers"])]
    sizes = c["num_local_experts"], c["hidden_size"], c["intermediate_size"], c["num_experts_per_tok"]
    return _layers(names, *sizes, gated=True, dtype=dtype)


_CONFIGS = {
    "switch_transformers": _switch_config,
    "nllb-moe": _nllb_config,
    "nomic_bert": _nomic_config,
    "openai_privacy_filter": _privacy_config,
}


def _from_model(model: Any) -> ModelShape:
    """From a torch module: the blocks that shard would take, or the layers that it has made."""
    from ..adapters import find_adapter
    from ..layer import ShardedExperts

    config = getattr(model, "config", None)
    layers = []
    for name, module in model.named_modules():
        if isinstance(module, ShardedExperts):
            packed = module.packed
            sizes = packed.num_experts, packed.d_model, packed.d_ff
            layers.append(LayerShape(name.removesuffix(".experts"), *sizes, _top_k(config), packed.gated, packed.dtype))
        elif (adapter := find_adapter(module)) is not None:
            weights = adapter.weights(module)
            found = weights.sizes()
            sizes = found.num_experts, found.d_model, found.d_ff
            layers.append(LayerShape(name, *sizes, _top_k(config), weights.gated, found.dtype))
    if not layers:
        raise _core.ArgumentError(f"model: {type(model).__name__} has no MoE layer of a known class")
    return ModelShape(type(model).__name__, tuple(layers))


def _top_k(config: object) -> int:
    """Experts of a token, by the names that HuggingFace's configs have for it; Switch's has none and means 1."""
    for name in ("num_experts_per_tok", "moe_top_k", "num_selected_experts"):
        if isinstance(value := getattr(config, name, None), int):
            return value
    return 2 if getattr(config, "model_type", "") == "nllb-moe" else 1
