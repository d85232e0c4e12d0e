"""The residual stream of a plain ViT: what writes into it and what reads from it, in float.

Nothing but norms, linear layers and sums touches it, so that a change of its basis can be folded into the weights on
both sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from timm.layers import GluMlp, LayerNorm, Mlp, RmsNorm, SwiGLU
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Attention, Block, LayerScale, VisionTransformer
from torch import Tensor, nn

_NORMS = (nn.LayerNorm, LayerNorm, RmsNorm, nn.RMSNorm)


@dataclass(frozen=True)
class ResidualStream:
    """Everything that has the stream's C channels as its inputs or outputs.

    Attributes:
        embedding: The convolution of the patches; its outputs are written.
        tokens: Parameters (..., C) that are written: class and register tokens, positions.
        writers: Layers whose outputs are added, each with the factors (C,) of its branch (LayerScale), if it has any.
        readers: Norms, each with the layers that see its output; the classifiers are last.
    """

    embedding: nn.Conv2d
    tokens: list[Tensor]
    writers: list[tuple[nn.Linear, Tensor | None]]
    readers: list[tuple[nn.Module, list[nn.Linear]]]


def residual_stream(model: nn.Module) -> ResidualStream | None:
    """The stream of a float model.

    None for models that are not plain ViTs: other families, norms between blocks or in front of them, a pooling with
    attention, no classifier behind the last norm, or a norm with a shift in front of layers that have no bias for it.
    """
    if type(model) not in (VisionTransformer, VisionTransformerDistilled):
        return None
    own: Any = model
    last = [norm for norm in (own.norm, getattr(own, "fc_norm", None)) if not isinstance(norm, nn.Identity | None)]
    between = [own.norm_pre, own.patch_embed.norm, own.patch_drop, own.pos_drop]
    if (
        len(last) != 1
        or getattr(own, "attn_pool", None) is not None
        or any(list(module.parameters()) for module in between)
        or not isinstance(own.patch_embed.proj, nn.Conv2d)
        or not all(type(block) is Block and _is_plain(block) for block in own.blocks)
    ):
        return None
    heads = [own.head, *([own.head_dist] if getattr(own, "head_dist", None) is not None else [])]
    readers = [pair for block in own.blocks for pair in _readers(block)] + [(last[0], heads)]
    if not all(_can_fold(norm, layers) for norm, layers in readers):
        return None
    tokens = [getattr(own, name, None) for name in ("cls_token", "dist_token", "reg_token", "pos_embed")]
    writers = [pair for block in own.blocks for pair in _writers(block)]
    return ResidualStream(own.patch_embed.proj, [token for token in tokens if token is not None], writers, readers)


def _is_plain(block: Any) -> bool:
    plain_attention = type(block.attn) is Attention and getattr(block.attn, "gate", None) is None
    outputs = (block.attn.proj, getattr(block.mlp, "fc2", None))
    return plain_attention and type(block.mlp) in (Mlp, SwiGLU, GluMlp) and all(type(x) is nn.Linear for x in outputs)


def _readers(block: Any) -> list[tuple[nn.Module, list[nn.Linear]]]:
    mlp = [block.mlp.fc1] if hasattr(block.mlp, "fc1") else [block.mlp.fc1_g, block.mlp.fc1_x]
    return [(block.norm1, [block.attn.qkv]), (block.norm2, mlp)]


def _writers(block: Any) -> list[tuple[nn.Linear, Tensor | None]]:
    return [
        (layer, scale.gamma if isinstance(scale, LayerScale) else None)
        for layer, scale in ((block.attn.proj, block.ls1), (block.mlp.fc2, block.ls2))
    ]


def _can_fold(norm: Any, layers: list[nn.Linear]) -> bool:
    """Whether the norm's parameters can move into the layers behind it."""
    if type(norm) not in _NORMS or norm.weight is None or not all(type(layer) is nn.Linear for layer in layers):
        return False
    return getattr(norm, "bias", None) is None or all(layer.bias is not None for layer in layers)
