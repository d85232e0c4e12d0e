"""Layers, attention and whole models in their fused forms beside the plain ones; products on integers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from grids import needs_int8, needs_kernels
from tiny_models import calibrated_model, digits_model, small_config
from torch import Tensor, nn

from qvit.errors import UsageError
from qvit.kernels import cpu
from qvit.kernels.attention import split_heads
from qvit.models.layers import AttentionSites, QuantConv2d, QuantLinear, QuantQKV, add_quantizers, adopt, linear_sites
from qvit.plan.spec import Layout, PerChannel, PerHead, TensorSpec
from qvit.quantizers import create_quantizer, quantizers_of
from qvit.runs.run import train
from qvit.training.config import TrainConfig
from qvit.training.held_weights import HeldWeights
from qvit.training.loop import run_on_integers


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A function that runs another one without compiled kernels."""

    def run(function: Any, *arguments: Any, **options: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "ENABLED", False)
            return function(*arguments, **options)

    return run


def gradients_of(model: nn.Module, images: Tensor, upstream: Tensor, *, bf16: bool = False) -> dict[str, Tensor]:
    """The output and the gradient of every parameter and of the images."""
    model.zero_grad()
    images = images.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = model(images)
    (out.float() * upstream).sum().backward()
    own = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert images.grad is not None
    return {"output": out.detach().float(), "images": images.grad, **own}


def close(found: dict[str, Tensor], expected: dict[str, Tensor], share: float) -> None:
    """Every tensor within `share` of the norm of the expected one."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        distance = (found[name].float() - value.float()).norm()
        assert distance <= share * value.float().norm() + 1e-7, (name, float(distance / value.float().norm()))


def layer(kind: str, inputs: TensorSpec, weights: TensorSpec) -> nn.Module:
    """A calibrated linear layer, or a convolution over patches."""
    if kind == "conv":
        module: Any = adopt(QuantConv2d, nn.Conv2d(3, 10, 4, stride=4))
        example = torch.randn(2, 3, 8, 12)
    else:
        module = adopt(QuantLinear, nn.Linear(24, 10, bias=kind == "bias"))
        example = torch.randn(2, 9, 24)
    sites = {site.name: site for site in linear_sites("layer", module, TensorSpec())}
    add_quantizers(module, "layer", sites, {"layer.input": inputs, "layer.weight": weights})
    for name, value in (("input", example), ("weight", module.weight)):
        quantizer = getattr(module, f"{name}_quantizer")
        observer = quantizer.create_observer()
        observer.observe(value.detach())
        quantizer.initialize(observer)
    return module


SPECS = {
    "per tensor": TensorSpec(bit_width=3),
    "offset": TensorSpec(bit_width=4, signed=False, symmetric=False),
    "8 bits, unsigned": TensorSpec(bit_width=8, signed=False),
    "per channel": TensorSpec(bit_width=3, granularity=PerChannel()),
    "switchable": TensorSpec(bit_width=4, learn_bit_width=True, options={"switchable_scale": True}),
    **{
        gradient: TensorSpec(
            bit_width=4,
            learn_bit_width=True,
            options={"switchable_scale": True, "width_gradient": gradient, "scale_gradient": factor},
            signed=False,
            symmetric=False,
        )
        for gradient, factor in (("difference", "count"), ("interpolation", "count-linear"))
    },
    "norm": TensorSpec(bit_width=3, options={"scale_gradient": "norm"}),
}


@needs_kernels
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", ["bias", "no bias", "conv"])
@pytest.mark.parametrize("spec", SPECS)
def test_a_layer_with_its_input_s_quantizer(plain: Any, kind: str, spec: str, bf16: bool) -> None:
    if kind == "conv" and spec == "per channel":
        pytest.skip("a convolution with a scale per channel has no fused form")
    module = layer(kind, SPECS[spec], TensorSpec(bit_width=4, granularity=PerChannel()))
    off_integers(module)
    images = torch.randn(5, 3, 8, 12) if kind == "conv" else torch.randn(5, 7, 24)
    upstream = torch.randn(5, 10, 2, 3) if kind == "conv" else torch.randn(5, 7, 10)
    found = gradients_of(module, images, upstream, bf16=bf16)
    expected = plain(gradients_of, module, images, upstream, bf16=bf16)
    close(found, expected, 0.02 if bf16 else 1e-5)
    assert "input_quantizer.scale" in found


def off_integers(module: nn.Module) -> None:
    """Moves learned widths by a third of a bit."""
    with torch.no_grad():
        for _, quantizer in quantizers_of(module):
            if quantizer.learns_width:
                quantizer.bit_width.add_(0.3)


class Attention(AttentionSites):
    """Nothing but the products, with a bias."""

    def __init__(self, bias: Tensor | None) -> None:
        super().__init__()
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = x.unflatten(2, (3, 3, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.attend(q, k, v, 8**-0.5, self.bias, nn.Identity())


def attention(bias: Tensor | None, sites: tuple[str, ...], spec: TensorSpec) -> nn.Module:
    module = Attention(bias)
    for site in sites:
        own = spec.changed({"signed": False}) if site == "probs" else spec
        layout = Layout(heads=(3, 1, 1), channels=(3, 1, 8))
        quantizer = create_quantizer(own, layout)
        observer = quantizer.create_observer()
        example = torch.rand(4, 3, 11, 11).softmax(-1) if site == "probs" else torch.randn(4, 3, 11, 8)
        observer.observe(example)
        quantizer.initialize(observer)
        module.add_module(f"{site}_quantizer", quantizer)
    return module


ALL = ("query", "key", "value", "probs")
PER_HEAD = TensorSpec(bit_width=(2, 3, 5), granularity=PerHead())


@needs_kernels
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("bias", [None, (1, 3, 11, 11), (7, 3, 11, 11), (11, 11)], ids=str)
@pytest.mark.parametrize("sites", [ALL, ("query",), ("probs",), ("key", "value")], ids=str)
def test_attention_beside_its_plain_form(
    plain: Any, monkeypatch: pytest.MonkeyPatch, bias: tuple[int, ...] | None, sites: tuple[str, ...], bf16: bool
) -> None:
    """Several chunks, the last one shorter; a bias for all images or one for each."""
    monkeypatch.setattr("qvit.kernels.attention.SCORES", 3 * 3 * 11 * 11)
    module = attention(None if bias is None else torch.randn(bias), sites, PER_HEAD)
    x, upstream = torch.randn(7, 11, 72), torch.randn(7, 3, 11, 8)
    found = gradients_of(module, x, upstream, bf16=bf16)
    expected = plain(gradients_of, module, x, upstream, bf16=bf16)
    close(found, expected, 0.05 if bf16 else 2e-5)


@needs_kernels
@pytest.mark.parametrize("learn", [None, "clipping", "difference", "interpolation"])
def test_attention_with_learned_widths_and_switchable_scales(plain: Any, learn: Any) -> None:
    spec = TensorSpec(
        bit_width=(3, 4, 6),
        granularity=PerHead(),
        learn_bit_width=learn is not None,
        options={"width_gradient": learn or "clipping", "switchable_scale": True},
        signed=False,
        symmetric=False,
    )
    module = attention(None, ALL, spec)
    off_integers(module)
    x, upstream = 2 * torch.randn(7, 11, 72), torch.randn(7, 3, 11, 8)
    close(gradients_of(module, x, upstream), plain(gradients_of, module, x, upstream), 2e-5)


@needs_kernels
@pytest.mark.parametrize("beside", [True, False])
def test_gradients_of_q_k_v_that_lie_side_by_side_are_not_copied(beside: bool) -> None:
    qkv = torch.randn(2, 5, 3 * 4 * 6, requires_grad=True)
    parts = split_heads(qkv, 4)
    memory = torch.randn(2, 5, 3, 4, 6)
    grads = memory.permute(2, 0, 3, 1, 4).unbind(0)
    given = grads if beside else [grads[0], grads[1].contiguous(), grads[2]]
    seen: list[Tensor] = []
    qkv.register_hook(seen.append)
    torch.autograd.backward(list(parts), list(given))
    assert torch.equal(seen[0], memory.flatten(2))
    assert (seen[0].data_ptr() == memory.data_ptr()) is beside
    expected = qkv.detach().unflatten(2, (3, 4, 6)).permute(2, 0, 3, 1, 4)
    assert all(torch.equal(part, other) for part, other in zip(parts, expected, strict=True))


@needs_kernels
@pytest.mark.parametrize("plan", ["w3a3", "w4a8", "w2a2"])
def test_a_whole_model(plain: Any, plan: str) -> None:
    model = calibrated_model(plan)
    images, upstream = torch.randn(9, 1, 8, 8), torch.randn(9, 10)
    close(gradients_of(model, images, upstream), plain(gradients_of, model, images, upstream), 2e-4)


@needs_kernels
def test_who_looks_at_a_quantizer_still_sees_what_passes() -> None:
    model = calibrated_model("w3a3")
    seen: list[str] = []
    for name, quantizer in quantizers_of(model):
        quantizer.register_forward_hook(lambda module, inputs, out, name=name: seen.append(name))
    model(torch.randn(2, 1, 8, 8))
    assert sorted(seen) == sorted(name for name, _ in quantizers_of(model))


@needs_kernels
def test_widths_that_change_are_noticed(plain: Any) -> None:
    """Ranges of fixed widths are kept: not across a change in place, and not as tensors that cannot be trained with."""
    model = calibrated_model("w3a3")
    images = torch.randn(2, 1, 8, 8)
    with torch.inference_mode():
        model(images)
    model(images).sum().backward()
    for _, quantizer in quantizers_of(model):
        quantizer.bit_width.fill_(2)
    torch.testing.assert_close(model(images), plain(model, images), rtol=1e-4, atol=1e-4)
    for _, quantizer in quantizers_of(model):
        quantizer.freeze(4)
    torch.testing.assert_close(model(images), plain(model, images), rtol=1e-4, atol=1e-4)


@needs_kernels
def test_only_raw_inputs_are_kept() -> None:
    """A linear layer keeps x and the weights, attention keeps q, k, v: nothing of the size of the scores."""
    module = attention(None, ALL, PER_HEAD)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        module(torch.randn(7, 11, 72, requires_grad=True))
    assert sorted(size for size in kept if size > 3) == [7 * 3 * 11 * 8] * 3


# ------------------------------------------------------------------------------------------------------------- integers


@needs_kernels
@needs_int8
@pytest.mark.parametrize("weights", ["per tensor", "per channel"])
@pytest.mark.parametrize("inputs", ["per tensor", "offset", "8 bits, unsigned", "switchable"])
@pytest.mark.parametrize("kind", ["bias", "no bias"])
def test_integer_products_are_the_simulated_ones(kind: str, inputs: str, weights: str) -> None:
    """To the rounding of the float sums; gradients are the same computation."""
    module: Any = layer(kind, SPECS[inputs], SPECS[weights].changed({"bit_width": 8}))
    x, upstream = torch.randn(5, 7, 24), torch.randn(5, 7, 10)
    simulated = gradients_of(module, x, upstream)
    module.integer_forward = True
    codes, scale = module.codes()
    assert torch.equal(codes.float() * scale[:, None], module.weight_quantizer(module.weight))
    integers = gradients_of(module, x, upstream)
    assert not torch.equal(integers["output"], simulated["output"]), "another order of operations"
    close(integers, simulated, 1e-6)
    exact = module.input_quantizer(x).double() @ module.weight_quantizer(module.weight).double().t()
    exact = exact if module.bias is None else exact + module.bias
    assert (integers["output"] - exact).norm() <= (simulated["output"] - exact).norm() * 3


@needs_kernels
@needs_int8
def test_integers_in_a_whole_model_and_where_they_cannot_be() -> None:
    model = calibrated_model("w4a4")
    images = torch.randn(9, 1, 8, 8)
    simulated = model(images)
    config = TrainConfig.create(model="vit_digits", method="lsq+", budget="4bit", integer_forward=True)
    run_on_integers(model, config)
    on_integers = [m for m in model.modules() if isinstance(m, (QuantLinear, QuantQKV)) and m.integer_forward]
    assert len(on_integers) == sum(isinstance(m, (QuantLinear, QuantQKV)) for m in model.modules())
    close({"x": model(images).detach()}, {"x": simulated.detach()}, 0.05)
    columns = layer("bias", SPECS["per tensor"], SPECS["per channel"])
    columns.integer_forward = True  # type: ignore[assignment]
    shared = layer("bias", SPECS["per channel"], SPECS["per tensor"])
    shared.integer_forward = True  # type: ignore[assignment]
    shared(torch.randn(2, 3, 24))  # a scale per input channel: simulated, without a complaint
    for inputs, weights in ((8, 12), (12, 8)):
        wide: Any = layer("bias", TensorSpec(bit_width=inputs), TensorSpec(bit_width=weights))
        simulated = wide(images := torch.randn(2, 3, 24))
        wide.integer_forward = True
        assert torch.equal(wide(images), simulated)


def test_what_excludes_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = digits_model()
    settings = {"model": "vit_digits", "method": "lsq+", "budget": "4bit", "integer_forward": True}
    with pytest.raises(UsageError, match="compile exclude each other"):
        run_on_integers(model, TrainConfig.create(**settings, compile=True))
    monkeypatch.setattr(cpu, "ENABLED", False)
    with pytest.raises(UsageError, match="has no compiled kernels"):
        run_on_integers(model, TrainConfig.create(**settings))
    monkeypatch.undo()
    monkeypatch.setattr("qvit.kernels.cpu.has_int8_dot_products", lambda: False)
    if cpu.available():
        with pytest.raises(UsageError, match="no 8-bit dot products"):
            run_on_integers(model, TrainConfig.create(**settings))


# ------------------------------------------------------------------------------------------- once per step, compilation


@pytest.mark.parametrize("plan", ["w3a3", "w4a4"])
def test_weights_quantized_once_have_the_gradients_of_each_time(plan: str) -> None:
    model = calibrated_model(plan)
    batches = torch.randn(4, 3, 1, 8, 8)
    model.zero_grad()
    for batch in batches:
        model(batch).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    held, calls = HeldWeights(model), dict.fromkeys(HeldWeights(model).quantizers, 0)
    for name, quantizer in held.quantizers.items():
        original = quantizer.fake_quantize

        def counted(x: Tensor, *more: Any, name: str = name, original: Any = original) -> Tensor:
            calls[name] += 1
            return original(x, *more)

        quantizer.fake_quantize = counted  # type: ignore[method-assign]
    with held.first():
        for batch in batches[:-1]:
            model(batch).square().sum().backward()
        weights = [p for name, p in model.named_parameters() if name.endswith("fc1.weight")]
        assert weights and all(weight.grad is None for weight in weights)
    with held.last():
        model(batches[-1]).square().sum().backward()
    assert calls and set(calls.values()) == {1}
    close({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, expected, 1e-5)
    assert all(quantizer.held is None for quantizer in held.quantizers.values())


def test_no_number_is_asked_for_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that would make the host wait."""
    model = calibrated_model("w3a3")
    images = torch.randn(4, 1, 8, 8)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a tensor's content was asked for")

    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy"):
        monkeypatch.setattr(Tensor, name, refuse)
    model(images).sum().backward()


@needs_kernels
@needs_int8
def test_a_run_on_integers(tmp_path: Path) -> None:
    """The whole of a training, with widths that are learned and frozen, and in micro-batches."""
    config = small_config(method="qvit", budget="3bit", epochs=2, integer_forward=True, accumulate=2)
    train(config, tmp_path / "run", quiet=True)
    result = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    assert 0 <= result["accuracy"] <= 100 and result["bit_operations"] > 0
