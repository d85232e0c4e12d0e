"""Folds of heads are exact, rounding with feedback is what it says, and the worth of tokens has its closed form."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import timm
import torch
from tiny_models import calibrated_model, digit_batches, digits_model, shake
from torch import Tensor, nn

from qvit.errors import QvitError, UsageError
from qvit.methods.ptq.bias_correction import correct_biases
from qvit.methods.ptq.head_folds import fold_heads, hadamard
from qvit.methods.ptq.layer_rounding import damage_left, round_layers, rounded_layers
from qvit.methods.ptq.rounding import (
    cost_with_feedback,
    damped,
    output_cost,
    round_to,
    round_with_feedback,
    row_factors,
)
from qvit.methods.ptq.token_weights import FLOOR, Worth, worth_of
from qvit.models.calibrate import calibrate
from qvit.models.convert import quantize
from qvit.models.families import inspect_model
from qvit.quantizers import quantizers_of

SWIN = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 12, "depths": (2, 1), "num_heads": (2, 3)}


def grid(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, smallest and largest integer of every element: one scale per row."""
    scale = (weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)).expand_as(weight)
    return scale, torch.full_like(weight, -(2 ** (bits - 1))), torch.full_like(weight, 2 ** (bits - 1) - 1)


def moments_of(size: int, seed: int = 0) -> Tensor:
    """Of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, size, generator=generator) @ torch.randn(size, size, generator=generator)
    return damped(x.t() @ x / len(x), 0.01)


def test_the_expected_cost_of_rounding_with_feedback() -> None:
    """Over many rows it is what is measured, and to nearest the trace: an error of rounding has mean square 1/12."""
    moments = moments_of(24)
    weight = 100 * torch.randn(4000, 24, generator=torch.Generator().manual_seed(1))
    scale, least, most = torch.ones_like(weight), torch.full_like(weight, -1e4), torch.full_like(weight, 1e4)
    nearest = output_cost(weight - weight.round(), moments).mean()
    rounded = round_with_feedback(weight, scale, least, most, moments).round()
    assert float(nearest) == pytest.approx(float(moments.trace()) / 12, rel=0.05)
    found = float(output_cost(weight - rounded, moments).mean())
    assert found == pytest.approx(float(cost_with_feedback(moments)) / 12, rel=0.05)
    assert found < 0.5 * float(nearest)


def test_what_is_left_of_the_damage_of_rounding() -> None:
    """Nothing where a layer's input is constant, all where its channels are independent, around zero and equal."""
    layer = nn.Sequential(nn.Linear(16, 3))
    eye = torch.cat([torch.eye(16), -torch.eye(16)])
    assert damage_left(layer, ["0"], [torch.ones(8, 16)])["0"] < 1e-6
    assert damage_left(layer, ["0"], list(eye.split(8)))["0"] == pytest.approx(1.0, abs=1e-5)
    twins = torch.cat([eye[:, :8], eye[:, :8]], dim=1)
    assert damage_left(layer, ["0"], [twins])["0"] < 0.6


def test_layers_that_are_rounded_with_feedback() -> None:
    """Those of the blocks, and no other; a head of a weight belongs to its layer."""
    model = digits_model(depth=2)
    found = rounded_layers(model, inspect_model(model).sites)
    leaves = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert sorted(set(found.values())) == sorted(f"blocks.{block}.{leaf}" for block in range(2) for leaf in leaves)
    assert found["blocks.1.attn.qkv.value_weight"] == "blocks.1.attn.qkv"


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_folds_of_heads_leave_the_model_as_it_is(name: str, rotate: bool) -> None:
    torch.manual_seed(0)
    if name == "vit":
        model, batches = digits_model(depth=2), digit_batches()
    else:
        model = shake(timm.create_model("swin_tiny_patch4_window7_224", **SWIN, num_classes=5)).eval()
        batches = [torch.randn(4, 3, 32, 32) for _ in range(2)]
    with torch.no_grad():
        before = model(batches[0])
        folded = fold_heads(model, batches, rotate=rotate)
        after = model(batches[0])
    assert len(folded) == (2 if name == "vit" else 3)
    assert torch.allclose(after, before, atol=1e-5 * float(before.abs().max()))


def qkv_of(model: nn.Module, batches: list[Tensor]) -> Tensor:
    """q, k, v of the first block's heads: (3, heads, rows, channels)."""
    seen: list[Tensor] = []
    attention: Any = model.get_submodule("blocks.0.attn")
    with attention.qkv.register_forward_hook(lambda _m, _i, y: seen.append(y)), torch.no_grad():
        for batch in batches:
            model(batch)
    return torch.cat(seen).flatten(0, 1).unflatten(1, (3, attention.num_heads, -1)).permute(1, 2, 0, 3)


def test_folded_channels_are_centred_and_alike() -> None:
    model, batches = digits_model(), digit_batches(4, 16)
    attention: Any = model.get_submodule("blocks.0.attn")
    with torch.no_grad():
        attention.qkv.bias.add_(torch.linspace(-3, 3, len(attention.qkv.bias)))
        attention.qkv.weight.mul_(torch.logspace(-1, 1, len(attention.qkv.weight)).flip(0).unsqueeze(1))
    fold_heads(model, batches)
    q, k, v = qkv_of(model, batches)
    for x in (k, v):
        middle, width = (x.amax(1) + x.amin(1)) / 2, x.amax(1) - x.amin(1)
        assert bool((middle.abs() < 0.05 * width).all())
    width = v.amax(1) - v.amin(1)
    assert torch.allclose(width, width.mean(1, keepdim=True).expand_as(width), rtol=0.05)
    ratios = 2 * q.abs().amax(1) / (k.amax(1) - k.amin(1))
    assert torch.allclose(ratios, ratios.mean(1, keepdim=True).expand_as(ratios), rtol=0.05)


def test_folds_undo_what_was_scaled_on_purpose() -> None:
    """A model whose values and projections were rescaled by channel ends as the one that was not."""
    batches = digit_batches(4, 16)
    models = [digits_model(), digits_model()]
    attention: Any = models[1].get_submodule("blocks.0.attn")
    factor = torch.logspace(-1, 1, attention.proj.in_features)
    with torch.no_grad():
        for tensor in (attention.qkv.weight, attention.qkv.bias):
            part = tensor.chunk(3)[2]
            part.mul_(factor.view(-1, *(1,) * (part.dim() - 1)))
        attention.proj.weight.div_(factor)
    for model in models:
        fold_heads(model, batches)
    size = models[0].get_submodule("blocks.0.attn").num_heads
    weights = [qkv_of(model, batches)[2] for model in models]
    means = [x.square().mean((1, 2), keepdim=True).sqrt() for x in weights]
    assert size == len(weights[0])
    assert torch.allclose(weights[0] / means[0], weights[1] / means[1], atol=2e-2)


def test_rotated_channels_share_an_outlier() -> None:
    """Heads of d channels: what one channel alone has, all have 1/sqrt(d) of."""
    matrix = hadamard(8).float()
    assert torch.allclose(matrix @ matrix.t(), torch.eye(8), atol=1e-6)
    assert torch.allclose(matrix.abs(), torch.full((8, 8), 8**-0.5))
    model, batches = digits_model(), digit_batches(4, 16)
    rotated = copy.deepcopy(model)
    fold_heads(model, batches)
    fold_heads(rotated, batches, rotate=True)
    for plain, other in zip(qkv_of(model, batches), qkv_of(rotated, batches), strict=True):
        assert torch.allclose(plain @ matrix, other, atol=1e-4)


def test_folds_refuse() -> None:
    with pytest.raises(UsageError, match="float model"):
        fold_heads(quantize(digits_model(), "w4a4"), digit_batches())
    with pytest.raises(QvitError, match="no images"):
        fold_heads(digits_model(), [])


def test_without_correlations_feedback_rounds_to_nearest() -> None:
    weight = torch.randn(5, 70, generator=torch.Generator().manual_seed(0))
    scale, low, high = grid(weight, 3)
    moments = torch.diag(torch.rand(70, generator=torch.Generator().manual_seed(1)) + 0.1)
    assert torch.allclose(round_with_feedback(weight, scale, low, high, moments), weight, atol=1e-6)


def test_two_columns_by_hand() -> None:
    """The second column takes back h12/h22 of the first one's error: with the larger moment the first comes first."""
    weight, moments = torch.tensor([[0.4, 0.3]]), torch.tensor([[2.0, 1.0], [1.0, 1.0]])
    scale, low, high = (torch.full((1, 2), number) for number in (1.0, -4.0, 3.0))
    found = round_with_feedback(weight, scale, low, high, moments)
    assert torch.allclose(found, torch.tensor([[0.4, 0.3 + 0.4]]))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_feedback_is_better_than_rounding_and_near_the_best(bits: int) -> None:
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(bits))
    scale, low, high = grid(weight, bits)
    moments = moments_of(6)
    found = round_to(round_with_feedback(weight, scale, low, high, moments), scale, low, high)
    nearest = round_to(weight, scale, low, high)
    errors = [float(output_cost(weight - own, moments).sum()) for own in (found, nearest)]
    best = 0.0
    for row in range(len(weight)):
        floors = (weight[row] / scale[row]).floor()
        ways = torch.tensor(list(itertools.product((0.0, 1.0), repeat=6)))
        candidates = (floors + ways).clamp(float(low[0, 0]), float(high[0, 0])) * scale[row]
        best += float(output_cost(weight[row] - candidates, moments).min())
    assert errors[0] < 0.8 * errors[1]
    assert errors[0] < 3 * best + 1e-6


def test_factors_of_rows_are_the_best_of_the_candidates() -> None:
    weight = torch.randn(8, 12, generator=torch.Generator().manual_seed(3))
    weight[:, 0] *= 8
    scale, low, high = grid(weight, 3)
    moments = moments_of(12)
    factors = row_factors(weight, scale, low, high, moments)
    costs = [
        output_cost(weight - round_to(weight, scale * own, low, high), moments) for own in (factors, 1.0, 0.75, 0.5)
    ]
    assert all(bool((costs[0] <= other + 1e-5).all()) for other in costs[1:])
    assert bool((costs[0] < costs[1]).any())


class Pool(nn.Module):
    """Two tokens of three channels; the first one alone decides."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.other(x)
        return self.layer(x)[:, 0] * torch.tensor([1.0, 1.0, 0.0])


def test_worth_in_closed_form() -> None:
    """∂L/∂z = (p - 1[answer])·(1, 1, 0) for the first token, 0 for the second."""
    torch.manual_seed(0)
    found = worth_of(Pool(), ["layer", "other"], [torch.randn(16, 2, 3)])
    assert list(found) == ["layer"], "what does not matter is left out"
    worth = found["layer"]
    assert torch.allclose(worth.tokens, torch.tensor([2 * (1 - FLOOR) + FLOOR, FLOOR]))
    assert worth.channels[2] == pytest.approx(FLOOR) and float(worth.channels.mean()) == pytest.approx(1.0)
    assert torch.equal(worth.rows(6), worth.tokens.repeat(3))


def worth(model: nn.Module, batches: list[Tensor]) -> dict[str, Worth]:
    """Of all linear layers in blocks."""
    paths = [path for path, module in model.named_modules() if isinstance(module, nn.Linear) and "blocks" in path]
    return worth_of(model, paths, batches)


@torch.no_grad()
def test_rounding_lowers_the_error_of_the_model() -> None:
    batches = digit_batches(4, 16)
    errors = []
    for rounds in (False, True):
        reference = digits_model(depth=2)
        model = calibrate(quantize(reference, "w2a8"), batches)
        if rounds:
            round_layers(model, reference, batches, 64, worth(reference, batches))
        unseen = torch.cat(digit_batches(4, 16, seed=9))
        errors.append(float((model(unseen) - reference(unseen)).square().mean()))
    assert errors[1] < 0.9 * errors[0]


def test_rounding_changes_weights_of_blocks_alone_and_the_seed_decides() -> None:
    batches = digit_batches()
    before = calibrated_model("w3a3").state_dict()
    models = []
    for _ in range(2):
        model = calibrated_model("w3a3")
        round_layers(model, digits_model(), batches, 16, worth(digits_model(), batches))
        models.append(model.state_dict())
    assert all(torch.equal(models[0][key], models[1][key]) for key in before)
    changed = {key for key in before if not torch.equal(models[0][key], before[key])}
    assert {"blocks.0.attn.qkv.weight", "blocks.0.mlp.fc2.bias"} <= changed
    assert all(key.startswith("blocks.") for key in changed)


def test_rounding_refuses() -> None:
    with pytest.raises(UsageError, match="calibrate"):
        round_layers(quantize(digits_model(), "w4a4"), digits_model(), digit_batches(), 16, {})
    broken = copy.deepcopy(calibrated_model())
    quantizer = dict(quantizers_of(broken))["blocks.0.mlp.fc1.input"]
    with torch.no_grad():
        quantizer.get_parameter("scale").fill_(float("nan"))
    with pytest.raises(QvitError, match=r"blocks\.0\.mlp\.fc1"):
        round_layers(broken, digits_model(), digit_batches(), 16, worth(digits_model(), digit_batches()))


def test_biases_are_corrected_by_the_worth_of_tokens() -> None:
    """The weighted mean of every layer's output is the float model's, and that of the plain mean is not."""
    batches, reference = digit_batches(2, 16), digits_model()
    model = calibrate(quantize(reference, "w3a3"), batches)
    own = worth(reference, batches)
    correct_biases(model, batches, reference=reference, worth=own)
    path = "blocks.0.mlp.fc2"
    outputs: list[Tensor] = []
    for each in (reference, model):
        with each.get_submodule(path).register_forward_hook(lambda _m, _i, y: outputs.append(y.detach())):
            each(torch.cat(batches))
    difference = (outputs[1] - outputs[0]).flatten(0, 1)
    weights = own[path].rows(len(difference)).unsqueeze(1)
    assert float((difference * weights).mean(0).abs().max()) < 1e-5 < float(difference.mean(0).abs().max())
