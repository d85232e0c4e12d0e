"""ViT and DeiT: timm's VisionTransformer.

A DeiT of `transformers` keeps the distillation token where its classifier is not used
(`DeiTForImageClassification`): to timm it is a register token with a position of its own. With both classifiers
(`DeiTForImageClassificationWithTeacher`) it is timm's distilled DeiT, which averages their answers, too. Without a
classifier the features are the normalised class token; the pooler, a layer with tanh behind it, is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qvit.models.transformers.base import (
    HALF,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Config,
    Converter,
    Pair,
    layer,
    register_converter,
)


def attention(ours: str, theirs: str, *, bias: bool) -> Iterator[Pair]:
    """Projections, as ViT, DeiT and DINOv2 name them."""
    projections = (f"{theirs}.attention.attention.{name}" for name in ("query", "key", "value"))
    yield from layer(f"{ours}.attn.qkv", *projections, bias=bias)
    yield from layer(f"{ours}.attn.proj", f"{theirs}.attention.output.dense")


@register_converter("vit")
class ViT(Converter):
    """A ViT."""

    classes = {"ViTForImageClassification": "vit.", "ViTModel": ""}
    refused = {"ViTForMaskedImageModeling": "its decoder of pixels is no part of timm's class"}
    unused = r"pooler\.dense\.(weight|bias)|embeddings\.mask_token"
    preparation = {"mean": HALF, "std": HALF, "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash"}

    def arguments(self, config: Config) -> tuple[str, dict[str, Any]]:
        kwargs = config.common() | {
            "qkv_bias": config.flag("qkv_bias", True),
            "act_layer": config.activation(),
            "norm_eps": config.number("layer_norm_eps", 1e-12),
        }
        return "vit_base_patch16_224", kwargs if config.classifies else kwargs | {"num_classes": 0}

    def pairs(self, config: Config) -> Iterator[Pair]:
        yield Pair("cls_token", ("embeddings.cls_token",))
        yield Pair("pos_embed", ("embeddings.position_embeddings",))
        yield from layer("patch_embed.proj", "embeddings.patch_embeddings.projection")
        for index in range(config.whole("num_hidden_layers", 12)):
            ours, theirs = f"blocks.{index}", f"encoder.layer.{index}"
            yield from layer(f"{ours}.norm1", f"{theirs}.layernorm_before")
            yield from attention(ours, theirs, bias=config.flag("qkv_bias", True))
            yield from layer(f"{ours}.norm2", f"{theirs}.layernorm_after")
            yield from layer(f"{ours}.mlp.fc1", f"{theirs}.intermediate.dense")
            yield from layer(f"{ours}.mlp.fc2", f"{theirs}.output.dense")
        yield from layer("norm", "layernorm")
        yield from self.heads(config)

    def heads(self, config: Config) -> Iterator[Pair]:
        """The classifiers."""
        if config.classifies:
            yield from layer("head", "classifier", outside=True)


@register_converter("deit")
class DeiT(ViT):
    """A DeiT with its distillation token."""

    classes = {
        "DeiTForImageClassification": "deit.",
        "DeiTForImageClassificationWithTeacher": "deit.",
        "DeiTModel": "",
    }
    refused = {"DeiTForMaskedImageModeling": "its decoder of pixels is no part of timm's class"}
    preparation = {
        "mean": IMAGENET_MEAN, "std": IMAGENET_STD, "interpolation": "bicubic", "crop_pct": 0.875,
        "crop_mode": "squash",
    }  # fmt: skip

    def arguments(self, config: Config) -> tuple[str, dict[str, Any]]:
        name, kwargs = super().arguments(config)
        if self._has_two(config):
            return "deit_base_distilled_patch16_224", kwargs
        return name, kwargs | {"reg_tokens": 1}

    def pairs(self, config: Config) -> Iterator[Pair]:
        yield Pair("dist_token" if self._has_two(config) else "reg_token", ("embeddings.distillation_token",))
        yield from super().pairs(config)

    def heads(self, config: Config) -> Iterator[Pair]:
        if not self._has_two(config):
            yield from super().heads(config)
            return
        yield from layer("head", "cls_classifier", outside=True)
        yield from layer("head_dist", "distillation_classifier", outside=True)

    @staticmethod
    def _has_two(config: Config) -> bool:
        return config.architecture.endswith("WithTeacher")
