"""A float model with switchable quantizers at every site: what all metrics look through.

The model is quantized by a plan whose specs get one scale per candidate width, and calibrated, so every site has its
grid of least squared error at each width. All quantizers are then disabled: the model computes in float, and a metric
looks at a tensor as it passes (`watched`), quantizes a copy of it (`errors`), or switches one site on (`only`).

Shapes: a tensor is viewed so that its heads are an axis (`spec.Layout`); `per_head` sums over all other axes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qvit.errors import QvitError, UsageError
from qvit.models.calibrate import calibrate
from qvit.models.convert import Stage, quantize, stage_of
from qvit.models.families import inspect_model
from qvit.plan.quant_plan import QuantPlan
from qvit.quantizers import Quantizer, quantizers_of


class Probe:
    """A calibrated copy of a float model, in eval mode, without gradients for its parameters.

    Args:
        model: A float timm model of a supported family.
        plan: Resolved plan of the grids; sites that it leaves in float are not probed.
        widths: Candidate widths, ascending.
        batches: Images to calibrate with.
    """

    def __init__(self, model: nn.Module, plan: QuantPlan, widths: tuple[int, ...], batches: Sequence[Tensor]) -> None:
        if stage_of(model) is not Stage.FLOAT:
            raise UsageError("sensitivity is measured on a float model: this one is quantized already")
        changes = {
            "bit_width": widths[0],
            "bit_width_range": [widths[0], widths[-1]],
            "learn_bit_width": False,
            "switchable_scale": len(widths) > 1,
        }
        specs = {name: None if spec is None else spec.changed(changes) for name, spec in plan.sites.items()}
        self.model = calibrate(quantize(model, QuantPlan(plan.name, (), specs)), batches).eval().requires_grad_(False)
        self.widths = widths
        self.sites = inspect_model(self.model).sites
        found = dict(quantizers_of(self.model))
        self.quantizers: dict[str, Quantizer] = {name: found[name] for name in self.sites if name in found}
        for quantizer in self.quantizers.values():
            quantizer.enabled = False

    def heads(self, site: str) -> int:
        """How many rows the site's table has."""
        return self.sites[site].layout.num_heads

    def logits(self, images: Tensor) -> Tensor:
        """The model's answer, (B, classes). Raises UsageError for a model without a classifier."""
        answer = self.model(images)
        classes = getattr(self.model, "num_classes", None)
        if not isinstance(answer, Tensor) or answer.dim() != 2 or answer.shape[1] < 2 or classes == 0:
            raise UsageError("sensitivity needs a classifier: the model must answer with (images, classes) numbers")
        return answer

    @torch.no_grad()
    def errors(self, site: str, x: Tensor) -> Iterator[Tensor]:
        """x̂ - x at each candidate width in turn, viewed with heads as an axis."""
        quantizer = self.quantizers[site]
        viewed = quantizer.view(x.detach())
        for width in self.widths:
            quantizer.bit_width.fill_(width)
            yield quantizer.fake_quantize(viewed).sub_(viewed)

    def per_head(self, site: str, values: Tensor) -> Tensor:
        """Sums of a viewed tensor over all axes but the heads: (heads,), or (1,) for a site without heads."""
        heads = self.sites[site].layout.heads
        if heads is None:
            return values.sum().reshape(1)
        return values.sum_to_size((1,) * (values.dim() - len(heads)) + tuple(heads)).flatten()

    def squares_per_head(self, site: str, values: Tensor) -> Tensor:
        """Sums of squares of a viewed tensor over all axes but the heads, in one pass."""
        heads = self.sites[site].layout.heads
        if heads is None:
            return torch.linalg.vector_norm(values).square().reshape(1)
        shape = (1,) * (values.dim() - len(heads)) + tuple(heads)
        others = [axis for axis, size in enumerate(shape) if size == 1]
        norms = torch.linalg.vector_norm(values, dim=others) if len(others) < values.dim() else values.norm().reshape(1)
        return norms.square().flatten()

    @contextmanager
    def watched(self) -> Iterator[list[tuple[str, Tensor]]]:
        """Within the block, (site, tensor) of every quantizer that a forward passes; clear the list in between.

        A tensor in the list is a node of its own in the graph: the gradient with respect to it is that through this
        site alone, even where another consumer reads the same activation.
        """
        seen: list[tuple[str, Tensor]] = []
        hooks = []

        def note(site: str) -> object:
            def hook(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
                own = output.view_as(output) if output.requires_grad else output.detach().requires_grad_()
                seen.append((site, own))
                return own

            return hook

        try:
            for site, quantizer in self.quantizers.items():
                hooks.append(quantizer.register_forward_hook(note(site)))  # type: ignore[arg-type]
            yield seen
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def only(self, site: str, head: int, width: int) -> Iterator[None]:
        """Within the block one head of one site is quantized, to `width` bits, and nothing else."""
        quantizer, layout = self.quantizers[site], self.sites[site].layout

        def keep_others(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            assert layout.heads is not None
            chosen = torch.zeros(layout.num_heads, dtype=torch.bool, device=output.device)
            chosen[head] = True
            x, quantized = quantizer.view(inputs[0]), quantizer.view(output)
            return torch.where(chosen.view(layout.heads), quantized, x).view_as(output)

        hook = quantizer.register_forward_hook(keep_others) if layout.num_heads > 1 else None
        quantizer.bit_width.fill_(width)
        quantizer.enabled = True
        try:
            yield
        finally:
            quantizer.enabled = False
            if hook is not None:
                hook.remove()


def require_finite(site: str, values: Tensor, what: str) -> None:
    """Raises QvitError naming the site if something is NaN or infinite."""
    if not bool(torch.isfinite(values).all()):
        raise QvitError(f"site '{site}': NaN or infinite {what}; the float model is broken before any quantization")
