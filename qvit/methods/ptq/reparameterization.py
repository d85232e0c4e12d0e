"""Scale reparameterization: one scale serves all channels of a LayerNorm's output, and the float model stays the same.

Channels of LayerNorm outputs differ in range by more than a factor of ten, so a single scale wastes most levels on most
channels. RepQ-ViT (Li et al., ICCV 2023) calibrates each channel on its own and moves the
differences into the parameters on both sides. With m_c the middle of channel c's range, w_c its width, and r_c = (w_c /
mean w)^strength,

    x'_c = (x_c - m_c) / r_c                      all channels lie around 0 and are equally wide
    γ' = γ / r     β' = (β - m) / r               the LayerNorm computes x'
    W' = W·diag(r)     b' = b + W·m               the next linear layer takes it back: W'x' + b' = Wx + b

Here the common range is centred on 0, so that it fits a signed grid without offset; the paper moves every channel to
the mean zero point. The fold is exact in real numbers, hence in float up to rounding.

Folded are LayerNorms in front of a block's `qkv` and `fc1`, and in front of Swin's patch merging. Whether the layer
really sees what the LayerNorm returns is measured: channel sums over the images must agree (windows reorder tokens,
which sums do not notice). Where they do not agree (post-norm, a norm inside), nothing is folded. Without a bias, or
where a window is padded with zeros after the norm, there is no place for m: then m = 0, and w_c is twice the largest
magnitude.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qvit.errors import QvitError, UsageError
from qvit.models.convert import Stage, in_eval_mode, quantizers_disabled, stage_of
from qvit.quantizers.ranges import PercentileObserver

#: Children of a module: a LayerNorm, and the linear layers that alone may see its output.
PAIRS = (
    ("norm1", ("attn.qkv",)),
    ("norm2", ("mlp.fc1",)),
    ("norm2", ("mlp.fc1_g", "mlp.fc1_x")),
    ("norm", ("reduction",)),
)
_TOLERANCE = 1e-3


@dataclass
class Fold:
    """A LayerNorm, the layers that see its output, and what was observed there.

    Attributes:
        path: Path of the LayerNorm.
        norm: It.
        linears: The layers, by path.
        observer: Histograms of the LayerNorm's output, one per channel.
        sums: Sum and number of tokens per channel: of the output under "", of each layer's input under its path.
    """

    path: str
    norm: nn.LayerNorm
    linears: dict[str, nn.Linear]
    observer: PercentileObserver = field(init=False)
    sums: dict[str, tuple[Tensor, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.observer = PercentileObserver((self.norm.normalized_shape[0],))

    def see_output(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        """Forward hook of the LayerNorm."""
        self._add("", output)
        self.observer.observe(output)

    def see_input(self, path: str, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Forward pre-hook of a layer."""
        self._add(path, inputs[0])

    def _add(self, key: str, x: Tensor) -> None:
        total, count = self.sums.get(key, (0.0, 0))
        self.sums[key] = (total + x.detach().double().flatten(0, -2).sum(0), count + x.numel() // x.shape[-1])

    @property
    def is_direct(self) -> bool:
        """Whether every layer sees the LayerNorm's output, zeros aside."""
        own, _ = self.sums[""]
        inputs = [self.sums.get(path, (own * torch.nan, 0))[0] for path in self.linears]
        return all(bool(((x - own).abs() <= _TOLERANCE * own.abs().amax()).all()) for x in inputs)

    @property
    def shifts(self) -> bool:
        """Whether the middle of the range can be moved into biases."""
        same_tokens = all(self.sums[path][1] == self.sums[""][1] for path in self.linears)
        has_bias = self.norm.bias is not None and all(linear.bias is not None for linear in self.linears.values())
        return same_tokens and has_bias

    @torch.no_grad()
    def apply(self, strength: float) -> None:
        """Moves the differences between channels into the parameters."""
        bottom, top = self.observer.range()
        if self.shifts:
            middle, width = (top + bottom) / 2, top - bottom
        else:
            middle, width = torch.zeros_like(top), 2 * torch.maximum(top.abs(), bottom.abs())
        width = width.clamp_min(1e-3 * width.mean()).clamp_min(torch.finfo(width.dtype).tiny)
        ratio = (width / width.mean()) ** strength
        self.norm.weight.div_(ratio)
        if self.norm.bias is not None:
            self.norm.bias.sub_(middle).div_(ratio)
        for linear in self.linears.values():
            if linear.bias is not None:
                linear.bias.add_(linear.weight @ middle)
            linear.weight.mul_(ratio)


def folds_of(model: nn.Module) -> Iterator[Fold]:
    """The places of a model where LayerNorm and linear layers have the right names and sizes."""
    for path, module in model.named_modules():
        children = dict(module.named_modules())
        for name, leaves in PAIRS:
            norm, linears = children.get(name), [children.get(leaf) for leaf in leaves]
            if not isinstance(norm, nn.LayerNorm) or not norm.elementwise_affine or len(norm.normalized_shape) != 1:
                continue
            found = {f"{path}.{leaf}": x for leaf, x in zip(leaves, linears, strict=True) if isinstance(x, nn.Linear)}
            if len(found) == len(leaves) and all(x.in_features == norm.normalized_shape[0] for x in found.values()):
                yield Fold(f"{path}.{name}", norm, found)


@torch.no_grad()
def reparameterize(model: nn.Module, batches: Iterable[Tensor], *, strength: float = 1.0) -> list[str]:
    """Evens out the channels of LayerNorm outputs, in place; the model computes what it computed before.

    Args:
        model: A float model, or a quantized one that is not calibrated yet; its mode is restored.
        batches: Calibration images (B, channels, height, width) on the model's device.
        strength: 1 makes all channels equally wide, 0 only centres them.

    Returns:
        Paths of the LayerNorms that were folded; an empty list for a model without such a place.

    Raises:
        UsageError: If the model is calibrated: its scales are those of other parameters.
        QvitError: If there are no images or activations are not finite.
    """
    if stage_of(model) > Stage.QUANTIZED:
        raise UsageError("reparameterize before calibration: the scales of a calibrated model would no longer fit")
    if not 0 <= strength <= 1:
        raise UsageError(f"strength {strength} of the reparameterization must lie between 0 and 1")
    folds, images = list(folds_of(model)), 0
    with quantizers_disabled(model), in_eval_mode(model), ExitStack() as stack:
        for fold in folds:
            stack.enter_context(fold.norm.register_forward_hook(fold.see_output))
            for path, linear in fold.linears.items():
                stack.enter_context(linear.register_forward_pre_hook(functools.partial(fold.see_input, path)))
        for batch in batches:
            model(batch)
            images += len(batch)
    if folds and not images:
        raise QvitError("no images to reparameterize with: pass at least one batch of training images")
    direct = [fold for fold in folds if "" in fold.sums and fold.is_direct]
    for fold in direct:
        fold.apply(strength)
    return [fold.path for fold in direct]
