"""timm's Eva: eva_*, eva02_*, vit_*_rope_*, vit_*_dinov3, vit_pe_{lang,spatial}_*, and others with rotary positions.

Sites and MACs are those of a ViT (`vit.py`), except:

    rotary positions    q and k are rotated in float, and quantized after that, as operands of their product. The angles
                        depend on positions alone; where they are learned (`rope_mixed`), they stay in float
    q, k, v apart       three layers in some models: `attn.{q,k,v}_proj.{input,weight}` instead of `attn.qkv`, weights
                        with a width per head
    grouped queries     where several heads share a head of keys and values (Sapiens 2), k, v and their weights have one
                        width for all heads: the product's widths are those of the query's heads
    SwiGLU              `mlp.fc1_g`, `mlp.fc1_x`, `mlp.fc2`, or `mlp.fc1` with both in one; the gate is an element-wise
                        product and computed in float, and the input of fc2 has both signs and no offset

Attention pooling (`vit_pe_core_*`) is in `attention_pool.py`. Refused: gated attention.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention
from torch import Tensor, nn

from qvit.models.families.attention_pool import constant_projections, pooling_parts
from qvit.models.families.base import register_family
from qvit.models.families.parts import (
    MLPS,
    Family,
    Part,
    attention_part,
    classifiers,
    mlp_parts,
    patch_embedding,
    separate_attention_part,
)
from qvit.models.layers import AttentionSites, additive_mask

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class RotaryAttention(AttentionSites):
    """What the quantized forms of timm's two attention classes with rotary positions share."""

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        module: Any = self
        if module.qkv is not None:
            q, k, v = self.fused_projection(x)
        else:
            layers = (module.q_proj, module.k_proj, module.v_proj)
            heads = (module.num_heads, *(getattr(module, "num_kv_heads", module.num_heads),) * 2)
            q, k, v = (
                layer(x).unflatten(2, (count, -1)).transpose(1, 2) for layer, count in zip(layers, heads, strict=True)
            )
        q, k = module.q_norm(q), module.k_norm(k)
        if rope is not None:
            q, k = self.rotate(q, rope).type_as(v), self.rotate(k, rope).type_as(v)
        x = self.attend(q, k, v, module.scale, additive_mask(attn_mask, is_causal, q), module.attn_drop)
        return module.proj_drop(self.project(x))

    def rotate(self, x: Tensor, rope: Tensor) -> Tensor:
        """Queries or keys (B, H, N, d), patches rotated by their position; prefix tokens have none."""
        module: Any = self
        prefix, patches = x[:, :, : module.num_prefix_tokens], x[:, :, module.num_prefix_tokens :]
        return torch.cat([prefix, apply_rot_embed_cat(patches, rope, half=module.rotate_half)], dim=2)


class QuantEvaAttention(RotaryAttention, EvaAttention):
    """timm's EvaAttention with quantized operands; same parameters, same signature."""


class QuantAttentionRope(RotaryAttention, AttentionRope):
    """timm's AttentionRope with quantized operands; same parameters, same signature."""


QUANTIZED: dict[type, type[nn.Module]] = {
    EvaAttention: QuantEvaAttention,
    QuantEvaAttention: QuantEvaAttention,
    AttentionRope: QuantAttentionRope,
    QuantAttentionRope: QuantAttentionRope,
}


@register_family(Eva)
class EvaFamily(Family):
    """The parts of Eva."""

    supported = (
        "patch embedding by one convolution, blocks with timm's EvaAttention or AttentionRope without a gate and an "
        "MLP of linear layers, pooling without weights or by AttentionPoolLatent, and a linear classifier"
    )

    def parts(self, model: nn.Module) -> Iterator[Part]:
        yield from patch_embedding(model)
        eva: Any = model
        tokens = eva.patch_embed.num_patches + eva.num_prefix_tokens
        for index, block in enumerate(eva.blocks):
            path = f"blocks.{index}.attn"
            quantized = QUANTIZED.get(type(block.attn))
            if quantized is not None and block.attn.gate is None:
                if block.attn.qkv is not None:
                    yield attention_part(path, block.attn, quantized, tokens)
                else:
                    shared = getattr(block.attn, "num_kv_heads", None)
                    yield separate_attention_part(path, block.attn, quantized, PROJECTIONS, tokens, tokens, shared)
            if type(block.mlp) in MLPS:
                yield from mlp_parts(f"blocks.{index}.mlp", block.mlp, tokens)
        yield from pooling_parts(model, tokens)
        yield from classifiers(model, tokens, "head")

    def float_modules(self, model: nn.Module) -> Collection[nn.Module]:
        return constant_projections(model)
