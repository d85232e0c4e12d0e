"""Which grid the output of an activation function asks for, told from the function itself.

A symmetric grid spends half of its levels below zero. What comes out of GELU, QuickGELU, SiLU, hard-swish, Mish or ELU
has a short negative side and a long positive one, so most of these levels would lie where no value is; LSQ+ (Bhalgat
et al. 2020) lays an unsigned grid with an offset there. No list of names can be complete, so the function is asked for
its values:

    negative side without a bound              signed grid                  identity, LeakyReLU, log-sigmoid
    negative side as long as the positive one  signed grid                  tanh, softsign, sine
    bounded below, longer above                unsigned grid with offset    all GELUs, SiLU, hard-swish, Mish, ELU, SELU
    never negative                             unsigned grid                ReLU, ReLU6, sigmoid, softplus

A function with parameters or buffers of its own (PReLU) may have another range after training: it keeps the signed
grid.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qvit.plan.spec import TensorSpec

#: Where a function is looked at closely, and how far out it is followed.
NEAR, FAR = 20.0, 1e4
POINTS = 4001


def activation_spec(activation: object) -> TensorSpec:
    """The default spec of the output of an element-wise function; signed where nothing better is known.

    A lower bound is one that inputs down to -1e4 do not pass by much: the least value there is at most twice as far
    from zero as that of inputs within ±20.

    Args:
        activation: A module or function of a tensor. Its hooks are not called.
    """
    if isinstance(activation, nn.Module):
        if [*activation.parameters(), *activation.buffers()]:
            return TensorSpec()
        activation = activation.forward
    if not callable(activation):
        return TensorSpec()
    close = torch.linspace(-NEAR, NEAR, POINTS, device="cpu", dtype=torch.float32)
    distances = torch.logspace(1, 4, 61, device="cpu", dtype=torch.float32)
    near, far = _values(activation, close), _values(activation, torch.cat([-distances, distances]))
    if near is None or far is None:
        return TensorSpec()
    bound, least, most = float(near.min()), float(far.min()), float(torch.maximum(near.max(), far.max()))
    if min(bound, least) >= 0:
        return TensorSpec(signed=False)
    if least < 2 * bound or -min(bound, least) >= most:
        return TensorSpec()
    return TensorSpec(signed=False, symmetric=False)


@torch.no_grad()
def _values(activation: Callable[..., Any], x: Tensor) -> Tensor | None:
    """f(x); None if that is no finite number for each element."""
    try:
        values = activation(x.clone())  # it may work in place
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None
    if not isinstance(values, Tensor) or values.shape != x.shape or not bool(torch.isfinite(values).all()):
        return None
    return values
