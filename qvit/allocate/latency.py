"""Milliseconds that were measured for pairs of widths: the file of `qvit bench --latency-table`, as a cost.

What a product of two quantized tensors takes depends on both widths at once: where sums are made in 16 bits, a product
is fast as long as the two widths are small together, and no sum of a part for each of them says that. So the file has
for every product a table by pair:

    {"left": "blocks.0.mlp.fc1.input", "right": "blocks.0.mlp.fc1.weight", "milliseconds": {"w4a4": 0.11, "w8a8": 0.19}}

`w` is the width of the operand in the weight's place, `a` that of the other; for q·kᵀ these are k and q. A pair that
was not measured takes the time of the narrowest measured pair that is as wide on both sides, of two such the slower
one. Products that the file leaves out take no time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from qvit.documents.base import Count, Document, Name, Positive, Text, checked
from qvit.errors import QvitError, UsageError, shown
from qvit.plan.cost import CostModel, Matmul
from qvit.plan.spec import MOST_SITES

FORMAT, VERSION = "qvit-latency", 1
#: Widths (left, right) of a product → milliseconds.
Rates = dict[tuple[int, int], float]
_PAIR = re.compile(r"w(?P<right>[0-9]{1,2})a(?P<left>[0-9]{1,2})")
Milliseconds = Annotated[float, Field(ge=0, le=1e12)]


class MeasuredProduct(Document):
    """What a product takes, all heads together, by the pair of its widths."""

    left: Name
    right: Name
    milliseconds: Annotated[dict[Name, Milliseconds], Field(min_length=1, max_length=1000)]


class MeasuredPlan(Document):
    """What the whole model takes by a plan of one width for weights and one for activations."""

    plan: Name
    precision: Name
    milliseconds: Milliseconds
    milliseconds_quartiles: Annotated[list[Milliseconds], Field(min_length=2, max_length=2)]
    predicted_milliseconds: Milliseconds
    kernels: Annotated[dict[Name, Milliseconds], Field(max_length=1000)] | None = None


class LatencyTable(Document):
    """The file.

    Attributes:
        macs: Multiply-accumulates of the model for one image: one of another input size has others.
        divided_by: How the time of the whole model came to its products: `profile` or `macs`.
    """

    format: Literal["qvit-latency"]
    version: Literal[1]
    model: Name
    macs: Count
    engine: Name
    arithmetic: Text
    threads: Count
    batch: Count
    divided_by: Literal["profile", "macs"]
    largest_error: Positive
    plans: Annotated[list[MeasuredPlan], Field(min_length=1, max_length=1000)]
    products: Annotated[list[MeasuredProduct], Field(min_length=1, max_length=MOST_SITES)]
    hardware: Text
    date: Name
    command: Text


def read_products(data: Mapping[str, Any], cost: CostModel, model: str | None) -> dict[Matmul, Rates]:
    """The rates of a model's products from the content of a file.

    Args:
        data: The content.
        cost: The model's costs.
        model: The model's name, if it is known.

    Raises:
        UsageError: Another model's table, or what is none.
    """
    try:
        table = checked(LatencyTable, data, "the latency table")
    except QvitError as error:
        raise UsageError(str(error)) from None
    if model is not None and table.model != model:
        raise UsageError(f"the latency table is of {shown(table.model)}, the sensitivity of {shown(model)}")
    if table.macs != cost.macs:
        raise UsageError(
            f"the latency table is of a {table.model} of {table.macs:,} MACs, this one has {cost.macs:,}: "
            "measure it at the same image size"
        )
    known = {(matmul.left, matmul.right): matmul for matmul in cost.matmuls}
    found: dict[Matmul, Rates] = {}
    for product in table.products:
        matmul = known.get((product.left, product.right))
        if matmul is None or matmul in found:
            what = "a product that is not in this model" if matmul is None else "a product twice"
            raise UsageError(f"the latency table has {what}: {shown(product.left)} × {shown(product.right)}")
        found[matmul] = {widths_of(pair): value for pair, value in product.milliseconds.items()}
        if widest(found[matmul]) not in found[matmul]:
            left, right = widest(found[matmul])
            raise UsageError(f"the latency table lacks the widest pair w{right}a{left} of '{product.right}'")
    return found


def widths_of(pair: str) -> tuple[int, int]:
    """Widths (left, right) of `w4a8`: (8, 4). Raises UsageError."""
    match = _PAIR.fullmatch(pair)
    if match is None or not all(1 <= int(width) <= 32 for width in match.groups()):
        raise UsageError(f"{shown(pair)} in the latency table is no pair of widths such as w4a8")
    return int(match["left"]), int(match["right"])


def widest(rates: Rates) -> tuple[int, int]:
    """The largest widths on both sides."""
    left, right = zip(*rates, strict=True)
    return max(left), max(right)


def rate_of(rates: Rates, left: int, right: int) -> float:
    """Milliseconds at a pair of widths, by the measured pair that stands for it; infinite where there is none."""
    if (left, right) in rates:
        return rates[left, right]
    wider = [(n + m, -value) for (n, m), value in rates.items() if n >= left and m >= right]
    return -min(wider)[1] if wider else math.inf


def is_table(data: Any) -> bool:
    """Whether this is meant as such a file, and not as milliseconds by site."""
    return isinstance(data, Mapping) and data.get("format") == FORMAT
