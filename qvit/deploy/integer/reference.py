"""The integer form of a frozen model: every product of quantized tensors computed on their integers.

A quantized operand is x̂ = s·q + β with integers q. Where s is constant along the axis that is summed over, a product is
one of integers, with its scales multiplied in afterwards:

    Σ_k (s_x q_x + β_x)(s_w q_w + β_w) = s_x s_w·Σ q_x q_w + s_x β_w·Σ q_x + β_x·Σ ŵ

The first sum is exact: codes of at most 8 bits in 32-bit accumulators. The second vanishes for weights whose grid holds
zero, the third depends on weights alone and is part of the bias. Weights on unsigned grids are shifted to int8. The
scales of heads at the input of `proj` lie along the summed axis: the sum splits into one for each head, and so do the
blocks of columns of W_o. Scales of positions are those of rows, or for the keys of columns, of what the sums make.

    (B, N, K) × (out, K)              linear layers, the patch embedding (patches are rows), q|k|v in one
    (B, H, N, d) × (B, H, d, M)       scores and weighted values, with the scales of each head

What is not a product of integers stays as it was in training: residuals, biases, and LayerNorm, softmax and GELU, each
in float or by its integer form (`models/integer_functions.py`), the same code that training simulates. A product is
*simulated*, computed in float from quantized values, where an operand has no uniform grid (logarithmic probabilities),
more than 8 bits, a scale that varies along the summed axis (activations per channel), or stays in float, as one whose
quantizer is switched off; `report_of` says which and why.

An `Arithmetic` (`arithmetic.py`) makes codes and multiplies them. The order of operations differs from fake
quantization in one respect: scales are applied after the sum, not before, so float rounding differs by about 1e-7 of
the largest term, and not at all where scales are powers of two.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qvit.deploy.integer.arithmetic import Arithmetic, Grid, Operand
from qvit.deploy.integer.simulated import simulated_products, why_simulated
from qvit.errors import UsageError
from qvit.models.convert import Stage, stage_of
from qvit.models.families.tokens import RankedLinear, RankedSites
from qvit.models.integer_functions import functions_of, places
from qvit.models.layers import QKV, AttentionSites, QuantConv2d, QuantLinear, for_all_heads, quantizer_at, weight_parts
from qvit.quantizers import Quantizer


class IntegerLinear(nn.Module):
    """A linear layer, q|k|v projection or patch embedding on integers.

    Args:
        codes: Integers (out, K) of the weight.
        scale: (S, out): one row, or one for each of S blocks of K/S columns.
        offset: Of the weight's grid, shaped like its scale; None if the grid holds zero.
        bias: (out,) or None.
        quantizer: Of the input; that of `attn.output` for an attention's `proj`.
        arithmetic: How integers are multiplied.
        patch: Side lengths of the patches of a patch embedding, whose rows are patches; None for a linear layer.
    """

    weight_scale: Tensor
    weight_offset: Tensor | None
    weight_sum: Tensor
    bias: Tensor

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        offset: Tensor | None,
        bias: Tensor | None,
        quantizer: Quantizer,
        arithmetic: Arithmetic,
        patch: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.grid, self.arithmetic, self.patch = Grid(quantizer), arithmetic, patch
        along = quantizer.layout.num_heads if self.grid.differs_by_token else self.grid.scale.numel()
        self.segments = max(along, len(scale))
        arithmetic.prepare((self.grid,), codes)
        for index, part in enumerate(codes.chunk(self.segments, dim=1)):
            self.register_buffer(f"weight_{index}", arithmetic.weight_form(part, self.grid))
        self.register_buffer("weight_scale", scale.float())
        self.register_buffer("weight_offset", None if offset is None else offset.float())
        values = codes.double().unflatten(1, (len(scale), -1)) * scale.double().t().unsqueeze(-1)
        values = values if offset is None else values + offset.double().t().unsqueeze(-1)
        sums = values.sum((1, 2))
        self.register_buffer("weight_sum", sums.float())
        exact = codes.new_zeros(len(codes), dtype=torch.float64) if bias is None else bias.double()
        own = self.grid.offset
        self.offset_in_bias = not self.grid.differs_by_token
        if own is not None and self.offset_in_bias:
            exact = exact + own.double() * sums
        self.register_buffer("bias", exact.float())

    def forward(self, x: Tensor | Operand) -> Tensor:
        operand = x if isinstance(x, Operand) else self.arithmetic.operand(self.grid, x)
        if self.patch is None:
            return self.arithmetic.project(operand, self)
        rows, grid = patches(operand.codes, self.patch)
        y = self.arithmetic.project(replace(operand, codes=rows), self)
        return y.transpose(1, 2).unflatten(2, grid)


class RankedIntegerLinear(IntegerLinear):
    """The same for ranked tokens."""

    def forward(self, x: Tensor, rank: Tensor) -> Tensor:
        return super().forward(self.arithmetic.operand(self.grid, x, rank))


def patches(x: Tensor, size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """The patches of images (B, C, h·p, w·q) as rows (B, h·w, C·p·q), and (h, w); the rest of the images is cut off."""
    (p, q), (height, width) = size, x.shape[2:]
    grid = (height // p, width // q)
    x = x[:, :, : grid[0] * p, : grid[1] * q]
    x = x.reshape(x.shape[0], x.shape[1], grid[0], p, grid[1], q).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(x.shape[0], grid[0] * grid[1], -1), grid


class IntegerAttention:
    """The products of an attention module on integers; put before an `AttentionSites` class."""

    arithmetic: Arithmetic
    #: Which of `scores`, `weigh` and `proj` stay simulated.
    simulated: Mapping[str, str]
    #: Whether q, k, v leave their projection as codes.
    projects_codes: bool
    #: A `Grid` by name of an activation.
    grids: Any
    # Of the attention module:
    qkv: Any
    num_heads: int
    normalize_heads: Any

    def fused_projection(self, x: Tensor) -> Any:
        if not self.projects_codes:
            return super().fused_projection(x)  # type: ignore[misc]
        grids = tuple(self.grids[name] for name in QKV)
        codes, zero = self.arithmetic.project_codes(self.arithmetic.encode(self.qkv.grid, x), self.qkv, grids)
        parts = codes.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return tuple(Operand(part, own.scale, own.offset, zero) for part, own in zip(parts, grids, strict=True))

    def scores(self, q: Tensor, k: Tensor, scale: float | Tensor) -> Tensor:
        if "scores" in self.simulated:
            return super().scores(q, k, scale)  # type: ignore[misc]
        if isinstance(q, Operand) and isinstance(k, Operand):
            left, right = q, k
        else:
            left = self.arithmetic.operand(self.grids["query"], q)
            right = self.arithmetic.operand(self.grids["key"], for_all_heads(k, q.shape[1]))
        codes, own, offset = (
            t if t is None or t.dim() < 2 else t.transpose(-2, -1) for t in (right.codes, right.scale, right.offset)
        )
        return self.arithmetic.product(left, replace(right, codes=codes, scale=own, offset=offset), scale)

    def weigh(self, probs: Tensor, v: Tensor) -> Tensor:
        if "weigh" in self.simulated:
            return super().weigh(probs, v)  # type: ignore[misc]
        left = self.arithmetic.encode(self.grids["probs"], probs)
        if isinstance(v, Operand):
            return self.arithmetic.product(left, v)
        grid, v = self.grids["value"], for_all_heads(v, probs.shape[1])
        if not grid.splits_tokens:
            return self.arithmetic.product(left, self.arithmetic.encode(grid, v))
        # Prefix tokens have a scale of their own, and tokens are summed over: two products.
        prefix, (own, low) = grid.quantizer.layout.prefix_tokens, grid.quantizer.group_widths()
        first = self.arithmetic.encode_tokens(grid, v[..., :prefix, :], own)
        second = self.arithmetic.encode_tokens(grid, v[..., prefix:, :], low)
        return self.arithmetic.product(replace(left, codes=left.codes[..., :prefix]), first) + self.arithmetic.product(
            replace(left, codes=left.codes[..., prefix:]), second
        )

    def merge(self, x: Tensor) -> Any:
        """The heads' outputs as an operand of `proj`, (B, N, C)."""
        if "proj" in self.simulated:
            return super().merge(x)  # type: ignore[misc]
        x = self.normalize_heads(x)
        operand = self.arithmetic.encode(self.grids["output"], x)
        scale = operand.scale
        if scale.dim() >= 2 and not self.grids["output"].differs_by_token:
            scale = scale.flatten().unsqueeze(-1)
        return Operand(operand.codes.transpose(1, 2).flatten(2), scale, operand.offset, operand.zero)


class RankedIntegerAttention(IntegerAttention):
    """The same over ranked tokens; values of the groups, whose scales differ, are weighted apart."""

    def ranked_operand(self, name: str, x: Tensor, rank: Tensor) -> Any:
        if ("weigh" if name == "value" else "scores") in self.simulated:
            return super().ranked_operand(name, x, rank)  # type: ignore[misc]
        x, grid = for_all_heads(x, self.num_heads), self.grids[name]
        if name != "value" or not grid.splits_tokens:
            return self.arithmetic.operand(grid, x, rank)
        found, own = [], grid.quantizer.token_bit_width(x, rank)
        left = torch.ones_like(own, dtype=torch.bool)
        for width in grid.quantizer.group_widths():
            group = left & (own == width)
            operand = self.arithmetic.encode_tokens(grid, x, width)
            found.append(replace(operand, codes=operand.codes * group))
            left = left & ~group
        return found

    def weigh(self, probs: Tensor, v: Any) -> Tensor:
        if not isinstance(v, list):
            return super().weigh(probs, v)
        left, total = self.arithmetic.encode(self.grids["probs"], probs), torch.zeros((), device=probs.device)
        for right in v:
            total = total + self.arithmetic.product(left, right)
        return total


def integer_form(
    model: nn.Module, arithmetic: Arithmetic | None = None, integers: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """A copy of a frozen model that computes on integers.

    Args:
        model: A calibrated model with fixed widths.
        arithmetic: How; None for the reference.
        integers: Codes of weights by site, where they are known; they are made from the weights otherwise.

    Raises:
        UsageError: If the model is not frozen.
    """
    if stage_of(model) is not Stage.FROZEN:
        raise UsageError("integers need fixed widths: call qvit.freeze(model) after calibration or training")
    arithmetic, codes = arithmetic or Arithmetic(), integers or {}
    target = copy.deepcopy(model).eval().requires_grad_(False)
    outputs: dict[str, Quantizer | None] = {}
    for path, module in list(target.named_modules()):
        if isinstance(module, AttentionSites):
            outputs[f"{path}.proj"] = quantizer_at(module, "output")
    for path, module in list(target.named_modules()):
        if isinstance(module, (QuantLinear, QuantConv2d)):
            own = outputs[path] if path in outputs else quantizer_at(module, "input")
            if why_simulated(module, own) is None:
                target.set_submodule(path, _layer(path, module, own, arithmetic, codes))
    for path, module in list(target.named_modules()):
        if isinstance(module, AttentionSites):
            cls = _integer_class(type(module))
            new: Any = cls.__new__(cls)
            new.__dict__ = module.__dict__
            new.arithmetic = arithmetic
            new.simulated = simulated_products(module, projects=isinstance(module.proj, IntegerLinear))
            found = {name: quantizer_at(module, name) for name in (*QKV, "probs", "output")}
            known = {name: own for name, own in found.items() if own is not None}
            grids = {name: Grid(own) for name, own in known.items() if own.uniform or own.has_multiples}
            for product, names in (("scores", ("query", "key")), ("weigh", ("probs", "value"))):
                if product not in new.simulated:
                    arithmetic.prepare(tuple(grids[name] for name in names))
            if "proj" not in new.simulated:
                grids["output"] = new.proj.grid
            new.grids = nn.ModuleDict(grids)
            new.projects_codes = arithmetic.projects_codes and _can_project_codes(new)
            target.set_submodule(path, new)
    return target


def _can_project_codes(module: Any) -> bool:
    """Whether q, k, v can leave a projection on integers as codes of one type, by rounding alone."""
    layer = module.qkv if module.projects_directly else None
    if not isinstance(layer, IntegerLinear) or {"scores", "weigh"} & set(module.simulated):
        return False
    grids = [module.grids[name] for name in QKV]
    if layer.grid.differs_by_token:
        return False
    plain = all(own.quantizer.rounds_only and not own.differs_by_token and own.unit != "float32" for own in grids)
    return plain and len({own.signed for own in grids}) == 1 and layer.segments == 1 and layer.weight_offset is None


@functools.cache
def _integer_class(cls: type[nn.Module]) -> type[nn.Module]:
    own: Any = RankedIntegerAttention if issubclass(cls, RankedSites) else IntegerAttention
    return type(f"Integer{cls.__name__}", (own, cls), {})


def report_of(model: nn.Module) -> dict[str, str | None]:
    """For each product of an integer form whether it is simulated, and why: None for one of integers."""
    found: dict[str, str | None] = {}
    for path, module in model.named_modules():
        if isinstance(module, IntegerLinear):
            found[path] = None
        elif isinstance(module, (QuantLinear, QuantConv2d)):
            attention = model.get_submodule(path.rpartition(".")[0])
            inner = isinstance(attention, IntegerAttention) and path.endswith(".proj")
            own = quantizer_at(attention, "output") if inner else quantizer_at(module, "input")
            found[path] = why_simulated(module, own)
        if isinstance(module, IntegerAttention):
            found |= {f"{path}.{name}": module.simulated.get(name) for name in ("scores", "weigh")}
    return found


def arithmetic_in_words(model: nn.Module) -> str:
    """What `report_of` says, in one line, and how many functions between the products are in integers."""
    return ", ".join(filter(None, (report_in_words(report_of(model)), functions_in_words(model))))


def functions_in_words(model: nn.Module) -> str:
    """How many LayerNorms, softmaxes and GELUs of a model have an integer form; nothing if none has."""
    kinds, own = places(model), {path for path, _ in functions_of(model)}
    names = {"layernorm": "LayerNorms", "softmax": "softmaxes", "gelu": "GELUs"}
    counts = [
        (sum(kinds[path] == kind for path in own), sum(each == kind for each in kinds.values()), name)
        for kind, name in names.items()
    ]
    return ", ".join(f"{found} of {total} {name} in integers" for found, total, name in counts if own and total)


def report_in_words(report: Mapping[str, str | None]) -> str:
    """A report as `report_of` makes it, in one line."""
    reasons = [reason for reason in report.values() if reason is not None]
    if not reasons:
        return f"all {len(report)} products in integers"
    counted = ", ".join(f"{reasons.count(reason)}: {reason}" for reason in dict.fromkeys(reasons))
    return f"{len(report) - len(reasons)} of {len(report)} products in integers, {len(reasons)} simulated ({counted})"


def _layer(
    path: str, module: nn.Module, quantizer: Quantizer | None, arithmetic: Arithmetic, integers: Mapping[str, Tensor]
) -> IntegerLinear:
    """The integer form of a layer."""
    assert quantizer is not None
    layer: Any = module
    parts = [
        _weight(f"{path}.{leaf}", getattr(module, leaf + Quantizer.SUFFIX), part, integers)
        for leaf, part in weight_parts(module).items()
    ]
    codes, scale = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts], dim=1)
    offsets = [torch.zeros_like(part[1]) if part[2] is None else part[2] for part in parts]
    offset = torch.cat(offsets, dim=1) if any(part[2] is not None for part in parts) else None
    patch = tuple(layer.kernel_size) if isinstance(module, nn.Conv2d) else None
    cls = RankedIntegerLinear if isinstance(module, RankedLinear) else IntegerLinear
    return cls(codes, scale, offset, layer.bias, quantizer, arithmetic, patch)


def _weight(
    site: str, quantizer: Quantizer, weight: Tensor, integers: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Integers (out, K), scales and offsets (S, out) of a weight."""
    quantizer(weight)  # `statsq` takes its scale from the weight that it sees
    codes = integers[site].to(weight.device) if site in integers else quantizer.to_int(weight)
    scale, offset = quantizer.grid()
    if int(codes.max()) > 127:
        codes = codes.to(torch.int32) - 128
        offset = 128 * scale if offset is None else offset + 128 * scale
    blocks = (
        quantizer.layout.heads if quantizer.layout.view is not None and len(quantizer.layout.heads or ()) == 2 else None
    )

    def rows(values: Tensor) -> Tensor:
        """(S, out) from what broadcasts against the viewed weight."""
        if values.dim() == 2 and tuple(values.shape) == blocks:
            return values.expand(-1, len(weight))
        values = values.flatten()
        return values.repeat_interleave(len(weight) // len(values)).unsqueeze(0)

    return codes.reshape(len(weight), -1), rows(scale), None if offset is None else rows(offset)
