# SPDX-License-Identifier: Apache-2.0
"""Balanced Mixture-of-Experts inference: every expert is cut over every rank (MoEShard, arXiv 2503.08467).

    import moeshard
    model = moeshard.shard(model)      # every MoE layer of a HuggingFace model; the same outputs as before

Names are imported on first use, so that ``import moeshard`` costs what ``import numpy`` costs and needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

try:
    from . import _core
except ImportError as error:
    if not str(error).startswith("cannot import name"):  # it is there, but cannot be loaded
        raise
    raise ImportError(
        f"moeshard was imported from a source tree without its C extension ({__path__[0]}): "
        "run `make build` (or `pip install -e .`) there, or leave this folder to use the installed package"
    ) from error

if TYPE_CHECKING:
    from .adapters import Adapter, register_adapter
    from .api import shard, unshard
    from .errors import (
        ArgumentError,
        CheckpointError,
        CommError,
        CommTimeout,
        CudaError,
        DTypeError,
        MoeshardError,
        PeerError,
        RangeError,
        RankLost,
        RankMismatch,
        ShapeError,
    )
    from .experts import ExpertWeights
    from .functional import PackedExperts, fused_experts, pack
    from .group import Group, init
    from .implementation import disable_transformers, enable_transformers
    from .launcher import Ranks, launch, worker_state
    from .layer import ShardedExperts
    from .loading import from_pretrained
    from .paths import TokenPaths, record_routing
    from .placement import Placement, place
    from .planner import ModelPlan, plan
    from .plans import Plan
    from .profiles import Profile, profile
    from .reports import Report, report
    from .saving import save_pretrained, state_dict
    from .speeds import measure_speed

__version__ = _core.__version__

__all__ = [
    "Adapter",
    "ArgumentError",
    "CheckpointError",
    "CommError",
    "CommTimeout",
    "CudaError",
    "DTypeError",
    "ExpertWeights",
    "Group",
    "ModelPlan",
    "MoeshardError",
    "PackedExperts",
    "PeerError",
    "Placement",
    "Plan",
    "Profile",
    "RangeError",
    "RankLost",
    "RankMismatch",
    "Ranks",
    "Report",
    "ShapeError",
    "ShardedExperts",
    "TokenPaths",
    "disable_transformers",
    "enable_transformers",
    "from_pretrained",
    "fused_experts",
    "init",
    "launch",
    "measure_speed",
    "pack",
    "place",
    "plan",
    "profile",
    "record_routing",
    "register_adapter",
    "report",
    "save_pretrained",
    "shard",
    "state_dict",
    "unshard",
    "worker_state",
]

# Files are named so that no public function shares its name with a submodule: importing the submodule would
# otherwise replace the function.
_ROOMS = {
    "adapters": ("Adapter", "register_adapter"),
    "api": ("shard", "unshard"),
    "experts": ("ExpertWeights",),
    "functional": ("PackedExperts", "fused_experts", "pack"),
    "group": ("Group", "init"),
    "implementation": ("disable_transformers", "enable_transformers"),
    "launcher": ("Ranks", "launch", "worker_state"),
    "layer": ("ShardedExperts",),
    "loading": ("from_pretrained",),
    "paths": ("TokenPaths", "record_routing"),
    "placement": ("Placement", "place"),
    "planner": ("ModelPlan", "plan"),
    "plans": ("Plan",),
    "profiles": ("Profile", "profile"),
    "reports": ("Report", "report"),
    "saving": ("save_pretrained", "state_dict"),
    "speeds": ("measure_speed",),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'moeshard' has no attribute {name!r}")
    value = getattr(import_module(f".{_ROOM_OF.get(name, 'errors')}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
