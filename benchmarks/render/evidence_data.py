"""The rows of evidence_*.json, their differences, and which figures there are of them."""

from __future__ import annotations

import statistics
from typing import Any

from rendering import Data

Row = dict[str, Any]
#: Parts whose rows lack something of a row of the part `budgets`: name of the figure, and that row.
ABLATIONS = {"ablations": ("ablations", "qvit"), "by differences": ("by-differences", "qvit by differences")}
#: Kinds of which every head has its own width.
OF_HEADS = ("attn.query", "attn.key", "attn.value", "attn.probs", "attn.output")
#: Mean and deviation of differences over seeds.
Gain = tuple[float, float]
KINDS = {
    "attn.qkv.input": "input of q, k, v",
    "attn.query": "q",
    "attn.key": "k",
    "attn.value": "v",
    "attn.probs": "probabilities",
    "attn.output": "heads' outputs",
    "mlp.fc1.input": "input of fc1",
    "mlp.fc2.input": "GELU's output",
    "attn.qkv.query_weight": "W_q",
    "attn.qkv.key_weight": "W_k",
    "attn.qkv.value_weight": "W_v",
    "attn.proj.weight": "W_o",
    "mlp.fc1.weight": "W of fc1",
    "mlp.fc2.weight": "W of fc2",
}


def rows_of(data: Data, part: str) -> list[Row]:
    """The rows of a part, budget by budget."""
    budgets = list(dict.fromkeys(row["budget"] for row in data["rows"]))
    return sorted((row for row in data["rows"] if row["part"] == part), key=lambda row: budgets.index(row["budget"]))


def floats_of(data: Data) -> dict[int, float]:
    """Accuracy of the float model by seed, of all seeds that some row has."""
    pairs = (pair for row in data["rows"] for pair in zip(row["seeds"], row["float_accuracies"], strict=True))
    return dict(sorted(pairs))


def reference_of(row: Row, data: Data, name: str) -> Row | None:
    """The row NAME of the part `budgets` at the same budget."""
    same = (own for own in rows_of(data, "budgets") if (own["row"], own["budget"]) == (name, row["budget"]))
    return next(same, None)


def paired(row: Row, other: Row | None) -> Gain | None:
    """Mean and deviation of the differences over common seeds; None without two of them, or for a row and itself."""
    if other is None or row is other:
        return None
    known = dict(zip(other["seeds"], other["accuracies"], strict=True))
    gains = [own - known[s] for s, own in zip(row["seeds"], row["accuracies"], strict=True) if s in known]
    return (statistics.mean(gains), statistics.stdev(gains)) if len(gains) > 1 else None


def learned(data: Data) -> list[Row]:
    """The full `qvit` of every budget."""
    return [row for row in rows_of(data, "budgets") if row["row"] == "qvit"]


def figure_names(data: Data) -> dict[str, str]:
    """Name of the file of each figure, by what it shows."""
    ablations = {
        figure: any(paired(row, reference_of(row, data, full)) for row in rows_of(data, part))
        for part, (figure, full) in ABLATIONS.items()
    }
    widths = [row for row in learned(data) if reference_of(row, data, "lsq+")]
    kinds = ["bit-operations", "weight-bytes"]
    kinds += [figure for figure, known in ablations.items() if known]
    kinds += ["widths"] if widths else []
    kinds += ["heads"] if any("width_counts" in row for row in learned(data)) else []
    return {kind: f"evidence-{data['set']}-{kind}" for kind in kinds}
