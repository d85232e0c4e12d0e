"""What of a frozen model cannot be computed on integers, and why: the products that stay simulated.

An operand needs a uniform grid of at most 8 bits, with a scale that is constant along the axis that is summed over: per
tensor, per head, per position of a token, or per row of a weight. A layer that has none of that keeps its fake
quantization.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qvit.errors import UsageError
from qvit.models.integer_functions import functions_of
from qvit.models.layers import QuantConv2d, quantizer_at, weight_parts
from qvit.plan.spec import PerPosition
from qvit.quantizers import Quantizer, quantizers_of

WIDEST = 8


def why_simulated(module: nn.Module, quantizer: Quantizer | None) -> str | None:
    """Why a layer cannot be computed on integers; None if it can."""
    weights = [(quantizer_at(module, leaf), part) for leaf, part in weight_parts(module).items()]
    if isinstance(module, QuantConv2d) and not _is_patches(module):
        return "a convolution of overlapping or padded patches"
    for each, weight in ((quantizer, None), *weights):
        if (reason := _no_integers(each, weight)) is not None:
            return reason
    assert quantizer is not None
    scale = quantizer.grid()[0]
    heads = quantizer.layout.num_heads if quantizer.layout.heads is not None else 1
    by_position = isinstance(quantizer.spec.granularity, PerPosition)
    if quantizer.spec.token_bit_width is not None or (by_position and heads == 1):
        return None
    if scale.numel() not in (1, heads) and not by_position:
        return "activations with a scale per channel"
    if scale.numel() > 1 and quantizer.grid()[1] is not None:
        return "activations with an offset per head"
    return None


def require_codes(model: nn.Module) -> None:
    """Raises UsageError unless all activations are multiplied as their codes, which have at most 8 bits."""
    for site, quantizer in quantizers_of(model):
        if quantizer.has_multiples:
            raise UsageError(
                f"'{site}' has a twin grid, whose products take integers of more than 8 bits: such a model runs with "
                "the engines 'reference' and 'torch' alone"
            )


def require_float_functions(model: nn.Module, what: str) -> None:
    """Raises UsageError if LayerNorm, softmax or GELU have integer forms."""
    for path, function in functions_of(model):
        raise UsageError(
            f"{what} does not run '{path}' by the integer form '{function.form}': a model with integer forms of "
            "LayerNorm, softmax or GELU runs with the engines 'native', 'reference' and 'torch' alone"
        )


def _no_integers(quantizer: Quantizer | None, weight: Tensor | None = None) -> str | None:
    if quantizer is None:
        return "an operand in float"
    if not quantizer.enabled:  # a packed model's weights lie on their grids already
        if weight is None or not torch.equal(quantizer.from_int(quantizer.to_int(weight)), weight):
            return "an operand in float"
    if quantizer.has_multiples and weight is not None:
        return "a weight on a twin grid"
    if not (quantizer.uniform or quantizer.has_multiples):
        return "a logarithmic grid"
    if max(quantizer.spec.widths) > WIDEST:
        return f"more than {WIDEST} bits"
    return None


def simulated_products(attention: nn.Module, *, projects: bool) -> dict[str, str]:
    """Which of `scores`, `weigh` and `proj` of an attention module stay simulated, and why.

    Args:
        attention: The module.
        projects: Whether its `proj` is computed on integers.
    """
    found: dict[str, str] = {}
    for product, names in (("scores", ("query", "key")), ("weigh", ("probs", "value"))):
        for name in names:
            own = quantizer_at(attention, name)
            reason = _no_integers(own)
            if reason is None and own is not None:
                reason = _varying(own, name, getattr(attention, "num_heads", 1))
            if reason is not None:
                found[product] = reason
                break
    if not projects:
        found["proj"] = "its layer"
    return found


def _varying(quantizer: Quantizer, name: str, heads: int) -> str | None:
    """Why scales are in the way of a product of heads."""
    scale, offset = quantizer.grid()
    if scale.dim() > 1 and scale.shape[-1] > 1 and name in ("query", "key"):
        return "activations with a scale per channel"
    if scale.numel() > 1 and scale.shape[0] != heads:
        return "groups of heads with scales of their own"
    if quantizer.spec.token_bit_width is not None and offset is not None:
        return "token groups with an offset"
    return None


def _is_patches(conv: nn.Conv2d) -> bool:
    return (
        tuple(conv.stride) == tuple(conv.kernel_size)
        and conv.padding in (0, (0, 0), "valid")
        and conv.groups == 1
        and tuple(conv.dilation) == (1, 1)
    )
