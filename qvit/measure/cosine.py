"""The cosine distance of the model's features when one site (one head) alone is quantized: measured, not estimated.

    Ω(b) = mean over images and tokens of  1 - cosine(f, f̂)

What `kl` is for classes; see there for the cost. For models that answer with features.
"""

from __future__ import annotations

import torch

from qvit.measure.kl import measured
from qvit.measure.metric import Task, register_metric
from qvit.measure.table import Table


@register_metric("cosine")
@torch.no_grad()
def cosine(task: Task) -> Table:
    """Ω by site: (heads, widths)."""
    return measured(task, task.probe.features)
