"""Quantized layers: float modules whose operands pass through quantizers, every one of them a submodule with a name.

A quantized class is a subclass of the float class whose `forward` alone differs. `adopt` turns a float module into one
without copying a parameter or calling a constructor, so all float keys, attributes and hooks survive, and quantizers
are only added. A site that the plan leaves in float has no quantizer.

Fused `qkv` (rows ordered q|k|v, then head, then head_dim) is three weights to Q-ViT: `QuantQKV` holds a quantizer for
each third, with heads as blocks of output rows. The heads of `proj` (W_o) are blocks of input columns: its layout views
the weight as (out, H, d).

`AttentionSites` is what attention classes of all families share: quantizers for q, k, v (after bias and norm, before
the 1/sqrt(d) factor), for the attention probabilities (after dropout, unsigned), and for the heads' outputs before they
are concatenated (Q-ViT eq. 9-10).

Shapes: B batch, N tokens, C channels, H heads, d head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qvit.quantizers import Quantizer, create_quantizer
from qvit.spec import Layout, PerHead, Site, TensorSpec

M = TypeVar("M", bound=nn.Module)
Specs = Mapping[str, TensorSpec | None]
QKV = ("query", "key", "value")


def adopt(cls: type[M], module: nn.Module) -> M:
    """A `cls` that shares everything with `module`, a direct instance of one of its base classes.

    Everything: parameters, buffers, submodules, attributes.
    """
    new = cls.__new__(cls)
    new.__dict__ = {key: value.copy() if isinstance(value, dict) else value for key, value in module.__dict__.items()}
    return new


def add_quantizers(module: nn.Module, prefix: str, sites: Mapping[str, Site], specs: Specs) -> None:
    """Gives `module`, whose path is `prefix`, a quantizer for each of its own sites.

    A site is its own if it is called `prefix.name`; one that `specs` leaves in float gets none.
    """
    for name, site in sites.items():
        path, _, leaf = name.rpartition(".")
        spec = specs[name]
        if path == prefix and spec is not None:
            quantizer = create_quantizer(spec, site.layout)
            reference = next(module.parameters())
            module.add_module(leaf + Quantizer.SUFFIX, quantizer.to(reference.device))


def apply_quantizer(module: nn.Module, leaf: str, x: Tensor) -> Tensor:
    """`x` through the quantizer of site `leaf`, or `x` itself where the site stays in float."""
    quantizer = module._modules.get(leaf + Quantizer.SUFFIX)
    return x if quantizer is None else quantizer(x)


class QuantLinear(nn.Linear):
    """`nn.Linear` with sites `input` and `weight`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(apply_quantizer(self, "input", input), apply_quantizer(self, "weight", self.weight), self.bias)


class QuantConv2d(nn.Conv2d):
    """`nn.Conv2d` with sites `input` and `weight`."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(
            apply_quantizer(self, "input", input), apply_quantizer(self, "weight", self.weight), self.bias
        )


class QuantQKV(nn.Linear):
    """A fused q|k|v projection with sites `input`, `query_weight`, `key_weight`, `value_weight`."""

    def forward(self, input: Tensor) -> Tensor:
        thirds = zip(QKV, self.weight.chunk(3), strict=True)
        weight = torch.cat([apply_quantizer(self, f"{name}_weight", part) for name, part in thirds])
        return F.linear(apply_quantizer(self, "input", input), weight, self.bias)


class AttentionSites(nn.Module):
    """The quantized part of multi-head attention; an attention class of a family inherits it beside its float class."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, dropout: nn.Module) -> Tensor:
        """softmax(q̂·k̂ᵀ·scale + bias)·v̂ with quantized operands.

        Args:
            q, k, v: (B, H, N, d), not scaled.
            scale: 1/sqrt(d), applied in float after the product.
            bias: Added to the scores in float, broadcasting to (B, H, N, N): masks, relative position bias. None for
                none.
            dropout: The module's attention dropout.

        Returns:
            (B, H, N, d), not yet quantized.
        """
        q, k, v = apply_quantizer(self, "query", q), apply_quantizer(self, "key", k), apply_quantizer(self, "value", v)
        scores = (q * scale) @ k.transpose(-2, -1)
        probs = dropout((scores if bias is None else scores + bias).softmax(dim=-1))
        return apply_quantizer(self, "probs", probs) @ v


def linear_sites(
    name: str, module: nn.Linear | nn.Conv2d, spec: TensorSpec, position: Literal["first", "block", "last"] = "block"
) -> list[Site]:
    """The input and the weight of a plain linear or convolution.

    Args:
        name: Path of the module.
        module: A linear layer, or a convolution (whose channels are axis 1 of its input).
        spec: Default for both tensors.
        position: See `Site`.
    """
    trailing = (1,) * (module.weight.dim() - 1)
    inputs = module.weight.shape[1]
    activation = Layout(channels=(inputs, 1, 1) if isinstance(module, nn.Conv2d) else (inputs,))
    weight = Layout(channels=(module.weight.shape[0], *trailing))
    return [
        Site(f"{name}.input", "activation", activation, spec, position),
        Site(f"{name}.weight", "weight", weight, spec, position, module.weight.numel()),
    ]


def attention_sites(name: str, qkv: nn.Linear, proj: nn.Linear, heads: int) -> list[Site]:
    """The sites of an attention module with fused `qkv` and `proj`, in the order of the computation."""
    inputs, outputs = qkv.in_features, proj.out_features
    dim = qkv.out_features // (3 * heads)
    per_head = TensorSpec(granularity=PerHead())
    rows = Layout(view=(heads, dim, inputs), heads=(heads, 1, 1), channels=(heads, dim, 1))
    columns = Layout(view=(outputs, heads, dim), heads=(heads, 1), channels=(outputs, 1, 1))
    tokens = Layout(heads=(heads, 1, 1), channels=(heads, 1, dim))
    sites = [Site(f"{name}.qkv.input", "activation", Layout(channels=(inputs,)), TensorSpec())]
    sites += [Site(f"{name}.qkv.{part}_weight", "weight", rows, per_head, numel=heads * dim * inputs) for part in QKV]
    sites += [Site(f"{name}.{part}", "activation", tokens, per_head) for part in QKV]
    sites += [
        Site(
            f"{name}.probs", "activation", Layout(heads=(heads, 1, 1)), TensorSpec(granularity=PerHead(), signed=False)
        ),
        Site(f"{name}.output", "activation", tokens, per_head),
        Site(f"{name}.proj.weight", "weight", columns, per_head, numel=proj.weight.numel()),
    ]
    return sites
