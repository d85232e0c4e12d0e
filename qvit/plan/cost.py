"""What a matmul costs: bit operations (BOPs) and weight bytes, for any widths.

    BOPs of a matmul = MACs · bits_a · bits_b          (Q-ViT section 3.3; no factor 2)

LayerNorm, softmax, GELU and residuals are not counted.

A matmul whose operands have a width per head costs the sum over its heads, each with MACs/H: the mean of products. (The
Q-ViT code multiplies two means for `proj`; the two agree for uniform widths only.) A tensor left in float counts 32
bits.

Every matmul is counted once, at the operand in the weight's place: the weight of a linear layer, `key` for q·kᵀ,
`value` for probs·v. So the rows of `CostModel.report` add up to its totals, and sites that are only the other operand
show zero.

Where the tokens of an operand form groups of different widths (`TokenWidths`), a product costs the sum over the groups,
for q·kᵀ over the pairs of groups, each with the MACs of its tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qvit.errors import UsageError
from qvit.plan.spec import Site, TokenSplit

Widths = Mapping[str, Sequence[int]]
FLOAT_BITS = 32


@dataclass(frozen=True)
class TokenWidths(Sequence[int]):
    """Widths of a tensor whose tokens form groups: a sequence of the tensor's own, those of the most important tokens.

    Attributes:
        high: The tensor's widths, one or one per head.
        split: The groups, and the widths of the others.
    """

    high: tuple[int, ...]
    split: TokenSplit

    def __len__(self) -> int:
        return len(self.high)

    def __getitem__(self, index: Any) -> Any:
        return self.high[index]


@dataclass(frozen=True)
class Matmul:
    """A product of two quantized tensors.

    Attributes:
        macs: Multiply-accumulates for one image, all heads together.
        left: Site of the activation operand.
        right: Site of the operand in the weight's place, at which the product is counted.
    """

    macs: int
    left: str
    right: str


class CostModel:
    """Costs of one model for one image.

    Args:
        sites: All sites of the model, by name.
        matmuls: All products of quantized tensors.
    """

    def __init__(self, sites: Mapping[str, Site], matmuls: Sequence[Matmul]) -> None:
        self.sites, self.matmuls = dict(sites), tuple(matmuls)
        self.macs = sum(matmul.macs for matmul in matmuls)

    def bit_operations(self, widths: Widths) -> int:
        """BOPs of integer widths: `{site: (width,) or one per head}`; exact, not in G."""
        return sum(self._matmul_cost(matmul, widths) for matmul in self.matmuls)

    def weight_bytes(self, widths: Widths) -> int:
        """Bytes of all weights, each site packed densely on its own."""
        return sum(self._site_bytes(name, widths) for name in self.sites)

    def report(self, widths: Widths, *, model: str, plan: str) -> dict[str, Any]:
        """The costs as plain data: totals, and per site the MACs, widths, BOPs and bytes counted there."""
        rows = []
        for name in self.sites:
            counted = [matmul for matmul in self.matmuls if matmul.right == name]
            own = list(widths[name])
            rows.append(
                {
                    "site": name,
                    "macs": sum(matmul.macs for matmul in counted),
                    "bit_width": own[0] if len(own) == 1 else own,
                    "bit_operations": sum(self._matmul_cost(matmul, widths) for matmul in counted),
                    "weight_bytes": self._site_bytes(name, widths),
                }
                | _token_groups(widths[name])
            )
        totals = {
            "macs": self.macs,
            "bit_operations": self.bit_operations(widths),
            "weight_bytes": self.weight_bytes(widths),
        }
        return {"model": model, "plan": plan, **totals, "sites": rows}

    def uniform(self, bits: int, *, boundary_bits: int = 8) -> dict[str, tuple[int, ...]]:
        """The same width everywhere but in the first and the last layer."""
        return {name: (bits if site.position == "block" else boundary_bits,) for name, site in self.sites.items()}

    def extreme(self, low: int = 2, high: int = 8) -> tuple[int, int]:
        """The smallest and the largest BOPs that widths from `low` to `high` can have, in all layers."""
        lowest, highest = (self.bit_operations(self.uniform(bits, boundary_bits=bits)) for bits in (low, high))
        return lowest, highest

    def pairs(self, counts: Mapping[str, int]) -> tuple[list[int], list[int], list[int]]:
        """The sum as index pairs: BOPs = Σ coefficient · width[left] · width[right] over one vector of widths.

        Args:
            counts: How many widths each site has (1 or one per head), in the order of the vector.

        Returns:
            Coefficients (MACs of one head), left indices, right indices.
        """
        start, offset = {}, 0
        for name, count in counts.items():
            start[name], offset = offset, offset + count
        coefficients, left, right = [], [], []
        for matmul in self.matmuls:
            heads, each = self._split(matmul, counts[matmul.left], counts[matmul.right])
            for head in range(heads):
                coefficients.append(each)
                left.append(start[matmul.left] + (head if counts[matmul.left] > 1 else 0))
                right.append(start[matmul.right] + (head if counts[matmul.right] > 1 else 0))
        return coefficients, left, right

    def _matmul_cost(self, matmul: Matmul, widths: Widths) -> int:
        left, right = widths[matmul.left], widths[matmul.right]
        heads, each = self._split(matmul, len(left), len(right))
        left_tokens, left_sums = self._summed(matmul.left, left)
        right_tokens, right_sums = self._summed(matmul.right, right)
        each, rest = divmod(each, left_tokens * right_tokens)
        if rest:
            raise UsageError(f"the tokens of {matmul.left} × {matmul.right} do not divide its {matmul.macs} MACs")
        return sum(each * left_sums[head % len(left)] * right_sums[head % len(right)] for head in range(heads))

    def _summed(self, name: str, own: Sequence[int]) -> tuple[int, list[int]]:
        """Tokens of a site, and the sum of their widths for each width given; 1 token where all are alike."""
        if not isinstance(own, TokenWidths):
            return 1, list(own)
        site = self.sites[name]
        return site.tokens, [own.split.total(width, site.tokens, site.layout.prefix_tokens) for width in own]

    @staticmethod
    def _split(matmul: Matmul, left: int, right: int) -> tuple[int, int]:
        heads = max(left, right)
        if min(left, right) not in (1, heads) or matmul.macs % heads:
            raise UsageError(
                f"the operands of {matmul.left} × {matmul.right} have {left} and {right} widths: "
                "give 1, or one per head"
            )
        return heads, matmul.macs // heads

    def _site_bytes(self, name: str, widths: Widths) -> int:
        site, own = self.sites[name], widths[name]
        return math.ceil(sum(site.numel // len(own) * width for width in own) / 8)


def _token_groups(own: Sequence[int]) -> dict[str, Any]:
    """The part of a report's row on token groups, where there are any."""
    return {"token_bit_width": own.split.to_json()} if isinstance(own, TokenWidths) else {}
