"""Calibration: every quantizer gets the scales (and offsets) of least squared error, for each width that it may take.

Activations are observed while training images pass through the model in float, batch by batch, into histograms
(`quantizers/observers.py`): memory does not grow with the number of images. Weights are fitted from their values. The
Q-ViT code calibrates on one batch of 64 validation images in folder order, that is, on two classes; here the images
come from the training set, shuffled by whoever makes the batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from qvit.errors import QvitError, UsageError
from qvit.models.convert import Stage, in_eval_mode, quantizers_disabled, stage_of
from qvit.models.families import inspect_model
from qvit.models.layers import weight_of
from qvit.models.sizes import check_size
from qvit.quantizers import Quantizer, quantizers_of
from qvit.quantizers.observers import BINS, HistogramObserver, ValueObserver


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[Tensor],
    *,
    observer: str = "mse",
    progress: Callable[[int], None] | None = None,
) -> nn.Module:
    """Initialises all quantizers, in place; scales that were there are chosen anew.

    Args:
        model: A quantized model; its mode (train or eval) is restored.
        batches: Image batches (B, channels, height, width), from training data, on the model's device; of any sizes
            that the model takes.
        observer: How the range of an activation is chosen: `mse`, `percentile` or `minmax` (`quantizers/ranges.py`).
            Weights are always fitted by least squared error: there are no outliers to guard against.
        progress: Called with the number of images after each batch.

    Raises:
        UsageError: If the model is float or does not take images of such a size, or there is no such observer.
        QvitError: If there are no images, or activations are not finite; the site is named.
    """
    if stage_of(model) is Stage.FLOAT:
        raise UsageError("calibrate needs quantizers: call qvit.quantize(model, plan) first")
    sites = inspect_model(model).sites
    quantizers = dict(quantizers_of(model))
    images, reached = 0, ""

    def note(site: str, *_: object) -> None:
        nonlocal reached
        reached = site

    with quantizers_disabled(model), in_eval_mode(model), ExitStack() as stack:
        for name, quantizer in quantizers.items():
            if sites[name].role == "activation":
                quantizer.observer = quantizer.create_observer(observer)
                stack.callback(setattr, quantizer, "observer", None)
                stack.enter_context(quantizer.register_forward_pre_hook(partial(note, name)))
        for batch in batches:
            if not torch.isfinite(batch).all():
                raise QvitError(
                    f"NaN or infinite pixels among calibration images {images} to {images + len(batch) - 1}"
                )
            check_size(model, batch.shape[-2:])
            try:
                model(batch)
            except QvitError as error:
                raise QvitError(f"site '{reached}': {error}") from None
            images += len(batch)
            if progress is not None:
                progress(images)
        if images == 0:
            raise QvitError("no images to calibrate with: pass at least one batch of training images")
        for name, quantizer in quantizers.items():
            try:
                quantizer.initialize(quantizer.observer or _observed_weight(quantizer, weight_of(model, name)))
            except QvitError as error:
                raise QvitError(f"site '{name}': {error}") from None
    return model


def _observed_weight(quantizer: Quantizer, weight: Tensor) -> HistogramObserver:
    """An observer that has seen a weight: its values, or a histogram where there are more of them than bins."""
    few = weight.numel() <= BINS * math.prod(quantizer.scale_shape)
    observer = ValueObserver(quantizer.scale_shape) if few else quantizer.create_observer()
    observer.observe(quantizer.view(weight))
    return observer
