"""HAWQ-V2's sensitivity: the average curvature of a tensor times its squared quantization error.

    Ω(b) = 1/2 · Tr(H_t)/n · ||t̂(b) - t||²            Dong et al., NeurIPS 2020, eq. 5 (without the factor 1/2)

H is the Hessian of KL(p || p̂), the divergence of the model's answer from what it was, which needs no labels. Where both
agree, its gradient is zero and H_t = JᵀSSᵀJ exactly, with J the derivative of the logits by the tensor and SSᵀ =
diag(p) - ppᵀ: no negative curvature. HAWQ-V2 takes the task's loss with labels, and weights only.

The trace by Hutchinson's estimate, on the side of the answer. Tr(JᵀSSᵀJ) = Tr(SᵀJJᵀS), so random signs r for the
classes do in place of random signs v for the tensor's elements:

    Tr(H_t) = E ||Jᵀ S r||²                    the squared gradient that `fisher` uses element by element

One backward per image serves all tensors, and every estimate is positive. With vᵀHv and one v over all tensors, as for
weights in HAWQ-V2, the cross terms between tensors have mean zero but drown the traces: on DeiT-T with 8 images, many
estimates were negative and their order had nothing to do with the measured divergence.

Weights have the mean of the images' traces; activations the trace and the error of each image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qvit.measure.fisher import Sums
from qvit.measure.metric import Task, register_metric
from qvit.measure.probe import require_finite
from qvit.measure.table import Table


@register_metric("hessian")
def hessian(task: Task) -> Table:
    """Ω by site: (heads, widths)."""
    sums, probe = Sums(task), task.probe
    for site, tensor, grad in sums.gradients():
        trace = probe.squares_per_head(site, probe.quantizers[site].view(grad)).double()
        require_finite(site, trace, "gradients")
        if probe.sites[site].role == "weight":
            sums.add(f"trace:{site}", trace)
        else:
            sums.add(site, trace[:, None] * _mean_squares(task, site, tensor))
    for site, weight in sums.weights.items():
        sums.add(site, sums[f"trace:{site}"][:, None] * _mean_squares(task, site, weight))
    return sums.table()


def _mean_squares(task: Task, site: str, tensor: Tensor) -> Tensor:
    """||t̂ - t||²/n by head and width; n is the number of elements of a head."""
    errors = task.probe.errors(site, tensor, task.widths)
    columns = [task.probe.squares_per_head(site, error) for error in errors]
    return torch.stack(columns, dim=1).double() * (task.probe.heads(site) / tensor.numel())
