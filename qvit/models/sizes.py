"""Which image sizes a model takes, and its position embedding at another one.

timm's models take images of the size that they were made for (`img_size`, height and width). Made with
`dynamic_img_size=True` (ViT, EVA, Swin; the default of DINOv3) they take any: learned position embeddings are resampled
in every call, rotary ones computed, windows of Swin laid anew. What is quantized knows no size: scales belong to
tensors, heads and channels, not to tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from qvit.errors import UsageError

Size = tuple[int, int]


def takes_any_size(model: nn.Module) -> bool:
    """Whether a model takes images of other sizes than the one that it was made for."""
    embed = getattr(model, "patch_embed", None)
    return not getattr(embed, "strict_img_size", True)


def check_size(model: nn.Module, size: Sequence[int]) -> None:
    """Raises UsageError if a model does not take images of this height and width; an unknown model may take any."""
    embed: Any = getattr(model, "patch_embed", None)
    own, strict = getattr(embed, "img_size", None), getattr(embed, "strict_img_size", None)
    if own is None or strict is None:
        return
    name = type(model).__name__
    if strict and tuple(size) != tuple(own):
        dynamic = "dynamic_img_size" in inspect.signature(type(model).__init__).parameters
        other = "; one made with dynamic_img_size=True (`-m dynamic_img_size=true`) takes others" if dynamic else ""
        raise UsageError(f"this {name} takes images of {shown_size(own)} pixels, not {shown_size(size)}{other}")
    if not strict and not embed.dynamic_img_pad:
        require_whole_patches(model, size)


def require_whole_patches(model: nn.Module, size: Sequence[int]) -> None:
    """Raises UsageError unless patches of the model divide this height and width."""
    embed: Any = model.get_submodule("patch_embed")
    if any(side < patch or side % patch for side, patch in zip(size, embed.patch_size, strict=True)):
        raise UsageError(
            f"images of {shown_size(size)} pixels are not made of whole patches: give multiples of "
            f"{shown_size(embed.patch_size)}"
        )


def shown_size(size: Sequence[int]) -> str:
    """Height and width as messages and options write them: `64x96`."""
    return "x".join(map(str, size))


def parse_size(text: str) -> Size:
    """The inverse: `64x96`, or `64` for a square. Raises UsageError."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isascii() and side.isdigit() and 0 < int(side) < 1 << 14 for side in sides):
        raise UsageError(f"a size of images is HEIGHTxWIDTH in pixels, such as 224x320, or 224, not '{text}'")
    return int(sides[0]), int(sides[-1])


def resampled_positions(positions: Tensor, before: Size, after: Size) -> Tensor:
    """A learned position embedding (1, prefix + tokens, C) for another grid of patches, as timm resamples it.

    Args:
        positions: Those of a grid of `before` (rows, columns), perhaps with some of prefix tokens in front.
        after: The new grid.
    """
    prefix = positions.shape[1] - before[0] * before[1]
    return resample_abs_pos_embed(positions, new_size=list(after), old_size=list(before), num_prefix_tokens=prefix)
