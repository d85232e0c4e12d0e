"""Frozen models of all families, and their products one by one: fake-quantized, on integers, and exactly in float64.

A `Product` has what is multiplied in both forms on the same input. `exact` is the value computed in float64 from codes
(`to_int`) and grids; `magnitude` is the sum of |terms|, where a term of x̂ is |s·q| + |β|: what rounding errors scale
with.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import timm
import torch
from family_models import TINY, images_for, tiny
from tiny_models import digit_batches, digits_model
from torch import Tensor, nn
from torch.nn import functional as F

from qvit.deploy.integer.reference import IntegerAttention, IntegerLinear
from qvit.models.calibrate import calibrate
from qvit.models.convert import freeze, quantize
from qvit.models.layers import AttentionSites, QuantLinear, QuantQKV, for_all_heads, quantizer_at
from qvit.plan.quant_plan import QuantPlan
from qvit.plan.spec import PerPosition
from qvit.quantizers import Quantizer, quantizers_of

FAMILIES = ["vit", *TINY]
#: Relative rounding error of float32.
UNIT = 2.0**-24


def float_model(name: str) -> tuple[nn.Module, Tensor]:
    """A tiny model of a family, and eight images."""
    if name == "vit":
        return digits_model(depth=2), digit_batches(1, 8)[0]
    model = tiny(name)
    return model, images_for(model, 8)


def frozen(name: str, plan: QuantPlan | str = "w4a4") -> tuple[nn.Module, Tensor]:
    """The same, quantized by `plan`, calibrated on the images, and frozen."""
    model, images = float_model(name)
    return freeze(calibrate(quantize(model, plan), [images]).eval()), images


def packed_arguments(name: str) -> dict[str, Any]:
    """What `Artifact.from_model` has to know of `float_model(name)`."""
    if name == "vit":
        return {"model_name": "vit_digits", "model_kwargs": {"depth": 2, "embed_dim": 16, "num_heads": 2}}
    model, kwargs = TINY[name]
    return {"model_name": model, "model_kwargs": {"num_classes": 5, **kwargs}}


@torch.no_grad()
def make_dyadic(model: nn.Module) -> nn.Module:
    """Scales become powers of two, offsets multiples of them, biases of 1/64: sums of products are then exact."""
    for _, quantizer in quantizers_of(model):
        own: Any = quantizer
        own.scale.copy_(torch.exp2(own.scale.log2().round()))
        if getattr(own, "offset", None) is not None:
            own.offset.copy_((own.offset / own.scale).round() * own.scale)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.copy_((parameter * 64).round() / 64)
    return model


@dataclass(frozen=True)
class Product:
    """A product of a model in two forms, on one input."""

    name: str
    fake: Tensor
    found: Tensor
    exact: Tensor
    magnitude: Tensor
    length: int
    blocks: int


def terms(quantizer: Quantizer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Values and magnitudes of what a quantizer makes of `x`, in float64."""
    codes = quantizer.view(quantizer.to_int(x)).double()
    scale, offset = (None if t is None else t.double() for t in quantizer.grid())
    assert scale is not None
    values, sizes = scale * codes, (scale * codes).abs()
    if offset is not None:
        values, sizes = values + offset, sizes + offset.abs()
    return values.reshape(x.shape), sizes.reshape(x.shape)


def weight_terms(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Values and magnitudes of a weight; codes beyond int8 are shifted by 128, which adds terms that cancel."""
    own: Any = layer
    pairs = [(own.weight_quantizer, own.weight)] if not isinstance(layer, QuantQKV) else [
        (getattr(own, f"{name}_weight_quantizer"), part)
        for name, part in zip(("query", "key", "value"), layer.weight.chunk(3), strict=True)
    ]  # fmt: skip
    found = []
    for quantizer, weight in pairs:
        values, sizes = terms(quantizer, weight)
        shifted = int(quantizer.to_int(weight).max()) > 127
        found.append((values, sizes + 256 * float(quantizer.grid()[0].max()) * shifted))
    return torch.cat([values for values, _ in found]), torch.cat([sizes for _, sizes in found])


def layer_product(name: str, fake: nn.Module, form: nn.Module, x: Tensor) -> Product:
    """A layer that has its own input quantizer, on `x`."""
    layer: Any = fake
    (values, sizes), (weight, widths) = terms(layer.input_quantizer, x), weight_terms(layer)
    bias = None if layer.bias is None else layer.bias.double()
    conv = isinstance(layer, nn.Conv2d)
    multiply = (lambda a, w, b: F.conv2d(a, w, b, layer.stride)) if conv else F.linear
    exact, magnitude = multiply(values, weight, bias), multiply(sizes, widths, None if bias is None else bias.abs())
    return Product(name, fake(x), form(x), exact, magnitude, weight[0].numel(), 1)


def attention_products(name: str, fake: Any, form: Any, queries: Tensor, keys: Tensor, probs: Tensor) -> Iterator:
    """Scores and weighted values of an attention module, and its proj, where they run on integers."""
    heads = queries.shape[1]
    if "scores" not in form.simulated:
        (q, q_size), (k, k_size) = terms(fake.query_quantizer, queries), terms(fake.key_quantizer, keys)
        k, k_size = (for_all_heads(t, heads).transpose(-2, -1) for t in (k, k_size))
        found = [own.scores(queries, keys, 0.25) for own in (fake, form)]
        yield Product(f"{name}.scores", *found, q @ k / 4, q_size @ k_size / 4, q.shape[-1], 1)
    if "weigh" not in form.simulated:
        (p, p_size), (v, v_size) = terms(fake.probs_quantizer, probs), terms(fake.value_quantizer, keys)
        v, v_size = for_all_heads(v, heads), for_all_heads(v_size, heads)
        yield Product(f"{name}.weigh", fake.weigh(probs, keys), form.weigh(probs, keys), p @ v, p_size @ v_size,
                      p.shape[-1], 1)  # fmt: skip
    if isinstance(form.proj, IntegerLinear):
        normed = fake.normalize_heads(queries)
        (x, x_size), (w, w_size) = terms(fake.output_quantizer, normed), weight_terms(fake.proj)
        x, x_size = (t.transpose(1, 2).flatten(2) for t in (x, x_size))
        bias = fake.proj.bias
        bias = torch.zeros(len(w)).double() if bias is None else bias.double()
        found = [own.proj(own.merge(queries)) for own in (fake, form)]
        exact, magnitude = F.linear(x, w, bias), F.linear(x_size, w_size, bias.abs())
        yield Product(f"{name}.proj", *found, exact, magnitude, w.shape[1], heads)


@torch.no_grad()
def products(fake: nn.Module, form: nn.Module, images: Tensor, *, edges: bool = False) -> list[Product]:
    """All products on integers of a model: both forms get what the fake-quantized model computes from `images`.

    Args:
        fake: The frozen model.
        form: Its integer form.
        images: Images.
        edges: Layers get multiples of half a step in place of what the model computes: the edges of rounding.
    """
    inputs: dict[str, Tensor] = {}
    hooks = []
    for path, module in fake.named_modules():
        if isinstance(module, (QuantLinear, QuantQKV, nn.Conv2d)):
            hooks.append(module.register_forward_pre_hook(lambda _, x, path=path: inputs.update({path: x[0]})))
    fake(images)
    for hook in hooks:
        hook.remove()
    found = []
    for path, module in form.named_modules():
        if isinstance(module, IntegerLinear) and hasattr(fake.get_submodule(path), "input_quantizer"):
            x = inputs[path]
            if edges:
                x = on_edges(fake.get_submodule(f"{path}.input_quantizer"), x)
            found.append(layer_product(path, fake.get_submodule(path), module, x))
        if isinstance(module, IntegerAttention):
            attention: Any = fake.get_submodule(path)
            assert isinstance(attention, AttentionSites)
            groups = getattr(attention, "num_kv_heads", attention.num_heads)
            dim = attention.proj.in_features // attention.num_heads
            query = quantizer_at(attention, "query")
            by_position = query is not None and query.spec.granularity == PerPosition()
            n, m = inputs[f"{path}.qkv"].shape[1:2] * 2 if by_position else (5, 7)
            queries, keys = torch.randn(2, attention.num_heads, n, dim), torch.randn(2, groups, m, dim)
            if edges:
                queries, keys = on_edges(attention.query_quantizer, queries), on_edges(attention.key_quantizer, keys)
            probs = torch.randn(2, attention.num_heads, n, m).mul(3).softmax(-1)
            found += attention_products(path, attention, module, queries, keys, probs)
    return found


def on_edges(quantizer: nn.Module, like: Tensor) -> Tensor:
    """Halves of steps from below to above the grid, in the shape of `like`."""
    own: Any = quantizer
    scale, offset = own.grid()
    low, high = (float(limit.max()) for limit in own.quant_range())
    halves = torch.randint(int(2 * low) - 6, int(2 * high) + 6, like.shape)
    return halves * scale / 2 + (0.0 if offset is None else offset)


def without_warnings(name: str, **kwargs: Any) -> nn.Module:
    """`timm.create_model`, silent."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return timm.create_model(name, **kwargs)
