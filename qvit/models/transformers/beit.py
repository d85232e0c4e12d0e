"""BEiT and BEiT v2: timm's Beit. Features are the mean of the patches behind a norm, or the normalised class token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qvit.models.transformers.base import HALF, Config, Converter, Pair, layer, register_converter

_TABLE = "relative_position_bias.relative_position_bias_table"


@register_converter("beit")
class BEiT(Converter):
    """A BEiT."""

    classes = {"BeitForImageClassification": "beit.", "BeitModel": ""}
    refused = {
        "BeitForMaskedImageModeling": "its decoder is no part of timm's class",
        "BeitForSemanticSegmentation": "its decoder is no part of timm's class",
        "BeitBackbone": "it gives the features of several blocks",
    }
    unused = r".*relative_position_index|embeddings\.mask_token"
    preparation = {"mean": HALF, "std": HALF, "interpolation": "bicubic", "crop_pct": 0.875, "crop_mode": "squash"}

    def arguments(self, config: Config) -> tuple[str, dict[str, Any]]:
        config.require("hidden_act", "gelu", "gelu", "timm's class has a GELU")
        mean = config.flag("use_mean_pooling", True)
        kwargs = config.common() | {
            "global_pool": "avg" if mean else "token",
            "use_fc_norm": mean,
            "use_abs_pos_emb": config.flag("use_absolute_position_embeddings", False),
            "use_rel_pos_bias": config.flag("use_relative_position_bias", False),
            "use_shared_rel_pos_bias": config.flag("use_shared_relative_position_bias", False),
            "init_values": config.number("layer_scale_init_value", 0.1),
            "norm_eps": config.number("layer_norm_eps", 1e-12),
        }
        return "beit_base_patch16_224", kwargs if config.classifies else kwargs | {"num_classes": 0}

    def pairs(self, config: Config) -> Iterator[Pair]:
        yield Pair("cls_token", ("embeddings.cls_token",))
        if config.flag("use_absolute_position_embeddings", False):
            yield Pair("pos_embed", ("embeddings.position_embeddings",))
        if config.flag("use_shared_relative_position_bias", False):
            yield Pair("rel_pos_bias.relative_position_bias_table", (f"encoder.{_TABLE}",))
        yield from layer("patch_embed.proj", "embeddings.patch_embeddings.projection")
        for index in range(config.whole("num_hidden_layers", 12)):
            ours, theirs = f"blocks.{index}", f"encoder.layer.{index}"
            attention = f"{theirs}.attention.attention"
            yield from layer(f"{ours}.norm1", f"{theirs}.layernorm_before")
            projections = (f"{attention}.{name}" for name in ("query", "key", "value"))
            yield from layer(f"{ours}.attn.qkv", *projections, bias=False)
            yield Pair(f"{ours}.attn.q_bias", (f"{attention}.query.bias",))
            yield Pair(f"{ours}.attn.v_bias", (f"{attention}.value.bias",))
            if config.flag("use_relative_position_bias", False):
                yield Pair(f"{ours}.attn.relative_position_bias_table", (f"{attention}.{_TABLE}",))
            yield from layer(f"{ours}.attn.proj", f"{theirs}.attention.output.dense")
            yield from layer(f"{ours}.norm2", f"{theirs}.layernorm_after")
            yield from layer(f"{ours}.mlp.fc1", f"{theirs}.intermediate.dense")
            yield from layer(f"{ours}.mlp.fc2", f"{theirs}.output.dense")
            if config.number("layer_scale_init_value", 0.1):
                yield Pair(f"{ours}.gamma_1", (f"{theirs}.lambda_1",))
                yield Pair(f"{ours}.gamma_2", (f"{theirs}.lambda_2",))
        norm = ("fc_norm", "pooler.layernorm") if config.flag("use_mean_pooling", True) else ("norm", "layernorm")
        yield from layer(*norm)
        if config.classifies:
            yield from layer("head", "classifier", outside=True)
