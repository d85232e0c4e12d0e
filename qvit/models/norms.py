"""Norms that leave their work to the layer behind them, so that it and the quantizer in between are one kernel.

Within `fused_norms(model)` a norm in front of a quantized projection or MLP returns what it was given, with a note of
what is to be done to it (`layers.Unnormed`); the layer does both at once where there is a kernel (`gpu_norm.py`), else
one after the other. That is for timm's plain blocks, in which nothing stands between the two. Keys, parameters and the
classes of the model are what they were once the context ends.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qvit.kernels.gpu_norm import Norm
from qvit.models.families.vit import QuantAttention
from qvit.models.integer_functions import IntegerLayerNorm
from qvit.models.layers import QuantLinear, QuantQKV, Unnormed, adopt
from qvit.models.network import is_plain_block, is_plain_mlp, norm_kind
from qvit.quantizers.base import has_hooks


class _Deferring(nn.Module):
    """A norm whose output is `Unnormed`, unless somebody looks at it or at what follows."""

    _followers: tuple[nn.Module, ...]

    def forward(self, x: Tensor) -> Any:
        own: Any = self
        plain = super().forward
        if any(has_hooks(module) for module in (self, *self._followers)):
            return plain(x)
        dtype = torch.float32 if torch.is_autocast_enabled(x.device.type) else x.dtype
        norm = Norm(own.weight, getattr(own, "bias", None), own.eps, norm_kind(self) == "rms", dtype)
        return Unnormed(x, norm, plain)


@functools.cache
def _deferring(cls: type[nn.Module]) -> type[nn.Module]:
    return type(f"Deferring{cls.__name__}", (_Deferring, cls), {})


@contextmanager
def fused_norms(model: nn.Module) -> Iterator[int]:
    """Within, norms of plain blocks are left to the layers behind them; yields how many."""
    swapped: list[tuple[nn.Module, str, type[nn.Module]]] = []
    for block, leaf, followers in _places(model):
        norm = block.get_submodule(leaf)
        new: Any = adopt(_deferring(type(norm)), norm)
        new.__dict__["_followers"] = followers  # not submodules of the norm
        setattr(block, leaf, new)
        swapped.append((block, leaf, type(norm)))
    try:
        yield len(swapped)
    finally:
        for block, leaf, cls in swapped:
            own = adopt(cls, block.get_submodule(leaf))
            del own.__dict__["_followers"]
            setattr(block, leaf, own)


def _places(model: nn.Module) -> Iterator[tuple[nn.Module, str, tuple[nn.Module, ...]]]:
    """Blocks, their norms that can be left to a layer, and the modules up to and including that layer."""
    for block in list(model.modules()):
        if not is_plain_block(block):
            continue
        own: Any = block
        if _can_defer(own.norm1) and type(own.attn) is QuantAttention and type(own.attn.qkv) is QuantQKV:
            yield block, "norm1", (own.attn, own.attn.qkv)
        if _can_defer(own.norm2) and is_plain_mlp(own.mlp) and type(own.mlp.fc1) is QuantLinear:
            yield block, "norm2", (own.mlp, own.mlp.fc1)


def _can_defer(norm: nn.Module) -> bool:
    by_integers = isinstance(norm, IntegerLayerNorm)
    return norm_kind(norm) is not None and not by_integers and not getattr(norm, "_fast_norm", False)
