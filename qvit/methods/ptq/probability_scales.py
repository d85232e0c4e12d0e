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
#: How many images take part.
IMAGES = 16


@torch.no_grad()
def fit_probability_scales(model: nn.Module, batches: Iterable[Tensor], worth: Mapping[str, Worth]) -> list[str]:
    """Chooses the scales of the probabilities of a calibrated model again, in place; its mode is restored.

    Args:
        model: A calibrated model.
        batches: Calibration images, on the model's device; the first `IMAGES` are used.
        worth: Of the outputs of attention projections, `PATH.proj`; where one is missing, all tokens count alike.

    Returns:
        Paths of the attention modules whose probabilities have a quantizer with one scale for each head or for all.
    """
    found: list[str] = []
    seen: dict[str, Tensor] = {}

    def keep(path: str, _quantizer: Quantizer, inputs: tuple[Tensor, ...]) -> None:
        seen[path] = inputs[0]

    def fit(path: str, quantizer: Any, inputs: tuple[Tensor, ...]) -> None:
        _fit(quantizer, inputs[0], seen.pop(path), worth.get(f"{path}.proj"))
        found.append(path)

    images = _first(batches)
    with quantizers_disabled(model), in_eval_mode(model), ExitStack() as stack:
        for path, module in model.named_modules():
            if not isinstance(module, AttentionSites):
                continue
            probs, value = quantizer_at(module, "probs"), quantizer_at(module, "value")
            if probs is not None and value is not None and probs.grid()[0].numel() in (1, probs.num_groups):
                stack.enter_context(value.register_forward_pre_hook(partial(keep, path)))
                stack.enter_context(probs.register_forward_pre_hook(partial(fit, path)))
        model(images)
    return found


def _fit(quantizer: Quantizer, probs: Tensor, value: Tensor, worth: Worth | None) -> None:
    """Gives a quantizer its best scales for probabilities (B, H, N, M) of values (B, G, M, d)."""
    start, _ = quantizer.grid()
    value = for_all_heads(value, probs.shape[1])
    tokens = len(probs) * probs.shape[2]
    rows = torch.ones(tokens) if worth is None or tokens % len(worth.tokens) else worth.rows(tokens)
    rows = rows.to(probs).view(len(probs), 1, -1)
    best, least = start.clone(), torch.full_like(start, torch.inf)
    for factor in FACTORS:
        quantizer.restore({"scale": start * factor})
        difference = (quantizer.fake_quantize(probs) - probs) @ value
        error = (difference.square().sum(-1) * rows).sum((0, 2))
        error = error.view_as(start) if start.numel() > 1 else error.sum().view_as(start)
        best, least = torch.where(error < least, start * factor, best), torch.minimum(error, least)
    quantizer.restore({"scale": best})


def _first(batches: Iterable[Tensor]) -> Tensor:
    """The first `IMAGES` images."""
    found: list[Tensor] = []
    for batch in batches:
        found.append(batch[: IMAGES - sum(map(len, found))])
        if sum(map(len, found)) >= IMAGES:
            break
    return torch.cat(found)
