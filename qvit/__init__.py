"""qvit: Vision Transformers at 2 to 8 bits. The public API is what this file names; it is loaded on first use, so that
`qvit --help` need not import torch.

    plan → quantize → calibrate → [train] → freeze        (see `qvit.convert`)
    TrainConfig → train → load_run                         (see `qvit.run`)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from qvit.version import __version__ as __version__

if TYPE_CHECKING:
    from qvit.allocate import round_to_budget as round_to_budget
    from qvit.calibrate import calibrate as calibrate
    from qvit.convert import Stage as Stage
    from qvit.convert import freeze as freeze
    from qvit.convert import plan_of as plan_of
    from qvit.convert import quantize as quantize
    from qvit.convert import quantizers_disabled as quantizers_disabled
    from qvit.convert import stage_of as stage_of
    from qvit.cost import CostModel as CostModel
    from qvit.cost import parse_budget as parse_budget
    from qvit.errors import QvitError as QvitError
    from qvit.errors import UsageError as UsageError
    from qvit.families import inspect_model as inspect_model
    from qvit.plan import QuantPlan as QuantPlan
    from qvit.plan import Rule as Rule
    from qvit.quantizers import quantizers_of as quantizers_of
    from qvit.run import evaluate_run as evaluate_run
    from qvit.run import load_run as load_run
    from qvit.run import resume as resume
    from qvit.run import train as train
    from qvit.spec import PerChannel as PerChannel
    from qvit.spec import PerHead as PerHead
    from qvit.spec import PerTensor as PerTensor
    from qvit.spec import TensorSpec as TensorSpec
    from qvit.training.config import TrainConfig as TrainConfig
    from qvit.training.evaluate import evaluate as evaluate
    from qvit.training.models import create_model as create_model

_PUBLIC = {
    "qvit.allocate": ("round_to_budget",),
    "qvit.calibrate": ("calibrate",),
    "qvit.convert": ("Stage", "freeze", "plan_of", "quantize", "quantizers_disabled", "stage_of"),
    "qvit.cost": ("CostModel", "parse_budget"),
    "qvit.errors": ("QvitError", "UsageError"),
    "qvit.families": ("inspect_model",),
    "qvit.plan": ("QuantPlan", "Rule"),
    "qvit.quantizers": ("quantizers_of",),
    "qvit.run": ("evaluate_run", "load_run", "resume", "train"),
    "qvit.spec": ("PerChannel", "PerHead", "PerTensor", "TensorSpec"),
    "qvit.training.config": ("TrainConfig",),
    "qvit.training.evaluate": ("evaluate",),
    "qvit.training.models": ("create_model",),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qvit' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
