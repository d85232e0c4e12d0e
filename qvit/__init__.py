"""qvit: Vision Transformers at 2 to 8 bits.

The public API is what this file names; it is loaded on first use, so that `qvit --help` need not import torch.

    plan → quantize → calibrate → [train] → freeze        (see `qvit.convert`)
    TrainConfig → train → load_run                        (see `qvit.run`)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from qvit.version import __version__ as __version__

if TYPE_CHECKING:
    from qvit.allocate import round_to_budget
    from qvit.analysis import Probe, analyze, analyze_heads, analyze_parts, analyze_widths
    from qvit.calibration import calibrate
    from qvit.convert import Stage, freeze, plan_of, quantize, quantizers_disabled, stage_of
    from qvit.cost import CostModel, parse_budget
    from qvit.dry_run import plan_run
    from qvit.errors import QvitError, UsageError
    from qvit.families import inspect_model
    from qvit.plan import QuantPlan, Rule
    from qvit.quantizers import quantizers_of
    from qvit.run import evaluate_run, load_run, resume, train
    from qvit.spec import PerChannel, PerHead, PerTensor, TensorSpec
    from qvit.subject import Request
    from qvit.training.config import TrainConfig
    from qvit.training.data import calibration_batches as calibration_batches
    from qvit.training.data import data_config_of as data_config_of
    from qvit.training.data import eval_loader as eval_loader
    from qvit.training.data import open_data as open_data
    from qvit.training.data import train_loader as train_loader
    from qvit.training.evaluate import evaluate
    from qvit.training.models import create_model
    from qvit.training.recipe import config_from_recipe

_PUBLIC = {
    "qvit.allocate": ("round_to_budget",),
    "qvit.analysis": ("Probe", "analyze", "analyze_heads", "analyze_parts", "analyze_widths"),
    "qvit.calibration": ("calibrate",),
    "qvit.convert": ("Stage", "freeze", "plan_of", "quantize", "quantizers_disabled", "stage_of"),
    "qvit.cost": ("CostModel", "parse_budget"),
    "qvit.dry_run": ("plan_run",),
    "qvit.errors": ("QvitError", "UsageError"),
    "qvit.families": ("inspect_model",),
    "qvit.plan": ("QuantPlan", "Rule"),
    "qvit.quantizers": ("quantizers_of",),
    "qvit.run": ("evaluate_run", "load_run", "resume", "train"),
    "qvit.spec": ("PerChannel", "PerHead", "PerTensor", "TensorSpec"),
    "qvit.subject": ("Request",),
    "qvit.training.config": ("TrainConfig",),
    "qvit.training.data": ("calibration_batches", "data_config_of", "eval_loader", "open_data", "train_loader"),
    "qvit.training.evaluate": ("evaluate",),
    "qvit.training.models": ("create_model",),
    "qvit.training.recipe": ("config_from_recipe",),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = [
    "__version__",
    "CostModel",
    "PerChannel",
    "PerHead",
    "PerTensor",
    "Probe",
    "QuantPlan",
    "QvitError",
    "Request",
    "Rule",
    "Stage",
    "TensorSpec",
    "TrainConfig",
    "UsageError",
    "analyze",
    "analyze_heads",
    "analyze_parts",
    "analyze_widths",
    "calibrate",
    "calibration_batches",
    "config_from_recipe",
    "create_model",
    "data_config_of",
    "eval_loader",
    "evaluate",
    "evaluate_run",
    "freeze",
    "inspect_model",
    "load_run",
    "open_data",
    "parse_budget",
    "plan_of",
    "plan_run",
    "quantize",
    "quantizers_disabled",
    "quantizers_of",
    "resume",
    "round_to_budget",
    "stage_of",
    "train",
    "train_loader",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qvit' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
