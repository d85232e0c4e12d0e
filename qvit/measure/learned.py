"""Learned scales as importance indicators: no images, no gradients, only what training left behind.

A model trained with switchable scales (method `qvit`) has for every site a scale per width. LIMPQ (Tang et al., ECCV
2022) trains such scales jointly and reads them as indicators: the larger the scale that a tensor wanted at b bits, the
coarser its grid and the more it matters what b is. Here

    Ω(b) = the mean of the site's (or head's) learned scales at b bits

What it is not: a loss. Scales have the units of their tensors and are summed over weights and activations as if these
could be compared, as LIMPQ does; `type_normalised` softens that. A scale that training never switched to is still that
of calibration, so a run whose widths moved little tells little.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qvit.errors import UsageError
from qvit.measure.metric import Task, register_metric
from qvit.measure.table import Table
from qvit.models.convert import Stage, stage_of
from qvit.models.families import inspect_model
from qvit.quantizers import quantizers_of


@register_metric("learned", reads_images=False)
def learned(task: Task) -> Table:
    """Ω by site: (heads, widths), of a trained model whose quantizers have a scale for each width."""
    if stage_of(task.model) < Stage.CALIBRATED:
        raise UsageError(
            "metric 'learned' reads the scales of a trained model: give a run of method qvit, or use metric 'fisher'"
        )
    sites, table, widths = inspect_model(task.model).sites, {}, task.widths
    for site, quantizer in quantizers_of(task.model):
        own = tuple(getattr(quantizer, "bank_widths", ()))
        if missing := [width for width in widths if width not in own]:
            raise UsageError(
                f"site '{site}' has no learned scale for {missing[0]} bits: metric 'learned' needs switchable scales "
                f"for all of {', '.join(map(str, widths))} bits (method qvit with switchable_scale)"
            )
        scale: Tensor = quantizer.get_parameter("scale").detach().abs()
        chosen = scale[..., [own.index(width) for width in widths]].double()
        heads = sites[site].layout.heads
        if heads is None:
            rows = chosen.reshape(-1, len(widths)).mean(0, keepdim=True)
        else:
            expanded = chosen.expand(*torch.broadcast_shapes(chosen.shape[:-1], heads), len(widths))
            axis = next(index for index, size in enumerate(heads) if size > 1) if max(heads) > 1 else 0
            rows = expanded.movedim(axis, 0).reshape(heads[axis], -1, len(widths)).mean(1)
        table[site] = rows.cpu().numpy()
    return {site: table[site] for site in sites if site in table}
