"""DQ: step sizes and ranges are learned, widths follow (Uhlich et al., ICLR 2020, arXiv 1905.11452).

"Mixed Precision DNNs: All you need is a good parametrization": of the three numbers step size d, range x_max and width
b, two determine the third. With d and x_max learned, and b̃ = log2(x_max/d + 1) + 1, gradients are of bounded size and
do not depend on each other; parametrizations with an explicit width, which Q-ViT has, did worse in the paper.
`quantizers/dq.py` has the quantizer.

All else is as in `qvit`; the gradient of its penalty reaches d and x_max through b̃. (The paper has the same form of
penalty, on the bytes of weights and of activations.) At the end of the search ranges are kept, scales are made to fit
the rounded widths, and what the optimizer remembers of them is forgotten. From then on the quantizers are LSQ's.

Ranges have the learning rate of widths, in log2; scales that of scales. Left out: step sizes that are powers of two.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from qvit.functional import integer_range
from qvit.methods.base import register_method
from qvit.methods.qvit import HIGH, LOW, QViTMethod, RealWidthOptions
from qvit.plan.cost import CostModel
from qvit.plan.spec import Site, TensorSpec
from qvit.quantizers.dq import derived_width
from qvit.training.loop import Trainer


class DQOptions(RealWidthOptions):
    """Options of `dq`, which it shares with `qvit`."""

    head_wise: bool = Field(True, description="a width, a scale and a range per head; off: one of each per tensor")
    width_lr: float | None = Field(
        None, gt=0, description="learning rate of log2 of the ranges; by default that of `qvit`'s widths"
    )


@register_method("dq")
class DQMethod(QViTMethod):
    """Learned step sizes and ranges within a budget."""

    Options = DQOptions

    def grid(self, spec: TensorSpec, site: Site) -> dict[str, Any]:
        """Scales are shared as widths are, whatever shares them in a plan to start from."""
        shared = "per-head" if self.options.head_wise and site.layout.heads else "per-tensor"
        return super().grid(spec, site) | {"granularity": shared}

    def spec_changes(self) -> dict[str, Any]:
        return {"quantizer": "dq", "switchable_scale": False}

    @property
    def scales(self) -> str:
        return "per-head" if self.options.head_wise else "shared"

    def attach(self, model: nn.Module, cost: CostModel, steps_per_epoch: int) -> None:
        signed = [float(q.spec.signed) for q in self.quantizers for _ in range(q.bit_width.numel())]
        self.signed = torch.tensor(signed, device=self.quantizers[0].bit_width.device)
        limits = [[integer_range(width, q.spec.signed)[1] for q in self.quantizers] for width in (LOW, HIGH)]
        self.smallest, self.largest = limits

    def widths(self) -> Tensor:
        if not self.quantizers[0].learns_width:
            return super().widths()
        scales, ranges = (torch.cat([part.flatten() for part in parts]) for parts in self._learned())
        return derived_width(scales, ranges, self.signed, LOW, HIGH)

    def _learned(self) -> tuple[list[Tensor], list[Tensor]]:
        """Scales and log2 of the ranges of all sites."""
        quantizers: list[Any] = self.quantizers
        return [q.scale[..., 0] for q in quantizers], [q.log2_range for q in quantizers]

    @torch.no_grad()
    def after_step(self, trainer: Trainer) -> None:
        """Puts ranges back to where widths are within their limits, as it is done with widths that are parameters."""
        if not self.quantizers[0].learns_width:
            return
        scales, ranges = self._learned()
        torch._foreach_maximum_(ranges, torch._foreach_log2(torch._foreach_mul(scales, self.smallest)))
        torch._foreach_minimum_(ranges, torch._foreach_log2(torch._foreach_mul(scales, self.largest)))

    def end_search(self, trainer: Trainer) -> None:
        super().end_search(trainer)
        quantizers: list[Any] = self.quantizers
        for quantizer in quantizers:
            trainer.optimizer.state.pop(quantizer.scale, None)
