# SPDX-License-Identifier: Apache-2.0
"""Which tensors of a checkpoint make which parameters of a transformers model, and what does not fit.

The 5 line renames and converts while it loads: experts that a checkpoint has one by one become one stacked parameter,
for example. Its own conversion code is run here, on lazy tensors. The 4 line renames only.

Source: transformers 5.23.0, core_model_loading.py and conversion_mapping.py; 4.57.6, modeling_utils.py.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from .lazy import Computed, Lazy, Store, Stored

Model = Any  # a transformers.PreTrainedModel: transformers is not imported for nothing

CONVERTS = find_spec("transformers.conversion_mapping") is not None  # the 5 line


@dataclass
class Match:
    """How a checkpoint fits a model.

    Attributes:
        sources: name of a parameter or buffer of the model -> what it is made of.
        problems: what does not fit, a line each.
        left_out: tensors of parts that the model's class does not have, ``lm_head`` for example.
        conversions: transformers' own objects that were used (5 line), to be undone when the model is saved.
    """

    sources: dict[str, Lazy] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    conversions: list[Any] = field(default_factory=list)


def match(
    model: Model,
    state: Mapping[str, torch.Tensor],
    tensors: Mapping[str, tuple[Sequence[int], torch.dtype]],
    store: Store,
    broken: Collection[str] = (),
) -> Match:
    """Find out what each parameter is made of.

    Args:
        model: whole, on any device, also meta.
        state: its ``state_dict()``.
        tensors: name in the checkpoint -> shape and dtype.
        store: what has them.
        broken: names in the checkpoint about which nothing else is known, and which are a problem already.
    """
    found = Match()
    stored = {name: Stored(store, name, shape, dtype) for name, (shape, dtype) in tensors.items()}
    names = [*stored, *broken]
    renames = _conversions(model, state, found) if CONVERTS else _prefixes(model, names)
    groups: dict[str, _Group] = {}
    tops = {name.partition(".")[0] for name in state}
    ignored = _ignored(model)
    for name in sorted(names, key=_natural):
        renamed, converter, pattern = renames(name)
        if renamed in state:
            groups.setdefault(renamed, _Group(converter)).add(pattern, name)
        elif renamed.partition(".")[0] not in tops:
            found.left_out.append(name)
        elif not ignored("unexpected", renamed):
            found.problems.append(f"{name}: the model has no place for it")
    for renamed, group in groups.items():
        if not group.names.isdisjoint(broken):
            found.sources[renamed] = Stored(store, renamed, state[renamed].shape, state[renamed].dtype)
        else:
            found.sources.update(group.make(model, renamed, state, stored, found.problems))
    _check(model, state, found, ignored)
    found.conversions = [conversion for conversion in found.conversions if conversion.was_used()]
    return found


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Numbers in order of size: the experts of a list are stacked in this order."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name)]


# ---- names -----------------------------------------------------------------------------------------------

Renames = Callable[[str], tuple[str, Any, str]]  # the model's name, what converts it (or None), its source pattern


def _conversions(model: Model, state: Mapping[str, torch.Tensor], found: Match) -> Renames:
    """The renaming of the 5 line."""
    loading = import_module("transformers.core_model_loading")
    transforms = import_module("transformers.conversion_mapping").get_model_conversion_mapping(model)
    found.conversions = transforms
    renamings = [entry for entry in transforms if isinstance(entry, loading.WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, loading.WeightConverter)]
    converter_of = {pattern: entry for entry in converters for pattern in entry.source_patterns}

    def rename(name: str) -> tuple[str, Any, str]:
        prefix = model.base_model_prefix
        renamed, pattern = loading.rename_source_key(name, renamings, converters, prefix, state)
        if renamed not in state and name in state:
            renamed, pattern = loading.rename_source_key(name, [], [], prefix, state)
        return renamed, converter_of.get(pattern), pattern or name

    return rename


def _prefixes(model: Model, names: Sequence[str]) -> Renames:
    """The renaming of the 4 line: a base model from a checkpoint with a head, or the other way round."""
    prefix = model.base_model_prefix
    is_prefixed = bool(prefix) and any(name.startswith(prefix) for name in names)
    expects = bool(prefix) and hasattr(model, prefix)

    def rename(name: str) -> tuple[str, Any, str]:
        renamed, _ = model._fix_state_dict_key_on_load(name)
        if expects and not is_prefixed:
            renamed = f"{prefix}.{renamed}"
        elif is_prefixed and not expects and renamed.startswith(f"{prefix}."):
            renamed = renamed.removeprefix(f"{prefix}.")
        return renamed, None, name

    return rename


def _ignored(model: Model) -> Callable[[str, str], bool]:
    """Whether the model's class wants a name that is missing, or one that is unexpected, to be ignored."""
    buffers = [name for name, _ in model.named_buffers()]
    also = [r"rotary_emb\.inv_freq"] if any(name.endswith("rotary_emb.inv_freq") for name in buffers) else []
    also += [r"(^|\.)position_ids$"] if any(name.endswith("position_ids") for name in buffers) else []

    def ignored(what: str, name: str) -> bool:
        patterns = list(getattr(model, f"_keys_to_ignore_on_load_{what}", None) or [])
        return any(re.search(pattern, name) for pattern in patterns + (also if what == "unexpected" else []))

    return ignored


# ---- tensors ---------------------------------------------------------------------------------------------


class _Group:
    """The tensors of a checkpoint that one parameter (or several, that were one) is made of."""

    def __init__(self, converter: Any) -> None:
        self.converter = converter
        self.members: dict[str, list[str]] = {}  # pattern -> names

    def add(self, pattern: str, name: str) -> None:
        self.members.setdefault(pattern, []).append(name)

    @property
    def names(self) -> set[str]:
        return {name for names in self.members.values() for name in names}

    def make(
        self,
        model: Model,
        renamed: str,
        state: Mapping[str, torch.Tensor],
        stored: Mapping[str, Lazy],
        problems: list[str],
    ) -> dict[str, Lazy]:
        """What the parameters are made of."""
        if self.converter is None:
            return {renamed: stored[next(iter(self.members.values()))[0]]}
        gaps = self._gaps(state[renamed].shape[0] if state[renamed].ndim else 0)
        if gaps:
            problems += [f"{name}: missing" for name in gaps]
            return {renamed: Stored(_Nothing(), renamed, state[renamed].shape, state[renamed].dtype)}
        try:
            return self._convert(model, renamed, lambda name: stored[name])
        except Exception:
            return self._computed(model, renamed, state, stored, problems)

    def _convert(self, model: Model, renamed: str, tensor_of: Callable[[str], Any]) -> dict[str, Any]:
        """Run transformers' conversion on some kind of tensors."""
        converter = copy.deepcopy(self.converter)
        for pattern, names in self.members.items():
            for name in names:
                converter.add_tensor(renamed, name, pattern, tensor_of(name))
        made = converter.convert(renamed, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def _computed(
        self,
        model: Model,
        renamed: str,
        state: Mapping[str, torch.Tensor],
        stored: Mapping[str, Lazy],
        problems: list[str],
    ) -> dict[str, Lazy]:
        """A conversion that lazy tensors do not understand: run it when it is needed, on whole tensors."""
        dtype = state[renamed].dtype
        try:
            shapes = self._convert(
                model, renamed, lambda name: torch.empty(stored[name].shape, dtype=dtype, device="meta")
            )
        except Exception as error:
            text = (str(error).splitlines() or [""])[0]
            problems.append(
                f"{renamed}: cannot be made of {', '.join(sorted(self.names, key=_natural))}: "
                f"{type(error).__name__}: {text}"
            )
            return {renamed: Stored(_Nothing(), renamed, state[renamed].shape, dtype)}

        def compute(target: str) -> torch.Tensor:
            made = self._convert(model, renamed, lambda name: stored[name].read(stored[name].whole()).to(dtype))
            result: torch.Tensor = made[target]
            return result

        return {
            target: Computed(shape.shape, dtype, sorted(self.names, key=_natural), partial(compute, target))
            for target, shape in shapes.items()
        }

    def _gaps(self, count: int) -> list[str]:
        """Names that a list of tensors lacks: numbers that are skipped, kinds of which there is none."""
        if not any(type(operation).__name__ == "MergeModulelist" for operation in self.converter.operations):
            return []
        templates: dict[str, tuple[list[str], int]] = {}
        numbers: dict[str, set[int]] = {}
        for pattern, names in self.members.items():
            parts, place = _numbered(names)
            templates[pattern] = (parts, place)
            numbers[pattern] = {int(name.split(".")[place]) for name in names}
        gaps = []
        known, (parts, place) = next(iter(templates.items()))
        for pattern in self.converter.source_patterns:
            if pattern not in templates:
                tail, other = _tail(known), _tail(pattern)
                name = ".".join(parts)
                if not name.endswith(tail):
                    continue
                templates[pattern] = ((name.removesuffix(tail) + other).split("."), place)
            own, at = templates[pattern]
            for number in sorted(set(range(count)) - numbers.get(pattern, set())):
                gaps.append(".".join([*own[:at], str(number), *own[at + 1 :]]))
        return gaps


def _numbered(names: Sequence[str]) -> tuple[list[str], int]:
    """A name in parts, and which part is the number that differs between the names."""
    parts = [name.split(".") for name in names]
    differing = [
        place
        for place, part in enumerate(parts[0])
        if part.isdigit() and len({other[place] if place < len(other) else "" for other in parts}) > 1
    ]
    numeric = [place for place, part in enumerate(parts[0]) if part.isdigit()]
    return parts[0], (differing or numeric)[-1]


def _tail(pattern: str) -> str:
    return pattern.rpartition("*.")[2].replace("\\", "")


class _Nothing:
    """What stands for tensors that are a problem already: nothing is ever read of it."""

    def tensor(self, name: str) -> torch.Tensor:
        raise LookupError(name)

    def write(self, name: str, tensor: torch.Tensor, first: int) -> None:
        raise LookupError(name)


# ---- what does not fit -----------------------------------------------------------------------------------


def _check(model: Model, state: Mapping[str, torch.Tensor], found: Match, ignored: Callable[[str, str], bool]) -> None:
    """Every parameter has a source of its shape and of a dtype that can be cast to its own."""
    tied = _tied(model, state)
    for name in list(found.sources):
        if name not in state:
            found.problems.append(f"{name}: the model has no place for it")
            del found.sources[name]
    for name, tensor in state.items():
        source = found.sources.get(name)
        if source is None:
            if not ignored("missing", name) and not any(other in found.sources for other in tied(name)):
                found.problems.append(f"{name}: missing")
            continue
        of = "" if source.pieces in ([], [name]) else f" (made of {', '.join(source.pieces[:3])}{_more(source.pieces)})"
        if tuple(source.shape) != tuple(tensor.shape):
            found.problems.append(f"{name}: expected {list(tensor.shape)}, got {list(source.shape)}{of}")
        if source.dtype != tensor.dtype and not (_is_wide(source.dtype) and _is_wide(tensor.dtype)):
            found.problems.append(f"{name}: expected {tensor.dtype}, got {source.dtype}{of}")


def _more(pieces: Sequence[str]) -> str:
    return f" and {len(pieces) - 3} more" if len(pieces) > 3 else ""


def _is_wide(dtype: torch.dtype) -> bool:
    """A floating-point number of at least 16 bits: those are cast to each other, as transformers does."""
    return dtype.is_floating_point and dtype.itemsize > 1


def _tied(model: Model, state: Mapping[str, torch.Tensor]) -> Callable[[str], list[str]]:
    """The names that share a parameter with a name: one of them in the checkpoint is enough."""
    declared = getattr(model, "all_tied_weights_keys", None)
    groups: list[set[str]] = []
    if isinstance(declared, Mapping):  # the 5 line: name -> the name it is tied to
        groups = [{one, other} for one, other in declared.items()]
    objects: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        objects.setdefault(id(parameter), set()).add(name)
    groups += [names for names in objects.values() if len(names) > 1]

    def tied(name: str) -> list[str]:
        together = {name}
        while True:
            more = set().union(*(group for group in groups if group & together)) - together
            if not more:
                return sorted(together - {name})
            together |= more

    return tied
