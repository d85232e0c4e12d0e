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
    from qvit.allocate import allocate_plan, frontier, round_to_budget
    from qvit.analysis import Probe, analyze, analyze_heads, analyze_parts, analyze_widths
    from qvit.bias_correction import correct_biases
    from qvit.calibration import calibrate
    from qvit.convert import Stage, freeze, plan_of, quantize, quantizers_disabled, stage_of
    from qvit.cost import CostModel, parse_budget
    from qvit.deploy.artifact import Artifact
    from qvit.deploy.engines import create_engine, load
    from qvit.deploy.onnx import export_onnx, export_openvino
    from qvit.dry_run import plan_run
    from qvit.errors import QvitError, UsageError
    from qvit.families import inspect_model
    from qvit.labels_run import LabelRequest, write_labels
    from qvit.methods.ptq import post_training_quantize
    from qvit.packed_run import pack_run
    from qvit.plan import QuantPlan, Rule
    from qvit.ptq_run import ptq
    from qvit.quantizers import quantizers_of
    from qvit.reconstruction import ReconstructOptions, reconstruct
    from qvit.reparameterization import reparameterize
    from qvit.run import evaluate_run, load_run, resume, train
    from qvit.sensitivity import Sensitivity, measure_sensitivity
    from qvit.spec import PerChannel, PerHead, PerTensor, TensorSpec
    from qvit.subject import Request
    from qvit.training.config import TrainConfig
    from qvit.training.data import calibration_batches as calibration_batches
    from qvit.training.data import data_config_of as data_config_of
    from qvit.training.data import eval_loader as eval_loader
    from qvit.training.data import open_data as open_data
    from qvit.training.data import train_loader as train_loader
    from qvit.training.evaluate import evaluate
    from qvit.training.labels.store import SoftLabelStore
    from qvit.training.models import create_model
    from qvit.training.recipe import config_from_recipe

_PUBLIC = {
    "qvit.allocate": ("allocate_plan", "frontier", "round_to_budget"),
    "qvit.analysis": ("Probe", "analyze", "analyze_heads", "analyze_parts", "analyze_widths"),
    "qvit.bias_correction": ("correct_biases",),
    "qvit.calibration": ("calibrate",),
    "qvit.convert": ("Stage", "freeze", "plan_of", "quantize", "quantizers_disabled", "stage_of"),
    "qvit.cost": ("CostModel", "parse_budget"),
    "qvit.deploy.artifact": ("Artifact",),
    "qvit.deploy.engines": ("create_engine", "load"),
    "qvit.deploy.onnx": ("export_onnx", "export_openvino"),
    "qvit.dry_run": ("plan_run",),
    "qvit.errors": ("QvitError", "UsageError"),
    "qvit.families": ("inspect_model",),
    "qvit.labels_run": ("LabelRequest", "write_labels"),
    "qvit.methods.ptq": ("post_training_quantize",),
    "qvit.packed_run": ("pack_run",),
    "qvit.plan": ("QuantPlan", "Rule"),
    "qvit.ptq_run": ("ptq",),
    "qvit.quantizers": ("quantizers_of",),
    "qvit.reconstruction": ("ReconstructOptions", "reconstruct"),
    "qvit.reparameterization": ("reparameterize",),
    "qvit.run": ("evaluate_run", "load_run", "resume", "train"),
    "qvit.sensitivity": ("Sensitivity", "measure_sensitivity"),
    "qvit.spec": ("PerChannel", "PerHead", "PerTensor", "TensorSpec"),
    "qvit.subject": ("Request",),
    "qvit.training.config": ("TrainConfig",),
    "qvit.training.data": ("calibration_batches", "data_config_of", "eval_loader", "open_data", "train_loader"),
    "qvit.training.evaluate": ("evaluate",),
    "qvit.training.labels.store": ("SoftLabelStore",),
    "qvit.training.models": ("create_model",),
    "qvit.training.recipe": ("config_from_recipe",),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = [
    "__version__",
    "Artifact",
    "CostModel",
    "LabelRequest",
    "PerChannel",
    "PerHead",
    "PerTensor",
    "Probe",
    "QuantPlan",
    "QvitError",
    "ReconstructOptions",
    "Request",
    "Rule",
    "Sensitivity",
    "SoftLabelStore",
    "Stage",
    "TensorSpec",
    "TrainConfig",
    "UsageError",
    "allocate_plan",
    "analyze",
    "analyze_heads",
    "analyze_parts",
    "analyze_widths",
    "calibrate",
    "calibration_batches",
    "config_from_recipe",
    "correct_biases",
    "create_engine",
    "create_model",
    "data_config_of",
    "eval_loader",
    "evaluate",
    "evaluate_run",
    "export_onnx",
    "export_openvino",
    "freeze",
    "frontier",
    "inspect_model",
    "load",
    "load_run",
    "measure_sensitivity",
    "open_data",
    "pack_run",
    "parse_budget",
    "plan_of",
    "plan_run",
    "post_training_quantize",
    "ptq",
    "quantize",
    "quantizers_disabled",
    "quantizers_of",
    "reconstruct",
    "reparameterize",
    "resume",
    "round_to_budget",
    "stage_of",
    "train",
    "train_loader",
    "write_labels",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qvit' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
