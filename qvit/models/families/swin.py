"""timm's SwinTransformer: swin_*, swin_s3_* (Swin v1, Liu et al. 2021).

Attention within windows of M = w·w tokens, in stages that halve the resolution. Sites of block j of stage i are those
of a ViT block (`vit.py`) below `layers.{i}.blocks.{j}`, with the stage's own number of heads. The linear layer
that merges 2×2 patches, `layers.{i}.downsample.reduction.{input,weight}`, is quantized like a layer of a block: counted
so, Swin-T costs the 41.25 G and 72.58 G bit operations that Q-ViT gives for 3 and 4 bits (8 in the first and the last
layer). The classifier is `head.fc`, behind the mean over all tokens; there is no class token.

In float: the relative position bias and the mask of shifted windows, both added to the scores; LayerNorm, softmax,
GELU, residuals.

MACs are those of the configured image size. Where it is no multiple of the window, timm pads the tokens with zeros
before attention: qkv, proj and the scores are computed, and counted, at the padded size; the MLP is not. Where a stage
is smaller than the window, the window shrinks to the stage.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from timm.layers import Mlp
from timm.models.swin_transformer import SwinTransformer, WindowAttention
from torch import Tensor, nn

from qvit.models.families.base import register_family
from qvit.models.families.parts import (
    MLPS,
    Family,
    Part,
    attention_part,
    classifiers,
    linear_part,
    mlp_parts,
    patch_embedding,
)
from qvit.models.families.tokens import (
    RankedMlp,
    RankedSites,
    magnitude,
    rank_attention,
    rank_mlp,
    rank_tokens,
    ranks_tokens,
    with_tokens,
)
from qvit.models.layers import AttentionSites, Specs
from qvit.plan.spec import Site


class QuantWindowAttention(AttentionSites, WindowAttention):
    """timm's WindowAttention with quantized operands; same parameters, same signature."""

    @property
    def projects_directly(self) -> bool:
        return True

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.fused_projection(x)
        bias = windows_bias(self._get_rel_pos_bias(), mask, x.shape[0])
        x = self.attend(q, k, v, self.scale, bias, self.attn_drop)
        return self.proj_drop(self.project(x))


class RankedWindowAttention(RankedSites, QuantWindowAttention):
    """The same with the tokens of each window ranked by the mean |x| of its input."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        rank = rank_tokens(magnitude(x))
        q, k, v = self.split(self.qkv(x, rank))
        bias = windows_bias(self._get_rel_pos_bias(), mask, x.shape[0])
        x, _ = self.attend_ranked(q, k, v, self.scale, bias, self.attn_drop, rank)
        return self.proj_drop(self.project(x))


def windows_bias(bias: Tensor, mask: Tensor | None, batch: int) -> Tensor:
    """What is added to the scores of all windows.

    Args:
        bias: (1, H, M, M), of the relative positions.
        mask: (W, M, M) for the W windows of one image, or None.
        batch: Windows of all images, those of one image together.

    Returns:
        (1, H, M, M) or (batch, H, M, M).
    """
    if mask is None:
        return bias
    windows = bias + mask.unsqueeze(1)
    return windows.expand(batch // mask.shape[0], *windows.shape).flatten(0, 1)


def stages(
    model: nn.Module, attention: tuple[type, ...], quantized: type[nn.Module], *, ranked: bool = False
) -> Iterator[Part]:
    """The parts of all stages of a Swin model.

    Args:
        model: The model.
        attention: Classes of window attention that are known.
        quantized: What they become.
        ranked: Whether the tokens of a window, and those of an image in the MLP, can differ in width.
    """
    for path, module in model.get_submodule("layers").named_modules(prefix="layers"):
        reduction = getattr(module, "reduction", None)
        if isinstance(reduction, nn.Linear):
            stage: Any = model.get_submodule(path.rpartition(".")[0])
            yield linear_part(f"{path}.reduction", reduction, math.prod(stage.output_resolution))
        own: Any = getattr(module, "attn", None)
        if type(own) in attention:
            block: Any = module
            area = math.prod(block.window_size)
            sides = zip(block.input_resolution, block.window_size, strict=True)
            padded = math.prod(math.ceil(side / window) * window for side, window in sides)
            tokens = math.prod(block.input_resolution)
            ranks = ranked and type(block.mlp) in (Mlp, RankedMlp)
            part = attention_part(f"{path}.attn", own, quantized, padded, area)
            yield replace(part, sites=with_tokens(part.sites, area if ranks else 0, 0))
            if type(block.mlp) in MLPS:
                for part in mlp_parts(f"{path}.mlp", block.mlp, tokens):
                    yield replace(part, sites=with_tokens(part.sites, tokens if ranks else 0, 0))


@register_family(SwinTransformer)
class Swin(Family):
    """The parts of SwinTransformer."""

    supported = "patch embedding by one convolution, blocks with timm's WindowAttention and MLP, and patch merging"

    def parts(self, model: nn.Module) -> Iterator[Part]:
        yield from patch_embedding(model)
        known = (WindowAttention, QuantWindowAttention, RankedWindowAttention)
        yield from stages(model, known, QuantWindowAttention, ranked=True)
        yield from classifiers(model, 1, "head.fc")

    def swap(self, model: nn.Module, sites: dict[str, Site], specs: Specs) -> None:
        super().swap(model, sites, specs)
        if ranks_tokens(specs):
            for path, module in list(model.named_modules()):
                if type(module) is QuantWindowAttention:
                    model.set_submodule(path, rank_attention(module, RankedWindowAttention))
                elif type(module) is Mlp:
                    model.set_submodule(path, rank_mlp(module))
