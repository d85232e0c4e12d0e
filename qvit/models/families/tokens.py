"""Modules in which tokens are ranked, so that the less important ones can have fewer bits (PMQ, Xiao et al. 2023).

The ranking is data, and takes the way of data: an argument from module to module. Nothing is noted in a module or
outside, so interleaved batches cannot mix, `torch.compile` sees one graph, and each image has a ranking of its own:

    RankedBlocks      timm's `blocks`: hands the attention that tokens received from one block to the next
    RankedBlock       ranks its tokens once, for all its activations
    RankedAttention   also returns how much attention each token received from the class token, mean over heads
    RankedMlp         takes a ranking; without one (Swin) it ranks by the mean |x| of its input
    RankedLinear      tells it to the quantizer of its input, as `RankedSites` does for q, k and v

    score_t = mean_h probs[h, class, t] of the previous block;  without one (first block, no class token):  mean |x_t|

of the block's normalised input. The class token and other prefix tokens rank before all, and whatever the share, they
are important. Equal scores keep the order of the tokens: a stable sort, on the device, without asking it for a number.
Where prefix tokens alone have the higher width (a share of 0), nothing is ranked, and modules stay what they are.

The rankings come from what the quantized model computes, as they would in deployment, where the two groups of a tensor
are gathered and multiplied one after the other. (PMQ has no public code, and its score could not be read: this is our
reconstruction. Classes change, keys of parameters do not.)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn
from torch.nn import functional as F

from qvit.errors import UsageError
from qvit.models.layers import (
    QKV,
    AttentionSites,
    QuantLinear,
    QuantQKV,
    Specs,
    additive_mask,
    adopt,
    quantizer_at,
)
from qvit.plan.spec import Site

#: Activations of a block, below its path, whose tokens may differ in width.
TOKEN_SITES = ("attn.qkv.input", "attn.query", "attn.key", "attn.value", "mlp.fc1.input", "mlp.fc2.input")
#: Those whose tokens are rows or columns of every product, so that each position can have a scale.
POSITION_SITES = (
    *("attn.qkv.input", "attn.query", "attn.key", "attn.probs", "attn.output", "mlp.fc1.input", "mlp.fc2.input"),
)


def rank_tokens(scores: Tensor, prefix: int = 0) -> Tensor:
    """The place of every token in the order of falling scores.

    Args:
        scores: (B, N).
        prefix: How many tokens at the front are important whatever they score.

    Returns:
        int64 (B, N): -1 for prefix tokens, then `prefix`, `prefix` + 1, ... from the highest score on.
    """
    order = scores[:, prefix:].argsort(dim=1, descending=True, stable=True)
    places = order.argsort(dim=1) + prefix
    return torch.cat([places.new_full((len(scores), prefix), -1), places], dim=1)


def magnitude(x: Tensor) -> Tensor:
    """Mean |x| of every token: (B, N) from (B, N, C)."""
    return x.detach().abs().mean(-1)


def apply_ranked(module: nn.Module, leaf: str, x: Tensor, rank: Tensor) -> Tensor:
    """`layers.apply_quantizer` for tokens whose importance is `rank`, (B, N)."""
    quantizer = quantizer_at(module, leaf)
    return x if quantizer is None else quantizer(x, rank)


class RankedLinear(QuantLinear):
    """A linear layer for ranked tokens."""

    def forward(self, input: Tensor, rank: Tensor) -> Tensor:
        weight = self.quantized_weight()
        return F.linear(apply_ranked(self, "input", input, rank), weight, self.bias)


class RankedQKV(RankedLinear, QuantQKV):
    """A fused q|k|v projection for ranked tokens."""


class RankedSites(AttentionSites):
    """Attention over ranked tokens: q, k, v are quantized by their ranking before anything else."""

    def attend_ranked(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | Tensor,
        bias: Tensor | None,
        dropout: nn.Module,
        rank: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """`attend_and_tell` with the tokens' ranking, (B, N)."""
        q, k, v = (self.ranked_operand(name, x, rank) for name, x in zip(QKV, (q, k, v), strict=True))
        return self.attend_and_tell(q, k, v, scale, bias, dropout)

    def ranked_operand(self, name: str, x: Tensor, rank: Tensor) -> Any:
        """What `scores` and `weigh` get for q, k or v."""
        return apply_ranked(self, name, x, rank)

    def operand(self, name: str, x: Tensor) -> Tensor:
        return x


class RankedMlp(Mlp):
    """timm's Mlp with a ranking of its tokens; same parameters."""

    def forward(self, x: Tensor, rank: Tensor | None = None) -> Tensor:
        rank = rank_tokens(magnitude(x)) if rank is None else rank
        x = self.drop1(self.act(self.fc1(x, rank)))
        return self.drop2(self.fc2(self.norm(x), rank))


class RankedAttention(RankedSites, Attention):
    """timm's Attention with quantized operands and a ranking of its tokens; same parameters."""

    def forward(
        self, x: Tensor, rank: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The output (B, N, C), and the attention that each token received from the first one, (B, N)."""
        q, k, v = self.split(self.qkv(x, rank))
        q, k = self.q_norm(q), self.k_norm(k)
        mask = additive_mask(attn_mask, is_causal, q)
        x, probs = self.attend_ranked(q, k, v, self.scale, mask, self.attn_drop, rank)
        return self.proj_drop(self.project(x)), probs[:, :, 0].detach().mean(1)


class RankedBlock(Block):
    """timm's Block, which ranks its tokens and passes on what the next block ranks by; same parameters."""

    prefix_tokens: int
    has_class_token: bool

    def forward(self, x: Tensor, *received: Tensor | None, **masks: Any) -> tuple[Tensor, Tensor | None]:
        """Tokens and what they received: (B, N, C) and (B, N), or None where magnitude is ranked by.

        Args:
            x: (B, N, C).
            received: One argument, what the block before returned; None for the first block.
            masks: None are understood.
        """
        if len(received) != 1 or masks:
            raise UsageError(
                "blocks with token groups hand a ranking from one to the next: run them through the model's forward, "
                "without masks or checkpointing"
            )
        normed = self.norm1(x)
        scores = magnitude(normed) if received[0] is None else received[0]
        rank = rank_tokens(scores, self.prefix_tokens)
        attended, attention = self.attn(normed, rank)
        x = x + self.drop_path1(self.ls1(attended))
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x), rank)))
        return x, attention if self.has_class_token else None


class RankedBlocks(nn.Sequential):
    """All blocks of a model, in order; the same call and the same keys as `nn.Sequential`."""

    def forward(self, input: Tensor) -> Tensor:
        received = None
        for block in self:
            input, received = block(input, received)
        return input


def ranks_tokens(specs: Specs) -> bool:
    """Whether any tensor has token groups that follow the image."""
    return any(spec is not None and spec.ranks_tokens for spec in specs.values())


def with_tokens(sites: list[Site], tokens: int, prefix: int) -> list[Site]:
    """The sites of a part, those in `TOKEN_SITES` with the number of tokens that are ranked together."""
    return [
        replace(site, tokens=tokens, layout=replace(site.layout, prefix_tokens=prefix))
        if site.name.endswith(TOKEN_SITES)
        else site
        for site in sites
    ]


def with_positions(sites: list[Site], tokens: int) -> list[Site]:
    """The sites of a part, those in `POSITION_SITES` with a layout of a fixed number of tokens."""
    found = []
    for site in sites:
        if site.name.endswith(POSITION_SITES):
            heads = () if site.layout.heads is None else (site.layout.num_heads,)
            site = replace(site, layout=replace(site.layout, positions=(*heads, tokens, 1)))
        found.append(site)
    return found


def patch_grid(model: nn.Module, block: str, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the patches that the block at path `block` sees of an image of `size` (height, width)."""
    resolution = getattr(model.get_submodule(block), "input_resolution", None)  # Swin: each stage has its own
    if resolution is None:
        embed: Any = model.get_submodule("patch_embed")
        resolution = embed.dynamic_feat_size(size)
    rows, columns = resolution
    return int(rows), int(columns)


def rank_attention(attention: nn.Module, cls: type[nn.Module]) -> nn.Module:
    """A quantized attention module as a `cls`, whose projection takes a ranking."""
    ranked: Any = adopt(cls, attention)
    ranked.qkv = adopt(RankedQKV, ranked.qkv)
    return ranked


def rank_mlp(mlp: nn.Module) -> RankedMlp:
    """A converted Mlp as one whose layers take a ranking."""
    ranked = adopt(RankedMlp, mlp)
    ranked.fc1, ranked.fc2 = adopt(RankedLinear, ranked.fc1), adopt(RankedLinear, ranked.fc2)
    return ranked


def rank_blocks(model: nn.Module) -> None:
    """Makes the blocks of a converted VisionTransformer rank their tokens, in place."""
    vit: Any = model
    for path, block in list(vit.blocks.named_children()):
        ranked: Any = adopt(RankedBlock, block)
        ranked.prefix_tokens = vit.num_prefix_tokens
        ranked.has_class_token = bool(vit.has_class_token)
        ranked.attn, ranked.mlp = rank_attention(block.attn, RankedAttention), rank_mlp(block.mlp)
        vit.blocks.set_submodule(path, ranked)
    vit.blocks = adopt(RankedBlocks, vit.blocks)
