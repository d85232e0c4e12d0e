"""timm's VisionTransformer: vit_*, deit_*, deit3_*, distilled DeiT.

Prefix tokens may be any number; qk-norm, LayerScale, pre- and post-norm blocks are known. Sites of one block, in order
(Q-ViT section 3.3; H = one width per head):

    attn.qkv.input                          the normalised input of the q, k, v projections
    attn.qkv.{query,key,value}_weight  H    thirds of the fused projection
    attn.{query,key,value}             H    after bias (and qk-norm), before 1/sqrt(d)
    attn.probs                         H    softmax output, unsigned
    attn.output                        H    head outputs before concatenation: the input of proj
    attn.proj.weight                   H    blocks of input columns
    mlp.fc1.input, mlp.fc1.weight, mlp.fc2.input (the GELU's output, see
                                            `families/activations.py`), mlp.fc2.weight

and `patch_embed.proj.{input,weight}`, `head.{input,weight}` (`head_dist` too for distilled DeiT). LayerNorm, softmax,
GELU, residuals, biases, tokens and position embeddings stay in float. MACs for N tokens (prefix tokens included): N·C²
per projection, N²·C for q·kᵀ and for probs·v; the classifier sees one token. Models that consist of timm's plain
blocks can give two groups of tokens different widths (`models/families/tokens.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from timm.layers import DiffAttention, HybridEmbed, Mlp
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import (
    Attention,
    Block,
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    VisionTransformer,
)
from torch import Tensor, nn

from qvit.models.families.attention_pool import constant_projections, pooling_parts
from qvit.models.families.base import register_family
from qvit.models.families.parts import Family, Part, attention_part, classifiers, mlp_parts, patch_embedding
from qvit.models.families.tokens import (
    RankedAttention,
    RankedBlock,
    RankedMlp,
    rank_blocks,
    ranks_tokens,
    with_positions,
    with_tokens,
)
from qvit.models.layers import AttentionSites, Specs, additive_mask
from qvit.plan.spec import Site


class QuantAttention(AttentionSites, Attention):
    """timm's Attention with quantized operands; same parameters, same signature."""

    @property
    def projects_directly(self) -> bool:
        return isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        q, k, v = self.fused_projection(x)
        q, k = self.q_norm(q), self.k_norm(k)
        x = self.attend(q, k, v, self.scale, additive_mask(attn_mask, is_causal, q), self.attn_drop)
        return self.proj_drop(self.project(x))


@register_family(VisionTransformer, VisionTransformerDistilled)
class ViT(Family):
    """The parts of VisionTransformer."""

    supported = (
        "patch embedding by one convolution, blocks with timm's Attention and an MLP of linear layers, "
        "pooling without weights or by AttentionPoolLatent, and a linear classifier"
    )
    refused = MappingProxyType(
        {
            ParallelScalingBlock: "where one layer yields q, k, v and the MLP's hidden channels from one input",
            DiffParallelScalingBlock: "where one layer yields q, k, v and the MLP's hidden channels from one input",
            DiffAttention: "which subtracts two softmaxes: the probabilities that weigh the values have both signs",
            HybridEmbed: "a convolutional network in place of one convolution per patch",
        }
    )

    def parts(self, model: nn.Module) -> Iterator[Part]:
        embed: Any = model.get_submodule("patch_embed")
        prefix = getattr(model, "num_prefix_tokens", 0)
        tokens = embed.num_patches + prefix
        ranked = tokens if _can_rank(model) else 0
        fixed = ranked > 0 and not getattr(model, "dynamic_img_size", False)
        yield from patch_embedding(model)
        for path, module in model.get_submodule("blocks").named_modules(prefix="blocks"):
            own: list[Part] = []
            if type(module) in (Attention, QuantAttention, RankedAttention) and getattr(module, "gate", None) is None:
                own = [attention_part(path, module, QuantAttention, tokens)]
            elif not isinstance(module, Attention) and path.rpartition(".")[2] == "mlp":
                own = list(mlp_parts(path, module, tokens))
            for part in own:
                sites = with_tokens(part.sites, ranked, prefix)
                yield replace(part, sites=with_positions(sites, tokens) if fixed else sites)
        pooled = tokens if getattr(model, "pool_include_prefix", False) else embed.num_patches
        yield from pooling_parts(model, pooled)
        yield from classifiers(model, tokens, "head", "head_dist")

    def float_modules(self, model: nn.Module) -> Collection[nn.Module]:
        return constant_projections(model)

    def swap(self, model: nn.Module, sites: dict[str, Site], specs: Specs) -> None:
        super().swap(model, sites, specs)
        if ranks_tokens(specs):
            rank_blocks(model)


def _can_rank(model: nn.Module) -> bool:
    """Whether all blocks are of the kind that `rank_blocks` knows."""
    blocks: Any = model.get_submodule("blocks").children()
    return all(
        type(block) in (Block, RankedBlock)
        and type(block.attn) in (Attention, QuantAttention, RankedAttention)
        and type(block.mlp) in (Mlp, RankedMlp)
        for block in blocks
    )
