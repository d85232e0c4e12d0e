"""Weights on their grid such that the layer's output changes least: rounding with feedback, and scales to match.

With inputs x of second moment H = E[xᵀx], a row w of a weight that becomes ŵ costs (w - ŵ) H (w - ŵ)ᵀ at its output.
Rounding column by column, the error of each is taken back by the columns that are still free (Frantar et al., GPTQ,
ICLR 2023; Hassibi and Stork 1993):

    U = upper Cholesky factor of H⁻¹        e = (w_j - ŵ_j) / U_jj        w_k ← w_k - e·U_jk   for k > j

Columns with the largest moments come first, while there is most freedom left. What is returned is w_j as it was when
its turn came: rounded to nearest, as the quantizer does, it is ŵ_j, so nothing else has to know; and a reconstruction
that follows still sees which weights were close to another level.

A row's scale is the best of `FACTORS` times the given one by the same cost, under rounding to nearest.

Costs K³ + out·K² for a weight (out, K), once.
"""

from __future__ import annotations

import torch
from torch import Tensor

FACTORS = tuple(0.5 + 0.025 * step for step in range(33))
_COLUMNS = 64
_LEAST = 1e-20


def damped(moments: Tensor, damping: float) -> Tensor:
    """H + λ·I with λ = `damping` times the mean of the diagonal; of inputs that never change, a small one."""
    size = moments.diagonal().mean().clamp_min(_LEAST)
    return moments + damping * size * torch.eye(len(moments), dtype=moments.dtype, device=moments.device)


def output_cost(difference: Tensor, moments: Tensor) -> Tensor:
    """δ H δᵀ of every row of δ (out, K): (out,)."""
    return ((difference @ moments) * difference).sum(-1)


def round_to(weight: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Rounded to nearest on the symmetric grid; all broadcast."""
    return torch.round(torch.clamp(weight / scale, low, high)) * scale


def row_factors(weight: Tensor, scale: Tensor, low: Tensor, high: Tensor, moments: Tensor) -> Tensor:
    """What the scales of every row are best multiplied by, (out, 1); arguments as for `round_with_feedback`."""
    best, least = torch.ones_like(weight[:, :1]), output_cost(weight - round_to(weight, scale, low, high), moments)
    for factor in FACTORS:
        cost = output_cost(weight - round_to(weight, scale * factor, low, high), moments)
        best = torch.where((cost < least).unsqueeze(1), factor, best)
        least = torch.minimum(cost, least)
    return best


def round_with_feedback(weight: Tensor, scale: Tensor, low: Tensor, high: Tensor, moments: Tensor) -> Tensor:
    """A weight on its grid.

    Args:
        weight: (out, K).
        scale, low, high: Grid of every element: step, smallest and largest integer; (out, K).
        moments: H, (K, K), symmetric and positive definite.

    Returns:
        (out, K), a weight that is near its rounded values: at most half a step away inside of the grid.
    """
    order, upper = _feedback(moments)
    left = weight[:, order].clone()
    scale, low, high = (part[:, order] for part in (scale, low, high))
    for start in range(0, weight.shape[1], _COLUMNS):
        stop = min(start + _COLUMNS, weight.shape[1])
        block, own = left[:, start:stop], upper[start:stop, start:stop]
        errors = torch.empty_like(block)
        for j in range(stop - start):
            column = start + j
            rounded = round_to(block[:, j], scale[:, column], low[:, column], high[:, column])
            errors[:, j] = (block[:, j] - rounded) / own[j, j]
            block[:, j + 1 :] -= errors[:, j : j + 1] * own[j, j + 1 :]
        left[:, stop:] -= errors @ upper[start:stop, stop:]
    result = torch.empty_like(left)
    result[:, order] = left
    return result


def cost_with_feedback(moments: Tensor) -> Tensor:
    """The expected cost of a row that is rounded with feedback, for errors of rounding of mean square 1: Σ_j 1/U_jj².

    Rounded to nearest, it is the trace of H (Chee et al., QuIP, NeurIPS 2023, theorem 1, where it is tr(D)).
    """
    _, upper = _feedback(moments)
    return upper.diagonal().square().reciprocal().sum()


def _feedback(moments: Tensor) -> tuple[Tensor, Tensor]:
    """The order of the columns, and U in that order."""
    order = moments.diagonal().argsort(descending=True)
    factor = torch.linalg.cholesky(moments[order][:, order])
    return order, torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)
