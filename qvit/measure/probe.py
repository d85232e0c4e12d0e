"""A float model and a copy of it in which any tensor can be quantized: one calibration for every question.

The copy has a scale for each candidate width of each site. At first all its quantizers are switched off: it computes
in float. What is put in place of a float tensor x, and where, is one of

    apply      x̂ of whole sites, at any widths                 `runs/analysis.py`
    only       x̂ of one head of one site                       `kl.py`
    under      the tensors of another plan                     patch-wise widths, `methods/pmq.py`
    watched    x as it is, with a gradient of its own          `fisher.py`, `hessian.py`; `errors` is x̂ - x

and what comes out is compared with the float model's answer by `divergence_terms`.

Shapes: a tensor is viewed so that its heads are an axis (`spec.Layout`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qvit.errors import QvitError, UsageError
from qvit.models.calibrate import calibrate
from qvit.models.convert import quantize, take_weights
from qvit.models.families import inspect_model
from qvit.models.features import answers_with_features
from qvit.plan.quant_plan import QuantPlan
from qvit.quantizers import Quantizer, quantizers_of


class Probe:
    """A float model, and its calibrated copy in eval mode, without gradients for its parameters.

    Args:
        model: A float timm model of a supported family; it stays as it is.
        calibration: Batches of training images (B, channels, height, width).
        plan: Resolved plan of the grids, with a scale for each width that is asked for; sites that it leaves in float
            are not probed. None: the sites' defaults, for widths from 2 to 8.
    """

    def __init__(self, model: nn.Module, calibration: Iterable[Tensor], plan: QuantPlan | None = None) -> None:
        self.float_model, self.cost = model, inspect_model(model)
        self.sites = self.cost.sites
        plan = QuantPlan.any_width(self.sites) if plan is None else plan
        self.model = calibrate(quantize(model, plan), calibration).eval().requires_grad_(False)
        found = dict(quantizers_of(self.model))
        self.quantizers: dict[str, Quantizer] = {name: found[name] for name in self.sites if name in found}
        self.apply({})

    def apply(self, widths: Mapping[str, tuple[int, ...]]) -> nn.Module:
        """The copy with these widths, one per site or one per head; sites that are not named compute in float."""
        for site, quantizer in self.quantizers.items():
            own = widths.get(site)
            quantizer.enabled = own is not None
            if own is not None:
                quantizer.freeze(own)
        return self.model

    def under(self, plan: QuantPlan) -> nn.Module:
        """Another copy, in eval mode: quantized by a plan of the same grids, with the scales of this calibration."""
        model = quantize(self.float_model, plan).eval()
        take_weights(model, self.model)
        return model

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

    @torch.no_grad()
    def errors(self, site: str, x: Tensor, widths: Sequence[int]) -> Iterator[Tensor]:
        """x̂ - x at each width in turn, viewed with heads as an axis."""
        quantizer = self.quantizers[site]
        viewed = quantizer.view(x.detach())
        for width in widths:
            quantizer.bit_width.fill_(width)
            yield quantizer.fake_quantize(viewed).sub_(viewed)

    def heads(self, site: str) -> int:
        """How many rows the site's table has."""
        return self.sites[site].layout.num_heads

    def squares_per_head(self, site: str, values: Tensor) -> Tensor:
        """Sums of squares of a viewed tensor over all axes but the heads: (heads,), or (1,) without heads."""
        heads = self.sites[site].layout.heads
        if heads is None:
            return torch.linalg.vector_norm(values).square().reshape(1)
        shape = (1,) * (values.dim() - len(heads)) + tuple(heads)
        others = [axis for axis, size in enumerate(shape) if size == 1]
        norms = torch.linalg.vector_norm(values, dim=others) if len(others) < values.dim() else values.norm().reshape(1)
        return norms.square().flatten()

    def logits(self, images: Tensor) -> Tensor:
        """The copy's answer, (B, classes). Raises UsageError for a model without a classifier."""
        answer = self.model(images)
        if answers_with_features(self.model):
            raise UsageError(
                "this metric needs classes, and the model answers with features: take the metric 'features' or 'cosine'"
            )
        if not isinstance(answer, Tensor) or answer.dim() != 2 or answer.shape[1] < 2:
            raise UsageError("sensitivity needs a classifier: the model must answer with (images, classes) numbers")
        return answer

    def features(self, images: Tensor) -> Tensor:
        """The copy's answer, (B, ..., C). Raises UsageError for a model with a classifier."""
        if not answers_with_features(self.model):
            raise UsageError(
                "this metric is for models that answer with features, and this one has classes: take the metric "
                "'fisher', 'hessian' or 'kl'"
            )
        return self.model(images)


def divergence_terms(reference: Tensor, answers: Tensor) -> Tensor:
    """What KL(p || p̂) sums over the classes, in nats, from log p and log p̂: all three (B, classes)."""
    return reference.exp() * (reference - answers)


def require_finite(site: str, values: Tensor, what: str) -> None:
    """Raises QvitError naming the site if something is NaN or infinite."""
    if not bool(torch.isfinite(values).all()):
        raise QvitError(f"site '{site}': NaN or infinite {what}; the float model is broken before any quantization")
