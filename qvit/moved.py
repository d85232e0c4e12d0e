"""Public names of qvit 0.1: they work for one more version, with a warning that says what takes their place."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any

#: Module → the names that are imported from there now; `old: new` where the name has changed too.
MOVED: dict[str, dict[str, str]] = {
    module: {name.split(":")[0]: name.split(":")[-1] for name in names.split()}
    for module, names in {
        "qvit.allocate": "frontier round_to_budget",
        "qvit.data.labels.store": "SoftLabelStore",
        "qvit.data.open": "train_loader",
        "qvit.deploy.engines": "create_engine",
        "qvit.errors": "UsageError",
        "qvit.measure": "Sensitivity",
        "qvit.methods.ptq.bias_correction": "correct_biases",
        "qvit.methods.ptq.stages": "post_training_quantize:ptq",
        "qvit.methods.ptq.reconstruction": "reconstruct",
        "qvit.methods.ptq.reparameterization": "reparameterize",
        "qvit.models.convert": "Stage quantizers_disabled stage_of",
        "qvit.plan.budget": "parse_budget",
        "qvit.plan.cost": "CostModel",
        "qvit.plan.spec": "PerChannel PerHead PerTensor TensorSpec",
        "qvit.quantizers": "quantizers_of",
        "qvit.runs.analysis": "Probe analyze analyze_heads analyze_parts analyze_widths",
        "qvit.runs.dry_run": "plan_run:dry_run",
        "qvit.runs.finished": "evaluate_run",
        "qvit.runs.labels": "LabelRequest write_labels",
        "qvit.runs.subject": "Request",
        "qvit.training.recipe": "config_from_recipe",
    }.items()
}


def find(name: str) -> Any:
    """What `qvit.NAME` was in version 0.1. Raises AttributeError for a name that was never there."""
    for module, names in MOVED.items():
        if name in names:
            new = names[name]
            way = f"from {module} import {new}" if new == name else f"qvit.{new}"
            warnings.warn(f"qvit.{name} goes with the next version: use `{way}`", DeprecationWarning, stacklevel=3)
            return getattr(importlib.import_module(module), new)
    raise AttributeError(f"module 'qvit' has no attribute '{name}'")


def accepting_a_config(ptq: Callable[..., Any]) -> Callable[..., Any]:
    """`qvit.ptq`, which in version 0.1 made a run of a `TrainConfig`."""

    @functools.wraps(ptq)
    def either(model: Any, *args: Any, **kwargs: Any) -> Any:
        if type(model).__name__ != "TrainConfig":
            return ptq(model, *args, **kwargs)
        from qvit.runs.run import train

        message = "qvit.ptq(config, out) goes with the next version: use `qvit.train(config, out)`"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return train(model, *args, **kwargs)

    return either
