"""Which integer form each LayerNorm, softmax and GELU gets: one that is named, or the best of all by its SQNR.

    SQNR = 10·log10(Σ y² / Σ (y - ŷ)²) dB, y of the float function, ŷ of a form, over calibration images

Every form of every place is measured on what the float model computes there, and each place takes its best one (mixed
non-linear quantization, https://arxiv.org/abs/2407.18437, chooses by differences of the same ratio; only its abstract
was read). Measuring takes as many passes as an operation has forms, over `MEASURED` images.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qvit.models.convert import in_eval_mode, quantizers_disabled
from qvit.models.integer_functions import IntegerFunction, forms_of, functions_of, parse_forms, places, use_forms
from qvit.nonlinear import OPERATIONS

#: In place of the name of a form: the best of each place.
SQNR = "sqnr"
#: Images that forms are measured on.
MEASURED = 32
_MOST_DECIBELS = 200.0


def choose_forms(model: nn.Module, text: str, batches: Iterable[Tensor]) -> dict[str, Any]:
    """Gives the functions of a quantized model integer forms, in place.

    Args:
        model: Calibrated, without integer forms.
        text: `sqnr`, or what `parse_forms` takes.
        batches: Calibration images on the model's device.

    Returns:
        What a result says: `forms`, as a plan has them, and after `sqnr` the `sqnr` in dB by place and form.

    Raises:
        UsageError: No such form.
    """
    if text != SQNR:
        use_forms(model, parse_forms(text, model))
        return {"forms": forms_of(model)}
    use_forms(model, {operation: next(iter(OPERATIONS[operation])) for operation in set(places(model).values())})
    found = measure_forms(model, batches)
    use_forms(model, {path: max(own, key=lambda name: own[name]) for path, own in found.items() if own})
    return {"forms": forms_of(model), "sqnr": found}


@torch.no_grad()
def measure_forms(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, dict[str, float]]:
    """The SQNR in dB of every form at every integer function of a model, while it computes in float."""
    sums: dict[str, dict[str, list[float]]] = {path: {} for path, _ in functions_of(model)}

    def compare(path: str, function: IntegerFunction, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        for name, form in OPERATIONS[function.operation].items():
            error = function.values(inputs[0], form) - output
            own = sums[path].setdefault(name, [0.0, 0.0])
            own[0] += float(output.double().square().sum())
            own[1] += float(error.double().square().sum())

    left = MEASURED
    with quantizers_disabled(model), in_eval_mode(model), ExitStack() as stack:
        for path, function in functions_of(model):
            stack.enter_context(function.register_forward_hook(partial(compare, path)))
        for batch in batches:
            model(batch[:left])
            left -= len(batch)
            if left <= 0:
                break
    return {path: {name: _decibels(*pair) for name, pair in own.items()} for path, own in sums.items()}


def _decibels(signal: float, noise: float) -> float:
    """Within ±200: a form without an error has no ratio."""
    if noise == 0 or signal == 0:
        return _MOST_DECIBELS if noise == 0 else -_MOST_DECIBELS
    return max(-_MOST_DECIBELS, min(_MOST_DECIBELS, round(10 * math.log10(signal / noise), 2)))
