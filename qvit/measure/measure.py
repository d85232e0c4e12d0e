"""One call for all metrics: images and a float model in, a table of predicted loss increases out.

    fisher    squared gradients, one backward per image             the default
    hessian   trace and mean squared error, HAWQ-V2                 as long as fisher
    kl        every head of every site at every width, one by one   hours for DeiT-T; what the others estimate
    learned   the scales of a model trained with switchable scales  no images

The first three predict the same number, the divergence KL(p || p̂) between the float model's answer and that of the
model with one site quantized, and so can be compared and added. Predictions for single sites are added as if errors
were independent, as in ZeroQ and HAWQ; at 2 bits they are not small, and second order is a rough guide.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qvit.errors import QvitError, UsageError
from qvit.measure.metric import METRICS, Task
from qvit.measure.table import Sensitivity, check_widths
from qvit.models.convert import Stage, plan_of, stage_of
from qvit.models.families import inspect_model
from qvit.models.features import answers_with_features
from qvit.plan.quant_plan import QuantPlan, plan_from

MINIMUM_IMAGES = 4


def measure_sensitivity(
    model: nn.Module,
    batches: Iterable[Tensor] = (),
    *,
    metric: str | None = None,
    widths: Iterable[int] = range(2, 9),
    seed: int = 0,
    type_normalised: bool = False,
    plan: QuantPlan | str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    partial: str | Path | None = None,
    name: str | None = None,
) -> Sensitivity:
    """How much the loss rises when one site, or one head of it, is quantized: for all sites and widths.

    Args:
        model: A float timm model of a supported family; it is copied, not changed. For metric `learned` a model
            trained with switchable scales.
        batches: Image batches (B, channels, height, width) from training data, on the model's device; at least 4
            images. All are kept in memory.
        metric: `fisher`, `hessian`, `kl` or `learned`; `features` or `cosine` of a model that answers with features. By
            default `fisher` or `features`.
        widths: Candidate widths, 2 to 16.
        seed: Of the random signs of `fisher` and `hessian`.
        type_normalised: Whether each kind of tensor gets the same mean (see `Sensitivity`).
        plan: Grids and granularity to measure with, as a plan, preset or file; default: those of the sites. Its widths
            play no part; sites that it leaves in float are not measured.
        progress: Called with what is done and how much there is: images, or sites for `kl`.
        partial: File for what has been measured so far; a repeated call goes on from there (see `partial.py`).
        name: The model's name for the record; default: timm's.

    Raises:
        UsageError: Unknown metric, quantized or unsupported model, wrong widths.
        QvitError: Too few images, or NaN among images, activations or gradients.
    """
    metric = metric or default_metric(model)
    chosen = METRICS[metric]
    task = Task(metric, model, check_widths(widths), seed=seed, file=None if partial is None else Path(partial))
    started = time.monotonic()
    known = name or _name_of(model)
    if not chosen.reads_images:
        if plan is not None:
            raise UsageError(
                f"metric '{metric}' has the grids of a trained model, and no plan: measure the run with "
                f"`qvit sensitivity RUN --metric {metric}`, and give that file as --sensitivity"
            )
        raw = chosen.table(task)
        grids = QuantPlan(metric, (), plan_of(model).sites, known)
    else:
        if stage_of(model) is not Stage.FLOAT:
            raise UsageError("sensitivity is measured on a float model: this one is quantized already")
        task.batches = _checked(batches)
        task.plan = (QuantPlan("default") if plan is None else plan_from(plan)).resolve(
            inspect_model(model).sites, known
        )
        if not any(spec is not None for spec in task.plan.sites.values()):
            raise UsageError("the plan leaves every site in float: there is nothing to measure")
        task.progress = progress or task.progress
        raw = chosen.table(task)
        grids = None if plan is None else task.plan
    return Sensitivity.from_raw(
        raw,
        type_normalised=type_normalised,
        model=known,
        metric=metric,
        images=sum(len(batch) for batch in task.batches),
        seed=seed,
        seconds=time.monotonic() - started,
        widths=task.widths,
        plan=grids,
    )


def default_metric(model: nn.Module) -> str:
    """The estimate that suits what a model answers with."""
    return "features" if answers_with_features(model) else "fisher"


def _checked(batches: Iterable[Tensor]) -> list[Tensor]:
    kept = []
    for batch in batches:
        if not isinstance(batch, Tensor) or batch.dim() != 4:
            raise UsageError("batches are tensors (images, channels, height, width), without labels")
        if not bool(torch.isfinite(batch).all()):
            raise QvitError(f"NaN or infinite pixels in batch {len(kept)} of the images")
        kept.append(batch)
    images = sum(len(batch) for batch in kept)
    if images < MINIMUM_IMAGES:
        raise QvitError(
            f"too few images to measure sensitivity with: {images}; give at least {MINIMUM_IMAGES}, better 32 or more"
        )
    return kept


def _name_of(model: nn.Module) -> str:
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    return str((config.get("architecture") if hasattr(config, "get") else None) or type(model).__name__)
