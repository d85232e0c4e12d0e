"""The contract of a quantizer, the learnable bit-width and its freezing.

`forward(x)` returns x̂ of the same shape and dtype. Three plain Python attributes decide what it does, so that a
compiled model has no branch on data:

    enabled       False: x passes untouched (the float model's numerics)
    observer      set while calibrating: x is looked at and passes untouched
    calibrated    False: quantizing raises, because scales that nobody chose would return garbage

A width is an argument of quantization like a scale. Learned, it is a float parameter b̃ that enters as b =
round(clamp(b̃, b_min, b_max)) with the gradient straight through (Q-ViT eq. 7, rounding to nearest). The clamp lies in
the graph: forward writes to no parameter. Its gradient is unchanged at the limits; what leads beyond one is taken away
once a step, when the whole batch is summed up (`training/optimizer.py`). `freeze` turns b̃ into integers for good: the
parameter becomes a buffer of the same name, so the keys of a state dict do not change.

Shapes: `bit_width` is `()` or one number per head, shaped to broadcast against the viewed tensor (`spec.Layout`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qvit.errors import UsageError
from qvit.functional import clamp_inward, dequantize, integer_range, quantize, round_ste
from qvit.kernels.fake_quantize import Learned
from qvit.kernels.linear import Codes
from qvit.plan.options import Options
from qvit.plan.spec import GRANULARITIES, Layout, PerChannel, PerHead, PerPosition, TensorSpec
from qvit.quantizers.observers import HistogramObserver
from qvit.quantizers.ranges import observer_class
from qvit.registry import Registry

QUANTIZERS: Registry[str, type[Quantizer]] = Registry("quantizer", "qvit.quantizers")
#: Class decorator: makes a quantizer available as `TensorSpec(quantizer=name)`.
register_quantizer = QUANTIZERS.register


def create_quantizer(spec: TensorSpec, layout: Layout) -> Quantizer:
    """The quantizer that `spec` names, for a tensor with the axes of `layout`."""
    return QUANTIZERS[spec.quantizer](spec, layout)


class Quantizer(nn.Module):
    """Base class: width, freezing, calibration state.

    Subclasses hold the scale and define `fake_quantize`, `grid` and `initialize`.

    Attributes:
        options: What the spec's options mean to this quantizer.
    """

    #: Which options it takes beside the fields of a `TensorSpec`.
    Options: ClassVar[type[Options]] = Options

    SUFFIX: ClassVar[str] = "_quantizer"
    #: Whether `fake_quantize` takes a width per token.
    splits_tokens: ClassVar[bool] = False
    #: Whether its values are scale·q + offset.
    uniform: ClassVar[bool] = True
    #: Whether its values are multiples of the scale that its codes stand for, without being these codes: `multiples`.
    has_multiples: ClassVar[bool] = False
    #: Whether its codes, once frozen, are x laid on `grid` and rounded, with nothing before that.
    rounds_only: ClassVar[bool] = False
    #: Names of the parameters that decide a learned width: they have a learning rate of their own, and end with it.
    width_parameters: ClassVar[tuple[str, ...]] = ("bit_width",)
    bit_width: Tensor

    def __init__(self, spec: TensorSpec, layout: Layout) -> None:
        super().__init__()
        if len(spec.widths) > 1 and len(spec.widths) != layout.num_heads:
            raise UsageError(f"{len(spec.widths)} bit-widths given for a tensor with {layout.num_heads} head(s)")
        if spec.token_bit_width is not None and not self.splits_tokens:
            raise UsageError(f"quantizer '{spec.quantizer}' has one width for all tokens")
        self.spec, self.layout, self.options = spec, layout, self.Options.of(spec)
        self.scale_shape = _scale_shape(spec, layout)
        shape = layout.heads if len(spec.widths) > 1 and layout.heads else ()
        widths = torch.tensor(spec.widths, dtype=torch.float32).reshape(shape)
        if spec.learn_bit_width:
            self.bit_width = nn.Parameter(widths)
        else:
            self.register_buffer("bit_width", widths)
        #: Shape of what has a scale or a width of its own, and how many that are.
        self.groups: tuple[int, ...] = tuple(torch.broadcast_shapes(self.scale_shape, tuple(self.bit_width.shape)))
        self.num_groups: int = math.prod(self.groups)
        self.enabled = True
        self.calibrated = False
        #: How many processes and micro-batches see a part of each training step's batch (activations only).
        self.batch_parts = 1
        self.observer: HistogramObserver | None = None
        #: x̂ of a weight that several micro-batches share (`training/held_weights.py`).
        self.held: Tensor | None = None
        self.register_load_state_dict_post_hook(_recognise_calibration)

    @property
    def learns_width(self) -> bool:
        """Whether the width is still a parameter."""
        return isinstance(self.bit_width, nn.Parameter)

    def clamped_bit_width(self) -> Tensor:
        """b̃ held inside its range: real-valued while it is learned, an integer once frozen."""
        return clamp_inward(self.bit_width, *self.spec.bit_width_range) if self.learns_width else self.bit_width

    def integer_bit_width(self) -> Tensor:
        """b, integer-valued in float dtype, with straight-through gradient while it is learned."""
        return round_ste(self.clamped_bit_width()) if self.learns_width else self.bit_width

    @property
    def largest_width(self) -> int:
        """The width that it has, or may learn, the largest one of its heads."""
        return max(self.spec.bit_width_range if self.learns_width else self.spec.widths)

    def width_per_scale(self) -> Tensor:
        """b of each scale, to broadcast against `scale_shape`; the median where heads of several widths share one."""
        own = self.integer_bit_width()
        return own if self.groups == tuple(self.scale_shape) else own.flatten().median()

    def view(self, x: Tensor) -> Tensor:
        """`x` with its heads on an axis of their own."""
        return x if self.layout.view is None else x.view(self.layout.view)

    def token_bit_width(self, x: Tensor, rank: Tensor | None) -> Tensor:
        """The width of every token, to broadcast against `x`: b where it is important, else a lower one.

        Args:
            x: (B, N, C), or (B, H, N, d).
            rank: (B, N), the importance of every token: 0, 1, ... from the most important one, negative for those that
                are always important. Not needed where prefix tokens alone are.
        """
        split = self.spec.token_bit_width
        if split is not None and not split.ranks:
            places = torch.arange(x.shape[-2], device=x.device).unsqueeze(-1)
            return torch.where(places < self.layout.prefix_tokens, self.bit_width, float(split.low))
        if split is None or rank is None:
            raise UsageError("this tensor has two groups of tokens, and its module was given no ranking of them")
        rank = rank.unsqueeze(-1) if x.dim() == 3 else rank[:, None, :, None]
        lower = torch.full_like(self.bit_width, split.low)
        if split.high is not None:
            lower = torch.where(rank < split.important(rank.shape[-2]), float(split.high), lower)
        own = rank < (split.important(rank.shape[-2]) if split.high is None else 0)
        return torch.where(own, self.bit_width, lower)

    def group_widths(self) -> tuple[Tensor, ...]:
        """The different widths of tokens, shaped like `bit_width`, for a tensor with groups of them.

        The first is that of prefix tokens, the last that of the least important ones.
        """
        split = self.spec.token_bit_width
        assert split is not None
        lower = [width for width in (split.high, split.low) if width is not None]
        return self.bit_width, *(torch.full_like(self.bit_width, width) for width in lower)

    def forward(self, x: Tensor, rank: Tensor | None = None) -> Tensor:
        if self.held is not None:
            return self.held
        if self.observer is not None:
            self.observer.observe(self.view(x))
            return x
        if not self.enabled:
            return x
        if not self.calibrated:
            raise UsageError(
                "this model was never calibrated: call qvit.calibrate(model, batches) or load a trained state first"
            )
        if self.spec.token_bit_width is not None:
            return self.fake_quantize(x, self.token_bit_width(x, rank))
        return self.fake_quantize(self.view(x)).view_as(x) if self.layout.view else self.fake_quantize(x)

    def fake_quantize(self, x: Tensor, bit_width: Tensor | None = None) -> Tensor:
        """x̂ of the viewed tensor, differentiable in x, scale, offset and width.

        `bit_width` are other widths than the quantizer's own, broadcasting against `x`; only where tokens may differ.
        """
        raise NotImplementedError

    def fused(self, count: int, x: Tensor | None = None) -> Learned | None:
        """What a fused form of this quantizer and its product needs; None where `forward` itself has to be called.

        Args:
            count: Elements of the tensor.
            x: The tensor, if it is there already.
        """
        return None

    def grouped(self, count: int) -> Learned | None:
        """What quantizing a weight of `count` elements, as `view` shows it, together with others needs.

        None where `forward` itself has to be called.
        """
        return None

    def row_codes(self, weight: Tensor) -> Codes | None:
        """The integers of a weight (out, in), int8, and their scales (out,), for products on integers.

        None unless each row has one scale, and for quantizers without such a form.
        """
        return None

    @property
    def fits_int8(self) -> bool:
        """Whether codes have at most 8 bits, wherever a learned width goes."""
        return self.largest_width <= 8

    def rectify(self, x: Tensor) -> Tensor:
        """What is laid on the grid: `x`, unless the quantizer makes its distribution regular first."""
        return x

    def grid(self, bit_width: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The active `(scale, offset)`, detached, shaped to broadcast against the viewed tensor.

        The offset is None on a symmetric grid. `bit_width` are other widths than its own, as for `fake_quantize`.
        """
        raise NotImplementedError

    def active_scale(self) -> Tensor:
        """The scale of `grid`, differentiable where it is learned."""
        return self.grid()[0]

    def initialize(self, observer: HistogramObserver) -> None:
        """Chooses scales and offsets from what was observed, and marks the quantizer as calibrated."""
        raise NotImplementedError

    @torch.no_grad()
    def restore(self, values: Mapping[str, Tensor]) -> None:
        """Takes `scale` and `offset` back as `grid` returned them; `low_scale`, `low_offset` of a lower width.

        `high_scale`, `high_offset` are those of the width between.
        """
        self.get_buffer("scale").copy_(values["scale"])

    def create_observer(self, name: str = "mse") -> HistogramObserver:
        """An empty observer with one histogram per scale; `mse`, `percentile` or `minmax`."""
        return observer_class(name)(self.scale_shape)

    @torch.no_grad()
    def to_int(self, x: Tensor) -> Tensor:
        """The integers of `x`, int32, in the shape of `x`."""
        scale, offset = self.grid()
        return quantize(self.view(x), scale, self.integer_bit_width(), self.spec.signed, offset).view_as(x)

    @torch.no_grad()
    def from_int(self, q: Tensor) -> Tensor:
        """The grid points of the integers `q`.

        `from_int(to_int(x))` equals `forward(x)` of a frozen quantizer, bit for bit in float32.
        """
        scale, offset = self.grid()
        return dequantize(self.view(q), scale, offset).view_as(q)

    def multiples(self, x: Tensor) -> Tensor:
        """The integers n of x̂ = scale·n + offset, in the shape of `x`: what products of integers multiply."""
        return self.to_int(x)

    def largest_multiple(self) -> int:
        """The largest |n|."""
        return int(torch.stack([limit.abs().max() for limit in self.quant_range()]).max())

    @torch.no_grad()
    def freeze(self, bit_width: tuple[int, ...] | int | None = None) -> None:
        """Makes the widths plain integers: `bit_width`, or the learned ones rounded to nearest.

        The spec then says so, too.
        """
        final = self.final_widths(bit_width)
        changes = {"bit_width": final if len(self.spec.widths) > 1 else final[0], "learn_bit_width": False}
        self.spec = self.spec.changed(changes)
        frozen = torch.tensor(final, dtype=self.bit_width.dtype, device=self.bit_width.device).view_as(self.bit_width)
        if self.learns_width:
            del self._parameters["bit_width"]
            self.register_buffer("bit_width", frozen)
        else:
            self.bit_width.copy_(frozen)

    def final_widths(self, bit_width: tuple[int, ...] | int | None) -> tuple[int, ...]:
        """What `freeze` makes of its argument: one width, or one per head."""
        widths = self.integer_bit_width().flatten().tolist() if bit_width is None else bit_width
        final = tuple(int(width) for width in (widths if isinstance(widths, (tuple, list)) else (widths,)))
        if len(final) != self.bit_width.numel():
            raise UsageError(f"{len(final)} bit-widths given for a quantizer with {self.bit_width.numel()}")
        return final

    def quant_range(self) -> tuple[Tensor, Tensor]:
        """`(quant_min, quant_max)` of the current widths, detached."""
        return integer_range(self.integer_bit_width().detach(), self.spec.signed)

    def extra_repr(self) -> str:
        widths = [round(float(width), 2) for width in self.clamped_bit_width().detach().flatten()]
        shown = "(" + ", ".join(f"{width:g}" for width in widths) + ")" if len(widths) > 1 else f"{widths[0]:g}"
        granularity = next(name for name, value in GRANULARITIES.items() if value == self.spec.granularity)
        parts = [f"bit_width={shown}", granularity, "learned" if self.learns_width else "fixed"]
        parts += self.extra_words()
        parts += ["unsigned"] if not self.spec.signed else []
        parts += ["offset"] if not self.spec.symmetric else []
        parts += ["off"] if not self.enabled else [] if self.calibrated else ["not calibrated"]
        return ", ".join(parts)

    def extra_words(self) -> list[str]:
        """What a subclass adds to how it prints."""
        return []


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody looks at what goes through a module."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def quantizers_of(model: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """Every `(site, quantizer)` of a model, in the order of its modules."""
    for path, module in model.named_modules():
        if isinstance(module, Quantizer):
            yield path.removesuffix(Quantizer.SUFFIX), module


def _scale_shape(spec: TensorSpec, layout: Layout) -> tuple[int, ...]:
    """The shape of the scales that `spec.granularity` means on this tensor."""
    if isinstance(spec.granularity, PerHead):
        if layout.heads is None:
            raise UsageError("granularity 'per-head' needs a tensor with heads; use 'per-tensor' or 'per-channel' here")
        return layout.heads
    if isinstance(spec.granularity, PerChannel):
        if layout.channels is None:
            raise UsageError(
                "granularity 'per-channel' needs a tensor with channels; use 'per-tensor' or 'per-head' here"
            )
        return layout.channels
    if isinstance(spec.granularity, PerPosition):
        if layout.positions is None:
            raise UsageError(
                "granularity 'per-position' needs a fixed number of tokens that are not summed over; use 'per-tensor' "
                "or 'per-head' here"
            )
        return layout.positions
    return ()


def _recognise_calibration(module: nn.Module, incompatible_keys: Any) -> None:
    """After loading a state dict: scales that are numbers were calibrated once."""
    assert isinstance(module, Quantizer)
    scale = getattr(module, "scale", None)
    if isinstance(scale, Tensor) and scale.device.type != "meta":
        module.calibrated = bool(torch.isfinite(scale).all() and (scale > 0).all())
