"""A small model of each family beside ViT, and images for it."""

from __future__ import annotations

import warnings
from typing import Any

import timm
import torch
from tiny_models import shake
from torch import Tensor

# Small models of one architecture each; two heads at least, so that heads can differ.
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"depths": (2, 1), "embed_dim": 16, "num_heads": (2, 4), "img_size": 32, "window_size": 4},
    ),
    "swin_v2": (
        "swinv2_tiny_window8_256",
        {"depths": (2, 1), "embed_dim": 16, "num_heads": (2, 4), "img_size": 32, "window_size": 4},
    ),
    "eva02": ("eva02_base_patch14_448", {"depth": 1, "embed_dim": 32, "num_heads": 2, "img_size": 28}),
    "dinov3": ("vit_small_plus_patch16_dinov3_qkvb", {"depth": 1, "embed_dim": 32, "num_heads": 2, "img_size": 32}),
    "rope_mixed": ("vit_small_patch16_rope_mixed_224", {"depth": 1, "embed_dim": 32, "num_heads": 2, "img_size": 32}),
    "siglip": ("vit_base_patch16_siglip_224", {"depth": 1, "embed_dim": 32, "num_heads": 2, "img_size": 32}),
    "pe_core": (
        "vit_pe_core_tiny_patch16_384",
        {"depth": 1, "embed_dim": 32, "num_heads": 2, "attn_pool_num_heads": 2, "img_size": 32},
    ),
    "sapiens2": (
        "vit_large_patch16_sapiens2",
        {"depth": 1, "embed_dim": 64, "num_heads": 4, "num_kv_heads": 2, "img_size": 32},
    ),
    "beit": ("beit_base_patch16_224", {"depth": 1, "embed_dim": 32, "num_heads": 2, "img_size": 32}),
    "cait": (
        "cait_xxs24_224",
        {"depth": 1, "depth_token_only": 1, "embed_dim": 32, "num_heads": 2, "img_size": 32},
    ),
}


def tiny(name: str = "swin", **kwargs: Any) -> Any:
    """A small float model, shaken, in eval mode."""
    torch.manual_seed(5)
    model, own = TINY[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return shake(timm.create_model(model, num_classes=5, **(own | kwargs))).eval()


def images_for(model: Any, count: int = 4, seed: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, *model.patch_embed.img_size, generator=generator)
