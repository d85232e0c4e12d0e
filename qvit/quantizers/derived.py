"""Quantizers whose width follows from other parameters while it is learned, and that are LSQ ones afterwards.

Rivals of Q-ViT learn a range (`dq.py`) or a distribution over widths (`edmips.py`) in place of the width itself.
`freeze` turns such a quantizer into an ordinary `LSQQuantizer` of the final width, in place: its own parameters are
gone from the state dict, its spec says `lsq`, and every fast path, packed file and engine that knows LSQ knows it. So
the optimizer's groups keep their order, and a run is resumed or loaded from its plan like any other.

While the width is learned, the buffer `bit_width` is the width to start from; `clamped_bit_width()` is the current one.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from qvit.errors import UsageError
from qvit.plan.spec import Layout, TensorSpec
from qvit.quantizers.lsq import LearnedScaleQuantizer, LSQQuantizer


class DerivedWidthQuantizer(LearnedScaleQuantizer):
    """Base class: subclasses add the parameters of `width_parameters`, `derived_width` and `fake_quantize`."""

    width_parameters: ClassVar[tuple[str, ...]]

    def __init__(self, spec: TensorSpec, layout: Layout) -> None:
        if not spec.learn_bit_width:
            raise UsageError(
                f"quantizer '{spec.quantizer}' learns its width: learn_bit_width must be true; "
                "for fixed widths use 'lsq'"
            )
        super().__init__(spec, layout)
        start = self._parameters.pop("bit_width")
        assert start is not None
        self.register_buffer("bit_width", start.detach(), persistent=False)

    @property
    def learns_width(self) -> bool:
        return True

    def derived_width(self) -> Tensor:
        """b̃ of the current parameters, within its range, differentiable."""
        raise NotImplementedError

    def clamped_bit_width(self) -> Tensor:
        return self.derived_width() if self.calibrated else self.bit_width

    def settle(self, bit_width: Tensor) -> None:
        """Makes the scale fit the final integer width."""

    @torch.no_grad()
    def freeze(self, bit_width: tuple[int, ...] | int | None = None) -> None:
        """Makes this an ordinary LSQ quantizer of `bit_width`, or of the learned widths rounded to nearest."""
        final = self.final_widths(bit_width)
        self.settle(self.bit_width.new_tensor(final).view_as(self.bit_width))
        for name in self.width_parameters:
            del self._parameters[name]
        self.__class__ = LSQQuantizer  # type: ignore[assignment]
        self.register_buffer("bit_width", self._buffers.pop("bit_width"))
        self.spec = self.spec.changed({"quantizer": "lsq", "learn_bit_width": False})
        self.freeze(final)
