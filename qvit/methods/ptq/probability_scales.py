"""Scales of attention probabilities, by the error of what they weigh.

Calibration takes the scale of least squared error of the probabilities themselves, so the few large ones decide. What
the next layer sees is P·V: the many small ones are what each row has most of, and on a logarithmic grid of 3 bits they
are rounded to zero unless the scale is far below the largest value. Here each head takes the candidate with the least

    Σ_i w_i · |(p̂_i - p_i)·V|²         p_i a row of the probabilities, w_i what its token is worth to the answer

of the float model's p and V on some images, with w of `token_weights.py`. Candidates are the calibrated scale times
powers of 2^(1/8), from twice it to 1/16 of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qvit.methods.ptq.token_weights import Worth
from qvit.models.convert import in_eval_mode, quantizers_disabled
from qvit.models.layers import AttentionSites, for_all_heads, quantizer_at
from qvit.quantizers import Quantizer

#: What the calibrated scale is multiplied by.
FACTORS = tuple(2.0 ** (step / 8) for step in range(8, -33, -1))
#: How many images are enough, and how many pass at a time: probabilities grow with the square of the tokens.
IMAGES, CHUNK = 16, 4


@torch.no_grad()
def fit_probability_scales(model: nn.Module, batches: Iterable[Tensor], worth: Mapping[str, Worth]) -> list[str]:
    """Chooses the scales of the probabilities of a calibrated model again, in place; its mode is restored.

    Args:
        model: A calibrated model.
        batches: Calibration images, on the model's device.
        worth: Of the outputs of attention projections, `PATH.proj`; where one is missing, or images are of another
            size, all tokens count alike.

    Returns:
        Paths of the attention modules whose probabilities have a quantizer with one scale for each head or for all.
    """
    quantizers: dict[str, Quantizer] = {}
    values: dict[str, Tensor] = {}
    errors: dict[str, Tensor] = {}
    passing = 0

    def keep(path: str, _quantizer: Quantizer, inputs: tuple[Tensor, ...]) -> None:
        values[path] = inputs[0]

    def add(path: str, quantizer: Any, inputs: tuple[Tensor, ...]) -> None:
        found = _errors(quantizer, inputs[0], values.pop(path), worth.get(f"{path}.proj"), passing)
        errors[path] = errors[path] + found if path in errors else found

    with quantizers_disabled(model), in_eval_mode(model), ExitStack() as stack:
        for path, module in model.named_modules():
            if not isinstance(module, AttentionSites):
                continue
            probs, value = quantizer_at(module, "probs"), quantizer_at(module, "value")
            if probs is not None and value is not None and probs.grid()[0].numel() in (1, probs.num_groups):
                quantizers[path] = probs
                stack.enter_context(value.register_forward_pre_hook(partial(keep, path)))
                stack.enter_context(probs.register_forward_pre_hook(partial(add, path)))
        for images in (chunk for batch in batches for chunk in batch.split(CHUNK)):
            passing = len(images)
            model(images)
    for path, found in errors.items():
        start, _ = quantizers[path].grid()
        quantizers[path].restore({"scale": start * start.new_tensor(FACTORS)[found.argmin(0)]})
    return list(errors)


def _errors(quantizer: Quantizer, probs: Tensor, value: Tensor, worth: Worth | None, images: int) -> Tensor:
    """Errors of probabilities (B, H, N, M) with values (B, G, M, d) under all `FACTORS`: (factors, ...) by scale.

    B is the number of images, or of their windows.
    """
    start, _ = quantizer.grid()
    value = for_all_heads(value, probs.shape[1])
    tokens = len(probs) * probs.shape[2]
    rows = torch.ones(tokens) if worth is None or tokens != images * len(worth.tokens) else worth.rows(tokens)
    rows = rows.to(probs).view(len(probs), 1, -1)
    found = []
    for factor in FACTORS:
        quantizer.restore({"scale": start * factor})
        difference = (quantizer.fake_quantize(probs) - probs) @ value
        found.append((difference.square().sum(-1) * rows).unsqueeze(-1).sum_to_size(start.shape))
    quantizer.restore({"scale": start})
    return torch.stack(found)
