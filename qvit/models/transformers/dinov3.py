"""DINOv3: timm's Eva with rotary positions.

Patches are rotated by their place on a grid from -1 to 1, computed alike in both; the grid needs no weights, so images
may have any size. The public checkpoints have no bias in the keys, which is how timm keeps its biases of q and v. The
features are the normalised class token.
"""

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
    ratio,
    register_converter,
)

_BIASES = "timm's class has biases of q and v, but not of k, or none"


@register_converter("dinov3_vit")
class DINOv3(Converter):
    """A DINOv3 ViT."""

    classes = {"DINOv3ViTModel": ""}
    refused = {"DINOv3ViTBackbone": "it gives the features of several blocks"}
    unused = r"embeddings\.(mask_token|register_tokens)"  # there are none of the latter, or they are used
    any_size = True
    preparation = {
        "mean": IMAGENET_MEAN, "std": IMAGENET_STD, "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash",
    }  # fmt: skip

    def arguments(self, config: Config) -> tuple[str, dict[str, Any]]:
        config.require("key_bias", False, False, _BIASES)
        config.require("value_bias", True, config.flag("query_bias", True), _BIASES)
        config.require("proj_bias", True, True, "timm's class has one")
        config.require("mlp_bias", True, True, "timm's class has one")
        kwargs = config.common()
        gated = config.flag("use_gated_mlp", False)
        config.require("hidden_act", "gelu", "silu" if gated else "gelu", "timm's class has another activation")
        hidden = config.whole("intermediate_size", 4 * kwargs["embed_dim"])
        return "vit_small_patch16_dinov3_qkvb", kwargs | {
            "mlp_ratio": ratio(hidden, kwargs["embed_dim"]),
            "swiglu_mlp": gated,
            "qkv_bias": config.flag("query_bias", True),
            "num_reg_tokens": config.whole("num_register_tokens", 0, least=0),
            "rope_temperature": config.number("rope_theta", 100.0),
            "dynamic_img_size": False,
            "global_pool": "token",
            "norm_eps": config.number("layer_norm_eps", 1e-5),
            "num_classes": 0,
        }

    def pairs(self, config: Config) -> Iterator[Pair]:
        yield Pair("cls_token", ("embeddings.cls_token",))
        if config.whole("num_register_tokens", 0, least=0):
            yield Pair("reg_token", ("embeddings.register_tokens",))
        yield from layer("patch_embed.proj", "embeddings.patch_embeddings")
        gated = config.flag("use_gated_mlp", False)
        for index in range(config.whole("num_hidden_layers", 12)):
            ours, theirs = f"blocks.{index}", f"layer.{index}"
            yield from layer(f"{ours}.norm1", f"{theirs}.norm1")
            projections = (f"{theirs}.attention.{name}_proj" for name in "qkv")
            yield from layer(f"{ours}.attn.qkv", *projections, bias=False)
            if config.flag("query_bias", True):
                yield Pair(f"{ours}.attn.q_bias", (f"{theirs}.attention.q_proj.bias",))
                yield Pair(f"{ours}.attn.v_bias", (f"{theirs}.attention.v_proj.bias",))
            yield from layer(f"{ours}.attn.proj", f"{theirs}.attention.o_proj")
            yield Pair(f"{ours}.gamma_1", (f"{theirs}.layer_scale1.lambda1",))
            yield from layer(f"{ours}.norm2", f"{theirs}.norm2")
            first = ("gate_proj", "up_proj") if gated else ("up_proj",)
            yield from layer(f"{ours}.mlp.fc1", *(f"{theirs}.mlp.{name}" for name in first))
            yield from layer(f"{ours}.mlp.fc2", f"{theirs}.mlp.down_proj")
            yield Pair(f"{ours}.gamma_2", (f"{theirs}.layer_scale2.lambda1",))
        yield from layer("norm", "norm")
