"""timm's Beit: beit_*, beitv2_* (Bao et al. 2022; Peng et al. 2022). beit3_* are VisionTransformers.

Sites and MACs are those of a ViT (`vit.py`). Attention adds a bias for the relative position of two patches,
each block's own or one of the whole model, to the scores in float; the biases of q and v, which timm keeps beside the
fused projection, are added in float before q and v are quantized. LayerScale, LayerNorm, softmax, GELU and residuals
stay in float.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from timm.models.beit import Attention, Beit
from torch import Tensor, nn

from qvit.models.families.base import register_family
from qvit.models.families.parts import (
    MLPS,
    Family,
    Part,
    attention_part,
    classifiers,
    mlp_parts,
    patch_embedding,
)
from qvit.models.layers import AttentionSites


class QuantBeitAttention(AttentionSites, Attention):
    """timm's Attention of BEiT with quantized operands; same parameters, same signature."""

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        q, k, v = self.fused_projection(x)
        bias = shared_rel_pos_bias
        if self.relative_position_bias_table is not None:
            own = self._get_rel_pos_bias()
            bias = own if bias is None else own + bias
        x = self.attend(q, k, v, self.scale, bias, self.attn_drop)
        return self.proj_drop(self.project(x))


@register_family(Beit)
class BeitFamily(Family):
    """The parts of Beit."""

    supported = "patch embedding by one convolution, blocks with timm's Attention and MLP, and a linear classifier"

    def parts(self, model: nn.Module) -> Iterator[Part]:
        yield from patch_embedding(model)
        beit: Any = model
        tokens = beit.patch_embed.num_patches + beit.num_prefix_tokens
        for path, block in model.get_submodule("blocks").named_children():
            attention: Any = getattr(block, "attn", None)
            if type(attention) in (Attention, QuantBeitAttention):
                yield attention_part(f"blocks.{path}.attn", attention, QuantBeitAttention, tokens)
            mlp: Any = getattr(block, "mlp", None)
            if type(mlp) in MLPS:
                yield from mlp_parts(f"blocks.{path}.mlp", mlp, tokens)
        yield from classifiers(model, tokens, "head")
