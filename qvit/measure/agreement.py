"""How well one sensitivity predicts another: the same heads at the same widths, and the order that both put them in.

Allocation needs the order of losses and, for sums, their size. So beside Spearman's rank correlation stands the median
ratio of predicted to measured. `raw` values are compared, before anything was made monotone or normalised by type.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qvit.errors import UsageError
from qvit.measure.table import Sensitivity


def agreement_of(predicted: Sensitivity, measured: Sensitivity) -> dict[str, Any]:
    """Both values of every head and width that the two have in common, and their rank correlation, as plain data.

    Args:
        predicted: An estimate.
        measured: Another table, such as of metric `kl`; may have fewer sites and widths.

    Raises:
        UsageError: If fewer than three values are in common.
    """
    widths = [width for width in predicted.widths if width in measured.widths]
    columns = [(width, predicted.widths.index(width), measured.widths.index(width)) for width in widths]
    rows = [
        [site, head, width, float(values[head, own]), float(measured.raw[site][head, other])]
        for site, values in predicted.raw.items()
        if site in measured.raw and len(values) == len(measured.raw[site])
        for head in range(len(values))
        for width, own, other in columns
    ]
    if len(rows) < 3:
        raise UsageError("the two sensitivities have next to nothing in common: were they measured on the same model?")
    return {
        "predicted": predicted.metric,
        "measured": measured.metric,
        "measured_images": measured.images,
        "spearman": _rank_correlation(rows),
        "spearman_by_width": {
            str(width): _rank_correlation([row for row in rows if row[2] == width]) for width in widths
        },
        "median_ratio_by_width": {
            str(width): float(np.median([row[3] / row[4] for row in rows if row[2] == width and row[4] > 0] or [0.0]))
            for width in widths
        },
        "columns": ["site", "head", "width", "predicted", "measured"],
        "rows": rows,
    }


def _rank_correlation(rows: list[list[Any]]) -> float | None:
    """Spearman's coefficient of the last two columns; None where it is not defined."""
    first, second = ([row[column] for row in rows] for column in (3, 4))
    if len(rows) < 3 or len(set(first)) < 2 or len(set(second)) < 2:
        return None
    from scipy.stats import spearmanr  # half a second, which commands that compare nothing need not wait

    answer: Any = spearmanr(first, second)
    return float(answer.statistic)
