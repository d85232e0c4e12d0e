"""Images of several sizes: which a model takes, calibration on all of them, and one model's answers at each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import tiny
from integer_models import make_dyadic
from tiny_models import digits_model
from torch import Tensor, nn

import qvit
from qvit.deploy.file.artifact import Artifact
from qvit.errors import UsageError
from qvit.methods.ptq.bias_correction import correct_biases
from qvit.methods.ptq.images import FirstImages, OfFirstSize, OneSize
from qvit.methods.ptq.layer_rounding import round_layers
from qvit.methods.ptq.probability_scales import _errors
from qvit.methods.ptq.reconstruction import ReconstructOptions, reconstruct
from qvit.methods.ptq.token_weights import Worth, worth_of
from qvit.models.sizes import check_size, parse_size, takes_any_size

ANY: dict[str, Any] = {"dynamic_img_size": True}
SIZES = {
    "vit": [(8, 8), (8, 12), (12, 8), (4, 4)],
    "swin": [(32, 32), (32, 48), (36, 60), (56, 56)],
    "swin_v2": [(32, 32), (36, 60)],
    "eva02": [(28, 28), (28, 42)],
    "dinov3": [(32, 32), (48, 32)],
}
MODELS = {
    "vit": ("vit_digits", {"depth": 1, "embed_dim": 16, "num_heads": 2, **ANY}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"depths": [2, 1], "embed_dim": 16, "num_heads": [2, 4], "img_size": 32, "window_size": 4, **ANY},
    ),
    "eva02": ("eva02_base_patch14_448", {"depth": 1, "embed_dim": 32, "num_heads": 2, "img_size": 28, **ANY}),
}


def dynamic(name: str) -> nn.Module:
    return digits_model(**ANY) if name == "vit" else tiny(name, **ANY)


def images_of(name: str, count: int = 4) -> list[Tensor]:
    """A batch of each size."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(count, 1 if name == "vit" else 3, *size, generator=generator) for size in SIZES[name]]


@pytest.mark.parametrize("name", list(SIZES))
def test_every_size_takes_part_in_calibration_and_is_computed_like_the_float_model(name: str) -> None:
    model, batches = dynamic(name), images_of(name)
    quantized = qvit.calibrate(qvit.quantize(model, "w8a8"), batches).eval()
    for images in batches:
        right = model(images)
        assert ((quantized(images) - right).norm() / right.norm()).item() < 0.1, images.shape
    one = qvit.calibrate(qvit.quantize(model, "w8a8"), batches[:1])
    pairs = zip(quantized.state_dict().items(), one.state_dict().values(), strict=True)
    assert any("scale" in key and not torch.equal(ours, other) for (key, ours), other in pairs)


#: The most important half of the tokens of an image, however many there are, has more bits.
GROUPS = {"switchable_scale": True, "token_bit_width": {"share": 0.5, "low": 2}}


@pytest.mark.parametrize(("name", "groups"), [("vit", False), ("vit", True), ("swin", False), ("eva02", False)])
def test_fake_quantized_and_packed_agree_at_each_size(name: str, groups: bool, tmp_path: Path) -> None:
    model, batches = dynamic(name), images_of(name)
    ranked = [site for site, own in qvit.inspect_model(model).sites.items() if own.tokens and groups]
    plan = qvit.QuantPlan.preset("w4a8").with_rules(*(qvit.Rule(site, GROUPS) for site in ranked))
    quantized = qvit.calibrate(qvit.quantize(model, plan), batches).eval()
    quantized = make_dyadic(qvit.freeze(quantized))
    model_name, kwargs = MODELS[name]
    file = tmp_path / "packed.safetensors"
    arguments = kwargs if name == "vit" else {"num_classes": 5, **kwargs}
    Artifact.from_model(quantized, model_name=model_name, model_kwargs=arguments).save(file)
    reference, fast = qvit.load(file, "reference"), qvit.load(file, "torch", compiled=False)
    for images in batches:
        expected = reference(images)
        assert torch.equal(fast(images), expected)
        torch.testing.assert_close(expected, quantized(images).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("plan", ["w8a8", "w4a4"])
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_post_training_quantization_on_several_sizes(name: str, plan: str) -> None:
    model, batches = dynamic(name), images_of(name, 8)
    quantized = qvit.ptq(model, plan, batches, reconstruct=ReconstructOptions(steps=2))
    for images in batches:
        right = model(images)
        assert ((quantized(images) - right).norm() / right.norm()).item() < (0.1 if plan == "w8a8" else 0.6)


def test_each_size_has_an_equal_share_of_the_first_images() -> None:
    batches = [torch.zeros(8, 1, *size) for size in ((8, 8), (8, 8), (8, 12), (12, 8))]
    shapes = [tuple(batch.shape) for batch in FirstImages(batches, 11)]
    assert shapes == [(4, 1, 8, 8), (4, 1, 8, 12), (3, 1, 12, 8)]
    assert [len(batch) for batch in FirstImages(FirstImages(batches, 11), 3)] == [1, 1, 1]
    assert [tuple(batch.shape[2:]) for batch in OfFirstSize(batches)] == [(8, 8), (8, 8)]


def test_parts_that_need_one_size_say_so() -> None:
    model, batches = digits_model(**ANY), images_of("vit")
    quantized = qvit.calibrate(qvit.quantize(model, "w4a4"), batches).eval()
    steps = ReconstructOptions(steps=1)
    refusals = {
        "bias correction": lambda: correct_biases(quantized, batches),
        "the worth of tokens": lambda: worth_of(model, ["blocks.0.attn.qkv"], batches),
        "rounding": lambda: round_layers(quantized, model, batches, 16, {}),
        "reconstruction": lambda: reconstruct(quantized, model, batches, steps),
    }
    for what, call in refusals.items():
        with pytest.raises(UsageError, match=f"{what} takes images of one size, not of 8x8 and 8x12"):
            call()
    assert [len(batch) for batch in OneSize(batches[:1] * 2, "it")] == [4, 4]


def test_weights_of_tokens_are_not_those_of_another_size() -> None:
    """Twice as many tokens, whose rows the weights of one size would divide."""
    quantized: Any = qvit.calibrate(qvit.quantize(digits_model(**ANY), "w3a3"), images_of("vit"))
    quantizer = quantized.blocks[0].attn.probs_quantizer
    generator = torch.Generator().manual_seed(0)
    worth = Worth(torch.rand(16, generator=generator), torch.ones(16))
    for tokens, same in ((16, False), (32, True)):
        probs = torch.rand(4, 2, tokens, tokens, generator=generator).softmax(-1)
        value = torch.randn(4, 2, tokens, 8, generator=generator)
        found, alike = (_errors(quantizer, probs, value, own, images=4) for own in (worth, None))
        assert torch.equal(found, alike) == same


def test_which_sizes_a_model_takes() -> None:
    fixed, free, beit = digits_model(), digits_model(**ANY), tiny("beit")
    assert (takes_any_size(fixed), takes_any_size(free), takes_any_size(nn.Linear(1, 1))) == (False, True, False)
    for model, size in ((fixed, (8, 8)), (free, (12, 8)), (nn.Linear(1, 1), (3, 3))):
        check_size(model, size)
    with pytest.raises(UsageError, match=r"takes images of 8x8 pixels, not 8x12; one made with dynamic_img_size=True"):
        qvit.calibrate(qvit.quantize(fixed, "w8a8"), [torch.zeros(1, 1, 8, 12)])
    with pytest.raises(UsageError, match=r"takes images of 32x32 pixels, not 48x32$"):
        check_size(beit, (48, 32))
    with pytest.raises(UsageError, match="images of 7x8 pixels are not made of whole patches: give multiples of 2x2"):
        check_size(free, (7, 8))
    check_size(digits_model(dynamic_img_pad=True, **ANY), (7, 8))


def test_sizes_as_options_write_them() -> None:
    assert (parse_size("64x96"), parse_size("64")) == ((64, 96), (64, 64))
    for wrong in ("64x", "0", "64x96x3", "-1x4", "1e3", "999999"):
        with pytest.raises(UsageError, match="HEIGHTxWIDTH"):
            parse_size(wrong)


def test_a_fixed_size_that_is_no_square(tmp_path: Path) -> None:
    kwargs = {"depth": 1, "embed_dim": 16, "num_heads": 2, "img_size": [8, 12]}
    model, images = digits_model(img_size=(8, 12)), torch.randn(2, 1, 8, 12)
    quantized = make_dyadic(qvit.freeze(qvit.calibrate(qvit.quantize(model, "w8a8"), [images]).eval()))
    artifact = Artifact.from_model(quantized, model_name="vit_digits", model_kwargs=kwargs)
    assert artifact.data_config["input_size"] == (1, 8, 12)
    artifact.save(tmp_path / "packed.safetensors")
    for engine in ("native", "reference"):
        found = qvit.load(tmp_path / "packed.safetensors", engine)(images)
        torch.testing.assert_close(found, quantized(images).detach(), rtol=1e-4, atol=1e-4)
