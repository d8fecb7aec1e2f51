# SPDX-License-Identifier: Apache-2.0
"""The planner: which layout each MoE layer should have on given ranks, why, and what it will cost. Needs no torch.

shapes.py      layers and models: presets, HuggingFace configs and models
machines.py    what ranks and their links can do: presets, this machine's calibration
histograms.py  how tokens spread over experts
planning.py    moeshard.plan: asks the C core (csrc/plan) for each layer
results.py     ModelPlan: what it returns
simulation.py  layers run on paper: routing drawn anew, ranks that are late
maps.py        where the best layout changes
calibration.py measures this machine
command.py     the command `moeshard plan`
"""

from .machines import Device, Link, Machine, machine
from .planning import plan
from .results import LayerPlan, ModelPlan
from .shapes import LayerShape, ModelShape, model_shape
from .simulation import simulate

__all__ = [
    "Device",
    "LayerPlan",
    "LayerShape",
    "Link",
    "Machine",
    "ModelPlan",
    "ModelShape",
    "machine",
    "model_shape",
    "plan",
    "simulate",
]
