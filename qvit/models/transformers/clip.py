"""CLIP's vision tower: timm's VisionTransformer with a norm before the blocks.

The features are the class token behind the last norm (`pooler_output`), or its projection, which is what is compared
with texts (`image_embeds`): to timm that is a classifier without bias. `CLIPForImageClassification` averages the
patches without a norm. Of a whole CLIP the vision tower and its projection are read, the rest is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from qvit.errors import UsageError
from qvit.models.transformers.base import CLIP_MEAN, CLIP_STD, Config, Converter, Pair, layer, register_converter

if TYPE_CHECKING:
    from torch import Tensor


def blocks(config: Config) -> Iterator[Pair]:
    """The blocks of CLIP's and SigLIP's vision towers."""
    for index in range(config.whole("num_hidden_layers", 12)):
        ours, theirs = f"blocks.{index}", f"encoder.layers.{index}"
        yield from layer(f"{ours}.norm1", f"{theirs}.layer_norm1")
        yield from layer(f"{ours}.attn.qkv", *(f"{theirs}.self_attn.{name}_proj" for name in "qkv"))
        yield from layer(f"{ours}.attn.proj", f"{theirs}.self_attn.out_proj")
        yield from layer(f"{ours}.norm2", f"{theirs}.layer_norm2")
        yield from layer(f"{ours}.mlp.fc1", f"{theirs}.mlp.fc1")
        yield from layer(f"{ours}.mlp.fc2", f"{theirs}.mlp.fc2")


@register_converter("clip_vision_model", "clip")
class CLIP(Converter):
    """A CLIP."""

    classes = {
        "CLIPVisionModel": "vision_model.",
        "CLIPVisionModelWithProjection": "vision_model.",
        "CLIPModel": "vision_model.",
        "CLIPForImageClassification": "vision_model.",
    }
    refused = {"CLIPTextModel": "it has no vision model", "CLIPTextModelWithProjection": "it has no vision model"}
    unused = r"text_model\..*|(text|visual)_projection\.weight|logit_scale|embeddings\.position_ids|post_layernorm\..*"
    preparation = {
        "mean": CLIP_MEAN, "std": CLIP_STD, "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center",
    }  # fmt: skip

    def arguments(self, config: Config) -> tuple[str, dict[str, Any]]:
        vision = config.part("vision_config")
        own: dict[str, Any] = {} if config.classifies else {"num_classes": 0}
        if self._projects(config):
            own = {"num_classes": config.whole("projection_dim", 512)}
        if config.classifies:
            own = {"global_pool": "avg", "fc_norm": False, "final_norm": False}
        return "vit_base_patch16_clip_224", vision.common() | own | {
            "pre_norm": True,
            "act_layer": _activation(vision),
            "norm_eps": vision.number("layer_norm_eps", 1e-5),
        }

    def pairs(self, config: Config) -> Iterator[Pair]:
        yield Pair("cls_token", ("embeddings.class_embedding",), leading=2)
        yield Pair("pos_embed", ("embeddings.position_embedding.weight",), leading=1)
        yield from layer("patch_embed.proj", "embeddings.patch_embedding", bias=False)
        yield from layer("norm_pre", "pre_layrnorm")
        yield from blocks(config.part("vision_config"))
        if config.classifies:
            yield from layer("head", "classifier", outside=True)
            return
        yield from layer("norm", "post_layernorm")
        if self._projects(config):
            yield from layer("head", "visual_projection", bias=False, outside=True)

    def adapt(self, config: Config, state: dict[str, Tensor], grid: tuple[int, int]) -> None:
        if self._projects(config):
            state["head.bias"] = state["head.weight"].new_zeros(len(state["head.weight"]))

    def restore(self, config: Config, state: dict[str, Tensor]) -> None:
        if self._projects(config) and bool(state.pop("head.bias").any()):
            raise UsageError(f"the projection of a {config.architecture} has no bias, and this model's has one")

    @staticmethod
    def _projects(config: Config) -> bool:
        return config.architecture in ("CLIPVisionModelWithProjection", "CLIPModel")


def _activation(vision: Config) -> str:
    """The activation; a config of CLIP that does not name one means its own."""
    return vision.activation() if "hidden_act" in vision.values else "quick_gelu"
