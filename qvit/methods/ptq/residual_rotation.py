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

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from qvit.errors import UsageError
from qvit.methods.ptq.head_folds import hadamard
from qvit.models.convert import Stage, stage_of
from qvit.models.residual_stream import residual_stream


@torch.no_grad()
def rotate_residual(model: nn.Module, seed: int = 0) -> bool:
    """Rotates the residual stream of a float ViT, in place; the model computes what it computed before.

    Args:
        model: A float model.
        seed: Draws the signs.

    Returns:
        Whether it was rotated: models that are not plain ViTs (`models/residual_stream.py`) stay as they are.

    Raises:
        UsageError: If the model is quantized.
    """
    if stage_of(model) is not Stage.FLOAT:
        raise UsageError("rotate before quantization: give the float model")
    stream = residual_stream(model)
    if stream is None:
        return False
    rotation = rotation_of(stream.embedding.out_channels, seed).to(stream.embedding.weight)
    for norm, layers in stream.readers:
        _fold_norm(norm, layers)
        for layer in layers:
            layer.weight.copy_(layer.weight @ rotation)
    for layer, factors in stream.writers:
        _rotate_rows(layer, rotation if factors is None else factors.unsqueeze(1) * rotation)
        if factors is not None:
            factors.fill_(1)
    _rotate_rows(stream.embedding, rotation)
    for tokens in stream.tokens:
        tokens.copy_(tokens @ rotation)
    return True


def unrotated(reference: Any, model: Any, seed: int = 0) -> Callable[[Tensor], Tensor]:
    """The way back from what a model's classifier sees to what the float model's does.

    Args:
        reference: The float model.
        model: What was made of it. That its stream was rotated is seen in the classifier: whose weights are nearer?
        seed: As for `rotate_residual`.

    Returns:
        A function of features (..., C): x → x·Rᵀ·diag(γ) + β after a rotation, else x.
    """
    stream = residual_stream(reference)
    if stream is None:
        return lambda features: features
    norm, (layer, *_) = stream.readers[-1]
    rotation = rotation_of(layer.in_features, seed).to(layer.weight)
    own, factors = model.head.weight.detach().to(layer.weight), cast(Tensor, norm.weight).detach()
    if (own - layer.weight * factors @ rotation).norm() >= (own - layer.weight).norm():
        return lambda features: features
    shift: Any = getattr(norm, "bias", None)
    return lambda features: features @ rotation.t() * factors + (0 if shift is None else shift.detach())


def _fold_norm(norm: Any, layers: list[nn.Linear]) -> None:
    shift = getattr(norm, "bias", None)
    for layer in layers:
        if shift is not None:
            layer.bias.add_(layer.weight @ shift)
        layer.weight.mul_(norm.weight)
    norm.weight.fill_(1)
    if shift is not None:
        shift.zero_()


def _rotate_rows(layer: Any, rotation: Tensor) -> None:
    """The outputs of a layer, times a matrix (C, C)."""
    layer.weight.copy_((rotation.t() @ layer.weight.flatten(1)).view_as(layer.weight))
    if layer.bias is not None:
        layer.bias.copy_(layer.bias @ rotation)


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
