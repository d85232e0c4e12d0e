"""What a budget is given in: bit operations, bytes of weights, or the milliseconds of a measured table.

    bit_operations    products of widths, see `plan/cost.py`; budgets as everywhere: 4bit, 21.455G, 25%
    weight_bytes      packed weights; budgets: 4bit (the uniform 4-bit model's), 2.5MB, 800kB, 25%
    milliseconds      measured on some device: the file of `qvit bench --latency-table`, by pairs of widths
                      (`latency.py`), or a table {site: {width: milliseconds}}; budgets: 4bit, 12.5ms, 25%. The heads of
                      a site share its time equally, what the table leaves out takes none

Bytes and milliseconds by site are additive: each width costs what it costs, whatever the others are. Bytes are rounded
up for every head, which is exact where a head's weights are a multiple of eight, as in all models of timm, and never
too few.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qvit.allocate.latency import Rates, is_table, rate_of, read_products
from qvit.errors import UsageError, nearest, shown
from qvit.files import read_json
from qvit.plan.budget import format_bops, parse_budget
from qvit.plan.cost import CostModel, Matmul, Widths
from qvit.plan.spec import Site

BIT_OPERATIONS, WEIGHT_BYTES, MILLISECONDS = "bit_operations", "weight_bytes", "milliseconds"
_LIMIT = re.compile(r"(?P<number>\d{1,18}(?:\.\d{1,18})?)\s*(?P<unit>bits?|gb|mb|kb|b|ms|%|)", re.IGNORECASE)
_WIDTH, _MOST = re.compile(r"[0-9]{1,2}"), 1e12
#: Sums of milliseconds in another order differ by less than this; a plan costs no more than itself.
_LAST_DIGITS = 1e-12
_SIZES = {"gb": 1e9, "mb": 1e6, "kb": 1e3, "b": 1.0}


@dataclass(frozen=True)
class Unit:
    """A kind of cost.

    Attributes:
        name: `bit_operations`, `weight_bytes` or `milliseconds`.
        latency: Milliseconds by site and width.
        products: Milliseconds by product and pair of widths.
    """

    name: str
    latency: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    products: Mapping[Matmul, Rates] = field(default_factory=dict)

    @classmethod
    def of(cls, value: Unit | str | Path | Mapping[str, Any], cost: CostModel, model: str | None = None) -> Unit:
        """A unit from its name, a latency table, or the file of one.

        Args:
            value: Which.
            cost: The model's costs.
            model: The model's name, which a measured table must have; None: it is not known.

        Raises:
            UsageError: Anything else, or another model's table.
        """
        if isinstance(value, Unit):
            return value
        if isinstance(value, Mapping):
            return cls._of_table(value, cost, model)
        if str(value) in (BIT_OPERATIONS, WEIGHT_BYTES):
            return cls(str(value))
        if not Path(value).is_file():
            raise UsageError(
                f"unit '{value}' is neither {BIT_OPERATIONS} nor {WEIGHT_BYTES} nor a file with a latency table "
                "(of `qvit bench --latency-table`, or {site: {width: milliseconds}} as JSON)"
            )
        try:
            return cls._of_table(read_json(value, "latency table"), cost, model)
        except UsageError as error:
            raise UsageError(f"{value}: {error}") from None

    @classmethod
    def _of_table(cls, data: Any, cost: CostModel, model: str | None) -> Unit:
        if is_table(data):
            return cls(MILLISECONDS, products=read_products(data, cost, model))
        return cls(MILLISECONDS, _checked_table(data, cost))

    @property
    def is_additive(self) -> bool:
        """Whether the cost is a sum over units, each by itself."""
        return self.name != BIT_OPERATIONS and not self.products

    def serves(self, site: str, width: int) -> bool:
        """Whether the cost of this width of a site is known; it is where the unit has no table of the site."""
        if self.latency and site in self.latency:
            return width in self.latency[site]
        sides = [
            max(own[matmul.right == site] for own in rates)
            for matmul, rates in self.products.items()
            if site in (matmul.left, matmul.right)
        ]
        return all(width <= most for most in sides)

    def rate(self, matmul: Matmul, left: int, right: int) -> float:
        """Milliseconds of a product, all heads together, at two widths; 0 for one that was not measured."""
        return rate_of(self.products[matmul], left, right) if matmul in self.products else 0.0

    def head_cost(self, site: Site, heads: int, width: int) -> float:
        """What one of a site's heads costs at a width; additive units alone."""
        if self.name == WEIGHT_BYTES:
            return math.ceil(site.numel // heads * width / 8)
        row = self.latency.get(site.name)
        return 0.0 if row is None else row.get(width, math.inf) / heads

    def total(self, cost: CostModel, widths: Widths) -> float:
        """The cost of a plan's widths; infinite at a width that the latency table does not have."""
        if self.name == BIT_OPERATIONS:
            return cost.bit_operations(widths)
        if self.name == WEIGHT_BYTES:
            return cost.weight_bytes(widths)
        if self.products:
            return sum(self._product_cost(matmul, widths) for matmul in cost.matmuls)
        return sum(self.head_cost(cost.sites[name], len(own), width) for name, own in widths.items() for width in own)

    def _product_cost(self, matmul: Matmul, widths: Widths) -> float:
        left, right = widths[matmul.left], widths[matmul.right]
        heads = max(len(left), len(right))
        times = (self.rate(matmul, left[head % len(left)], right[head % len(right)]) for head in range(heads))
        return sum(times) / heads

    def format(self, value: float) -> str:
        """For people: `21.455 G`, `2.500 MB`, `12.3 ms`."""
        if self.name == BIT_OPERATIONS:
            return f"{format_bops(value)} bit operations"
        if self.name == MILLISECONDS:
            return f"{value:.4g} ms"
        size = next((unit for unit in _SIZES if value >= _SIZES[unit]), "b")
        return f"{value / _SIZES[size]:.4g} {'kB' if size == 'kb' else size.upper()} of weights"

    def parse(self, budget: str | float, cost: CostModel) -> float:
        """A budget in this unit. Raises UsageError for text that is none.

        Args:
            budget: A number in this unit, or text as in the module's description.
            cost: The model's costs.
        """
        if not isinstance(budget, str):
            if isinstance(budget, bool) or not math.isfinite(budget) or budget <= 0:
                raise UsageError(f"a budget must be a positive number, not {budget!r}")
            return budget
        if self.name == BIT_OPERATIONS:
            return parse_budget(budget, cost)
        examples = "'4bit', '2.5MB', '800kB' or '25%'" if self.name == WEIGHT_BYTES else "'4bit', '12.5ms' or '25%'"
        match = _LIMIT.fullmatch(budget.strip())
        if match is None:
            raise UsageError(f"budget '{budget}' is not understood: give {examples}")
        number, suffix = float(match["number"]), match["unit"].lower()
        if suffix.startswith("bit"):
            if number != int(number) or not 1 <= number <= 16:
                raise UsageError(f"budget '{budget}': the bit-width must be an integer, such as '4bit'")
            return self._of_uniform(cost, int(number), budget)
        if suffix in ("", "%"):
            share = number / 100 if suffix else number
            if share > 1:
                raise UsageError(f"budget '{budget}' is more than the 8-bit model takes: give {examples}")
            return share * self._of_uniform(cost, 8, budget)
        if (suffix == "ms") != (self.name == MILLISECONDS):
            raise UsageError(f"budget '{budget}' does not fit the unit {self.name}: give {examples}")
        return number if suffix == "ms" else math.floor(number * _SIZES[suffix])

    def _of_uniform(self, cost: CostModel, bits: int, budget: str) -> float:
        total = self.total(cost, cost.uniform(bits))
        if math.isinf(total):
            raise UsageError(f"budget '{budget}': the latency table has no entry for {bits} (or, at the ends, 8) bits")
        return total * (1 + _LAST_DIGITS) if self.name == MILLISECONDS else total


def _checked_table(data: Any, cost: CostModel) -> dict[str, dict[int, float]]:
    if not isinstance(data, Mapping) or not data:
        raise UsageError("a latency table is an object {site: {width: milliseconds}} with at least one site")
    table: dict[str, dict[int, float]] = {}
    for site, row in data.items():
        if site not in cost.sites:
            raise UsageError(
                f"the latency table names a site that is not in this model: {shown(site)}{nearest(site, cost.sites)}"
            )
        if not isinstance(row, Mapping) or not row:
            raise UsageError(
                f"site '{site}' of the latency table must be an object {{width: milliseconds}}, not {shown(row)}"
            )
        table[site] = {}
        for width, value in row.items():
            if not _WIDTH.fullmatch(str(width)) or not 1 <= int(width) <= 32:
                raise UsageError(
                    f"site '{site}' of the latency table: width {shown(width)} must be an integer from 1 to 32"
                )
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= _MOST:
                raise UsageError(f"site '{site}' of the latency table: {shown(value)} is no number of milliseconds")
            table[site][int(width)] = float(value)
    return table
