"""Swin: timm's SwinTransformer, which merges patches before a stage where `transformers` does it after one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qvit.models.transformers.base import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Config,
    Converter,
    Pair,
    layer,
    register_converter,
)


@register_converter("swin")
class Swin(Converter):
    """A Swin."""

    classes = {"SwinForImageClassification": "swin.", "SwinModel": ""}
    refused = {
        "SwinForMaskedImageModeling": "its decoder of pixels is no part of timm's class",
        "SwinBackbone": "it gives the features of several stages",
    }
    unused = r".*\.relative_position_index|embeddings\.mask_token"
    preparation = {
        "mean": IMAGENET_MEAN, "std": IMAGENET_STD, "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "squash",
    }  # fmt: skip

    def arguments(self, config: Config) -> tuple[str, dict[str, Any]]:
        config.require("hidden_act", "gelu", "gelu", "timm's class has a GELU")
        config.require("use_absolute_embeddings", False, False, "timm's class has no position embedding")
        config.require("qkv_bias", True, True, "timm's class has one")
        kwargs = {
            "img_size": list(config.sides("image_size", 224)),
            "patch_size": config.whole("patch_size", 4),
            "in_chans": config.whole("num_channels", 3),
            "embed_dim": config.whole("embed_dim", 96),
            "depths": config.wholes("depths"),
            "num_heads": config.wholes("num_heads"),
            "window_size": config.whole("window_size", 7),
            "mlp_ratio": config.number("mlp_ratio", 4.0),
            "norm_eps": config.number("layer_norm_eps", 1e-5),
        }
        return "swin_base_patch4_window7_224", kwargs if config.classifies else kwargs | {"num_classes": 0}

    def pairs(self, config: Config) -> Iterator[Pair]:
        yield from layer("patch_embed.proj", "embeddings.patch_embeddings.projection")
        yield from layer("patch_embed.norm", "embeddings.norm")
        depths = config.wholes("depths")
        for stage, depth in enumerate(depths):
            for block in range(depth):
                ours, theirs = f"layers.{stage}.blocks.{block}", f"encoder.layers.{stage}.blocks.{block}"
                yield from layer(f"{ours}.norm1", f"{theirs}.layernorm_before")
                projections = (f"{theirs}.attention.self.{name}" for name in ("query", "key", "value"))
                yield from layer(f"{ours}.attn.qkv", *projections)
                table = "relative_position_bias_table"
                yield Pair(f"{ours}.attn.{table}", (f"{theirs}.attention.self.{table}",))
                yield from layer(f"{ours}.attn.proj", f"{theirs}.attention.output.dense")
                yield from layer(f"{ours}.norm2", f"{theirs}.layernorm_after")
                yield from layer(f"{ours}.mlp.fc1", f"{theirs}.intermediate.dense")
                yield from layer(f"{ours}.mlp.fc2", f"{theirs}.output.dense")
            if stage + 1 < len(depths):
                ours, theirs = f"layers.{stage + 1}.downsample", f"encoder.layers.{stage}.downsample"
                yield from layer(f"{ours}.norm", f"{theirs}.norm")
                yield from layer(f"{ours}.reduction", f"{theirs}.reduction", bias=False)
        yield from layer("norm", "layernorm")
        if config.classifies:
            yield from layer("head.fc", "classifier", outside=True)
