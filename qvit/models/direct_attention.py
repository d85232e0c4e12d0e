"""Attention modules whose q, k, v come straight from `qkv`, and whose heads' outputs go straight to `proj`, in float.

Nothing lies between, neither a norm nor a rotation nor a gate, and both layers have a bias: what one of them does to
its channels the other can undo. A position bias or a mask, which is added to scores, is no obstacle.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from timm.models.swin_transformer import WindowAttention
from timm.models.vision_transformer import Attention
from torch import nn


def direct_attentions(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The modules, by path: timm's `Attention` without norms or gate, and Swin's `WindowAttention`."""
    for path, module in model.named_modules():
        if type(module) not in (Attention, WindowAttention):
            continue
        own: Any = module
        between = [getattr(module, name, None) for name in ("q_norm", "k_norm", "norm", "gate")]
        nothing = all(each is None or isinstance(each, nn.Identity) for each in between)
        if nothing and own.qkv.bias is not None and own.proj.bias is not None:
            yield path, own
