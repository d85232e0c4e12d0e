"""Plain Vision Transformers: what a runtime without PyTorch may rely on, for float and for quantized models.

timm's `VisionTransformer` is many models; the plain ones consist of pre-norm blocks with attention and an MLP of two
layers, with LayerNorm or RmsNorm, and pool by the class token or the mean. `differences` names what else there is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from timm.layers import GELU, GELUTanh, Mlp, QuickGELU, RmsNorm
from timm.models.vision_transformer import Block, LayerScale, VisionTransformer
from torch import Tensor, nn

_ACTIVATIONS = {GELUTanh: "gelu-tanh", QuickGELU: "quick-gelu", nn.SiLU: "silu", nn.ReLU: "relu"}


def differences(model: nn.Module) -> Iterator[str]:
    """Why a model is no plain Vision Transformer: every reason, or nothing."""
    if type(model) is not VisionTransformer:
        yield f"it is a {type(model).__name__}, not timm's VisionTransformer"
        return
    vit: Any = model
    if vit.global_pool not in ("token", "avg") or vit.attn_pool is not None:
        yield f"it pools tokens by '{vit.global_pool or 'attention'}'"
    if not len(vit.blocks):
        yield "it has no blocks"
    if vit.dynamic_img_size:
        yield "its image size is not fixed"
    if not isinstance(vit.patch_embed.norm, nn.Identity):
        yield "it normalises embedded patches"
    for name in ("norm_pre", "norm", "fc_norm"):
        yield from _of_norm(name, getattr(vit, name))
    for index, block in enumerate(vit.blocks):
        yield from _of_block(f"blocks.{index}", block, vit.blocks[0])


def _of_block(path: str, block: Any, first: Any) -> Iterator[str]:
    if type(block) is not Block or type(block.mlp) is not Mlp:
        yield f"{path} is not one of timm's plain blocks"
        return
    for name in ("norm", "gate"):
        if not isinstance(getattr(block.attn, name, None), (nn.Identity, type(None))):
            yield f"{path} has a {name} in its attention"
    if not isinstance(block.mlp.norm, nn.Identity):
        yield f"{path} has a norm in its MLP"
    if activation_of(block.mlp.act) is None or type(block.mlp.act) is not type(first.mlp.act):
        yield f"{path} has the activation {type(block.mlp.act).__name__}"
    norms = {"norm1": block.norm1, "norm2": block.norm2, "q_norm": block.attn.q_norm, "k_norm": block.attn.k_norm}
    for name, norm in norms.items():
        yield from _of_norm(f"{path}.{name}", norm)


def _of_norm(path: str, norm: Any) -> Iterator[str]:
    plain = isinstance(norm, (nn.LayerNorm, RmsNorm)) and norm.weight is not None and norm.eps is not None
    if not isinstance(norm, nn.Identity) and not plain:
        yield f"{path} is a {type(norm).__name__}"


def activation_of(module: nn.Module) -> str | None:
    """The name of an activation function: gelu, gelu-tanh, quick-gelu, silu or relu; None for others."""
    if isinstance(module, (nn.GELU, GELU)):
        return "gelu" if getattr(module, "approximate", "none") == "none" else "gelu-tanh"
    return next((name for kind, name in _ACTIVATIONS.items() if type(module) is kind), None)


def factor_of(module: nn.Module) -> Tensor | None:
    """The numbers (C,) of a LayerScale; None for anything else."""
    return module.gamma.detach() if isinstance(module, LayerScale) else None


def added_to_patches(model: nn.Module) -> Tensor:
    """What every image's tokens (N, C) start from: prefix tokens, and the positions that patches are added to."""
    vit: Any = model
    with torch.no_grad():
        return vit._pos_embed(torch.zeros(1, vit.patch_embed.num_patches, vit.embed_dim))[0]
