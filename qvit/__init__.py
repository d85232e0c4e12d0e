"""qvit: Vision Transformers at 2 to 8 bits.

The public API is what this file names; it is loaded on first use, so that `qvit --help` need not import torch.

    plan → quantize → calibrate → [train] → freeze        (see `qvit.models.convert`)
    TrainConfig → train → load_run                        (see `qvit.runs.run`)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from qvit.version import __version__ as __version__

if TYPE_CHECKING:
    from qvit.allocate import allocate_plan, frontier, round_to_budget
    from qvit.data.labels.store import SoftLabelStore
    from qvit.data.open import calibration_batches as calibration_batches
    from qvit.data.open import data_config_of as data_config_of
    from qvit.data.open import eval_loader as eval_loader
    from qvit.data.open import open_data as open_data
    from qvit.data.open import train_loader as train_loader
    from qvit.deploy.engines import create_engine, load
    from qvit.deploy.export.onnx import export_onnx, export_openvino
    from qvit.deploy.file.artifact import Artifact
    from qvit.errors import QvitError, UsageError
    from qvit.measure import Sensitivity, measure_sensitivity
    from qvit.methods.ptq.bias_correction import correct_biases
    from qvit.methods.ptq.method import post_training_quantize
    from qvit.methods.ptq.reconstruction import ReconstructOptions, reconstruct
    from qvit.methods.ptq.reparameterization import reparameterize
    from qvit.models.calibrate import calibrate
    from qvit.models.convert import Stage, freeze, plan_of, quantize, quantizers_disabled, stage_of
    from qvit.models.create import create_model
    from qvit.models.families import inspect_model
    from qvit.plan.budget import parse_budget
    from qvit.plan.cost import CostModel
    from qvit.plan.quant_plan import QuantPlan, Rule
    from qvit.plan.spec import PerChannel, PerHead, PerTensor, TensorSpec
    from qvit.quantizers import quantizers_of
    from qvit.runs.analysis import Probe, analyze, analyze_heads, analyze_parts, analyze_widths
    from qvit.runs.dry_run import plan_run
    from qvit.runs.labels import LabelRequest, write_labels
    from qvit.runs.packed import pack_run
    from qvit.runs.ptq import ptq
    from qvit.runs.run import evaluate_run, load_run, resume, train
    from qvit.runs.subject import Request
    from qvit.training.config import TrainConfig
    from qvit.training.evaluate import evaluate
    from qvit.training.recipe import config_from_recipe

_PUBLIC = {
    "qvit.allocate": ("allocate_plan", "frontier", "round_to_budget"),
    "qvit.runs.analysis": ("Probe", "analyze", "analyze_heads", "analyze_parts", "analyze_widths"),
    "qvit.methods.ptq.bias_correction": ("correct_biases",),
    "qvit.models.calibrate": ("calibrate",),
    "qvit.models.convert": ("Stage", "freeze", "plan_of", "quantize", "quantizers_disabled", "stage_of"),
    "qvit.plan.budget": ("parse_budget",),
    "qvit.plan.cost": ("CostModel",),
    "qvit.deploy.file.artifact": ("Artifact",),
    "qvit.deploy.engines": ("create_engine", "load"),
    "qvit.deploy.export.onnx": ("export_onnx", "export_openvino"),
    "qvit.runs.dry_run": ("plan_run",),
    "qvit.errors": ("QvitError", "UsageError"),
    "qvit.models.families": ("inspect_model",),
    "qvit.runs.labels": ("LabelRequest", "write_labels"),
    "qvit.methods.ptq.method": ("post_training_quantize",),
    "qvit.runs.packed": ("pack_run",),
    "qvit.plan.quant_plan": ("QuantPlan", "Rule"),
    "qvit.runs.ptq": ("ptq",),
    "qvit.quantizers": ("quantizers_of",),
    "qvit.methods.ptq.reconstruction": ("ReconstructOptions", "reconstruct"),
    "qvit.methods.ptq.reparameterization": ("reparameterize",),
    "qvit.runs.run": ("evaluate_run", "load_run", "resume", "train"),
    "qvit.measure": ("Sensitivity", "measure_sensitivity"),
    "qvit.plan.spec": ("PerChannel", "PerHead", "PerTensor", "TensorSpec"),
    "qvit.runs.subject": ("Request",),
    "qvit.training.config": ("TrainConfig",),
    "qvit.data.open": ("calibration_batches", "data_config_of", "eval_loader", "open_data", "train_loader"),
    "qvit.training.evaluate": ("evaluate",),
    "qvit.data.labels.store": ("SoftLabelStore",),
    "qvit.models.create": ("create_model",),
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
