"""Evening out the channels of LayerNorm outputs: exact in float, and what it is for."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from tiny_models import calibrated_model, digit_batches, digits_model, shake
from torch import Tensor, nn

from qvit.errors import QvitError, UsageError
from qvit.methods.ptq.reparameterization import folds_of, reparameterize
from qvit.models.calibrate import calibrate
from qvit.models.convert import quantize, quantizers_disabled
from qvit.plan.quant_plan import QuantPlan, Rule

SWIN = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 12, "depths": (2, 1), "num_heads": (2, 3)}
TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}


def made(name: str, **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    return shake(timm.create_model(name, **kwargs)).eval()


def uneven(model: nn.Module, seed: int = 3) -> nn.Module:
    """LayerNorms with channels whose ranges differ by a factor of a hundred, as in trained models."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for fold in folds_of(model):
            spread = 10 ** (2 * torch.rand(fold.norm.weight.shape, generator=generator) - 1)
            fold.norm.weight.mul_(spread)
            fold.norm.bias.add_(spread * torch.randn(spread.shape, generator=generator))
            for linear in fold.linears.values():
                linear.weight.div_(spread)
    return model


def colour(size: int, count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, size, size, generator=generator) for _ in range(count)]


def outputs(model: nn.Module, batches: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(batch) for batch in batches])


@pytest.mark.parametrize(
    ("name", "kwargs", "size", "expected"),
    [
        ("deit_tiny_patch16_224", TINY, 16, 4),
        ("deit_tiny_distilled_patch16_224", TINY, 16, 4),
        ("swin_tiny_patch4_window7_224", SWIN, 32, 7),
        ("beit_base_patch16_224", TINY, 16, 2),
        ("eva02_tiny_patch14_224", TINY | {"patch_size": 4}, 16, None),
        ("cait_xxs24_224", TINY | {"depth_token_only": 1}, 16, None),
        ("swinv2_tiny_window8_256", SWIN, 32, None),
    ],
)
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_the_float_model_stays_the_same(
    name: str, kwargs: dict[str, object], size: int, expected: int | None, strength: float
) -> None:
    model, batches = uneven(made(name, **kwargs)), colour(size)
    before = outputs(model, batches)
    names = set(model.state_dict())
    folded = reparameterize(model, batches, strength=strength)
    after = outputs(model, batches)
    assert torch.allclose(after, before, atol=2e-4 * float(before.abs().max()))
    assert set(model.state_dict()) == names
    if expected is not None:
        assert len(folded) == expected


def test_windows_padded_with_zeros() -> None:
    model, batches = uneven(made("swin_tiny_patch4_window7_224", **(SWIN | {"img_size": 36}))), colour(36)
    before = outputs(model, batches)
    assert reparameterize(model, batches)
    assert torch.allclose(outputs(model, batches), before, atol=2e-4 * float(before.abs().max()))


def test_channels_become_equally_wide_and_centred() -> None:
    model, batches = uneven(digits_model()), digit_batches()
    seen: list[Tensor] = []
    reparameterize(model, batches)
    model.get_submodule("blocks.0.norm1").register_forward_hook(lambda _m, _i, output: seen.append(output))
    outputs(model, batches)
    x = torch.cat(seen).flatten(0, 1)
    width = x.amax(0) - x.amin(0)
    assert float(width.max() / width.min()) < 1.01
    assert float((x.amax(0) + x.amin(0)).abs().max()) < 0.01 * float(width.mean())


def test_quantization_gains() -> None:
    model, batches = uneven(digits_model(depth=2)), digit_batches(4)
    exact = outputs(model, batches)
    plan = QuantPlan.preset("w8a4").with_rules(Rule("*", {"granularity": "per-channel"}, role="weight"))
    plain = outputs(calibrate(quantize(model, plan), batches), batches)
    reparameterize(model, batches)
    better = outputs(calibrate(quantize(model, plan), batches), batches)
    assert float((better - exact).square().mean()) < 0.5 * float((plain - exact).square().mean())


def test_a_quantized_model_that_is_not_calibrated() -> None:
    float_model = uneven(digits_model())
    model, batches = quantize(copy.deepcopy(float_model), "w4a4"), digit_batches()
    assert reparameterize(model, batches) == ["blocks.0.norm1", "blocks.0.norm2"]
    with quantizers_disabled(model):
        assert torch.allclose(outputs(model, batches), outputs(float_model, batches), atol=1e-3)


def test_dead_channels() -> None:
    model, batches = digits_model(), digit_batches()
    with torch.no_grad():
        model.get_submodule("blocks.0.norm1").get_parameter("weight")[:3] = 0
        model.get_submodule("blocks.0.norm2").get_parameter("weight").zero_()
    before = outputs(model, batches)
    reparameterize(model, batches)
    assert torch.allclose(outputs(model, batches), before, atol=1e-4)


def test_errors() -> None:
    with pytest.raises(UsageError, match="before calibration"):
        reparameterize(calibrated_model(), digit_batches())
    with pytest.raises(UsageError, match="strength"):
        reparameterize(digits_model(), digit_batches(), strength=2.0)
    with pytest.raises(QvitError, match="no images"):
        reparameterize(digits_model(), [])
    with pytest.raises(QvitError, match="NaN"):
        reparameterize(digits_model(), [torch.full((2, 1, 8, 8), float("nan"))])
