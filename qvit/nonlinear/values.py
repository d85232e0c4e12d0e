"""Integer forms as layers call them: float values in and out, the integer form's values forward, float gradients back.

Forward, x is rounded to fixed point (half to even, clamped to the range of `base.py`), the form computes, and its codes
times a power of two are the values: exact in float32. Backward, the gradient is that of the float function at x,
straight through the integers. What follows, such as a quantizer, sees numbers of the grid of the form.

To a compiler a form is one operator: inlined, its hundred operations on integers would be computed again wherever their
result is read, which takes a compiler minutes for each layer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from qvit.functional import straight_through
from qvit.nonlinear.base import INPUT_BITS, LARGEST, OPERATIONS, OUTPUT_BITS, Form, affine

#: Elements that are computed at a time on a CPU.
_ELEMENTS = 1 << 15


def softmax(form: Form, scores: Float[Tensor, "... M"]) -> Float[Tensor, "... M"]:
    """Probabilities of scores, over the last axis; masked scores may be -inf."""

    def values(scores: Tensor) -> Tensor:
        return form(fixed("softmax", scores)) * 2.0 ** -OUTPUT_BITS["softmax"]

    return _through(lambda: scores.softmax(-1), partial(_by_rows, values), scores)


def gelu(form: Form, x: Float[Tensor, "..."], approximate: str = "none") -> Float[Tensor, "..."]:
    """GELU; `approximate` is of the float function whose gradient is taken, as in `F.gelu`."""

    def values(x: Tensor) -> Tensor:
        return form(fixed("gelu", x)) * 2.0 ** -OUTPUT_BITS["gelu"]

    return _through(lambda: F.gelu(x, approximate=approximate), partial(_by_rows, values), x)


def layer_norm(
    form: Form, x: Float[Tensor, "... C"], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Float[Tensor, "... C"]:
    """LayerNorm over the last axis; `eps` is of the float function."""

    def values(x: Tensor) -> Tensor:
        codes, unit = affine(form(fixed("layernorm", x)), weight, bias)
        return codes * unit

    return _through(lambda: F.layer_norm(x, x.shape[-1:], weight, bias, eps), values, x)


@torch.library.custom_op("qvit::integer_form", mutates_args=())
def one_operator(codes: Tensor, operation: str, name: str) -> Tensor:
    """A form of an operation as an operator of PyTorch, codes in and out."""
    return OPERATIONS[operation][name](codes)


@one_operator.register_fake
def _(codes: Tensor, operation: str, name: str) -> Tensor:
    return torch.empty_like(codes)


def fixed(operation: str, x: Float[Tensor, "..."]) -> Tensor:
    """x in the fixed point of an operation's input: round(x·2^f), clamped, int64."""
    most = LARGEST[operation]
    return (x.detach().float() * 2.0 ** INPUT_BITS[operation]).round().clamp(-most, most).long()


def _by_rows(values: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """values(x), on so many rows at a time that what lies between stays in the cache of a CPU."""
    rows = max(1, _ELEMENTS // x.shape[-1])
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.numel() <= rows * x.shape[-1]:
        return values(x)
    found = torch.empty(x.shape, dtype=torch.float32).flatten(0, -2)
    for own, part in zip(found.split(rows), x.flatten(0, -2).split(rows), strict=True):
        own.copy_(values(part))
    return found.view(x.shape)


def _through(exact: Callable[[], Tensor], values: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The values, with the gradient of the exact function; NaN where x is NaN, which no integer can say."""
    with torch.no_grad():
        found = torch.where(x.isnan(), x, values(x).to(x.dtype))
    if not torch.is_grad_enabled():
        return found
    float_values = exact()
    return straight_through(float_values, found.to(float_values.dtype))
