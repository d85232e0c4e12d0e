"""Weights that are quantized once per step, not once for each of its micro-batches.

Ŵ is computed before the first micro-batch. All but the last one see it as a leaf, where their gradients add up; the
last one sees the real Ŵ, and on its way back through it the sum of the others joins. So parameters get their gradients
in one piece, with the last micro-batch, when processes exchange theirs. The gradient of a quantizer is linear in what
arrives, so the result is that of quantizing every time, up to the order of additions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qvit.models.families import inspect_model
from qvit.models.layers import weight_of
from qvit.quantizers import Quantizer, quantizers_of


class HeldWeights:
    """The quantizers of the weights of `model`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        found = dict(quantizers_of(model))
        sites = inspect_model(model).sites if found else {}
        weights = {name: quantizer for name, quantizer in found.items() if name in sites}
        self.quantizers = {name: own for name, own in weights.items() if sites[name].role == "weight"}
        self._real: dict[Quantizer, Tensor] = {}

    @contextmanager
    def first(self) -> Iterator[None]:
        """Within, Ŵ is a leaf; it is quantized at the beginning."""
        with torch.enable_grad():
            self._real = {own: own(weight_of(self.model, name)) for name, own in self.quantizers.items()}
        for quantizer, real in self._real.items():
            quantizer.held = real.detach().requires_grad_(real.requires_grad)
        try:
            yield
        finally:
            for quantizer, real in self._real.items():
                leaf, quantizer.held = quantizer.held, None
                if leaf is not None and leaf.grad is not None:
                    real.register_hook(lambda grad, more=leaf.grad: grad + more)

    @contextmanager
    def last(self) -> Iterator[None]:
        """Within, Ŵ is what `first` quantized, and takes all gradients back with its own."""
        for quantizer, real in self._real.items():
            quantizer.held = real
        try:
            yield
        finally:
            self._real = {}
            for quantizer in self.quantizers.values():
                quantizer.held = None
