"""What a budget is given in: bit operations, bytes of weights, or the milliseconds of a measured table.

    bit_operations    products of widths, see `plan/cost.py`; budgets as everywhere: 4bit, 21.455G, 25%
    weight_bytes      packed weights; budgets: 4bit (the uniform 4-bit model's), 2.5MB, 800kB, 25%
    milliseconds      a table {site: {width: milliseconds}}, measured on some device; budgets: 4bit, 12.5ms, 25%; the
                      heads of a site share its time equally, sites that the table leaves out take none

Bytes and milliseconds are additive: each width costs what it costs, whatever the others are. Bytes are rounded up for
every head, which is exact where a head's weights are a multiple of eight, as in all models of timm, and never too few.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qvit.errors import QvitError, UsageError, nearest
from qvit.plan.budget import format_bops, parse_budget
from qvit.plan.cost import CostModel, Widths
from qvit.plan.spec import Site

BIT_OPERATIONS, WEIGHT_BYTES, MILLISECONDS = "bit_operations", "weight_bytes", "milliseconds"
_LIMIT = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>bits?|gb|mb|kb|b|ms|%|)", re.IGNORECASE)
_SIZES = {"gb": 1e9, "mb": 1e6, "kb": 1e3, "b": 1.0}


@dataclass(frozen=True)
class Unit:
    """A kind of cost.

    Attributes:
        name: `bit_operations`, `weight_bytes` or `milliseconds`.
        latency: The table, for milliseconds.
    """

    name: str
    latency: Mapping[str, Mapping[int, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, value: Unit | str | Path | Mapping[str, Mapping[Any, float]], cost: CostModel) -> Unit:
        """A unit from its name, a latency table, or the file of one. Raises UsageError for anything else."""
        if isinstance(value, Unit):
            return value
        if isinstance(value, Mapping):
            return cls(MILLISECONDS, _checked_table(value, cost))
        if str(value) in (BIT_OPERATIONS, WEIGHT_BYTES):
            return cls(str(value))
        if not Path(value).is_file():
            raise UsageError(
                f"unit '{value}' is neither {BIT_OPERATIONS} nor {WEIGHT_BYTES} nor a file with a latency table "
                "({site: {width: milliseconds}} as JSON)"
            )
        try:
            return cls(MILLISECONDS, _checked_table(json.loads(Path(value).read_text(encoding="utf-8")), cost))
        except UsageError as error:
            raise UsageError(f"{value}: {error}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise QvitError(f"cannot read the latency table {value}: {error}") from None

    @property
    def is_additive(self) -> bool:
        """Whether the cost is a sum over units, each by itself."""
        return self.name != BIT_OPERATIONS

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
        return sum(self.head_cost(cost.sites[name], len(own), width) for name, own in widths.items() for width in own)

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
        return total


def _checked_table(data: Any, cost: CostModel) -> dict[str, dict[int, float]]:
    if not isinstance(data, Mapping) or not data:
        raise UsageError("a latency table is an object {site: {width: milliseconds}} with at least one site")
    table: dict[str, dict[int, float]] = {}
    for site, row in data.items():
        if site not in cost.sites:
            raise UsageError(
                f"the latency table names a site that this model does not have: '{site}'{nearest(site, cost.sites)}"
            )
        if not isinstance(row, Mapping) or not row:
            raise UsageError(
                f"site '{site}' of the latency table must be an object {{width: milliseconds}}, not {row!r}"
            )
        table[site] = {}
        for width, value in row.items():
            if not str(width).isdecimal() or not 1 <= int(width) <= 32:
                raise UsageError(f"site '{site}' of the latency table: width {width!r} must be an integer from 1 to 32")
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
                raise UsageError(f"site '{site}' of the latency table: {value!r} is no number of milliseconds")
            table[site][int(width)] = float(value)
    return table
