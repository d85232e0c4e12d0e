"""A quantized model that starts from another one: the weights as they are, scales carried over to the new widths.

    same spec       the quantizer's numbers, unchanged
    other widths    s' = s·ρ, the offset unchanged        ρ of least Σ (q(x; s', b') - clamp(x, l, u))²

where x is what the other model computes, quantized as it is, and [l, u] is the range that its scale had come to cover.
ρ is one of 65 candidates between 1, which keeps the steps, and quant_max / quant_max', which keeps the range. So what
training had decided to clip stays clipped, and within that range each new width gets the steps that suit it: with the
range itself, 2 bits round nearly everything to zero, with the steps of 8 bits they clip nearly everything. Ours; the
paper of multi-step distillation (Ranjan and Savakis 2024) could not be read.

Only learned scales on uniform grids are carried over, where both models share them alike. Others (`statsq`, `dq`, `irm`
...), and sites that the other model leaves in float, are calibrated on the inherited weights, like those of any run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from qvit.errors import UsageError, first_line
from qvit.functional import dequantize, integer_range, quantize
from qvit.models.calibrate import calibrate
from qvit.models.convert import Stage, in_eval_mode, stage_of
from qvit.models.families import inspect_model
from qvit.models.layers import weight_of
from qvit.quantizers import Quantizer, quantizers_of
from qvit.quantizers.bank import BankQuantizer
from qvit.quantizers.lsq import LSQQuantizer
from qvit.quantizers.observers import HistogramObserver

_CANDIDATES = 64


@torch.no_grad()
def inherit(model: nn.Module, source: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """Calibrates a quantized model such that it continues another one, in place.

    Args:
        model: A quantized model, calibrated or not.
        source: A quantized model with fixed widths, of the same architecture, on the same device; stays as it is.
        batches: Training images (B, channels, height, width), on the models' device; passed through both.

    Returns:
        `model`, calibrated.

    Raises:
        UsageError: `source` is not a finished quantized model, or is another architecture.
    """
    if stage_of(source) is not Stage.FROZEN:
        raise UsageError("a model is continued from a quantized one whose widths are fixed: start from a finished run")
    weights = {key: value for key, value in source.state_dict().items() if Quantizer.SUFFIX not in key}
    own = {key for key in model.state_dict() if Quantizer.SUFFIX not in key}
    try:
        if own != set(weights):
            raise RuntimeError(f"'{min(own ^ set(weights))}' is in one of them alone")
        model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        text = first_line(error)
        raise UsageError(f"a model is continued from another one of the same architecture, not this: {text}") from None
    calibrate(model, batches)
    sites, given = inspect_model(model).sites, dict(quantizers_of(source))
    pairs = {site: (quantizer, given[site]) for site, quantizer in quantizers_of(model) if site in given}
    changed: dict[str, tuple[BankQuantizer, HistogramObserver]] = {}
    for site, (quantizer, before) in pairs.items():
        if quantizer.spec == before.spec:
            quantizer.load_state_dict(before.state_dict())
        elif isinstance(before, LSQQuantizer) and _continues(quantizer, before):
            changed[site] = (before, quantizer.create_observer())
    with in_eval_mode(source), ExitStack() as stack:
        for site, (before, observer) in changed.items():
            if sites[site].role == "activation":
                stack.enter_context(before.register_forward_pre_hook(partial(_observe, observer)))
            else:
                _observe(observer, before, (weight_of(source, site),))
        for batch in batches:
            source(batch)
    for site, (before, observer) in changed.items():
        quantizer = pairs[site][0]
        assert isinstance(quantizer, BankQuantizer)
        quantizer.scale.copy_(carried_over(quantizer, before, observer))
        if quantizer.offset is not None and (offset := before.grid()[1]) is not None:
            quantizer.offset.copy_(offset.unsqueeze(-1))
    return model


def _continues(quantizer: Quantizer, before: LSQQuantizer) -> bool:
    """Whether the scales of `before` say something to `quantizer`: both learn them, alike, on a grid of one kind."""
    return (
        isinstance(quantizer, LSQQuantizer)
        and before.groups == tuple(quantizer.scale_shape)
        and (before.spec.signed, before.spec.symmetric) == (quantizer.spec.signed, quantizer.spec.symmetric)
    )


def _observe(observer: HistogramObserver, quantizer: Quantizer, inputs: tuple[Tensor, ...]) -> None:
    """Shows an observer what a quantizer is given."""
    observer.observe(quantizer.view(inputs[0]))


def carried_over(quantizer: BankQuantizer, before: Quantizer, observer: HistogramObserver) -> Tensor:
    """The bank of scales that continue those of `before`, for values in `observer`'s histograms."""
    x, share = (part.reshape(*quantizer.scale_shape, -1) for part in observer.histogram())
    scale, offset = (None if part is None else part.unsqueeze(-1) for part in before.grid())
    assert scale is not None
    signed, shift = before.spec.signed, 0.0 if offset is None else offset
    bottom, top = (limit.unsqueeze(-1) * scale + shift for limit in before.quant_range())
    target = torch.minimum(torch.maximum(x, bottom), top)
    own = quantizer.width_per_scale().unsqueeze(-1)
    found = []
    for width in [own.new_tensor(bits) for bits in quantizer.bank_widths] or [own]:
        reach = before.quant_range()[1].unsqueeze(-1) / integer_range(width, signed)[1]
        best, least = scale, torch.full_like(scale, math.inf)
        for step in range(_CANDIDATES + 1):
            tried = scale * reach ** (step / _CANDIDATES)
            values = dequantize(quantize(x, tried, width, signed, offset), tried, offset)
            error = (share * (values - target).square()).sum(-1, keepdim=True)
            best, least = torch.where(error < least, tried, best), torch.minimum(error, least)
        found.append(best)
    return torch.cat(found, dim=-1)
