"""Block reconstruction and what feeds it: errors fall on images that were not seen, reproducibly, for every family."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from tiny_models import digit_batches, digits_model, shake
from torch import Tensor, nn

from qvit.errors import QvitError, UsageError
from qvit.methods.ptq.reconstruction import ReconstructOptions, fisher_weights, reconstruct
from qvit.methods.ptq.suffix import features_of, suffix_of
from qvit.models.block_inputs import attention_blocks, capture, same_input
from qvit.models.calibrate import calibrate
from qvit.models.convert import Stage, quantize, stage_of
from qvit.quantizers import quantizers_of

QUICK = ReconstructOptions(steps=40, images=64, batch_size=16)
TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
SWIN = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 12, "depths": (2, 1), "num_heads": (2, 3)}
SWIN |= {"num_classes": 5}


def pair(plan: str = "w3a3", depth: int = 2) -> tuple[nn.Module, nn.Module]:
    """A quantized model and its float original."""
    reference = digits_model(depth=depth)
    return calibrate(quantize(reference, plan), digit_batches(4, 16)), reference


@torch.no_grad()
def block_error(model: nn.Module, reference: nn.Module, path: str, batches: list[Tensor]) -> float:
    """Relative error of a block's output when everything before it is quantized too."""
    seen: dict[int, list[Tensor]] = {}
    for index, own in enumerate((model, reference)):
        rows = seen.setdefault(index, [])
        hook = own.get_submodule(path).register_forward_hook(lambda _m, _i, y, rows=rows: rows.append(y))
        for batch in batches:
            own(batch)
        hook.remove()
    found, exact = torch.cat(seen[0]), torch.cat(seen[1])
    return float((found - exact).square().mean() / exact.square().mean())


def test_errors_fall_on_images_that_were_not_seen() -> None:
    model, reference = pair()
    unseen = digit_batches(4, 16, seed=77)
    paths = list(attention_blocks(model))
    before = [block_error(model, reference, path, unseen) for path in paths]
    report = reconstruct(model, reference, digit_batches(4, 16), ReconstructOptions(150, 64, 16))
    after = [block_error(model, reference, path, unseen) for path in paths]
    assert [row.block for row in report] == paths == ["blocks.0", "blocks.1"]
    assert all(new < 0.8 * old for new, old in zip(after, before, strict=True)), (before, after)
    assert all(row.after < row.before for row in report)
    assert stage_of(model) is Stage.FROZEN


def test_the_reported_error_is_that_of_the_model() -> None:
    model, reference = pair()
    batches = digit_batches(4, 16)
    (_, last) = reconstruct(model, reference, batches, QUICK)
    assert last.after == pytest.approx(block_error(model, reference, "blocks.1", batches), rel=1e-4)


def test_only_the_blocks_change_and_the_float_model_does_not() -> None:
    model, reference = pair()
    before, original = copy.deepcopy(model.state_dict()), copy.deepcopy(reference.state_dict())
    reconstruct(model, reference, digit_batches(4, 16), QUICK)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed and all(key.startswith("blocks.") for key in changed)
    assert {"blocks.0.attn.qkv.weight", "blocks.1.mlp.fc2.weight", "blocks.0.mlp.fc2.input_quantizer.scale"} <= changed
    assert all(torch.equal(value, original[key]) for key, value in reference.state_dict().items())
    assert all(bool((q.get_parameter("scale") > 0).all()) for _, q in quantizers_of(model))


@pytest.mark.parametrize("options", [QUICK, ReconstructOptions(20, 64, 16, fisher=True, float_inputs=0.0)])
def test_the_seed_decides(options: ReconstructOptions) -> None:
    models = []
    for seed in (options.seed, options.seed, 5):
        torch.manual_seed(seed + 100)  # the global generator plays no part
        model, reference = pair()
        reconstruct(model, reference, digit_batches(4, 16), replace(options, seed=seed))
        models.append(model.state_dict())
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])
    assert any(not torch.equal(models[0][key], models[2][key]) for key in models[0])


@pytest.mark.parametrize(
    ("name", "kwargs", "size", "count"),
    [
        ("deit_tiny_distilled_patch16_224", TINY, 16, 2),
        ("swin_tiny_patch4_window7_224", SWIN, 32, 3),
        ("swinv2_tiny_window8_256", SWIN, 32, 3),
        ("beit_base_patch16_224", TINY, 16, 2),
        ("eva02_tiny_patch14_224", TINY, 16, 2),
        ("cait_xxs24_224", TINY | {"depth_token_only": 1}, 16, 2),
    ],
)
def test_families(name: str, kwargs: dict[str, Any], size: int, count: int) -> None:
    torch.manual_seed(0)
    reference = shake(timm.create_model(name, **kwargs)).eval()
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(8, 3, size, size, generator=generator) for _ in range(4)]
    model = calibrate(quantize(reference, "w4a4"), batches)
    report = reconstruct(model, reference, batches, ReconstructOptions(20, 32, 8))
    assert len(report) == count, "blocks whose further inputs differ by image are left out"
    for row in report:
        assert row.after == pytest.approx(block_error(model, reference, row.block, batches), rel=1e-3), row.block


def test_inputs_are_handed_on_only_where_they_are_the_same() -> None:
    torch.manual_seed(0)
    model = shake(timm.create_model("swin_tiny_patch4_window7_224", **SWIN)).eval()
    batches = [torch.randn(4, 3, 32, 32)]
    assert same_input(model, "layers.0.blocks.0", "layers.0.blocks.1", batches) is not None
    assert same_input(model, "layers.0.blocks.1", "layers.1.blocks.0", batches) is None, "patch merging lies between"
    inputs = capture(model, "layers.1.blocks.0", batches, 3)
    assert inputs is not None and inputs.x.shape == (3, 8, 8, 24)


def test_fisher_weights_against_autograd() -> None:
    model, images = digits_model(depth=2), digit_batches(1, 6)[0]
    weights = fisher_weights(model, ["blocks.0", "blocks.1"], [images[:4], images[4:]], 6)
    kept: list[Tensor] = []
    model.get_submodule("blocks.1").register_forward_hook(partial(keep, kept))
    squares = []
    for image in images.split(1):
        logits = model(image)
        loss = nn.functional.cross_entropy(logits, logits.argmax(-1))
        squares.append(torch.autograd.grad(loss, kept[-1])[0].square())
    expected = torch.cat(squares).mean(0)
    assert torch.allclose(weights["blocks.1"], expected / expected.mean(), rtol=1e-3)
    assert weights["blocks.0"].mean().item() == pytest.approx(1.0, rel=1e-4)


def test_progress_and_the_number_of_images() -> None:
    model, reference = pair(depth=1)
    calls: list[tuple[str, int, int]] = []
    reconstruct(
        model,
        reference,
        digit_batches(4, 16),
        ReconstructOptions(steps=3, images=8, batch_size=100),
        progress=lambda block, step, steps, _loss: calls.append((block, step, steps)),
    )
    assert calls == [("blocks.0", step, 3) for step in (1, 2, 3)]


def test_a_diverging_block_is_named() -> None:
    model, reference = pair()
    with torch.no_grad():
        model.get_submodule("blocks.1.mlp.fc1").get_parameter("weight").fill_(float("nan"))
    with pytest.raises(QvitError, match=r"block 'blocks\.1'.*not finite at step 1"):
        reconstruct(model, reference, digit_batches(4, 16), QUICK)


def test_errors() -> None:
    reference = digits_model()
    with pytest.raises(UsageError, match="calibrate"):
        reconstruct(quantize(reference, "w4a4"), reference, digit_batches())
    with pytest.raises(QvitError, match="no images"):
        reconstruct(*pair(depth=1), [], QUICK)
    for wrong in ({"steps": 0}, {"float_inputs": 1.5}, {"lr": -1.0}):
        with pytest.raises(UsageError):
            ReconstructOptions(**wrong)  # type: ignore[arg-type]


def test_a_block_that_got_worse_is_put_back() -> None:
    model, reference = pair()
    before = copy.deepcopy(model.state_dict())
    wild = ReconstructOptions(steps=3, images=64, batch_size=16, weight_lr=10.0, scale_lr=0.0, lr=5.0)
    report = reconstruct(model, reference, digit_batches(4, 16), wild)
    assert all(row.after == row.before for row in report)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_blocks_that_are_there_are_not_trained_again(tmp_path: Path) -> None:
    whole, reference = pair()
    reconstruct(whole, reference, digit_batches(4, 16), QUICK, keep=tmp_path / "whole")
    first = tmp_path / "whole" / "blocks.0.safetensors"
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / first.name).write_bytes(first.read_bytes())
    resumed, _ = pair()
    steps: list[tuple[str, int, int]] = []
    reconstruct(
        resumed,
        reference,
        digit_batches(4, 16),
        QUICK,
        keep=tmp_path / "part",
        progress=lambda block, step, total, _loss: steps.append((block, step, total)),
    )
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in resumed.state_dict().items())
    assert steps == [("blocks.1", 40 + step, 80) for step in range(1, 41)]


def test_the_time_is_announced_once() -> None:
    model, reference = pair()
    said: list[str] = []
    reconstruct(model, reference, digit_batches(4, 16), QUICK, notify=said.append)
    assert len(said) == 1 and "80 steps" in said[0]


def test_rows_are_dropped_in_every_activation_and_only_in_training() -> None:
    """With all rows and all inputs in float only weights are quantized: a block with 8 bits there is nearly exact."""
    model, reference = pair("w8a2")
    losses: list[float] = []
    options = ReconstructOptions(1, 64, 16, weight_lr=0.0, scale_lr=0.0, lr=0.0, float_inputs=1.0, float_rows=1.0)

    def keep_loss(_block: str, _step: int, _steps: int, figures: str) -> None:
        losses.append(float(figures.removeprefix("error ")))

    report = reconstruct(model, reference, digit_batches(4, 16), options, progress=keep_loss)
    assert all(loss < 1e-3 for loss in losses) and all(row.before > 1e-2 for row in report)


def keep(outputs: list[Tensor], _module: nn.Module, _inputs: Any, output: Tensor) -> None:
    outputs.append(output)


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_a_suffix_is_the_rest_of_the_model(name: str) -> None:
    """Fed with a block's own output it gives the model's feature, for images that are not those it was made with."""
    torch.manual_seed(0)
    if name == "vit":
        model, batches, blocks = digits_model(depth=3), digit_batches(2, 8), [f"blocks.{n}" for n in range(3)]
    else:
        model = shake(timm.create_model("swin_tiny_patch4_window7_224", **SWIN)).eval()
        batches, blocks = [torch.randn(4, 3, 32, 32)], ["layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0"]
    features = features_of(model, batches, 3)
    with torch.no_grad():
        logits = model.get_classifier()(features)  # type: ignore[operator]
        assert torch.allclose(logits, model(batches[0][:3]), atol=1e-6)
    before = dict(model.named_modules())
    for path in blocks:
        outputs: list[Tensor] = []
        with model.get_submodule(path).register_forward_hook(partial(keep, outputs)), torch.no_grad():
            model(batches[0][:3])
        with suffix_of(model, blocks, path, batches[0][-1:]) as suffix:
            y = outputs[0].clone().requires_grad_(True)
            found = suffix(y)
            assert torch.allclose(found, features, atol=1e-5)
            (gradient,) = torch.autograd.grad(found.square().sum(), y)
            assert bool(gradient.any())
            assert not any(parameter.requires_grad for parameter in model.parameters())
        assert dict(model.named_modules()) == before
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_with_the_suffix_the_feature_comes_nearer() -> None:
    """On images that were not seen; the float model is not changed."""
    errors = []
    for suffix in (False, True):
        model, reference = pair()
        original = copy.deepcopy(reference.state_dict())
        options = ReconstructOptions(60, 64, 16, suffix=suffix, float_inputs=0.0, float_rows=0.0)
        reconstruct(model, reference, digit_batches(4, 16), options)
        unseen = digit_batches(8, 16)[4:]
        right = features_of(reference, unseen, 64)
        errors.append(float((features_of(model, unseen, 64) - right).square().mean()))
        assert all(torch.equal(value, original[key]) for key, value in reference.state_dict().items())
    assert errors[1] < errors[0]
