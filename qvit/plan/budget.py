"""Budgets of bit operations: how people write them, and how costs are written for people."""

from __future__ import annotations

import re

from qvit.errors import QvitError, UsageError
from qvit.plan.cost import CostModel

_BUDGET = re.compile(r"(?P<number>\d{1,18}(?:\.\d{1,18})?)\s*(?P<unit>bits?|g|m|%|)", re.IGNORECASE)


def is_budget(text: str) -> bool:
    """Whether `parse_budget` understands a text; names of plans, such as `w4a4`, are none."""
    return _BUDGET.fullmatch(text.strip()) is not None


def parse_budget(text: str, cost: CostModel) -> int:
    """A budget in BOPs.

    Args:
        text: `4bit`: the BOPs of the uniform 4-bit model with 8 bits in the first and the last layer (the Q-ViT paper's
            "4-bit constraint"); `21.455G` or `12.3M`: BOPs (1e9, 1e6); `0.25` or `25%`: that share of the uniform 8-bit
            model's BOPs.
        cost: The model's costs.

    Raises:
        UsageError: If the text is none of these.
        QvitError: If no plan of 2 to 8 bits fits; the message gives the smallest and largest possible.
    """
    match = _BUDGET.fullmatch(text.strip())
    if match is None:
        raise UsageError(
            f"budget '{text}' is not understood: give '4bit', '21.455G' (bit operations), "
            "or a share of the 8-bit model such as '0.25' or '25%'"
        )
    number, unit = float(match["number"]), match["unit"].lower()
    lowest, highest = cost.extreme()
    if unit.startswith("bit"):
        if number != int(number) or not 1 <= number <= 16:
            raise UsageError(
                f"budget '{text}': the bit-width must be an integer, such as '4bit'; "
                f"for values between give bit operations, such as '{highest / 4e9:.4g}G'"
            )
        budget = cost.bit_operations(cost.uniform(int(number)))
    elif unit in ("g", "m"):
        budget = round(number * (1e9 if unit == "g" else 1e6))
    else:
        share = number / 100 if unit == "%" else number
        if share > 1:
            meant = "" if unit else f": did you mean '{text}bit' or '{text}G'?"
            raise UsageError(f"budget '{text}' is more than the 8-bit model takes{meant}")
        budget = round(share * highest)
    if budget < lowest:
        raise QvitError(
            f"budget '{text}' ({format_bops(budget)}) is impossible: this model takes between "
            f"{format_bops(lowest)} (2 bits everywhere) and {format_bops(highest)} (8 bits everywhere)"
        )
    return budget


def format_bops(bit_operations: float) -> str:
    """Bit operations for people: `21.455 G` or, below 0.1 G, `12.345 M`."""
    return f"{bit_operations / 1e9:.3f} G" if bit_operations >= 1e8 else f"{bit_operations / 1e6:.3f} M"
