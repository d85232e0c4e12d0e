"""Quantized layers: float modules whose operands pass through quantizers, every one of them a submodule with a name.

A quantized class is a subclass of the float class whose `forward` alone differs. `adopt` turns a float module into one
without copying a parameter or calling a constructor, so all float keys, attributes and hooks survive, and quantizers
are only added. A site that the plan leaves in float has no quantizer.

Fused `qkv` (rows ordered q|k|v, then head, then head_dim) is three weights to Q-ViT: `QuantQKV` holds a quantizer for
each third, with heads as blocks of output rows. The heads of `proj` (W_o) are blocks of input columns: its layout views
the weight as (out, H, d).

`AttentionSites` is what attention classes of all families share: quantizers for q, k, v (after bias, norm and rotation,
before the 1/sqrt(d) factor), for the attention probabilities (after dropout, unsigned), and for the heads' outputs
before they are concatenated (Q-ViT eq. 9-10).

Shapes: B batch (of images, or of windows), N tokens, C channels, H heads, d head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qvit.kernels import gpu_norm
from qvit.kernels.attention import quantized_attention, split_heads
from qvit.kernels.fake_quantize import Learned, fuses
from qvit.kernels.gpu_norm import Norm
from qvit.kernels.linear import Codes, quantized_linear
from qvit.plan.spec import Layout, PerHead, Position, Site, TensorSpec
from qvit.quantizers import Quantizer, create_quantizer
from qvit.quantizers.base import has_hooks

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


def quantizer_at(module: nn.Module, leaf: str) -> Quantizer | None:
    """The quantizer of the module's site `leaf`; None where the plan leaves it in float."""
    found = module._modules.get(leaf + Quantizer.SUFFIX)
    return found if isinstance(found, Quantizer) else None


def apply_quantizer(module: nn.Module, leaf: str, x: Tensor) -> Tensor:
    """`x` through the quantizer of site `leaf`, or `x` itself where the site stays in float."""
    quantizer = module._modules.get(leaf + Quantizer.SUFFIX)
    return x if quantizer is None else quantizer(x)


def fused(module: nn.Module, leaf: str, x: Tensor) -> Learned | None:
    """The quantizer of site `leaf` for a fused form of its product with `x`; None where there is no such form."""
    quantizer = quantizer_at(module, leaf)
    return None if quantizer is None else quantizer.fused(x.numel(), x)


def weight_of(model: nn.Module, site: str) -> Tensor:
    """The weight that the quantizer of `site` quantizes; a third of it, as a view, for a part of a fused projection."""
    path, _, leaf = site.rpartition(".")
    return weight_parts(model.get_submodule(path))[leaf]


def weight_parts(module: nn.Module) -> dict[str, Tensor]:
    """What of a layer's weight has a quantizer of its own, by site: thirds of a fused projection's rows, or all."""
    weight = module.get_parameter("weight")
    if not isinstance(module, QuantQKV):
        return {"weight": weight}
    return {f"{name}_weight": part for name, part in zip(QKV, weight.chunk(3), strict=True)}


@dataclass(frozen=True)
class Unnormed:
    """The input of a norm that is left to the layer behind it (`norms.py`).

    Attributes:
        x: (..., C).
        norm: What is to be done to it, for a kernel.
        apply: The norm itself.
    """

    x: Tensor
    norm: Norm
    apply: Callable[[Tensor], Tensor]


class QuantLinear(nn.Linear):
    """`nn.Linear` with sites `input` and `weight`."""

    #: Whether products run on integers in training, too, where they can.
    integer_forward: bool = False

    def forward(self, input: Tensor | Unnormed) -> Tensor:
        if isinstance(input, Unnormed):
            own = quantizer_at(self, "input")
            learned = None if own is None else own.fused(input.x.numel())
            if learned is not None and gpu_norm.handles(input.x, input.norm, learned):
                return quantized_linear(input.x, self.quantized_weight(), self.bias, learned, norm=input.norm)
            input = input.apply(input.x)
        weight, learned = self.quantized_weight(), fused(self, "input", input)
        if learned is None:
            return F.linear(apply_quantizer(self, "input", input), weight, self.bias)
        own: Any = quantizer_at(self, "input")
        on_integers = self.integer_forward and has_one_grid(learned) and own.fits_int8
        return quantized_linear(input, weight, self.bias, learned, self.codes() if on_integers else None)

    def quantized_weight(self) -> Tensor:
        return apply_quantizer(self, "weight", self.weight)

    def codes(self) -> Codes | None:
        """The integers of the weight, with one scale for each row; None where scales differ within a row."""
        found: list[Codes] = []
        for leaf, part in weight_parts(self).items():
            quantizer = quantizer_at(self, leaf)
            own = None if quantizer is None else quantizer.row_codes(part)
            if own is None:
                return None
            found.append(own)
        codes, scales = zip(*found, strict=True)
        return (codes[0], scales[0]) if len(found) == 1 else (torch.cat(codes), torch.cat(scales))


class QuantQKV(QuantLinear):
    """A fused q|k|v projection with sites `input`, `query_weight`, `key_weight`, `value_weight`."""

    def quantized_weight(self) -> Tensor:
        return torch.cat([apply_quantizer(self, leaf, part) for leaf, part in weight_parts(self).items()])


class QuantConv2d(nn.Conv2d):
    """`nn.Conv2d` with sites `input` and `weight`."""

    def forward(self, input: Tensor) -> Tensor:
        weight = apply_quantizer(self, "weight", self.weight)
        learned = fused(self, "input", input)
        if learned is None or not has_one_grid(learned) or not self._sees_patches(input):
            return self._conv_forward(apply_quantizer(self, "input", input), weight, self.bias)
        (height, width), (rows, columns) = self.kernel_size, self._count_patches(input)
        patches = input.unflatten(3, (columns, width)).unflatten(2, (rows, height)).permute(0, 2, 4, 1, 3, 5)
        tokens = quantized_linear(patches.flatten(3).flatten(1, 2), weight.flatten(1), self.bias, learned)
        return tokens.transpose(1, 2).unflatten(2, (rows, columns))

    def _sees_patches(self, x: Tensor) -> bool:
        """Whether this is a linear layer on the patches of an image, which is faster, its backward by far."""
        plain = self.kernel_size == self.stride and self.groups == 1 and self.padding in ((0, 0), 0, "valid")
        if x.dim() != 4 or not plain or self.dilation != (1, 1):
            return False
        (height, width), (rows, columns) = self.kernel_size, self._count_patches(x)
        return (rows * height, columns * width) == tuple(x.shape[2:])

    def _count_patches(self, x: Tensor) -> tuple[int, int]:
        return x.shape[2] // self.kernel_size[0], x.shape[3] // self.kernel_size[1]


def has_one_grid(learned: Learned) -> bool:
    """Whether all elements share a scale and a width."""
    return learned.scales.shape[:-1].numel() == learned.bit_width.numel() == 1


class AttentionSites(nn.Module):
    """The quantized part of multi-head attention; an attention class of a family inherits it beside its float class."""

    #: Whether `forward` leaves scores, softmax and weighted values to `attend`.
    attends: bool = True

    @property
    def projects_directly(self) -> bool:
        """Whether q, k, v reach their quantizers as `qkv` gives them, without norm, rotation or another bias."""
        return False

    def fused_projection(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of `self.qkv`, each (B, H, N, d), from tokens (B, N, C)."""
        module: Any = self
        return self.split(module.qkv(x))

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v, each (B, H, N, d), of a projection (B, N, 3·H·d).

        BEiT, EVA and Swin v2 keep the biases of q and v beside the projection (k's is a buffer of zeros): they are
        added here.
        """
        module: Any = self
        if getattr(self, "q_bias", None) is not None:
            qkv = qkv + torch.cat((module.q_bias, module.k_bias, module.v_bias))
        if fuses(qkv):
            return split_heads(qkv, module.num_heads)
        q, k, v = qkv.unflatten(2, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | Tensor, bias: Tensor | None, dropout: nn.Module
    ) -> Tensor:
        """softmax(q̂·k̂ᵀ·scale + bias)·v̂ with quantized operands.

        Args:
            q: (B, H, N, d), not scaled.
            k, v: (B, G, M, d); G is H, or a divisor of it where G groups of heads share keys and values.
            scale: 1/sqrt(d), or one number per head (H, 1, 1); applied in float.
            bias: Added to the scores in float, broadcasting to (B, H, N, M): masks, relative position bias. None for
                none.
            dropout: The module's attention dropout.

        Returns:
            (B, H, N, d), not yet quantized.
        """
        learned = self._fused(q, k, v, scale, dropout)
        if learned is not None:
            return quantized_attention(q, k, v, scale, bias, learned)
        return self.attend_and_tell(q, k, v, scale, bias, dropout)[0]

    def _fused(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | Tensor, dropout: nn.Module
    ) -> list[Learned | None] | None:
        """The quantizers of q, k, v and the probabilities, for the fused form; None where the plain one has to run."""
        own = type(self)
        drops = dropout.training and getattr(dropout, "p", 0.0) > 0
        changed = own.scores is not AttentionSites.scores or own.weigh is not AttentionSites.weigh
        learns_factor = isinstance(scale, Tensor) and scale.requires_grad
        if drops or changed or learns_factor or k.shape[1] != q.shape[1] or self._integer_softmax():
            return None
        counts = {"query": q.numel(), "key": k.numel(), "value": v.numel()}
        counts["probs"] = q.shape[:-1].numel() * k.shape[2]
        learned: list[Learned | None] = []
        for name, count in counts.items():
            quantizer = quantizer_at(self, name)
            learned.append(None if quantizer is None else quantizer.fused(count))
            if quantizer is not None and learned[-1] is None:
                return None
        return learned if any(one is not None for one in learned) else None

    def attend_and_tell(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | Tensor, bias: Tensor | None, dropout: nn.Module
    ) -> tuple[Tensor, Tensor]:
        """What `attend` returns, and the attention probabilities before they are quantized, (B, H, N, M)."""
        scores = self.scores(q, k, scale)
        probs = dropout(self.probabilities(scores if bias is None else scores + bias))
        return self.weigh(probs, v), probs

    def probabilities(self, scores: Tensor) -> Tensor:
        """The softmax of scores, by the module's integer form where it has one (`integer_functions.py`)."""
        own = self._integer_softmax()
        return scores.softmax(dim=-1) if own is None else own(scores)

    def _integer_softmax(self) -> nn.Module | None:
        own = self._modules.get("softmax")
        return None if type(own) is nn.Softmax else own  # Swin has one, and does not use it here

    def scores(self, q: Tensor, k: Tensor, scale: float | Tensor) -> Tensor:
        """q̂·k̂ᵀ·scale, (B, H, N, M); arguments as for `attend`."""
        q, k = self.operand("query", q), self.operand("key", k)
        return (q * scale) @ for_all_heads(k, q.shape[1]).transpose(-2, -1)

    def weigh(self, probs: Tensor, v: Tensor) -> Tensor:
        """The values' sums, weighted by the probabilities (B, H, N, M): (B, H, N, d)."""
        v = self.operand("value", v)
        return apply_quantizer(self, "probs", probs) @ for_all_heads(v, probs.shape[1])

    def operand(self, name: str, x: Tensor) -> Tensor:
        """q̂, k̂ or v̂ by the name of its site."""
        return apply_quantizer(self, name, x)

    def merge(self, x: Tensor) -> Tensor:
        """The heads' outputs (B, H, N, d), normalised if the module does so, quantized, concatenated to (B, N, C)."""
        return apply_quantizer(self, "output", self.normalize_heads(x)).transpose(1, 2).flatten(2)

    def project(self, x: Tensor) -> Tensor:
        """The module's projection of the heads' outputs (B, H, N, d), with quantized operands: (B, N, C)."""
        module: Any = self
        proj = module.proj
        plain = type(self).merge is AttentionSites.merge and type(proj) is QuantLinear and not has_hooks(proj)
        learned = fused(self, "output", x) if plain and self._head_norm() is None else None
        if learned is None or x.shape[-1] == proj.in_features:
            return proj(self.merge(x))
        return quantized_linear(x, apply_quantizer(proj, "weight", proj.weight), proj.bias, learned)

    def _head_norm(self) -> nn.Module | None:
        norm = getattr(self, "norm", None)
        return None if isinstance(norm, nn.Identity) else norm

    def normalize_heads(self, x: Tensor) -> Tensor:
        """The heads' outputs (B, H, N, d) behind the module's norm over all channels, where it has one."""
        norm = self._head_norm()
        if norm is None:
            return x
        return norm(x.transpose(1, 2).flatten(2)).unflatten(2, (x.shape[1], -1)).transpose(1, 2)


def for_all_heads(x: Tensor, heads: int) -> Tensor:
    """Keys or values (B, G, M, d) of G groups of heads, repeated to (B, heads, M, d)."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def additive_mask(attn_mask: Tensor | None, is_causal: bool, q: Tensor) -> Tensor | None:
    """The mask as something to add to the scores, with the meaning of `scaled_dot_product_attention`."""
    if is_causal:
        tokens = q.shape[-2]
        return q.new_full((tokens, tokens), float("-inf")).triu(1)
    if attn_mask is None or attn_mask.dtype != torch.bool:
        return attn_mask
    return torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, float("-inf"))


def linear_sites(
    name: str,
    module: nn.Linear | nn.Conv2d,
    spec: TensorSpec,
    position: Position = "block",
    inputs: TensorSpec | None = None,
) -> list[Site]:
    """The input and the weight of a plain linear or convolution.

    Args:
        name: Path of the module.
        module: A linear layer, or a convolution (whose channels are axis 1 of its input).
        spec: Default for both tensors.
        position: See `Site`.
        inputs: Default for the input, where its range asks for another grid than the weight's.
    """
    trailing = (1,) * (module.weight.dim() - 1)
    channels = module.weight.shape[1]
    activation = Layout(channels=(channels, 1, 1) if isinstance(module, nn.Conv2d) else (channels,))
    weight = Layout(channels=(module.weight.shape[0], *trailing))
    return [
        Site(f"{name}.input", "activation", activation, inputs or spec, position),
        Site(f"{name}.weight", "weight", weight, spec, position, module.weight.numel()),
    ]


def attention_sites(name: str, qkv: nn.Linear, proj: nn.Linear, heads: int) -> list[Site]:
    """The sites of an attention module with fused `qkv` and `proj`, in the order of the computation."""
    inputs, dim = qkv.in_features, qkv.out_features // (3 * heads)
    rows, spec = _rows(heads, dim, inputs), TensorSpec(granularity=PerHead())
    sites = [Site(f"{name}.qkv.input", "activation", Layout(channels=(inputs,)), TensorSpec())]
    sites += [Site(f"{name}.qkv.{part}_weight", "weight", rows, spec, numel=heads * dim * inputs) for part in QKV]
    return sites + head_sites(name, proj, {part: heads for part in QKV}, dim)


def separate_attention_sites(
    name: str, projections: Mapping[str, nn.Linear], proj: nn.Linear, heads: Mapping[str, int]
) -> list[Site]:
    """The sites of an attention module with a linear layer for each of q, k, v.

    Keys and values that are shared by groups of heads have one width and one scale for all groups: a product has as
    many widths as its operands' heads, and theirs are not the query's.

    Args:
        name: Path of the module.
        projections: The layers by their names in the module, in the order q, k, v.
        proj: The output projection.
        heads: The number of heads of `query`, `key` and `value`.
    """
    dim = projections[next(iter(projections))].out_features // heads["query"]
    sites = []
    for part, (leaf, linear) in zip(QKV, projections.items(), strict=True):
        own, weight = linear_sites(f"{name}.{leaf}", linear, TensorSpec())
        if heads[part] == heads["query"]:
            layout = _rows(heads[part], dim, linear.in_features)
            weight = replace(weight, layout=layout, default=TensorSpec(granularity=PerHead()))
        sites += [own, weight]
    return sites + head_sites(name, proj, heads, dim)


def _rows(heads: int, dim: int, inputs: int) -> Layout:
    """A projection to heads: blocks of output rows."""
    return Layout(view=(heads, dim, inputs), heads=(heads, 1, 1), channels=(heads, dim, 1))


def head_sites(name: str, proj: nn.Linear, heads: Mapping[str, int], dim: int) -> list[Site]:
    """What follows the projections: q, k, v, probabilities, outputs, and the blocks of input columns of `proj`."""
    count, outputs = heads["query"], proj.out_features
    spec = TensorSpec(granularity=PerHead())
    tokens = Layout(heads=(count, 1, 1), channels=(count, 1, dim))
    columns = Layout(view=(outputs, count, dim), heads=(count, 1), channels=(outputs, 1, 1))
    sites = []
    for part in QKV:
        own = heads[part] == count
        layout = tokens if own else Layout(channels=(heads[part], 1, dim))
        sites.append(Site(f"{name}.{part}", "activation", layout, spec if own else TensorSpec()))
    probs = Layout(heads=(count, 1, 1))
    return [
        *sites,
        Site(f"{name}.probs", "activation", probs, TensorSpec(granularity=PerHead(), signed=False)),
        Site(f"{name}.output", "activation", tokens, spec),
        Site(f"{name}.proj.weight", "weight", columns, spec, numel=proj.weight.numel()),
    ]
