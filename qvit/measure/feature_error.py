"""Sensitivity of features: what `fisher` is for classes, with the cosine distance for the divergence.

    Ω(b) = 1/2 · mean over images of  Σ_j g_j² · (t̂_j(b) - t_j)²

estimates the mean over tokens of 1 - cosine(f, f̂), which the metric `cosine` measures. The backward passes start from
the random vectors of `features.signed_features`, whose mean square is the Hessian of that distance. For models that
answer with features; the metric where no other is asked for.
"""

from __future__ import annotations

from qvit.measure.features import signed_features
from qvit.measure.fisher import Sums, table_of
from qvit.measure.metric import Task, register_metric
from qvit.measure.table import Table


@register_metric("features")
def feature_error(task: Task) -> Table:
    """Ω by site: (heads, widths)."""
    return table_of(Sums(task, task.probe.features, signed_features))
