"""DINOv2, with and without registers: timm's VisionTransformer.

Images are seldom of the size of the position embedding (a grid for 518 pixels, images of 224). It is resampled when the
weights are loaded, as `transformers` does it in every pass: bicubic, with registers also antialiased. Register tokens
have no position: timm adds none to the class token either then, so the class token takes in its own. The features are
the normalised class token. Its classifier sees that beside the mean of all patches, twice the width, which timm's class
does not do: it is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from qvit.models.transformers.base import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Config,
    Converter,
    Pair,
    layer,
    ratio,
    register_converter,
)
from qvit.models.transformers.vit import attention

if TYPE_CHECKING:
    from torch import Tensor


@register_converter("dinov2")
class DINOv2(Converter):
    """A DINOv2."""

    classes = {"Dinov2Model": ""}
    refused = {
        "Dinov2ForImageClassification": "its classifier sees the class token and the mean of the patches side by side, "
        "which timm's class does not; save the model below it",
        "Dinov2Backbone": "it gives the features of several blocks",
    }
    unused = r"embeddings\.mask_token"
    any_size = True
    preparation = {
        "mean": IMAGENET_MEAN, "std": IMAGENET_STD, "interpolation": "bicubic", "crop_pct": 0.875,
        "crop_mode": "center",
    }  # fmt: skip

    def arguments(self, config: Config) -> tuple[str, dict[str, Any]]:
        gated, width = config.flag("use_swiglu_ffn", False), config.whole("hidden_size", 768)
        hidden = int(width * config.number("mlp_ratio", 4))
        if gated:  # both halves of the first layer, as timm counts them
            hidden = 2 * ((int(hidden * 2 / 3) + 7) // 8 * 8)
        kwargs = config.common() | {
            "mlp_ratio": ratio(hidden, width),
            "qkv_bias": config.flag("qkv_bias", True),
            "init_values": config.number("layerscale_value", 1.0),
            "norm_eps": config.number("layer_norm_eps", 1e-6),
            "num_classes": 0,
        }
        if gated:
            return "vit_giant_patch14_dinov2", kwargs
        return "vit_base_patch14_dinov2", kwargs | {"act_layer": config.activation()}

    def pairs(self, config: Config) -> Iterator[Pair]:
        yield Pair("cls_token", ("embeddings.cls_token",))
        yield Pair("pos_embed", ("embeddings.position_embeddings",))
        yield from layer("patch_embed.proj", "embeddings.patch_embeddings.projection")
        first, second = ("weights_in", "weights_out") if config.flag("use_swiglu_ffn", False) else ("fc1", "fc2")
        for index in range(config.whole("num_hidden_layers", 12)):
            ours, theirs = f"blocks.{index}", f"encoder.layer.{index}"
            yield from layer(f"{ours}.norm1", f"{theirs}.norm1")
            yield from attention(ours, theirs, bias=config.flag("qkv_bias", True))
            yield Pair(f"{ours}.ls1.gamma", (f"{theirs}.layer_scale1.lambda1",))
            yield from layer(f"{ours}.norm2", f"{theirs}.norm2")
            yield from layer(f"{ours}.mlp.fc1", f"{theirs}.mlp.{first}")
            yield from layer(f"{ours}.mlp.fc2", f"{theirs}.mlp.{second}")
            yield Pair(f"{ours}.ls2.gamma", (f"{theirs}.layer_scale2.lambda1",))
        yield from layer("norm", "layernorm")

    def adapt(self, config: Config, state: dict[str, Tensor], grid: tuple[int, int]) -> None:
        state["pos_embed"] = resampled(state["pos_embed"], grid, antialias=False)


@register_converter("dinov2_with_registers")
class DINOv2WithRegisters(DINOv2):
    """A DINOv2 with register tokens."""

    classes = {"Dinov2WithRegistersModel": ""}
    refused = {
        "Dinov2WithRegistersForImageClassification": DINOv2.refused["Dinov2ForImageClassification"],
        "Dinov2WithRegistersBackbone": DINOv2.refused["Dinov2Backbone"],
    }

    def arguments(self, config: Config) -> tuple[str, dict[str, Any]]:
        name, kwargs = super().arguments(config)
        return name, kwargs | {"reg_tokens": config.whole("num_register_tokens", 4), "no_embed_class": True}

    def pairs(self, config: Config) -> Iterator[Pair]:
        yield Pair("reg_token", ("embeddings.register_tokens",))
        yield from super().pairs(config)

    def adapt(self, config: Config, state: dict[str, Tensor], grid: tuple[int, int]) -> None:
        positions = resampled(state["pos_embed"], grid, antialias=True)
        state["cls_token"] = state["cls_token"] + positions[:, :1]
        state["pos_embed"] = positions[:, 1:]

    def restore(self, config: Config, state: dict[str, Tensor]) -> None:
        import torch

        positions = state["pos_embed"]
        state["pos_embed"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)


def resampled(positions: Tensor, grid: tuple[int, int], *, antialias: bool) -> Tensor:
    """A position embedding (1, 1 + side², C) for another `grid` of patches, the class token's first."""
    import torch
    from torch.nn import functional as F

    count, side = positions.shape[1] - 1, round((positions.shape[1] - 1) ** 0.5)
    if count == grid[0] * grid[1] and grid[0] == grid[1]:
        return positions
    patches = positions[:, 1:].float().unflatten(1, (side, -1)).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=grid, mode="bicubic", align_corners=False, antialias=antialias)
    return torch.cat([positions[:, :1].float(), patches.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
