"""The life of a model: float → quantized → calibrated → frozen.

    timm.create_model ── quantize(plan) ── calibrate ── [learn widths] ── freeze ── [train on]
         FLOAT              QUANTIZED       CALIBRATED                     FROZEN

The stage is not stored anywhere: it is read off the quantizers. A step taken in the wrong order raises, and the message
says what to call.
"""

from __future__ import annotations

import copy
import enum
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from qvit.errors import UsageError
from qvit.models.families import family_of, inspect_model
from qvit.models.integer_functions import forms_of, in_float, use_forms
from qvit.plan.quant_plan import QuantPlan, plan_from
from qvit.quantizers import quantizers_of


class Stage(enum.IntEnum):
    """How far a model has come; ordered."""

    FLOAT = 0
    QUANTIZED = 1
    CALIBRATED = 2
    FROZEN = 3


def stage_of(model: nn.Module) -> Stage:
    """The stage of a model; the least one of its quantizers."""
    quantizers = [quantizer for _, quantizer in quantizers_of(model)]
    if not quantizers:
        return Stage.FLOAT
    if not all(quantizer.calibrated for quantizer in quantizers):
        return Stage.QUANTIZED
    return Stage.CALIBRATED if any(quantizer.learns_width for quantizer in quantizers) else Stage.FROZEN


def quantize(model: nn.Module, plan: QuantPlan | str | Path, *, in_place: bool = False) -> nn.Module:
    """Puts quantizers into a float model.

    Args:
        model: A timm model of a supported family.
        plan: A plan, a preset such as `w4a4`, or the path of a plan file.
        in_place: Changes `model` itself; by default a copy is made and the float model stays as it is.

    Returns:
        The quantized model: same call, same output shape, same float keys; calibrate it before use.

    Raises:
        UsageError: Already quantized, unsupported, or the plan does not fit.
    """
    if stage_of(model) is not Stage.FLOAT:
        raise UsageError("this model is quantized already: start from the float model")
    sites = inspect_model(model).sites
    resolved = plan_from(plan).resolve(sites)
    target = model if in_place else copy.deepcopy(model)
    family_of(target).swap(target, sites, resolved.sites)
    use_forms(target, resolved.nonlinear)
    return target


def plan_of(model: nn.Module, name: str = "model", model_name: str | None = None) -> QuantPlan:
    """The resolved plan of a quantized model. While widths are learned, it holds their rounded values."""
    if stage_of(model) is Stage.FLOAT:
        raise UsageError("a float model has no plan: call qvit.quantize(model, plan) first")
    found = dict(quantizers_of(model))
    specs = {}
    for site in inspect_model(model).sites:
        quantizer = found.get(site)
        if quantizer is None:
            specs[site] = None
            continue
        widths = [int(width) for width in quantizer.integer_bit_width().detach().flatten().tolist()]
        specs[site] = quantizer.spec.changed({"bit_width": widths if len(quantizer.spec.widths) > 1 else widths[0]})
    return QuantPlan(name, (), specs, model_name, forms_of(model))


def freeze(model: nn.Module, widths: Mapping[str, tuple[int, ...]] | None = None) -> nn.Module:
    """Makes all widths plain integers, in place.

    Args:
        model: A calibrated model.
        widths: Final widths by site; sites that are not named round to nearest.

    Raises:
        UsageError: If the model is not calibrated, or a site does not exist.
    """
    if stage_of(model) < Stage.CALIBRATED:
        raise UsageError(
            "freeze comes after calibration: call qvit.quantize(model, plan), then qvit.calibrate(model, batches)"
        )
    found = dict(quantizers_of(model))
    unknown = [site for site in widths or {} if site not in found]
    if unknown:
        raise UsageError(f"cannot freeze '{unknown[0]}': the model has no quantizer there")
    for site, quantizer in found.items():
        quantizer.freeze((widths or {}).get(site))
    return model


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block the model is in eval mode; afterwards in the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        yield model
    finally:
        model.train(was_training)


@contextmanager
def quantizers_disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block the model computes in float: quantizers pass their inputs on, functions have no integers."""
    before = [(quantizer, quantizer.enabled) for _, quantizer in quantizers_of(model)]
    try:
        for quantizer, _ in before:
            quantizer.enabled = False
        with in_float(model):
            yield model
    finally:
        for quantizer, enabled in before:
            quantizer.enabled = enabled


def take_weights(model: nn.Module, other: nn.Module) -> None:
    """Gives a quantized model the weights, biases and scales of another one, which differs from it in widths alone."""
    own = model.state_dict()
    model.load_state_dict(
        {key: own[key] if key.endswith(".bit_width") else value for key, value in other.state_dict().items()}
    )
