# SPDX-License-Identifier: Apache-2.0
"""from_pretrained: a sharded model straight from a checkpoint, of which each rank reads its share.

transformers builds the model on the meta device, as its own ``from_pretrained`` does. Before it loads weights into it,
the experts' parameters are taken out, so that it loads all the others by its own rules and never sees an expert. The
experts come from the mapped files, one by one and only the columns of this rank, straight into packed memory.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from . import _core
from .adapters import Capacity, find_adapter
from .api import no_block, prepare, replace_blocks
from .checkpoint import Checkpoint
from .conversion import CONVERTS, Match, match
from .errors import CheckpointError
from .experts import ExpertWeights, Tensors
from .group import Group, init
from .lazy import Lazy
from .memory import Canvas, return_freed_memory
from .plans import PlanChoice
from .streaming import Load, empty
from .streaming import progress as progress_bar

Model = TypeVar("Model", bound=nn.Module)

_SAMPLE = 256  # bytes of each tensor that tell a checkpoint from another one of the same shapes


def from_pretrained(
    cls: type[Model],
    path: str | Path,
    *,
    group: Group | None = None,
    plan: PlanChoice = "auto",
    dtype: object = None,
    tokens: Literal["local", "replicated"] = "local",
    capacity: Capacity = "model",
    fused_router: bool = True,
    progress: bool = True,
    torch_dtype: object = None,
    config: object = None,
    device: str | torch.device = "cpu",
) -> Model:
    """Load a model from a HuggingFace checkpoint and shard it; each rank reads its share of the experts. Collective.

    The result is what ``moeshard.shard(cls.from_pretrained(path))`` gives, and no rank ever holds an expert that is not
    packed but one. Weights that are not experts are loaded by transformers itself: its rules for names, tied weights,
    dtypes and buffers hold.

    Memory: this rank's share of the experts, the other weights, and one expert. Where transformers converts a
    checkpoint in a way that cannot be done piece by piece, one layer's parameter instead of one expert.

    Args:
        cls: the model's class, or an Auto class (``AutoModel`` ...). A class of code from the hub is loaded by
            transformers too: a ``from_pretrained`` of its own is not called.
        path: a folder with ``model.safetensors``, or with its index and the files it names; or a name on the hub.
        group: the ranks. ``None``: :func:`moeshard.init`.
        plan: the layout, as in :func:`moeshard.shard`.
        dtype: storage of the experts, as in :func:`moeshard.shard`. ``None``: that of the model.
        tokens: as in :func:`moeshard.shard`.
        capacity: as in :func:`moeshard.shard`.
        fused_router: as in :func:`moeshard.shard`.
        progress: show a progress bar over the experts on rank 0, if tqdm is installed.
        torch_dtype: of the model, ``"auto"``, a name or torch's, as in transformers; ``None``: its default.
        config: the model's configuration. ``None``: the checkpoint's. For options of the model:
            ``AutoConfig.from_pretrained(path, attn_implementation="eager")``.
        device: where the model will be: ``"cpu"``, or this rank's CUDA device, whose engine then runs the layers.

    Returns:
        The sharded model, in eval mode. ``unshard`` gives the whole model.

    Raises:
        CheckpointError: tensors that are missing, truncated, of a wrong shape or dtype, or extra, all of them in one
            error, before any weight is read. Extra tensors are an error only inside a part that ``cls`` has; whole
            parts that it has not (the decoder, for an encoder) are left out with a warning, as transformers does.
        ArgumentError: no safetensors (a pickled ``pytorch_model.bin`` is never loaded), or what ``shard`` refuses.
        RankMismatch: the ranks were given different checkpoints or options.
        PeerError: another rank failed.

    Example:
        >>> model = moeshard.from_pretrained(SwitchTransformersEncoderModel, "google/switch-base-128")  # doctest: +SKIP
    """
    group = init() if group is None else group
    shown = progress and group.rank == 0
    with torch.inference_mode(False), torch.no_grad(), contextlib.ExitStack() as stack:
        with group.all_or_none():
            folder = _folder(path)
            checkpoint = stack.enter_context(Checkpoint(folder))
            digest = checkpoint.digest(_SAMPLE)
            model, taken = _build(cls, config, checkpoint, torch_dtype, shown)
            _describe(model, str(path), folder)
            sources = taken.put_back(model.to(device))
        sites, replicated = prepare(model, group, plan, dtype, tokens, capacity, sample=lambda _: digest)
        experts = [sources[site.block] for site in sites]
        model, loads = replace_blocks(model, sites, group, capacity, replicated, fused_router)
        sites.clear()  # they would keep what stands for the experts' parameters
        with group.all_or_none():
            _pack(loads, experts, checkpoint, shown)
    return model


def _folder(path: str | Path) -> Path:
    """Where the checkpoint is; one that has only a name is taken from the hub, or from its cache."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise _core.ArgumentError(f"path: expected a folder, got a file, {folder}")
    hub = import_module("huggingface_hub")
    try:
        return Path(hub.snapshot_download(str(path), allow_patterns=["*.safetensors", "*.json"]))
    except Exception as error:
        raise _core.ArgumentError(
            f"path: no folder {folder}, and the hub has nothing of that name or cannot be reached: "
            f"{(str(error).splitlines() or [type(error).__name__])[0]}"
        ) from error


# ---- transformers builds the model, without its experts -----------------------------------------------------


def _build(
    cls: type[Model], config: Any, checkpoint: Checkpoint, torch_dtype: object, shown: bool
) -> tuple[Model, _Taken]:
    """The model with all its weights but the experts'."""
    transformers = import_module("transformers")
    if config is None:
        config_class = getattr(cls, "config_class", None) or transformers.AutoConfig
        config = config_class.from_pretrained(checkpoint.folder)
    if isinstance(cls, type) and not issubclass(cls, nn.Module) and hasattr(cls, "from_config"):
        with torch.device("meta"):
            cls = type(cls.from_config(config))
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise _core.ArgumentError(f"cls: expected a model class of transformers, got {cls!r}")
    made: type[Any] = cls
    state = {name: checkpoint.tensor(name, keep=True) for name in checkpoint.intact()}
    built: list[nn.Module] = []
    taken: list[_Taken] = []

    foreign = made.__module__.partition(".")[0] != "transformers"
    computed: list[tuple[nn.Module, str, torch.Tensor]] = []
    has_pooler = any("pooler" in name.split(".") for name in [*checkpoint.entries, *checkpoint.broken])

    # from_pretrained calls the class, then loads `state` into what it gets: between the two, the experts go.
    def build(self: Any, *arguments: Any, **options: Any) -> None:
        if not has_pooler and "add_pooling_layer" in inspect.signature(made).parameters:
            options["add_pooling_layer"] = False
        with _buffers_in_memory() if foreign and CONVERTS else contextlib.nullcontext():
            made.__init__(self, *arguments, **options)
        if foreign and CONVERTS:
            computed.extend(_unstored_buffers(self))
            if not hasattr(self, "all_tied_weights_keys"):  # loading needs what post_init makes
                self.post_init()
        built.append(self)
        if CONVERTS:
            taken.append(_Taken(self, checkpoint, state))

    def tie_weights(self: Any, *arguments: Any, **options: Any) -> None:
        made.tie_weights(self, *arguments, **options)
        # The 4 line builds models where every assignment makes a new parameter, and ties them again afterwards.
        if not CONVERTS and built and not taken:
            taken.append(_Taken(self, checkpoint, state))

    names = {"__init__": build, "tie_weights": tie_weights}
    derived = type(made.__name__, (made,), {**names, "__module__": made.__module__, "__qualname__": made.__qualname__})
    options = {} if torch_dtype is None else {"dtype": torch_dtype}
    with _progress_bars(transformers, shown):
        # Code from the hub may have one of its own, which reads whole files.
        load = transformers.PreTrainedModel.from_pretrained.__func__ if foreign else made.from_pretrained.__func__
        model, info = load(derived, None, config=config, state_dict=state, output_loading_info=True, **options)
    model.__class__ = made
    for module, name, buffer in computed:
        module._buffers[name] = buffer
    missing = sorted({*info.get("missing_keys", ()), *(str(key) for key in info.get("mismatched_keys", ()))})
    if missing:  # what our own check let pass; transformers has made these up
        raise CheckpointError(str(checkpoint.folder), [f"{name}: transformers finds it missing" for name in missing])
    if CONVERTS:  # to undo, when the model is saved, also what was done to experts
        model._weight_conversions = taken[0].found.conversions
    return model, taken[0]


@contextlib.contextmanager
def _buffers_in_memory() -> Iterator[None]:
    """Modules made meanwhile have buffers with their values, and parameters without memory.

    The 5 line builds all on the meta device, and lets its classes compute again the buffers that no checkpoint has;
    code that was not written for it cannot.
    """

    def empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:  # None leaves it as it is; one that is tied must stay one
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(empty)  # type: ignore[arg-type]  # what it returns is taken
    try:
        with torch.device("cpu"):
            yield
    finally:
        handle.remove()


def _unstored_buffers(model: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    """The buffers that no checkpoint has: module, name, values."""
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers.get(name)
            if buffer is not None:
                yield module, name, buffer


@contextlib.contextmanager
def _progress_bars(transformers: Any, shown: bool) -> Iterator[None]:
    """Those of transformers, only if ours is shown."""
    logging = transformers.utils.logging
    enabled = logging.is_progress_bar_enabled()
    if not shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _describe(model: Any, path: str, folder: Path) -> None:
    """What transformers notes about a checkpoint that it loads itself."""
    model.config.name_or_path = model.name_or_path = path
    if not model.can_generate():
        return
    generation = import_module("transformers").GenerationConfig
    try:
        model.generation_config = generation.from_pretrained(folder)
    except OSError:
        if CONVERTS:  # an old checkpoint has these settings in its config.json
            model.generation_config = generation.from_pretrained(
                folder, config_file_name="config.json", _from_model_config=True
            )


class _Taken:
    """The experts' parameters, taken out of a model while transformers loads the others.

    Args:
        model: on the meta device.
        checkpoint: its files.
        state: name in the checkpoint -> tensor, for transformers; what experts are made of is taken out of it too.

    Raises:
        CheckpointError: the checkpoint does not fit.
        ArgumentError: no MoE block of a known class.
    """

    def __init__(self, model: Any, checkpoint: Checkpoint, state: dict[str, torch.Tensor]) -> None:
        """Check everything, then take them out."""
        self.blocks = [(module, adapter) for module in model.modules() if (adapter := find_adapter(module)) is not None]
        if not self.blocks:
            raise _core.ArgumentError(no_block(model))
        self.found = _match(model, checkpoint)
        parameters = [parameter for block, adapter in self.blocks for parameter in adapter.parameters(block)]
        self._places = {id(parameter): (parameter, list[tuple[nn.Module, str]]()) for parameter in parameters}
        self._names: dict[int, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if id(parameter) in self._places:
                self._names.setdefault(id(parameter), name)
        self._dtypes = {key: _kept_dtype(model, name, self._places[key][0].dtype) for key, name in self._names.items()}
        for module in model.modules():
            for attribute, parameter in module._parameters.items():
                if id(parameter) in self._places:
                    self._places[id(parameter)][1].append((module, attribute))
                    module._parameters[attribute] = None
        owners = {module for _, places in self._places.values() for module, _ in places}
        for block, _ in self.blocks:  # nothing is left in there to initialise
            for module in block.modules():
                if not owners.isdisjoint(module.modules()):
                    module._is_hf_initialized = True
        experts = set(self._names.values())
        others = {
            piece for name, source in self.found.sources.items() if name not in experts for piece in source.pieces
        }
        for name in [name for name in state if name not in others]:
            del state[name]

    def put_back(self, model: nn.Module) -> dict[nn.Module, list[_Expert]]:
        """Give the model parameters in which nothing is yet, and tell where each expert of a block comes from."""
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        sources: dict[nn.Module, list[_Expert]] = {}
        lazies: dict[int, Lazy] = {}
        canvas = Canvas([(parameter.shape, self._dtypes[key]) for key, (parameter, _) in self._places.items()])
        for (key, (old, places)), tensor in zip(self._places.items(), canvas.tensors, strict=True):
            lazies[tensor.untyped_storage().data_ptr()] = self.found.sources[self._names[key]]
            self._set(places, tensor, old)
        for block, adapter in self.blocks:
            sources[block] = _experts(type(block).__name__, adapter.weights(block), lazies)
        if device.type != "cpu":  # the engine is chosen by where the parameters are; they take a row of memory there
            for old, places in self._places.values():
                module, attribute = places[0]
                dtype = module._parameters[attribute].dtype  # type: ignore[union-attr]
                row = torch.empty(old.shape[-1], dtype=dtype, device=device)  # contiguous, as a bias must be
                self._set(places, row.expand(old.shape), old)
        return sources

    @staticmethod
    def _set(places: Sequence[tuple[nn.Module, str]], tensor: torch.Tensor, like: nn.Parameter) -> None:
        parameter = nn.Parameter(tensor, requires_grad=like.requires_grad)
        for module, attribute in places:
            module._parameters[attribute] = parameter


def _match(model: Any, checkpoint: Checkpoint) -> Match:
    """How the checkpoint fits; all that does not, in one error."""
    tensors = {name: (entry.shape, entry.dtype) for name, entry in checkpoint.entries.items()}
    found = match(model, model.state_dict(), tensors, checkpoint, checkpoint.broken)
    problems = [*checkpoint.problems, *found.problems]
    if problems:
        raise CheckpointError(str(checkpoint.folder), problems)
    if found.left_out:
        parts = sorted({name.partition(".")[0] for name in found.left_out})
        warnings.warn(
            f"{type(model).__name__} has no {', '.join(parts)}: {len(found.left_out)} tensors of {checkpoint.folder} "
            "are left out",
            UserWarning,
            stacklevel=2,
        )
    return found


def _kept_dtype(model: Any, name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype that transformers would load a parameter in: some it keeps in float32."""
    kept: list[str] = []
    if dtype == torch.float16:
        kept += getattr(model, "_keep_in_fp32_modules", None) or []
    if dtype in (torch.float16, torch.bfloat16):
        kept += getattr(model, "_keep_in_fp32_modules_strict", None) or []
    return torch.float32 if any(re.search(rf"(^|\.){module}($|\.)", name) for module in kept) else dtype


# ---- experts, from the files into packed memory ---------------------------------------------------------------


@dataclass
class _Expert:
    """Where an expert's w_in, w_out, b_in and b_out come from, the dtype that the model has them in, and their rows."""

    parts: list[Lazy | None]
    dtype: torch.dtype
    gated: bool
    interleaved: bool

    def columns(self, start: int, stop: int) -> tuple[Tensors, int]:
        """Tensors that hold hidden columns [start, stop), and the first column that they hold."""
        parts = self.parts
        if all(part is None or (part.lends and part.dtype == self.dtype) for part in parts):
            # Views of the files: packing looks at no other columns than this rank's.
            return self._tensors([None if part is None else part.read(part.whole()) for part in parts]), 0
        w_in, w_out, b_in, b_out = parts
        assert w_in is not None and w_out is not None
        d_model, d_ff = w_out.shape
        if self.interleaved:
            rows = [slice(2 * start, 2 * stop)]
        else:
            rows = [slice(half * d_ff + start, half * d_ff + stop) for half in range(2 if self.gated else 1)]
        return self._tensors(
            [
                torch.cat([w_in.read((part, slice(0, d_model))) for part in rows]),
                w_out.read((slice(0, d_model), slice(start, stop))),
                None if b_in is None else torch.cat([b_in.read((part,)) for part in rows]),
                None if b_out is None else b_out.read(b_out.whole()),
            ]
        ), start

    def _tensors(self, found: Sequence[torch.Tensor | None]) -> Tensors:
        w_in, w_out, b_in, b_out = (None if tensor is None else tensor.to(self.dtype) for tensor in found)
        return w_in, w_out, b_in if b_in is None else b_in.contiguous(), b_out if b_out is None else b_out.contiguous()

    def pieces(self) -> list[str]:
        """The tensors of the checkpoint that have it."""
        return [name for part in self.parts if part is not None for name in part.pieces_of(part.whole())]

    def forget(self) -> None:
        """Let go of what was computed."""
        for part in self.parts:
            if part is not None:
                part.forget()


def _experts(block: str, weights: ExpertWeights, lazies: Mapping[int, Lazy]) -> list[_Expert]:
    """Where each expert comes from: each of its tensors is a view of a parameter, of which that is known."""

    def lazy(tensor: torch.Tensor) -> Lazy:
        source = lazies.get(tensor.untyped_storage().data_ptr())
        if source is None:
            raise ValueError("a tensor of its own")
        return source.as_strided(tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    stacks = (weights.w_in, weights.w_out, weights.b_in, weights.b_out)
    try:
        return [
            _Expert(
                [None if stack is None else lazy(stack[expert].detach()) for stack in stacks],
                weights.w_in[expert].dtype,
                weights.gated,
                weights.interleaved,
            )
            for expert in range(len(weights.w_in))
        ]
    except ValueError as error:
        raise _core.ArgumentError(
            f"{block}: its adapter's weights are no views of its parameters ({error}), so they cannot be loaded in "
            "slices: moeshard.shard(cls.from_pretrained(path)) loads the whole model first"
        ) from error


def _pack(loads: list[Load], experts: list[list[_Expert]], checkpoint: Checkpoint, shown: bool) -> None:
    """Pack this rank's columns, expert by expert. Takes the loads from the list."""
    with progress_bar(sum(map(len, experts)), shown, "loading experts") as step:
        while loads:
            load = loads.pop(0)
            load.experts.clear()
            empty(load.parameters)
            own = experts.pop(0)
            for expert, (start, stop) in enumerate(load.packed.columns.tolist()):
                if stop > start:
                    tensors, first = own[expert].columns(start, stop)
                    load.packed.pack(expert, *tensors, first=first)
                    del tensors
                    checkpoint.forget(own[expert].pieces())
                step()
            for one in own:
                one.forget()
    return_freed_memory()
