"""timm's Cait: cait_* (Touvron et al. 2021).

Blocks of two kinds, over N patches:

`blocks`: attention with talking heads. Two linear layers mix the heads, `proj_l` the scores before the softmax and
`proj_w` the probabilities after it; both multiply N²·H² numbers, so both are quantized. Beyond a ViT block's sites:

    attn.proj_l.{input,weight}    the scores of all heads, after 1/sqrt(d)
    attn.proj_w.{input,weight}    the softmax output, unsigned
    attn.probs               H    the mixed probabilities, after dropout; mixing can make them negative: signed

`blocks_token_only`: the class token alone attends, to itself and the patches. `attn.{q,k,v}.{input,weight}` are three
layers, of which q sees one token; `attn.{query,key,value,probs,output}` are as in a ViT block, and the MLP sees one
token.

LayerScale, LayerNorm, softmax, GELU and residuals stay in float.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from timm.layers import Mlp
from timm.models.cait import Cait, ClassAttn, LayerScaleBlock, LayerScaleBlockClassAttn, TalkingHeadAttn
from torch import Tensor, nn

from qvit.models.families.base import register_family
from qvit.models.families.parts import (
    Family,
    Part,
    attention_part,
    classifiers,
    linear_part,
    mlp_parts,
    patch_embedding,
    separate_attention_part,
)
from qvit.models.layers import AttentionSites
from qvit.plan.cost import Matmul
from qvit.plan.spec import PerHead, Site, TensorSpec

PROJECTIONS = ("q", "k", "v")


class QuantTalkingHeadAttention(AttentionSites, TalkingHeadAttn):
    """timm's TalkingHeadAttn with quantized operands; same parameters, same signature."""

    attends = False

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.fused_projection(x)
        scores = _heads_first(self.proj_l(_heads_last(self.scores(q, k, self.scale))))
        probs = _heads_first(self.proj_w(_heads_last(self.probabilities(scores))))
        return self.proj_drop(self.project(self.weigh(self.attn_drop(probs), v)))


class QuantClassAttention(AttentionSites, ClassAttn):
    """timm's ClassAttn with quantized operands; same parameters, same signature."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(tokens).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for layer, tokens in ((self.q, x[:, :1]), (self.k, x), (self.v, x))
        )
        x = self.attend(q, k, v, self.scale, None, self.attn_drop)
        return self.proj_drop(self.project(x))


def _heads_last(x: Tensor) -> Tensor:
    """(B, H, N, M) to (B, N, M, H)."""
    return x.permute(0, 2, 3, 1)


def _heads_first(x: Tensor) -> Tensor:
    """(B, N, M, H) to (B, H, N, M)."""
    return x.permute(0, 3, 1, 2)


@register_family(Cait)
class CaitFamily(Family):
    """The parts of Cait."""

    supported = "patch embedding by one convolution, timm's two kinds of CaiT blocks, and a linear classifier"

    def parts(self, model: nn.Module) -> Iterator[Part]:
        yield from patch_embedding(model)
        cait: Any = model
        patches: int = cait.patch_embed.num_patches
        for index, block in enumerate(cait.blocks):
            path = f"blocks.{index}"
            if type(block) is LayerScaleBlock and type(block.attn) in (TalkingHeadAttn, QuantTalkingHeadAttention):
                yield _talking_heads(f"{path}.attn", block.attn, patches)
            if type(block.mlp) is Mlp:
                yield from mlp_parts(f"{path}.mlp", block.mlp, patches)
        for index, block in enumerate(cait.blocks_token_only):
            path = f"blocks_token_only.{index}"
            if type(block) is LayerScaleBlockClassAttn and type(block.attn) in (ClassAttn, QuantClassAttention):
                yield separate_attention_part(
                    f"{path}.attn", block.attn, QuantClassAttention, PROJECTIONS, 1, patches + 1
                )
            if type(block.mlp) is Mlp:
                yield from mlp_parts(f"{path}.mlp", block.mlp, 1)
        yield from classifiers(model, patches + 1, "head")


def _talking_heads(path: str, attention: nn.Module, tokens: int) -> Part:
    """Attention with the two layers that mix its heads."""
    module: Any = attention
    plain = attention_part(path, attention, QuantTalkingHeadAttention, tokens)
    before = linear_part(f"{path}.proj_l", module.proj_l, tokens**2)
    after = linear_part(f"{path}.proj_w", module.proj_w, tokens**2, inputs=TensorSpec(signed=False))
    sites: list[Site] = []
    matmuls: list[Matmul] = []
    for site in plain.sites:
        if site.name == f"{path}.probs":
            sites += [*before.sites, *after.sites, replace(site, default=TensorSpec(granularity=PerHead()))]
        else:
            sites.append(site)
    for matmul in plain.matmuls:
        matmuls += [*before.matmuls, *after.matmuls] if matmul.left == f"{path}.probs" else []
        matmuls.append(matmul)
    return Part(sites, matmuls, [*before.replacements, *after.replacements, *plain.replacements])
