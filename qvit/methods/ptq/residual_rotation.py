"""Exact rotation of a ViT's residual stream: every channel becomes a mixture of all, so that none is an outlier.

With an orthogonal R, all that writes into the stream is multiplied by R, all that reads from it by Rᵀ (SliceGPT,
Ashkboos et al., ICLR 2024; QuaRot, NeurIPS 2024; for ViTs GLF-Q, 2026):

    tokens, positions, patch embedding, proj, fc2        y' = y·R
    qkv, fc1, the classifier                             W' = W·diag(γ)·R      b' = b + W·β

γ and β of the norm before them have to be folded, because a norm treats channel by channel. Those papers put an RMSNorm
in the LayerNorm's place, since a LayerNorm subtracts the mean over channels, x - (x·1/C)1ᵀ, which a rotation does not
keep. Here R leaves the vector of ones where it is, R·1 = 1: then it keeps the mean, and the LayerNorm stays a
LayerNorm. So a rotated model is a model of the same architecture; it packs, exports and runs like any other.

R = D·H·P, with D random signs, H a normalised Hadamard matrix (for C = 2^k·m the Kronecker product with an orthogonal
DCT of m), P the reflection that takes 1·D·H to 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from timm.layers import GluMlp, LayerNorm, Mlp, RmsNorm, SwiGLU
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Attention, Block, LayerScale, VisionTransformer
from torch import Tensor, nn

from qvit.errors import UsageError
from qvit.methods.ptq.head_folds import hadamard
from qvit.models.convert import Stage, stage_of

_NORMS = (nn.LayerNorm, LayerNorm, RmsNorm, nn.RMSNorm)
_TOKENS = ("cls_token", "dist_token", "reg_token", "pos_embed")


@torch.no_grad()
def rotate_residual(model: nn.Module, seed: int = 0) -> bool:
    """Rotates the residual stream of a float ViT, in place; the model computes what it computed before.

    Args:
        model: A float model.
        seed: Draws the signs.

    Returns:
        Whether it was rotated: models that are not plain ViTs (other families, norms between blocks or in front of
        them, a pooling with attention, no classifier behind the last norm) stay as they are.

    Raises:
        UsageError: If the model is quantized.
    """
    if stage_of(model) is not Stage.FLOAT:
        raise UsageError("rotate before quantization: give the float model")
    if not is_plain(model):
        return False
    own: Any = model
    first = own.patch_embed.proj
    rotation = rotation_of(first.out_channels, seed).to(first.weight)
    for norm, layers in _readers(own):
        _fold_norm(norm, layers)
        for layer in layers:
            layer.weight.copy_(layer.weight @ rotation)
    for layer, scale in _writers(own):
        if isinstance(scale, LayerScale):
            _rotate_rows(layer, rotation, scale.gamma)
            scale.gamma.fill_(1)
        else:
            _rotate_rows(layer, rotation)
    _rotate_rows(first, rotation)
    for name in _TOKENS:
        if (tokens := getattr(own, name, None)) is not None:
            tokens.copy_(tokens @ rotation)
    return True


def is_plain(model: nn.Module) -> bool:
    """Whether nothing but norms, linear layers and sums touches the residual stream of a model."""
    if type(model) not in (VisionTransformer, VisionTransformerDistilled):
        return False
    own: Any = model
    between = [own.norm_pre, own.patch_embed.norm, own.patch_drop, own.pos_drop]
    return (
        all(type(block) is Block and _plain_block(block) for block in own.blocks)
        and all(not list(module.parameters()) for module in between)
        and isinstance(own.patch_embed.proj, nn.Conv2d)
        and getattr(own, "attn_pool", None) is None
        and isinstance(own.norm, nn.Identity) is not isinstance(getattr(own, "fc_norm", nn.Identity()), nn.Identity)
        and all(_can_fold(norm, layers) for norm, layers in _readers(own))
    )


def _plain_block(block: Any) -> bool:
    plain_attention = type(block.attn) is Attention and getattr(block.attn, "gate", None) is None
    writers = (block.attn.proj, getattr(block.mlp, "fc2", None))
    return plain_attention and type(block.mlp) in (Mlp, SwiGLU, GluMlp) and all(type(x) is nn.Linear for x in writers)


def _can_fold(norm: Any, layers: list[nn.Linear]) -> bool:
    """Whether the norm's parameters can move into the layers behind it."""
    if type(norm) not in _NORMS or norm.weight is None or not all(type(layer) is nn.Linear for layer in layers):
        return False
    return getattr(norm, "bias", None) is None or all(layer.bias is not None for layer in layers)


def _mlp_inputs(mlp: Any) -> list[nn.Linear]:
    return [mlp.fc1] if hasattr(mlp, "fc1") else [mlp.fc1_g, mlp.fc1_x]


def _heads(own: Any) -> list[Any]:
    return [own.head] if getattr(own, "head_dist", None) is None else [own.head, own.head_dist]


def _readers(own: Any) -> Iterator[tuple[Any, list[nn.Linear]]]:
    """Each norm with the layers that see its output."""
    for block in own.blocks:
        yield block.norm1, [block.attn.qkv]
        yield block.norm2, _mlp_inputs(block.mlp)
    yield own.norm if not isinstance(own.norm, nn.Identity) else own.fc_norm, _heads(own)


def _writers(own: Any) -> Iterator[tuple[nn.Linear, nn.Module]]:
    """Each layer whose output is added to the stream, with the scaling of the branch."""
    for block in own.blocks:
        yield block.attn.proj, block.ls1
        yield block.mlp.fc2, block.ls2


def _fold_norm(norm: Any, layers: list[nn.Linear]) -> None:
    shift = getattr(norm, "bias", None)
    for layer in layers:
        if shift is not None:
            layer.bias.add_(layer.weight @ shift)
        layer.weight.mul_(norm.weight)
    norm.weight.fill_(1)
    if shift is not None:
        shift.zero_()


def _rotate_rows(layer: Any, rotation: Tensor, factor: Tensor | None = None) -> None:
    """The outputs of a layer, times `factor` channel by channel, times the rotation."""
    own = rotation if factor is None else factor.unsqueeze(1) * rotation
    layer.weight.copy_((own.t() @ layer.weight.flatten(1)).view_as(layer.weight))
    if layer.bias is not None:
        layer.bias.copy_(layer.bias @ own)


def rotation_of(size: int, seed: int = 0) -> Tensor:
    """A random orthogonal matrix (size, size) with R·1 = 1 and Rᵀ·1 = 1, all of whose entries are small."""
    power = size & -size
    odd = size // power
    signs = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1
    mixed = signs.unsqueeze(1) * torch.kron(hadamard(power), _cosines(odd))
    ones = torch.full((size,), size**-0.5, dtype=torch.float64)
    apart = ones @ mixed - ones
    if float(apart.norm()) > 1e-9:
        apart = apart / apart.norm()
        mixed = mixed - 2 * (mixed @ apart).unsqueeze(1) * apart
    return mixed


def _cosines(size: int) -> Tensor:
    """The orthogonal DCT-II of some size, rows as frequencies."""
    at = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(torch.pi / size * (at + 0.5) * at.unsqueeze(1)) * (2 / size) ** 0.5
    matrix[0] *= 0.5**0.5
    return matrix
