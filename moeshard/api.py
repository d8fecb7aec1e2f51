# SPDX-License-Identifier: Apache-2.0
"""shard and unshard: the MoE layers of a model cut over the ranks, in place, and put back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
import torch
from torch import nn

from . import _core
from .adapters import Adapter, Capacity, find_adapter, looks_like_moe
from .experts import ExpertWeights, Sizes, storage_name
from .group import Group, init
from .interrupts import interrupts_put_off
from .layer import ShardedExperts, is_replicated
from .padding import Padding, counts_over_sequences, has_capacity, readers
from .placement import Placement
from .planner.results import ModelPlan
from .plans import Plan, PlanChoice, plan_for
from .router import unfuse
from .streaming import Load, allocate, empty, pack_and_free, unpack_and_free

if TYPE_CHECKING:
    from ._core import Storage

Model = TypeVar("Model", bound=nn.Module)


Places = list[tuple[nn.Module, str]]  # (parent, attribute): more than one if a model uses a module twice


@dataclass
class Site:
    """A MoE block, where it stands in the model, and what becomes of it."""

    name: str
    places: Places
    block: nn.Module
    adapter: Adapter
    weights: ExpertWeights
    sizes: Sizes
    plan: Plan
    dtype: Storage


@dataclass
class Original:
    """What a replacement keeps to be undone: the emptied block, which is no submodule any more."""

    block: nn.Module
    adapter: Adapter
    experts: ShardedExperts
    parameters: Sequence[nn.Parameter]
    shapes: list[torch.Size]


def shard(
    model: Model,
    *,
    group: Group | None = None,
    plan: PlanChoice = "auto",
    dtype: object = None,
    tokens: Literal["local", "replicated"] = "local",
    capacity: Capacity = "model",
    skip_padding: bool = False,
    fused_router: bool = True,
    progress: bool = True,
) -> Model:
    """Cut the experts of every MoE layer of a model over the ranks, in place. Collective.

    Afterwards the model is called as before and gives the same outputs. Its forward pass is collective: all ranks call
    it equally often (``generate`` too: the same number of steps), each with any number of tokens. Each rank keeps its
    share of the experts, the originals are freed.

    Memory: weights are packed expert by expert, and each original is freed before the next is packed. So a rank needs
    one expert (and about 40 MiB) beside the model, not a second copy; where the model keeps a layer's experts in one
    tensor, one layer; and with a wider ``dtype`` what the packed weights take more than the originals.

    Interrupts: a Ctrl-C while the model is checked leaves it as it was. Once originals go there is no way back, so from
    then on Ctrl-C takes effect when ``model`` is sharded, and it can be used then (unless it is itself a MoE block: the
    module that takes its place was not returned). A rank that dies meanwhile closes the group, as in a forward pass.

    Args:
        model: a HuggingFace model (or any module that holds MoE blocks of a known class) in eval mode, with the same
            weights on every rank; on the CPU, or on this rank's CUDA device, which then runs the layers.
        group: the ranks. ``None``: :func:`moeshard.init`.
        plan: the layout of each MoE layer. ``"auto"``, ``"shard"``: every expert over every rank;
            ``"expert_parallel"``: each expert whole on one rank; a :class:`moeshard.Plan` of the layers' sizes, see
            ``docs/layouts.md``; or what :func:`moeshard.plan` or :func:`moeshard.place` found for each layer, by name.
            A plan that prunes experts frees their weights for good: ``unshard`` will refuse.
        dtype: storage of the experts: ``"float32"``, ``"bfloat16"``, ``"float16"``, ``"int8"`` (weights within half a
            scale, see ``docs/numerics.md``) or torch's. ``None``: as it is.
        tokens: ``"local"``: each rank has its own batch; ``"replicated"``: all ranks hold the same.
        capacity: ``"model"``: tokens are dropped as the installed transformers version does; ``None``: never;
            an int: the model's rule with this capacity.
        skip_padding: do not compute what the experts make of padding, as told by the ``attention_mask`` ``[B, S]`` of
            integers or booleans that an encoder or decoder is called with. The outputs of all other tokens keep their
            bits; padding's own change. See ``docs/padding.md``.
        fused_router: what a Switch router does after its softmax is one pass of moeshard's core, with the same results
            bit for bit (on the CPU; not while torch compiles). ``False``: the model's own code. Other routers are left
            alone. See ``docs/performance.md``.
        progress: show a progress bar over the experts on rank 0, if tqdm is installed.

    Returns:
        The model. Only if ``model`` is itself a MoE block, another module.

    Raises:
        ArgumentError: no known MoE block (names what looks like one), training mode, a wrong device, weights that are
            not loaded, already sharded, or a bad option.
        ShapeError, DTypeError: expert weights or a plan that do not fit.
        RankMismatch: the ranks were given different models or options; says which.
        PeerError: another rank failed. In every one of these cases the models are as they were, on all ranks.

    Example:
        >>> model = moeshard.shard(SwitchTransformersEncoderModel.from_pretrained(path).eval())  # doctest: +SKIP

    Source: arXiv 2503.08467.
    """
    group = init() if group is None else group
    with torch.inference_mode(False), torch.no_grad():
        sites, replicated = prepare(model, group, plan, dtype, tokens, capacity)
        group.agree({"skip_padding": str(bool(skip_padding))})
        with group.all_or_none():
            told_by = readers(model, [site.name for site in sites]) if skip_padding else []
            trailing = any(has_capacity(site.block) for site in sites)
            left_to_router = [counts_over_sequences(site.block) for site in sites]
        with interrupts_put_off():
            model, loads = replace_blocks(model, sites, group, capacity, replicated, fused_router)
            paddings = {reader: Padding(reader, trailing=trailing) for reader in dict.fromkeys(told_by)}
            for reader, by_router, (*_, original) in zip(told_by, left_to_router, _replaced(model), strict=False):
                if not by_router:
                    original.experts.padding = paddings[reader]
            sites.clear()  # they would keep the originals
            try:
                pack_and_free(loads, progress and group.rank == 0)
            except BaseException:  # nothing in there fails; the handler of a signal may raise
                group.close()  # so that experts that are not packed are never called
                raise
    return model


def prepare(
    model: nn.Module,
    group: Group,
    plan: PlanChoice,
    dtype: object,
    tokens: Literal["local", "replicated"],
    capacity: Capacity,
    sample: Callable[[ExpertWeights], str] | None = None,
) -> tuple[list[Site], bool]:
    """Check all that can be checked before anything is changed. Collective.

    Args:
        model: as in :func:`shard`, as are the options.
        group: the ranks.
        plan: the layout.
        dtype: storage of the experts.
        tokens: whose tokens a rank has.
        capacity: what is dropped.
        sample: what tells a layer's weights from others; ``None``: some of them, read.

    Returns:
        The blocks to replace; whether all ranks hold the same tokens.
    """
    with group.all_or_none():
        replicated = is_replicated(tokens)
        _check_capacity(capacity)
        sites = _sites(model, group, plan, dtype)
        facts = _facts(sites, tokens, capacity, sample or _sample)
    group.agree(facts)
    return sites, replicated


def unshard(model: Model) -> Model:
    """Put the original MoE blocks back, with their weights. Collective.

    Memory: expert by expert, each one's packed weights freed before the next is filled, so that a rank needs one expert
    (and about 40 MiB) beside the whole model. Ctrl-C takes effect when the model is whole.

    Args:
        model: what :func:`moeshard.shard` returned, on every rank of its group.

    Returns:
        The model, every parameter the same object as before; its bits too, unless ``shard`` changed the dtype.

    Raises:
        ArgumentError: the model is not sharded, or its plan has pruned experts, whose weights are gone.
        CommError: a rank failed (PeerError; there its own error) or is lost. The model stays sharded, on all ranks:
            after PeerError it works and ``unshard`` can be called again; after a loss the group is closed.

    Example:
        >>> model = moeshard.unshard(moeshard.shard(model))  # doctest: +SKIP
    """
    sharded = originals(model)
    group = sharded[0][1].experts.group
    with torch.inference_mode(False), torch.no_grad(), interrupts_put_off():
        back: list[Load] = []
        try:
            with group.all_or_none():
                for _, original in sharded:
                    allocate(original.parameters, original.shapes)
                weights = [original.adapter.weights(original.block) for _, original in sharded]
            for (_, original), destination in zip(sharded, weights, strict=True):
                back.append(Load(original.experts.packed, [], original.parameters))
                unpack_and_free(original.experts, destination, back[-1])
            group.barrier()
        except BaseException:
            pack_and_free(back, shown=False)  # no bit is lost: what came out goes in again
            for _, original in sharded:
                empty(original.parameters)
            raise
        for places, original in sharded:
            original.adapter.restore(original.block)
            if original.experts.padding is not None:
                original.experts.padding.remove()
            model = put(model, places, original.block)
    return model


def originals(model: nn.Module) -> list[tuple[Places, Original]]:
    """The blocks that shard has replaced, and where; the ranks together have all their weights.

    Raises:
        ArgumentError: there is none, or the plan has pruned experts, whose weights are gone.
    """
    found = list(_replaced(model))
    if not found:
        raise _core.ArgumentError("model: it is not sharded")
    pruned = {
        name or type(original.block).__name__: np.flatnonzero(original.experts.plan.copies == 0).tolist()
        for name, _, original in found
    }
    gone = "; ".join(f"experts {experts} of {name}" for name, experts in pruned.items() if experts)
    if gone:
        raise _core.ArgumentError(
            f"model: the plan it was sharded with prunes {gone}: no rank has their weights, so it cannot be made whole "
            "or saved. Keep the checkpoint it was loaded from, or shard with a plan in which every expert has a copy"
        )
    return [(places, original) for _, places, original in found]


def _replaced(model: nn.Module) -> Iterable[tuple[str, Places, Original]]:
    for name, places, module in _modules(model):
        original: object = getattr(module, "moeshard_original", None)
        if isinstance(original, Original):
            yield name, places, original


def _sites(model: nn.Module, group: Group, plan: PlanChoice, dtype: object) -> list[Site]:
    """The MoE blocks of the model, everything about them checked."""
    if not isinstance(model, nn.Module):
        raise _core.ArgumentError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    modules = list(_modules(model))
    if any(isinstance(module, ShardedExperts) for _, _, module in modules):
        raise _core.ArgumentError("model: it is already sharded, call moeshard.unshard(model) first")
    blocks = [(*entry, adapter) for entry in modules if (adapter := find_adapter(entry[2])) is not None]
    if not blocks:
        raise _core.ArgumentError(no_block(model))
    sites = [_site(name, places, block, adapter, group, plan, dtype) for name, places, block, adapter in blocks]
    first = sites[0]
    for site in sites:
        if site.sizes.device != first.sizes.device:
            raise _core.ArgumentError(
                f"model: its MoE layers are on different devices, {first.name} on {first.sizes.device} but {site.name} "
                f"on {site.sizes.device}; a rank works on one: model.to({first.sizes.device!r})"
            )
    _check_not_shared(model, sites)
    if isinstance(plan, (ModelPlan, Placement)):
        plan.check_layers([site.name for site in sites])
    return sites


def _site(
    name: str, places: Places, block: nn.Module, adapter: Adapter, group: Group, plan: PlanChoice, dtype: object
) -> Site:
    where = name or type(block).__name__
    for parameter_name, parameter in block.named_parameters():
        if parameter.device.type == "meta":
            raise _core.ArgumentError(
                f"{where}.{parameter_name}: not loaded (on the meta device): load the weights first"
            )
        if parameter.device.type not in ("cpu", "cuda"):
            raise _core.ArgumentError(
                f"{where}.{parameter_name}: expected the CPU or CUDA, got {parameter.device}: model.cpu()"
            )
    if any(module.training for module in block.modules()):
        raise _core.ArgumentError(f"{where}: in training mode, but moeshard is for inference: call model.eval() first")
    try:
        weights = adapter.weights(block)
        sizes = weights.sizes()
        table = plan_for(plan, group.size, sizes.num_experts, sizes.d_ff, name)
    except _core.MoeshardError as error:
        raise type(error)(f"{where}: {error}") from error
    return Site(
        name, places, block, adapter, weights, sizes, table, sizes.dtype if dtype is None else storage_name(dtype)
    )


def _modules(model: nn.Module) -> Iterable[tuple[str, Places, nn.Module]]:
    """Every module once: its first name, where it hangs, itself."""
    found: dict[nn.Module, tuple[str, Places, nn.Module]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        _, places, _ = found.setdefault(module, (name, [], module))
        if name:
            parent, _, attribute = name.rpartition(".")
            places.append((model.get_submodule(parent), attribute))
    return found.values()


def no_block(model: nn.Module) -> str:
    """What to say of a model without a MoE block of a known class."""
    suspects = sorted({type(module).__qualname__ for module in model.modules() if looks_like_moe(module)})
    if not suspects:
        return f"model: {type(model).__name__} has no Mixture-of-Experts layer"
    return (
        f"model: {type(model).__name__} has no MoE block of a known class; what looks like one: {', '.join(suspects)}. "
        "Teach moeshard a class with moeshard.register_adapter(cls, adapter)"
    )


def _check_not_shared(model: nn.Module, sites: Sequence[Site]) -> None:
    """Freeing an expert's weights must not take them from anything else."""
    inside = {module for site in sites for module in site.block.modules()}
    freed = {id(parameter) for site in sites for parameter in site.adapter.parameters(site.block)}
    for name, module in model.named_modules():
        if module not in inside and any(id(parameter) in freed for parameter in module.parameters(recurse=False)):
            raise _core.ArgumentError(f"{name}: shares a parameter with an expert, which shard would free")


def _check_capacity(capacity: object) -> None:
    if capacity is None or capacity == "model":
        return
    if not isinstance(capacity, int) or isinstance(capacity, bool) or capacity < 1:
        raise _core.ArgumentError(f"capacity: expected 'model', None or a positive integer, got {capacity!r}")


def _facts(
    sites: Sequence[Site], tokens: str, capacity: Capacity, sample: Callable[[ExpertWeights], str]
) -> dict[str, str]:
    """What must be the same on all ranks. Of the weights, a sample: enough to tell checkpoints and seeds apart."""
    facts = {"the device": sites[0].sizes.device_type, "tokens": str(tokens), "capacity": str(capacity)}
    for site in sites:
        weights, sizes = site.weights, site.sizes
        kind = f"{'gated ' if weights.gated else ''}{weights.activation}"
        facts[f"layer {site.name}"] = f"{sizes.num_experts} experts {sizes.d_model} x {sizes.d_ff} {kind} {sizes.dtype}"
        facts[f"the dtype of layer {site.name}"] = site.dtype
        facts[f"the plan of layer {site.name}"] = f"{site.plan} {site.plan.digest}"
        facts[f"the weights of layer {site.name} (were all ranks given the same?)"] = sample(weights)
    return facts


def _sample(weights: ExpertWeights) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for expert in range(len(weights.w_in)):
        for stack in (weights.w_in, weights.w_out):
            digest.update(stack[expert][0].contiguous().view(torch.uint8).cpu().numpy())
    return digest.hexdigest()


def replace_blocks(
    model: Model, sites: Sequence[Site], group: Group, capacity: Capacity, replicated: bool, fused_router: bool
) -> tuple[Model, list[Load]]:
    """Put a replacement in the place of every block, its experts still to be packed; on all ranks or on none."""
    layers = [group.new_layer() for _ in sites]  # the same number on all ranks, whatever happens
    built: list[Site] = []
    loads = []
    sharded = model
    try:
        with group.all_or_none():
            for site, layer in zip(sites, layers, strict=True):
                packed = site.weights.reserve(site.plan.columns[group.rank], site.sizes, site.dtype)
                parameters = site.adapter.parameters(site.block)
                loads.append(Load.prepare(site.weights, site.sizes, packed, parameters))
                experts = ShardedExperts(packed, site.plan, group, layer=layer, replicated=replicated)
                replacement = site.adapter.build(site.block, experts, capacity)
                built.append(site)
                for module in () if fused_router else replacement.modules():
                    unfuse(module)
                for hooks in _HOOKS:
                    setattr(replacement, hooks, getattr(site.block, hooks))
                shapes = [parameter.shape for parameter in parameters]
                replacement.moeshard_original = Original(  # type: ignore[assignment]
                    site.block, site.adapter, experts, parameters, shapes
                )
                experts.emptied = list(parameters)
                experts.interleaved = site.weights.interleaved
                held = {id(parameter) for parameter in parameters}
                names = [name for name, parameter in site.block.named_parameters() if id(parameter) in held]
                replacement.register_load_state_dict_pre_hook(partial(_refuse_experts, names))  # type: ignore[no-untyped-call]
                sharded = put(sharded, site.places, replacement.eval())
    except BaseException:
        for site in built:
            put(model, site.places, site.block)
            site.adapter.restore(site.block)
        raise
    return sharded, loads


# The user's hooks on a block (recording activations, for example) go on working.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def _refuse_experts(
    names: Sequence[str], module: nn.Module, state_dict: Mapping[str, object], prefix: str, *arguments: object
) -> None:
    """Before load_state_dict: experts would be forgotten without a word, with ``strict=False``."""
    found = next((prefix + name for name in names if prefix + name in state_dict), None)
    if found is not None:
        raise _core.ArgumentError(
            f"load_state_dict: {found} belongs to experts that are packed and spread over the ranks: call "
            "moeshard.unshard(model) first, then load, then shard"
        )


def put(model: Model, places: Places, module: nn.Module) -> Model:
    """Hang a module where another was, and return the model: the module itself, if the other was the model."""
    for parent, attribute in places:
        setattr(parent, attribute, module)
    return model if places else module  # type: ignore[return-value]
