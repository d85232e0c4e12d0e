"""What is decided about one tensor, and where that tensor lies: frozen data, no behaviour.

A `TensorSpec` is the decision: widths, grid, granularity of the scale. A `Site` is the place: the dotted name of a
tensor that gets quantized (the path of its quantizer without the suffix: `blocks.3.attn.query` ↔
`blocks.3.attn.query_quantizer`) and the `Layout` of its axes.

Granularity is about *scales*, the number of widths is its own matter: Q-ViT gives each attention head its own width,
and either its own set of scales (the paper, eq. 9: `PerHead`) or one set for all heads (its public code: `PerTensor`).
Both are a shape that broadcasts against the tensor:

    tensor                              view          scales per head   scales per channel   widths of a per-head site
    activations   (batch, tokens, C)    as it is      -                 (C,)                 -
    q, k, v       (batch, H, N, d)      as it is      (H, 1, 1)         (H, 1, d)            (H, 1, 1)
    W_q           (H·d, C)              (H, d, C)     (H, 1, 1)         (H, d, 1)            (H, 1, 1)
    W_o           (C, H·d)              (C, H, d)     (H, 1)            (C, 1, 1)            (H, 1)

Activations whose tokens are a fixed number N of rows or columns of a product can have a scale per position (FIMA-Q):
(N, 1) of inputs, (H, N, 1) of q, k and the probabilities. It is the same for all images, and never along a summed axis.

Heads are blocks of output rows in W_q (W_k, W_v), and blocks of input columns in W_o.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from qvit.errors import UsageError, nearest, shown
from qvit.plan.options import checked, declares, option_names, written

#: No model has more, and no file may ask for more: blocks, attention heads of a block, tensors that are quantized.
MOST_BLOCKS, MOST_HEADS, MOST_SITES = 256, 1024, 20_000


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor: scale shape `()`."""


@dataclass(frozen=True)
class PerChannel:
    """One scale per channel: output channels of a weight, the last axis of an activation."""


@dataclass(frozen=True)
class PerHead:
    """One scale per attention head; allowed where the site has heads."""


@dataclass(frozen=True)
class PerPosition:
    """One scale per position of a token, in each head where the site has heads; allowed where their number is fixed."""


Granularity = PerTensor | PerChannel | PerHead | PerPosition
GRANULARITIES: dict[str, Granularity] = {
    "per-tensor": PerTensor(),
    "per-channel": PerChannel(),
    "per-head": PerHead(),
    "per-position": PerPosition(),
}


@dataclass(frozen=True)
class Layout:
    """The axes of a site.

    Attributes:
        channels: Shape of one scale per channel; None if the site has no channel axis (attention probabilities).
        heads: Shape of one number per head; None if the site has no heads.
        view: Shape the tensor is viewed as before it is quantized, so that its heads are an axis; None for the tensor
            as it is.
        prefix_tokens: How many of its tokens are class, distillation or register tokens: they come first.
        positions: Shape of one number per position of a token; None where their number is not fixed, or they are summed
            over.
    """

    channels: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    view: tuple[int, ...] | None = None
    prefix_tokens: int = 0
    positions: tuple[int, ...] | None = None

    @property
    def num_heads(self) -> int:
        return max(self.heads) if self.heads else 1


@dataclass(frozen=True)
class TokenSplit:
    """Groups of tokens with widths of their own, told apart for every image anew (PMQ, Xiao et al. 2023).

    Attributes:
        share: Share of the tokens, class and other prefix tokens included, that have the tensor's `bit_width`: the most
            important ones. Rounded down to whole tokens. 0: prefix tokens alone have it, so nothing is ranked.
        low: Width of the others.
        high: Width of the important ones that are no prefix tokens; None: the tensor's.
    """

    share: float
    low: int
    high: int | None = None

    def total(self, width: int, tokens: int, prefix: int = 0) -> int:
        """The sum of the widths of `tokens`, the first `prefix` of which have `width`."""
        important = self.important(tokens, prefix)
        high = width if self.high is None else self.high
        return prefix * width + (important - prefix) * high + (tokens - important) * self.low

    def to_json(self) -> dict[str, Any]:
        """Plain data; a width that is not there is left out."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}

    @property
    def ranks(self) -> bool:
        """Whether the groups follow the image."""
        return self.share > 0

    def important(self, tokens: int, prefix: int = 0) -> int:
        """How many of `tokens` have the higher width; the first `prefix` always do."""
        return max(prefix, math.floor(self.share * tokens + 1e-9))


@dataclass(frozen=True)
class TensorSpec:
    """How one tensor is quantized.

    Attributes:
        bit_width: One width, or one per head.
        bit_width_range: Smallest and largest width that may be learned or allocated, both included.
        learn_bit_width: Whether the width is a parameter that training moves (Q-ViT, searching stage).
        signed: Two's complement grid, or 0 … 2^b - 1.
        symmetric: False adds a learned offset (LSQ+); the grid is then unsigned.
        granularity: What shares a scale.
        options: What the quantizer takes beside these, by name, as far as it differs from the defaults (`options.py`).
        quantizer: Registered name of the quantizer.
        token_bit_width: A lower width for the less important tokens; None: all tokens alike. Needs switchable scales.
    """

    bit_width: int | tuple[int, ...] = 8
    bit_width_range: tuple[int, int] = (2, 8)
    learn_bit_width: bool = False
    signed: bool = True
    symmetric: bool = True
    granularity: Granularity = field(default_factory=PerTensor)
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    quantizer: str = "lsq"
    token_bit_width: TokenSplit | None = None

    def __post_init__(self) -> None:
        limits = self.bit_width_range
        if not isinstance(limits, tuple) or len(limits) != 2 or not 1 <= _whole(limits[0]) <= _whole(limits[1]) <= 16:
            raise UsageError(
                f"bit_width_range {shown(limits)} must be two integers between 1 and 16, the smaller first"
            )
        if not isinstance(self.granularity, (PerTensor, PerChannel, PerHead, PerPosition)):
            raise UsageError(f"granularity {shown(self.granularity)} must be one of {', '.join(GRANULARITIES)}")
        if not self.widths:
            raise UsageError("bit_width is empty: give one width, or one per head")
        if len(self.widths) > MOST_HEADS:
            raise UsageError(f"bit_width has {len(self.widths):,} widths; a tensor has at most {MOST_HEADS:,} heads")
        low, high = limits
        for width in self.widths:
            if not 1 <= _whole(width) <= 16:
                raise UsageError(f"bit_width {shown(width)} must be an integer between 1 and 16")
            if self.learn_bit_width and not low <= width <= high:
                raise UsageError(
                    f"bit_width {width} lies outside of the range {low} to {high} in which it is to be learned"
                )
            if width == 1 and self.signed:
                raise UsageError("bit_width 1 on a signed grid has no positive level; use an unsigned grid or 2 bits")
        if not self.symmetric and self.signed:
            raise UsageError("an asymmetric spec has an unsigned grid and an offset: set signed=False")
        if self.token_bit_width is not None:
            self._check_tokens(self.token_bit_width)
        object.__setattr__(self, "options", checked(self))

    def _check_tokens(self, split: TokenSplit) -> None:
        if not isinstance(split, TokenSplit):
            raise UsageError(f'token_bit_width must be {{"share": 0.5, "low": 3}} or null, not {shown(split)}')
        low, share, high = split.low, split.share, split.high
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise UsageError(f"the share of important tokens must lie between 0 and 1, unlike {shown(share)}")
        if not self.bit_width_range[0] <= _whole(low) <= min(self.widths):
            raise UsageError(
                f"the width of less important tokens must be an integer from {self.bit_width_range[0]} to the "
                f"tensor's width, {min(self.widths)}, unlike {shown(low)}"
            )
        if high is not None and not (split.ranks and low <= _whole(high) <= min(self.widths)):
            raise UsageError(
                f"the width of important tokens beside that of prefix tokens must be an integer from that of the "
                f"others, {low}, to the tensor's, {min(self.widths)}, unlike {shown(high)}, and needs a share above 0"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths as a tuple, of length 1 where one width serves the whole tensor."""
        return self.bit_width if isinstance(self.bit_width, tuple) else (self.bit_width,)

    @property
    def ranks_tokens(self) -> bool:
        """Whether it has groups of tokens that follow the image."""
        return self.token_bit_width is not None and self.token_bit_width.ranks

    def changed(self, changes: Mapping[str, Any]) -> TensorSpec:
        """A copy with `changes`, given as in JSON: lists for tuples, granularity by name.

        The quantizer's options are keys like any other. Unknown keys are refused with the nearest name.
        """
        values: dict[str, Any] = {}
        options = dict(self.options)
        for key, value in changes.items():
            if key not in _FIELDS:
                if not declares(key):
                    known = spec_keys()
                    listed = ", ".join(sorted(known))
                    raise UsageError(f"unknown key {shown(key)} in a tensor spec{nearest(key, known)} (keys: {listed})")
                options[key] = value
                continue
            if key == "granularity" and isinstance(value, str):
                if value not in GRANULARITIES:
                    close = nearest(value, GRANULARITIES)
                    raise UsageError(f"unknown granularity {shown(value)}{close} ({', '.join(GRANULARITIES)})")
                value = GRANULARITIES[value]
            if key == "token_bit_width" and isinstance(value, Mapping):
                if set(value) - {"high"} != {"share", "low"}:
                    raise UsageError(
                        f'token_bit_width must be {{"share": 0.5, "low": 3}} or null, not {shown(dict(value))}'
                    )
                value = TokenSplit(**value)
            expected = _PLAIN_TYPES.get(key)
            if expected is not None and not isinstance(value, expected):
                raise UsageError(f"'{key}' of a tensor spec must be {expected.__name__}, not {shown(value)}")
            values[key] = tuple(value) if isinstance(value, list) else value
        return dataclasses.replace(self, options=options, **values)

    def to_json(self) -> dict[str, Any]:
        """Plain data, the inverse of `changed` on a default spec."""
        values: dict[str, Any] = {}
        for name in (own.name for own in dataclasses.fields(self)):
            value = getattr(self, name)
            if name == "options":
                values |= written(value)
            elif name == "granularity":
                values[name] = next(key for key, known in GRANULARITIES.items() if known == value)
            elif name != "token_bit_width":
                values[name] = list(value) if isinstance(value, tuple) else value
            elif value is not None:  # left out otherwise: plans without token groups read as they always did
                values[name] = value.to_json()
        return values


def _whole(value: Any) -> int:
    """A whole number; 0, which is no width, for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


_FIELDS = {field.name for field in dataclasses.fields(TensorSpec)} - {"options"}
_PLAIN_TYPES: dict[str, type] = {"learn_bit_width": bool, "signed": bool, "symmetric": bool, "quantizer": str}


def spec_keys() -> set[str]:
    """The keys that a spec can have in JSON: fields, and options of quantizers."""
    return _FIELDS | set(option_names())


Position = Literal["first", "block", "last"]


@dataclass(frozen=True)
class Site:
    """A tensor that gets quantized.

    Attributes:
        name: Dotted path, unique in the model.
        role: Weights are quantized from their values, activations are observed.
        position: `first` and `last` are the patch embedding and the classifier, which presets keep at 8 bits.
        layout: Axes.
        default: The spec before any rule: grid and granularity that the tensor's range asks for.
        numel: Number of elements, for weights; 0 for activations.
        tokens: How many tokens are ranked together where two groups of them may differ in width; 0 where they may not.
    """

    name: str
    role: Literal["weight", "activation"]
    layout: Layout
    default: TensorSpec
    position: Position = "block"
    numel: int = 0
    tokens: int = 0
