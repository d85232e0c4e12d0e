"""Exact changes of an attention's weights that make q, k, v and the heads' outputs easier to quantize.

Softmax does not see what is the same for all keys, and probabilities sum to one. So with any vectors m, n, and r > 0,
channel by channel, the float model stays the same under

    k' = (k - m)·r       q' = q / r                                    scores: q'·k' = q·k - q·m, the same for all keys
    v' = (v - n) / t     W_o' = W_o·diag(t)     b_o' = b_o + W_o·n     outputs: Σ p (v - n) = Σ p v - n

m and n are the middles of the channels' ranges: zero points for each channel, which cost nothing at inference and need
no grid with an offset. Beyond that, probabilities that are rounded no longer sum to one, and what is missing multiplies
the mean of v, which is gone now. t makes the channels of v equally wide within a head; r = sqrt(width of q / width of
k), relative to the head's mean, shares the differences between q and k (cross-layer equalization, Nagel et al., ICCV
2019, between two activations).

On request they are rotated, too, by orthogonal matrices R within each head (QuaRot, Ashkboos et al., NeurIPS 2024):

    q' = q·R     k' = k·R             v' = v·R     W_o' = W_o·R   for the head's columns

R is a Hadamard matrix over sqrt(d): every new channel is made of all old ones in equal parts, so an outlier is shared
out. Heads whose d is no power of two stay as they are.

Everything is folded into `qkv` and `proj`, of the modules that `models/direct_attention.py` finds.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qvit.errors import QvitError, UsageError
from qvit.models.convert import Stage, in_eval_mode, stage_of
from qvit.models.direct_attention import direct_attentions
from qvit.quantizers.ranges import PercentileObserver

_SMALLEST_SHARE = 1e-3


@torch.no_grad()
def fold_heads(model: nn.Module, batches: Iterable[Tensor], *, rotate: bool = False) -> list[str]:
    """Centres and evens out q, k, v and the heads' outputs, in place; the model computes what it computed before.

    Args:
        model: A float model; its mode is restored.
        batches: Calibration images (B, channels, height, width) on the model's device.
        rotate: Rotates within heads, too.

    Returns:
        Paths of the attention modules that were changed.

    Raises:
        UsageError: If the model is quantized.
        QvitError: If there are no images or activations are not finite.
    """
    if stage_of(model) is not Stage.FLOAT:
        raise UsageError("fold heads before quantization: give the float model")
    modules = dict(direct_attentions(model))
    observers = {path: PercentileObserver((module.qkv.out_features,)) for path, module in modules.items()}
    images = 0
    with in_eval_mode(model), ExitStack() as stack:
        for path, module in modules.items():
            stack.enter_context(module.qkv.register_forward_hook(partial(_see, observers[path])))
        for batch in batches:
            model(batch)
            images += len(batch)
    if modules and not images:
        raise QvitError("no images to fold heads with: pass at least one batch of training images")
    for path, module in modules.items():
        _fold(module, *observers[path].range())
        if rotate:
            _rotate(module)
    return list(modules)


def _see(observer: PercentileObserver, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
    observer.observe(output)


def _fold(module: Any, bottom: Tensor, top: Tensor) -> None:
    """Changes one attention module; `bottom` and `top` are the ranges of the channels (3·H·d,) of its `qkv`."""
    heads = module.num_heads
    middle = ((top + bottom) / 2).chunk(3)
    half = torch.maximum(top.abs(), bottom.abs())
    query = _even(half.chunk(3)[0], heads)
    key, value = (_even(part, heads) for part in (top - bottom).chunk(3)[1:])
    ratio = (query / key).sqrt()
    weights, biases = module.qkv.weight.chunk(3), module.qkv.bias.chunk(3)
    for part, (shift, factor) in enumerate(((None, 1 / ratio), (middle[1], ratio), (middle[2], 1 / value))):
        if shift is not None:
            biases[part].sub_(shift)
        biases[part].mul_(factor)
        weights[part].mul_(factor.unsqueeze(1))
    module.proj.bias.add_(module.proj.weight @ middle[2])
    module.proj.weight.mul_(value)


def _rotate(module: Any) -> None:
    """Rotates q, k, v and the heads' outputs of one attention module."""
    size = module.qkv.out_features // (3 * module.num_heads)
    if size & (size - 1):
        return
    rotation = hadamard(size).to(module.qkv.weight)
    for tensor in (module.qkv.weight, module.qkv.bias):
        heads = tensor.view(3 * module.num_heads, size, -1)
        heads.copy_(rotation.t() @ heads)
    columns = module.proj.weight.view(module.proj.out_features, module.num_heads, size)
    columns.copy_(columns @ rotation)


def hadamard(size: int) -> Tensor:
    """Sylvester's Hadamard matrix over sqrt(size), (size, size), orthogonal, float64; `size` is a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5


def _even(width: Tensor, heads: int) -> Tensor:
    """Widths (H·d,) relative to the mean of their head, none of them near zero."""
    own = width.view(heads, -1)
    mean = own.mean(1, keepdim=True).clamp_min(torch.finfo(width.dtype).tiny)
    return (own / mean).clamp_min(_SMALLEST_SHARE).flatten()
