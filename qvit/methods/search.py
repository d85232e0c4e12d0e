"""Bit operations as a function of real-valued widths: what a search is penalized by.

The widths of all sites are one vector, a matmul is a pair of indices and an integer coefficient (`CostModel.pairs`), so
the whole sum is five operations in a training step.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qvit.plan.cost import CostModel


class DifferentiableCost(torch.nn.Module):
    """BOPs as a function of one vector of real widths, for a penalty.

    ∂BOPs/∂b_i = Σ MACs · b_other over the matmuls of i.

    Args:
        cost: The model's costs.
        counts: See `CostModel.pairs`.
    """

    coefficients: Tensor
    left: Tensor
    right: Tensor

    def __init__(self, cost: CostModel, counts: Mapping[str, int]) -> None:
        super().__init__()
        coefficients, left, right = cost.pairs(counts)
        self.register_buffer("coefficients", torch.tensor(coefficients, dtype=torch.float64), persistent=False)
        self.register_buffer("left", torch.tensor(left), persistent=False)
        self.register_buffer("right", torch.tensor(right), persistent=False)

    def forward(self, widths: Tensor) -> Tensor:
        """BOPs, a float64 scalar: exact for integer widths below 2^53."""
        wide = widths.double()
        return (self.coefficients * wide[self.left] * wide[self.right]).sum()
