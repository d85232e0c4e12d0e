"""Weights that are quantized once per step, not once for each of its micro-batches.

Ŵ is computed before the first micro-batch. All but the last one see it as a leaf, where their gradients add up; the
last one sees the real Ŵ, and on its way back through it the sum of the others joins. So parameters get their gradients
in one piece, with the last micro-batch, when processes exchange theirs. The gradient of a quantizer is linear in what
arrives, so the result is that of quantizing every time, up to the order of additions.

Where there is a kernel for it (`kernels/gpu_weights.py`), all weights are quantized in one launch; a step of one batch
gains from that, too (`together`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qvit.kernels import gpu_weights
from qvit.models.families import inspect_model
from qvit.models.layers import weight_parts
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
        self._tables: gpu_weights.Tables = {}

    @contextmanager
    def together(self) -> Iterator[None]:
        """Within, Ŵ of the weights that one launch quantizes is what it made at the beginning, with gradients.

        Not within `first` and `last`, where Ŵ is there already.
        """
        if self._real:
            yield
            return
        for quantizer, values in self._in_one_launch(self._weights()).items():
            quantizer.held = values
        try:
            yield
        finally:
            self._release()

    def _weights(self) -> dict[Quantizer, Tensor]:
        found: dict[str, dict[str, Tensor]] = {}
        weights: dict[Quantizer, Tensor] = {}
        for name, quantizer in self.quantizers.items():
            path, _, leaf = name.rpartition(".")
            parts = found.setdefault(path, {}) or weight_parts(self.model.get_submodule(path))
            found[path], weights[quantizer] = parts, parts[leaf]
        return weights

    def _in_one_launch(self, weights: Mapping[Quantizer, Tensor]) -> dict[Quantizer, Tensor]:
        """Ŵ of the weights that can be quantized together."""
        parts = {}
        for quantizer, weight in weights.items():
            learned = quantizer.grouped(weight.numel())
            view = quantizer.view(weight)
            if learned is not None and gpu_weights.handles(view, learned):
                parts[quantizer] = (view, learned)
        values = gpu_weights.quantize_together(list(parts.values()), self._tables) if parts else []
        return {own: value.view_as(weights[own]) for own, value in zip(parts, values, strict=True)}

    def _release(self) -> None:
        for quantizer in self.quantizers.values():
            quantizer.held = None

    @contextmanager
    def first(self) -> Iterator[None]:
        """Within, Ŵ is a leaf; it is quantized at the beginning."""
        with torch.enable_grad():
            weights = self._weights()
            at_once = self._in_one_launch(weights)
            self._real = {own: at_once[own] if own in at_once else own(weight) for own, weight in weights.items()}
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
            self._release()
