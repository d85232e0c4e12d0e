"""The integer form of a Vision Transformer as numbers for the C++ engine, and what that engine refuses.

It takes timm's VisionTransformer with plain pre-norm blocks: any number of prefix tokens, LayerScale, qk-norm,
`norm_pre`, `fc_norm`, LayerNorm or RmsNorm, GELU and its relatives. Widths may differ by tensor and by head. Every
product must be one of integers; probabilities may be on a logarithmic grid of at most 4 bits.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qvit.deploy.integer.reference import IntegerAttention, IntegerLinear, RankedIntegerAttention, report_of
from qvit.deploy.native.library import call, failure, form_index, forms, library
from qvit.errors import UsageError
from qvit.models.layers import QKV, quantizer_at
from qvit.models.plain_vit import activation_of, added_to_patches, differences, factor_of
from qvit.quantizers.log2 import Log2Quantizer

Floats = NDArray[np.float32]
_EMBED, _QKV, _PROJ, _FC1, _FC2, _HEAD = range(6)
_NORM1, _NORM2, _NORM_PRE, _NORM, _FC_NORM, _QUERY_NORM, _KEY_NORM = range(7)
_POOLS = {"token": 0, "avg": 1}
_ACTIVATIONS: list[str | None] = ["gelu", "gelu-tanh", "quick-gelu", "silu", "relu"]
_MOST_LOG_BITS, _LARGEST_HEAD = 4, 256


class NativeVit:
    """A model in the C++ engine; free of PyTorch once it is made.

    Args:
        model: The integer form by the reference arithmetic (`integer_form`).
        threads: How many threads it may use; None: one for each processor that this process may use.
        form: How products are computed, see `library.forms`; None for the fastest.

    Raises:
        UsageError: A model that the engine does not run; the first reason is named.
        CannotBuild: There is no compiler.
    """

    def __init__(self, model: nn.Module, threads: int | None = None, form: str | None = None) -> None:
        if reason := next(why_not(model), None):
            raise UsageError(f"engine 'native' does not run this model: {reason}")
        vit: Any = model
        self.form, self.classes = forms()[form_index(form)], len(vit.head.bias)
        size, patch = vit.patch_embed.img_size, vit.patch_embed.patch_size
        channels = vit.patch_embed.proj.weight_0.shape[1] // (patch[0] * patch[1])
        self.shape = (channels, *size)
        added = _floats(added_to_patches(vit))
        block = vit.blocks[0]
        sizes = [*self.shape, *patch, vit.embed_dim, block.attn.num_heads, len(block.mlp.fc1.bias), len(added)]
        pool = 2 if vit.pool_include_prefix and vit.global_pool == "avg" else _POOLS[vit.global_pool]
        sizes += [
            vit.num_prefix_tokens,
            self.classes,
            pool,
            len(vit.blocks),
            _ACTIVATIONS.index(activation_of(block.mlp.act)),
        ]
        self._free = library().qvit_free
        self._model = library().qvit_create(
            np.array(sizes, np.int32), added, form_index(form), threads or _processors()
        )
        if not self._model:
            raise failure()
        self._add(vit)

    def __call__(self, images: Floats) -> Floats:
        """Logits (B, classes) of images (B, channels, height, width). Raises UsageError for another shape."""
        if images.ndim != 4 or images.shape[1:] != self.shape or not len(images):
            raise UsageError(f"this model takes images of shape (B, {', '.join(map(str, self.shape))}), B at least 1")
        logits = np.empty((len(images), self.classes), np.float32)
        call("qvit_run", self._model, np.ascontiguousarray(images, np.float32), len(images), logits)
        return logits

    def __del__(self) -> None:
        if model := self.__dict__.pop("_model", None):
            self._free(model)

    def _add(self, vit: Any) -> None:
        self._linear(_EMBED, 0, vit.patch_embed.proj)
        for index, block in enumerate(vit.blocks):
            self._norm(_NORM1, index, block.norm1)
            self._norm(_NORM2, index, block.norm2)
            self._norm(_QUERY_NORM, index, block.attn.q_norm)
            self._norm(_KEY_NORM, index, block.attn.k_norm)
            self._linear(_QKV, index, block.attn.qkv)
            self._linear(_PROJ, index, block.attn.proj, block.ls1)
            self._linear(_FC1, index, block.mlp.fc1)
            self._linear(_FC2, index, block.mlp.fc2, block.ls2)
            self._heads(index, block.attn)
        for kind, norm in ((_NORM_PRE, vit.norm_pre), (_NORM, vit.norm), (_FC_NORM, vit.fc_norm)):
            self._norm(kind, 0, norm)
        self._linear(_HEAD, 0, vit.head)

    def _norm(self, kind: int, block: int, norm: Any) -> None:
        if isinstance(norm, nn.Identity):
            return
        bias = getattr(norm, "bias", None)
        arrays = (_floats(norm.weight), _floats(torch.zeros_like(norm.weight) if bias is None else bias))
        centred = isinstance(norm, nn.LayerNorm)
        call("qvit_set_norm", self._model, kind, block, len(arrays[0]), *arrays, norm.eps, centred)

    def _linear(self, kind: int, block: int, layer: IntegerLinear, factor: nn.Module | None = None) -> None:
        """A layer; its outputs are multiplied by a LayerScale."""
        count, grid = layer.segments, layer.grid
        codes = torch.cat([layer.get_buffer(f"weight_{index}") for index in range(count)], dim=1).to(torch.int8)
        columns = [_each(numbers, count) for numbers in (grid.scale, grid.offset, grid.low, grid.high)]
        scale, bias = columns[0].unsqueeze(1) * layer.weight_scale, layer.bias
        if factor is not None and (numbers := factor_of(factor)) is not None:
            scale, bias = scale * numbers, bias * numbers
        arrays = (_floats(scale), _floats(bias), _floats(torch.stack(columns, dim=1)))
        call("qvit_set_linear", self._model, kind, block, *codes.shape, count, codes.contiguous().numpy(), *arrays)

    def _heads(self, block: int, attention: Any) -> None:
        rows, steps = [], 0
        for name in (*QKV, "probs", "output"):
            quantizer: Any = quantizer_at(attention, name)
            if isinstance(quantizer, Log2Quantizer):
                steps = quantizer.STEPS
            numbers = (*quantizer.grid(), *quantizer.quant_range())
            rows.append(torch.stack([_each(number, attention.num_heads) for number in numbers], dim=1))
        call("qvit_set_heads", self._model, block, _floats(torch.stack(rows, dim=1)), steps, float(attention.scale))


def _processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _each(numbers: Tensor | None, count: int) -> Tensor:
    """One number, or one each, as `count` numbers; zeros where there are none."""
    return torch.zeros(count) if numbers is None else numbers.detach().float().flatten().expand(count)


def _floats(numbers: Tensor) -> Floats:
    return np.ascontiguousarray(numbers.detach().cpu().float().numpy())


def why_not(model: nn.Module) -> Iterator[str]:
    """Why the engine does not run an integer form: every reason, or nothing."""
    reasons = list(differences(model))
    yield from reasons
    if reasons:
        return
    vit: Any = model
    if not isinstance(vit.head, IntegerLinear):
        yield "it has no classifier on integers"
    for product, reason in report_of(model).items():
        if reason is not None and not (product.endswith(".weigh") and reason == "a logarithmic grid"):
            yield f"{product} is simulated ({reason})"
    for index, block in enumerate(vit.blocks):
        yield from _of_attention(f"blocks.{index}.attn", block.attn)
    for path, layer in model.named_modules():
        if isinstance(layer, IntegerLinear):
            yield from _of_layer(path, layer)


def _of_attention(path: str, attention: Any) -> Iterator[str]:
    kind, proj = type(attention), attention.proj
    if not issubclass(kind, IntegerAttention) or issubclass(kind, RankedIntegerAttention):
        yield f"{path} has two groups of tokens, or is not on integers"
        return
    if not isinstance(proj, IntegerLinear):  # which the report has said
        return
    dim, heads = proj.get_buffer("weight_0").shape[1] * proj.segments, attention.num_heads
    if dim != proj.weight_sum.numel():
        yield f"{path} has heads of another width than its tokens"
    if dim % heads or (dim // heads) % 4 or dim // heads > _LARGEST_HEAD:
        yield f"{path} has heads of {dim / heads:g} channels, which are not a multiple of 4 up to {_LARGEST_HEAD}"
    grids: dict[str, Any] = {name: quantizer_at(attention, name) for name in (*QKV, "probs")}
    for name, quantizer in grids.items():
        if quantizer is not None and quantizer.spec.signed != (name in QKV):
            yield f"{path}.{name} has {'a signed' if quantizer.spec.signed else 'an unsigned'} grid"
    if isinstance(grids["probs"], Log2Quantizer) and max(grids["probs"].spec.widths) > _MOST_LOG_BITS:
        yield f"{path}.probs has more than {_MOST_LOG_BITS} bits on a logarithmic grid"


def _of_layer(path: str, layer: IntegerLinear) -> Iterator[str]:
    if layer.weight_offset is not None:
        yield f"{path} has weights on a grid without zero"
    if layer.grid.splits_tokens:
        yield f"{path} has two groups of tokens"
    if layer.segments > 64 or (layer.segments > 1 and layer.get_buffer("weight_0").shape[1] % 4):
        yield f"{path} has heads that the engine does not split"
