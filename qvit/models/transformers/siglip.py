"""SigLIP's vision tower, and that of SigLIP 2 at a fixed resolution: timm's VisionTransformer with attention pooling.

There is no class token; a learned query attends to all tokens, and an MLP follows (`AttentionPoolLatent`). The features
are what comes out (`pooler_output`), which is compared with texts as it is. `SiglipForImageClassification` averages
the tokens behind the last norm. SigLIP 2 for images of any size (NaFlex) has another patch embedding: it is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qvit.models.transformers.base import HALF, Config, Converter, Pair, layer, register_converter
from qvit.models.transformers.clip import blocks


@register_converter("siglip_vision_model", "siglip")
class SigLIP(Converter):
    """A SigLIP."""

    classes = {
        "SiglipVisionModel": "vision_model.",
        "SiglipModel": "vision_model.",
        "SiglipForImageClassification": "vision_model.",
    }
    refused = {"SiglipTextModel": "it has no vision model"}
    unused = r"text_model\..*|logit_(scale|bias)|embeddings\.position_ids|head\..*"
    preparation = {"mean": HALF, "std": HALF, "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "squash"}

    def arguments(self, config: Config) -> tuple[str, dict[str, Any]]:
        vision = config.part("vision_config")
        own: dict[str, Any] = {"global_pool": "avg", "fc_norm": False}
        if not config.classifies:
            vision.require("vision_use_head", True, True, "without its pooling there is no single vector of features")
            own = {"global_pool": "map", "num_classes": 0}
        return "vit_base_patch16_siglip_224", vision.common() | own | {
            "class_token": False,
            "act_layer": vision.activation() if "hidden_act" in vision.values else "gelu_tanh",
            "norm_eps": vision.number("layer_norm_eps", 1e-6),
        }

    def pairs(self, config: Config) -> Iterator[Pair]:
        yield Pair("pos_embed", ("embeddings.position_embedding.weight",), leading=1)
        yield from layer("patch_embed.proj", "embeddings.patch_embedding")
        yield from blocks(config.part("vision_config"))
        yield from layer("norm", "post_layernorm")
        if config.classifies:
            yield from layer("head", "classifier", outside=True)
            return
        yield Pair("attn_pool.latent", ("head.probe",))
        for name in ("weight", "bias"):
            yield Pair(f"attn_pool.qkv.{name}", (f"head.attention.in_proj_{name}",))
        yield from layer("attn_pool.proj", "head.attention.out_proj")
        yield from layer("attn_pool.norm", "head.layernorm")
        yield from layer("attn_pool.mlp.fc1", "head.mlp.fc1")
        yield from layer("attn_pool.mlp.fc2", "head.mlp.fc2")

    def adapt(self, config: Config, state: dict[str, Any], grid: tuple[int, int]) -> None:
        for name in () if config.classifies else ("weight", "bias"):
            joined = state.pop(f"attn_pool.qkv.{name}")
            width = len(joined) // 3
            state[f"attn_pool.q.{name}"], state[f"attn_pool.kv.{name}"] = joined[:width], joined[width:]

    def restore(self, config: Config, state: dict[str, Any]) -> None:
        import torch

        for name in () if config.classifies else ("weight", "bias"):
            parts = [state.pop(f"attn_pool.{part}.{name}") for part in ("q", "kv")]
            state[f"attn_pool.qkv.{name}"] = torch.cat(parts)
