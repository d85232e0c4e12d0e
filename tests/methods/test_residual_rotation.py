"""A rotated residual stream: the same answers, the same architecture, no outliers; what is not a plain ViT stays."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from tiny_models import digit_batches, digits_model, shake
from torch import nn

from qvit.errors import UsageError
from qvit.methods.ptq.residual_rotation import rotate_residual, rotation_of
from qvit.models.convert import quantize

TINY: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7}


@pytest.mark.parametrize("size", [8, 48, 192, 320, 384, 768])
def test_rotations_are_orthogonal_spread_out_and_keep_the_mean(size: int) -> None:
    rotation = rotation_of(size, seed=3)
    assert torch.allclose(rotation @ rotation.t(), torch.eye(size, dtype=torch.float64), atol=1e-12)
    ones = torch.ones(size, dtype=torch.float64)
    assert torch.allclose(rotation @ ones, ones, atol=1e-12)
    assert torch.allclose(ones @ rotation, ones, atol=1e-12)
    assert float(rotation.abs().max()) < 5 / size**0.5
    assert not torch.equal(rotation, rotation_of(size, seed=4))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_tiny_patch16_224", {"global_pool": "avg"}),
        ("vit_tiny_patch16_224", {"init_values": 0.3, "reg_tokens": 2, "qk_norm": True}),
        ("vit_tiny_patch16_224", {"no_embed_class": True, "global_pool": "avg", "fc_norm": False}),
        ("deit_tiny_distilled_patch16_224", {}),
        ("vit_giant_patch14_reg4_dinov2", {"global_pool": "token"}),
        ("vit_tiny_patch16_224", {"norm_layer": "rmsnorm", "qkv_bias": False, "proj_bias": False}),
    ],
)
def test_a_rotated_model_computes_the_same(name: str, changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    own = shake(timm.create_model(name, **TINY, **changes)).eval()
    images, keys = torch.randn(2, 3, 32, 32), set(own.state_dict())
    with torch.no_grad():
        before = own(images)
        assert rotate_residual(own)
        after = own(images)
    assert set(own.state_dict()) == keys
    assert torch.allclose(after, before, atol=1e-5 * max(1.0, float(before.abs().max())))


def test_an_outlier_is_shared_out() -> None:
    """A channel that is hundred times the others is not even twice the mean afterwards."""
    model, images = digits_model(), digit_batches()[0]
    own: Any = model
    with torch.no_grad():
        own.pos_embed[..., 3] += 100
    streams = []
    for each in (model, copy.deepcopy(model)):
        if each is not model:
            assert rotate_residual(each)
        with (
            each.get_submodule("blocks.0").register_forward_pre_hook(lambda _m, x: streams.append(x[0])),
            torch.no_grad(),
        ):
            each(images)
    size = [stream.flatten(0, -2).square().mean(0).sqrt() for stream in streams]
    assert float(size[0].max() / size[0].median()) > 30
    assert float(size[1].max() / size[1].median()) < 6


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("vit_tiny_patch16_224", {"num_classes": 0}),
        ("vit_tiny_patch16_224", {"pre_norm": True}),
        ("vit_tiny_patch16_224", {"block_fn": timm.models.vision_transformer.ResPostBlock, "init_values": 0.1}),
        ("vit_base_patch16_siglip_224", {}),
        ("aimv2_large_patch14_224", {"pos_embed": "learn"}),  # a norm behind the patch embedding
    ],
)
def test_other_streams_stay(name: str, changes: dict[str, Any]) -> None:
    own = timm.create_model(name, **TINY | changes).eval()
    before = {key: value.clone() for key, value in own.state_dict().items()}
    assert not rotate_residual(own)
    assert all(torch.equal(value, before[key]) for key, value in own.state_dict().items())


def test_other_families_stay() -> None:
    swin = timm.create_model("swin_tiny_patch4_window7_224", embed_dim=24, depths=(1, 1), num_heads=(2, 2), img_size=56)
    assert not rotate_residual(swin)
    assert not rotate_residual(nn.Linear(3, 3))


def test_quantized_models_are_refused() -> None:
    with pytest.raises(UsageError, match="float model"):
        rotate_residual(quantize(digits_model(), "w4a4"))
