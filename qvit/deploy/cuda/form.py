"""From the integer form of a model (`deploy/integer/`) to one that runs in the kernels of `operators.py`.

Module by module, what the kernels take is replaced:

    IntegerLinear       CudaLinear: weights packed, scales multiplied out once; codes or float in, either out
    attention           scores, softmax and weighted values in one kernel; q, k, v leave their projection as codes
    Mlp                 fc1 → activation → codes → fc2
    a ViT's block       LayerNorm → codes → projection → attention → proj + LayerScale + residual; the MLP likewise

What they do not take (groups of tokens with widths of their own, weights on grids without zero, attention that is
computed otherwise) stays as the engine `torch` computes it, and what is simulated stays simulated, but for logarithmic
probabilities of at most 4 bits, which are integers here. Sums are those of the reference; LayerNorm, softmax and
activations are in float32, with last digits of their own.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qvit.deploy.cuda.operators import (
    ACTIVATIONS,
    LOG_BITS,
    LONGEST,
    NUMBERS,
    Codes,
    Target,
    attention,
    linear,
    normalize,
    pack,
)
from qvit.deploy.integer.arithmetic import Grid, Operand
from qvit.deploy.integer.reference import (
    IntegerAttention,
    IntegerLinear,
    RankedIntegerAttention,
    RankedIntegerLinear,
    patches,
)
from qvit.models.layers import QKV, AttentionSites, for_all_heads, quantizer_at
from qvit.models.network import activation_name, is_plain_block, is_plain_mlp, norm_kind
from qvit.quantizers import Quantizer


def zero_of(grid: Grid) -> int:
    """What stored codes are less than codes, so that they fit int8."""
    return 128 if not grid.signed and grid.largest > 127 else 0


def target_of(grid: Grid) -> Target:
    """Where a kernel lays values of this grid."""
    return Target(grid.scale, grid.offset, grid.low, grid.high, zero_of(grid))


class CudaLinear(nn.Module):
    """A linear layer, q|k|v projection or patch embedding; `forward` takes floats, or integers on its grid.

    Args:
        layer: With the arithmetic of the engine `torch`, whose weights are (K, out) in any type.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor
    correction: Tensor | None

    def __init__(self, layer: IntegerLinear) -> None:
        super().__init__()
        self.grid, self.patch, self.segments = layer.grid, layer.patch, layer.segments
        parts = [getattr(layer, f"weight_{index}").t() for index in range(self.segments)]
        codes = torch.stack(parts, dim=1).to(torch.int8)
        self.packed = bool(codes.min() >= -8 and codes.max() <= 7)
        self.zero, own = zero_of(self.grid), self.grid.scale.reshape(-1, 1)
        self.register_buffer("weight", pack(codes) if self.packed else codes.contiguous())
        self.register_buffer("scale", (own * layer.weight_scale).expand(self.segments, -1).contiguous())
        self.register_buffer("bias", layer.bias.clone())
        sums = codes.sum(2, dtype=torch.int32).t().contiguous()
        self.register_buffer("correction", self.zero * sums if self.zero else None)

    @staticmethod
    def takes(layer: nn.Module) -> bool:
        """Whether a layer has a form for the kernels."""
        if not isinstance(layer, IntegerLinear) or isinstance(layer, RankedIntegerLinear):
            return False
        length = sum(getattr(layer, f"weight_{index}").shape[0] for index in range(layer.segments))
        return layer.weight_offset is None and not layer.grid.splits_tokens and length <= LONGEST

    def encode(self, x: Tensor) -> Codes:
        """The codes of its input."""
        return encode(self.grid, x)

    def forward(self, x: Any, **epilogue: Any) -> Tensor:
        """The output (..., out) in float32, or what the `epilogue` makes of it: arguments of `operators.linear`."""
        if isinstance(x, Operand):
            codes = Codes((x.codes - (x.zero + self.zero)).to(torch.int8), self.zero)
        else:
            codes = x if isinstance(x, Codes) else self.encode(x)
        stored, grid = (codes.stored, None) if self.patch is None else patches(codes.stored, self.patch)
        codes = Codes(stored.contiguous(), codes.zero)
        about = {"correction": self.correction, "packed": self.packed}
        y = linear(codes, self.weight, self.scale, self.bias, **about, **epilogue)
        return y if grid is None else y.transpose(1, 2).unflatten(2, grid)


def encode(grid: Grid, x: Tensor) -> Codes:
    """Codes of a tensor whose widths are those of its heads, made by plain operations."""
    x, zero = grid.quantizer.rectify(x).float(), zero_of(grid)
    x = (x if grid.offset is None else x - grid.offset) / grid.scale
    x = torch.minimum(torch.maximum(x, grid.low), grid.high).round()
    return Codes((x - zero if zero else x).to(torch.int8).contiguous(), zero)


class CudaAttention(IntegerAttention):
    """Attention in one kernel; put before an integer attention class."""

    #: Codes per factor of two of logarithmic probabilities, 0 for a uniform grid.
    log: int
    #: The grid on which q, k, v leave their projection as codes; None where they leave it as floats.
    heads_grid: _Numbers | None
    _table: tuple[Any, Tensor] | None
    proj: Any

    def fused_projection(self, x: Any) -> Any:
        if self.heads_grid is None:
            return AttentionSites.fused_projection(self, x)  # type: ignore[arg-type]
        target = self.heads_grid.target()
        codes = self.qkv(x, target=target)
        parts = codes.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return tuple(Codes(part, target.zero) for part in parts)

    def attend(
        self, q: Any, k: Any, v: Any, scale: float | Tensor, bias: Tensor | None, dropout: nn.Module
    ) -> Tensor | Codes:
        if not isinstance(q, Codes):
            every = [for_all_heads(x, q.shape[1]) for x in (q, k, v)]
            q, k, v = (encode(self.grids[name], x) for name, x in zip(QKV, every, strict=True))
        heads, queries, dim = q.stored.shape[1:]
        target = target_of(self.grids["output"]) if self._gives_codes() else None
        if bias is not None:
            shape = (len(bias) if bias.dim() == 4 else 1, heads, queries, k.stored.shape[2])
            bias = bias.float().expand(shape).contiguous()
        out = attention(
            q, k, v, self._numbers(scale, heads, dim, target), bias, probs_zero=self._probs_zero(), log=self.log,
            offsets=[self.grids[name].offset is not None for name in QKV], zero=None if target is None else target.zero,
            has_offset=target is not None and target.offset is not None,
        )  # fmt: skip
        if target is not None:
            return Codes(out, target.zero)
        return out.unflatten(2, (heads, -1)).transpose(1, 2)

    def merge(self, x: Any) -> Any:
        if isinstance(x, Codes):
            return x
        if not isinstance(self.proj, CudaLinear):
            return super().merge(x)
        codes = self.proj.encode(self.normalize_heads(x))
        return replace(codes, stored=codes.stored.transpose(1, 2).flatten(2))

    def project(self, x: Any, **epilogue: Any) -> Tensor:
        return self.proj(self.merge(x), **epilogue)

    @property
    def takes_epilogue(self) -> bool:
        """Whether its projection is a kernel, which can add a residual."""
        return isinstance(self.proj, CudaLinear)

    def _gives_codes(self) -> bool:
        plain = isinstance(self.proj, CudaLinear) and self._head_norm() is None  # type: ignore[attr-defined]
        return plain and self.grids["output"].quantizer.rounds_only

    def _probs_zero(self) -> int:
        return 0 if self.log else zero_of(self.grids["probs"])

    def _numbers(self, factor: float | Tensor, heads: int, dim: int, target: Target | None) -> Tensor:
        """Scales, offsets and limits of each head, (H, NUMBERS); kept while the factor is a number.

        0 s_q·f·s_k    1 s_q    2 β_k·f    3 s_k    4 β_q·f    5 β_q·β_k·f·d    6 s_p    7 largest code of p
        8 s_p·s_v    9 β_v    10 scale, 11 offset, 12 and 13 limits of the output
        """
        device = self.grids["query"].scale.device
        kept = self._table
        if kept is not None and not isinstance(factor, Tensor) and kept[0] == (factor, device):
            return kept[1]
        q, k, v = (self.grids[name] for name in QKV)
        step, high = self._of_probs()
        none = torch.zeros((), device=device)
        own = factor.flatten() if isinstance(factor, Tensor) else factor
        s_q, s_k, s_v = (_flat(x.scale) for x in (q, k, v))
        b_q, b_k, b_v = (none if x.offset is None else _flat(x.offset) for x in (q, k, v))
        columns = [s_q * own * s_k, s_q, b_k * own, s_k, b_q * own, b_q * b_k * (own * dim)]
        columns += [step, high, step * s_v, b_v]
        if target is not None:
            offset = none if target.offset is None else target.offset
            columns += [_flat(x) for x in (target.scale, offset, target.low, target.high)]
        columns += [none] * (NUMBERS - len(columns))
        table = torch.stack([x.float().expand(heads) for x in columns], dim=1).contiguous()
        if not isinstance(factor, Tensor):
            self._table = ((factor, device), table)
        return table

    def _of_probs(self) -> tuple[Tensor, Tensor]:
        own = quantizer_at(self, "probs")  # type: ignore[arg-type]
        assert own is not None
        return _flat(own.grid()[0]), _flat(own.quant_range()[1])


def _flat(x: Tensor) -> Tensor:
    return x.flatten() if x.numel() > 1 else x.reshape(())


def _takes_attention(module: nn.Module) -> bool:
    """Whether the kernel computes this attention."""
    if not isinstance(module, IntegerAttention) or isinstance(module, RankedIntegerAttention):
        return False
    own: Any = module
    base: Any = type(module).__bases__[1]
    methods = ("attend", "attend_and_tell", "scores", "weigh", "merge", "project", "split", "fused_projection")
    if any(getattr(base, name) is not getattr(AttentionSites, name) for name in methods):
        return False
    if not own.attends or "scores" in own.simulated or not all(name in own.grids for name in QKV):
        return False
    probs, grids = quantizer_at(module, "probs"), [own.grids[name] for name in QKV]
    value = own.grids["value"]
    weighs = "weigh" not in own.simulated or (
        _log_steps(probs) > 0
        and value.quantizer.enabled
        and value.largest <= 255
        and value.scale.numel() in (1, own.num_heads)
    )
    split = any(grid.splits_tokens for grid in grids) or (probs is not None and probs.spec.token_bit_width is not None)
    return weighs and not split and probs is not None and probs.grid()[1] is None


def _log_steps(probs: Quantizer | None) -> int:
    """Codes per factor of two, of a logarithmic grid that is a sum of two tensors of int8; else 0."""
    if probs is None or not probs.enabled or max(probs.spec.widths) > LOG_BITS:
        return 0
    steps = getattr(probs, "STEPS", 0)
    return steps if steps in (1, 2) else 0


def _cuda_attention(module: Any) -> nn.Module:
    cls = _cuda_class(type(module))
    new: Any = cls.__new__(cls)
    new.__dict__ = module.__dict__
    new.log = 0 if "weigh" not in module.simulated else _log_steps(quantizer_at(module, "probs"))
    new._table = None
    new.heads_grid = _heads_grid(new)
    return new


@functools.cache
def _cuda_class(cls: type[nn.Module]) -> type[nn.Module]:
    return type(cls.__name__.replace("Integer", "Cuda", 1), (CudaAttention, cls), {})


def _heads_grid(module: Any) -> _Numbers | None:
    """The grids of q, k, v side by side, where rounding alone lays what `qkv` gives on them."""
    layer = module.qkv if module.projects_directly else None
    grids = [module.grids[name] for name in QKV]
    if not isinstance(layer, CudaLinear) or not all(grid.quantizer.rounds_only for grid in grids):
        return None
    targets = [target_of(grid).for_channels(len(layer.weight) // 3) for grid in grids]
    if len({target.zero for target in targets}) > 1:
        return None
    scale, low, high = (torch.cat([getattr(target, name) for target in targets]) for name in ("scale", "low", "high"))
    offset = None
    if any(target.offset is not None for target in targets):
        offset = torch.cat([torch.zeros_like(own.scale) if own.offset is None else own.offset for own in targets])
    return _Numbers(Target(scale, offset, low, high, targets[0].zero))


class CudaMlp(nn.Module):
    """fc1 → activation → codes → fc2."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.fc1, self.fc2, self.activation = mlp.fc1, mlp.fc2, activation_name(mlp.act)
        own = target_of(mlp.fc2.grid).for_channels(len(mlp.fc1.weight))
        self.hidden = _Numbers(own)

    @staticmethod
    def takes(module: nn.Module) -> bool:
        """Whether a module is such an MLP."""
        if not is_plain_mlp(module):
            return False
        own: Any = module
        known = activation_name(own.act) in ACTIVATIONS
        return known and isinstance(own.fc1, CudaLinear) and _takes_codes(own.fc2)

    def forward(self, x: Any, **epilogue: Any) -> Tensor:
        target = self.hidden.target()
        codes = self.fc1(x, activation=self.activation, target=target)
        return self.fc2(Codes(codes, target.zero), **epilogue)


class CudaBlock(nn.Module):
    """A plain block of a ViT; the residual stream is float32."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = block.norm1, block.attn, block.norm2, block.mlp
        self.ls1, self.ls2 = block.ls1, block.ls2

    @staticmethod
    def takes(module: nn.Module) -> bool:
        """Whether a module is such a block, all of it replaced already."""
        if not is_plain_block(module):
            return False
        own: Any = module
        norms = norm_kind(own.norm1) is not None and norm_kind(own.norm2) is not None
        attention = isinstance(own.attn, CudaAttention) and _takes_codes(own.attn.qkv) and own.attn.takes_epilogue
        return norms and attention and isinstance(own.mlp, CudaMlp) and _takes_codes(own.mlp.fc1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.float().contiguous()
        attn: Any = self.attn
        q, k, v = attn.fused_projection(_normalized(self.norm1, attn.qkv, x))
        out = attn.attend(attn.q_norm(q), attn.k_norm(k), v, attn.scale, None, attn.attn_drop)
        x = attn.project(out, residual=x, gain=getattr(self.ls1, "gamma", None))
        hidden = _normalized(self.norm2, self.mlp.fc1, x)
        return self.mlp(hidden, residual=x, gain=getattr(self.ls2, "gamma", None))


class _Numbers(nn.Module):
    """A target as buffers, so that it follows its module to a device."""

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.zero = target.zero
        for name in ("scale", "offset", "low", "high"):
            self.register_buffer(name, getattr(target, name))

    def target(self) -> Target:
        """The numbers where they are now."""
        own: Any = self
        return Target(own.scale, own.offset, own.low, own.high, self.zero)


def _takes_codes(layer: nn.Module) -> bool:
    """Whether a kernel before a layer can lay its input on the layer's grid."""
    if not isinstance(layer, CudaLinear):
        return False
    return layer.patch is None and layer.grid.scale.numel() == 1 and layer.grid.quantizer.rounds_only


def _normalized(norm: Any, layer: Any, x: Tensor) -> Codes:
    rms = norm_kind(norm) == "rms"
    shift = getattr(norm, "bias", None)
    return normalize(x, norm.weight, shift, norm.eps, target_of(layer.grid), rms=rms)


def cuda_form(form: nn.Module) -> nn.Module:
    """An integer form with the arithmetic of the engine `torch`, its modules replaced where kernels take them."""
    steps: tuple[tuple[Any, Any], ...] = (
        (CudaLinear.takes, CudaLinear),
        (_takes_attention, _cuda_attention),
        (CudaMlp.takes, CudaMlp),
        (CudaBlock.takes, CudaBlock),
    )
    for takes, make in steps:
        modules: list[tuple[str, Any]] = list(form.named_modules())
        for path, module in modules:
            if takes(module):
                form.set_submodule(path, make(module))
    return form


def attentions_taken(form: nn.Module) -> dict[str, None]:
    """The products of attention that kernels compute on integers, as keys of a report."""
    paths = [path for path, module in form.named_modules() if isinstance(module, CudaAttention)]
    return {f"{path}.{name}": None for path in paths for name in ("scores", "weigh")}


def kernels_in_words(form: nn.Module) -> str:
    """How many modules the kernels compute, and what is left."""
    modules = list(form.modules())
    counts = [sum(isinstance(module, kind) for module in modules) for kind in (CudaLinear, CudaAttention)]
    left = [type(module).__name__ for module in modules if isinstance(module, (IntegerLinear, IntegerAttention))
            and not isinstance(module, CudaAttention)]  # fmt: skip
    rest = f"; {len(left)} modules as in engine 'torch'" if left else ""
    return f"by int8 kernels for {counts[0]} layers and {counts[1]} attentions{rest}"
