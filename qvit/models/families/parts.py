"""What families are made of: the parts of a model, and a family that is nothing but the list of them.

A `Part` is a layer or an attention module with all that qvit has to know: its sites, its products, and the classes that
take its modules' place. A `Family` names the parts of a model once; sites, costs and conversion all follow from
that one list, so they cannot disagree. So does the refusal: a layer with weights that is in no part raises, with its
path. The few that stay in float on purpose are listed by the family (`float_modules`), with the reason beside them.
A norm whose channels come first raises, too: such a model computes nothing, in float neither.

MACs, for N tokens of which each attends to M (M = N without windows), C input channels and H·d channels of all heads:

    projection to q, k or v     N·C·(H·d)
    q·kᵀ, and probs·v           N·M·(H·d)
    output projection           N·(H·d)·C

An element-wise product (LayerScale, the gate of SwiGLU, rotation by position) is no matmul and not counted, like
LayerNorm and softmax. What depends on parameters alone, like a position bias, is the same for every image: it does not
scale with the input and is not counted either.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

import torch
from timm.layers import GluMlp, Mlp, PatchEmbed, SwiGLU
from torch import nn

from qvit.errors import UsageError
from qvit.models.families.activations import activation_spec
from qvit.models.families.tokens import RankedLinear, RankedMlp, RankedQKV
from qvit.models.layers import (
    QKV,
    QuantConv2d,
    QuantLinear,
    QuantQKV,
    Specs,
    add_quantizers,
    adopt,
    attention_sites,
    linear_sites,
    separate_attention_sites,
)
from qvit.plan.cost import Matmul
from qvit.plan.spec import Position, Site, TensorSpec


@dataclass(frozen=True)
class Part:
    """A part of a model whose operands are quantized.

    Attributes:
        sites: Its tensors, in the order of the computation.
        matmuls: Its products, with MACs for one image.
        replacements: Paths of its modules, the innermost first, and the class that each becomes.
    """

    sites: list[Site]
    matmuls: list[Matmul]
    replacements: list[tuple[str, type[nn.Module]]]


class Family:
    """Base class of families, which are defined by the parts of their models."""

    #: What a refusal says is supported.
    supported: str
    #: Modules that are known not to be supported, and why: what a refusal of a layer within one says.
    refused: Mapping[type[nn.Module], str] = MappingProxyType({})

    def parts(self, model: nn.Module) -> Iterator[Part]:
        """The parts of a float or quantized model, in the order of the computation."""
        raise NotImplementedError

    def float_modules(self, model: nn.Module) -> Collection[nn.Module]:
        """Layers with weights that stay in float on purpose."""
        return ()

    def sites(self, model: nn.Module) -> list[Site]:
        """All tensors that get quantized, in the order of the computation."""
        return [site for part in self._all_parts(model) for site in part.sites]

    def matmuls(self, model: nn.Module) -> list[Matmul]:
        """All products of quantized tensors, with MACs for one image of the model's configured size."""
        return [matmul for part in self._all_parts(model) for matmul in part.matmuls]

    def swap(self, model: nn.Module, sites: dict[str, Site], specs: Specs) -> None:
        """Replaces float modules by quantized ones, in place; parameters are shared, keys are kept."""
        for part in self._all_parts(model):
            for path, cls in part.replacements:
                quantized = adopt(cls, model.get_submodule(path))
                add_quantizers(quantized, path, sites, specs)
                model.set_submodule(path, quantized)

    def _all_parts(self, model: nn.Module) -> list[Part]:
        """All parts. Raises UsageError if a layer with weights is in none of them, or a norm takes channels first."""
        parts = list(self.parts(model))
        known = {path for part in parts for path, _ in part.replacements}
        exempt = set(self.float_modules(model))
        for path, module in model.named_modules():
            if isinstance(module, _WITH_WEIGHTS) and module not in exempt and not (path in known and is_plain(module)):
                raise UsageError(
                    f"this {type(model).__name__} has a layer that qvit does not quantize yet: '{path}' "
                    f"({type(module).__name__}){self._why_refused(model, path)}. Supported are {self.supported}"
                )
            if not channels_last(module):
                raise UsageError(
                    f"this {type(model).__name__} has a norm of another axis than the channels of tokens, which come "
                    f"last: '{path}' ({type(module).__name__}). Supported are norms such as LayerNorm and RmsNorm, and "
                    f"{self.supported}"
                )
        return parts

    def _why_refused(self, model: nn.Module, path: str) -> str:
        """What there is to say of the module that a layer is in."""
        while path := path.rpartition(".")[0]:
            for kind, reason in self.refused.items():
                if isinstance(model.get_submodule(path), kind):
                    return f" of a {kind.__name__}, {reason}"
        return ""


#: Layers that multiply by weights. A parameter's outer and element-wise products are no such layer.
_WITH_WEIGHTS = (nn.Linear, nn.Bilinear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)
#: Norms of axis 1, or of groups of it.
_CHANNELS_FIRST = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm, nn.LocalResponseNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)
#: Feed-forward modules of timm that are sequences of linear layers, with at most an element-wise gate between.
MLPS = (Mlp, RankedMlp, GluMlp, SwiGLU)


def channels_last(module: nn.Module) -> bool:
    """False for a norm that cannot be applied to tokens (B, N, C); anything else than a norm can."""
    if isinstance(module, _CHANNELS_FIRST):
        return False
    shape = getattr(module, "normalized_shape", None)
    if not isinstance(shape, tuple):
        return True
    weight = next(module.parameters(), torch.zeros(()))  # LayerNorm2d is a LayerNorm: only trying tells them apart
    tokens = weight.new_zeros(2, 3, *shape)
    try:
        with torch.no_grad():
            return len(shape) == 1 and module.forward(tokens).shape == tokens.shape
    except (RuntimeError, ValueError, IndexError, TypeError):
        return False


def is_plain(module: nn.Module) -> bool:
    """Whether the computation of a layer is known; a subclass of a float one may compute something else."""
    return type(module) in (nn.Linear, nn.Conv2d, QuantLinear, QuantConv2d, QuantQKV, RankedLinear, RankedQKV)


def linear_part(
    path: str,
    module: nn.Linear | nn.Conv2d,
    tokens: int,
    position: Position = "block",
    inputs: TensorSpec | None = None,
) -> Part:
    """A linear layer or convolution that is applied at `tokens` places; `inputs` is its input's default spec."""
    return Part(
        linear_sites(path, module, TensorSpec(), position, inputs),
        [Matmul(tokens * module.weight.numel(), f"{path}.input", f"{path}.weight")],
        [(path, QuantConv2d if isinstance(module, nn.Conv2d) else QuantLinear)],
    )


def patch_embedding(model: nn.Module) -> Iterator[Part]:
    """The convolution of timm's `PatchEmbed`; nothing if the model embeds its patches in another way."""
    embed: Any = getattr(model, "patch_embed", None)
    if type(embed) is PatchEmbed:
        yield linear_part("patch_embed.proj", cast("nn.Conv2d", embed.proj), embed.num_patches, "first")


def classifiers(model: nn.Module, tokens: int, *paths: str) -> Iterator[Part]:
    """The linear classifiers at `paths`; they see one token, or all `tokens` of a model that does not pool."""
    seen = 1 if getattr(model, "global_pool", "token") else tokens
    found = dict(model.named_modules())
    for path in paths:
        head = found.get(path)
        if isinstance(head, nn.Linear):
            yield linear_part(path, head, seen, "last")


def mlp_parts(path: str, mlp: nn.Module, tokens: int) -> Iterator[Part]:
    """The linear layers of a feed-forward module, in the order of its definition.

    The input of the second one has the grid that the activation function asks for, where that function's output arrives
    there unchanged: neither multiplied by a gate nor normalised.
    """
    for name, module in mlp.named_children():
        if isinstance(module, nn.Linear):
            behind = name == "fc2" and is_direct(mlp)
            inputs = activation_spec(getattr(mlp, "act", None)) if behind else None
            yield linear_part(f"{path}.{name}", module, tokens, inputs=inputs)


def is_direct(mlp: nn.Module) -> bool:
    """Whether a feed-forward module is `fc1`, an activation and `fc2`, with no gate and no norm between."""
    first, second = getattr(mlp, "fc1", None), getattr(mlp, "fc2", None)
    return (
        isinstance(first, nn.Linear)
        and isinstance(second, nn.Linear)
        and first.out_features == second.in_features
        and isinstance(getattr(mlp, "norm", None), nn.Identity)
    )


def attention_part(path: str, attention: nn.Module, cls: type[nn.Module], tokens: int, keys: int | None = None) -> Part:
    """An attention module with a fused `qkv`.

    Args:
        path: Its path.
        attention: The module, with `qkv`, `proj` and `num_heads`.
        cls: The class that takes its place.
        tokens: How many tokens pass through it, padding included.
        keys: How many tokens each of them attends to; all by default.
    """
    module: Any = attention
    width = module.qkv.out_features // 3
    projection = tokens * module.qkv.in_features * width
    return Part(
        attention_sites(path, module.qkv, module.proj, module.num_heads),
        [Matmul(projection, f"{path}.qkv.input", f"{path}.qkv.{part}_weight") for part in QKV]
        + head_matmuls(path, module.proj, width, tokens, tokens if keys is None else keys),
        [(f"{path}.qkv", QuantQKV), (f"{path}.proj", QuantLinear), (path, cls)],
    )


def separate_attention_part(
    path: str,
    attention: nn.Module,
    cls: type[nn.Module],
    projections: tuple[str, str, str],
    queries: int,
    keys: int,
    shared_heads: int | None = None,
) -> Part:
    """An attention module with a linear layer for each of q, k, v.

    Args:
        path: Its path.
        attention: The module, with `proj`, `num_heads` and the projections.
        cls: The class that takes its place.
        projections: Names of the layers for q, k, v.
        queries: How many tokens attend.
        keys: How many tokens are attended to.
        shared_heads: The number of heads of keys and values, where several heads of the queries share one.
    """
    module: Any = attention
    layers: Mapping[str, nn.Linear] = {name: module.get_submodule(name) for name in projections}
    others = shared_heads or module.num_heads
    heads = {"query": module.num_heads, "key": others, "value": others}
    counts = zip(layers.items(), (queries, keys, keys), strict=True)
    products = [
        Matmul(tokens * linear.weight.numel(), f"{path}.{name}.input", f"{path}.{name}.weight")
        for (name, linear), tokens in counts
    ]
    width = layers[projections[0]].out_features
    return Part(
        separate_attention_sites(path, layers, module.proj, heads),
        products + head_matmuls(path, module.proj, width, queries, keys),
        [(f"{path}.{name}", QuantLinear) for name in (*projections, "proj")] + [(path, cls)],
    )


def head_matmuls(path: str, proj: nn.Linear, width: int, queries: int, keys: int) -> list[Matmul]:
    """The products that follow the projections."""
    return [
        Matmul(queries * keys * width, f"{path}.query", f"{path}.key"),
        Matmul(queries * keys * width, f"{path}.probs", f"{path}.value"),
        Matmul(queries * proj.weight.numel(), f"{path}.output", f"{path}.proj.weight"),
    ]
