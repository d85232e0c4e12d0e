"""LampQ's type-aware Fisher metric (AAAI 2026): traces of the Fisher matrix, comparable between kinds of tensors.

    Ω(b) = α_t · tr(F) · ‖t̂(b) - t‖²/‖t‖²         α_t = 1 / mean of tr(F) over all heads of all sites of the kind t

tr(F) is the sum of squared gradients at the tensor (one head of it), mean over images, as in `fisher`: all classes
enter with random signs, and no labels. Traces of the weights of `fc1`, of attention probabilities and of q differ by
orders of magnitude for reasons of their shape and range; α_t gives each kind (`site_type`) the mean 1, so that widths
within a kind follow the traces, and between kinds the errors.

The paper's criterion is α_t · tr(F); its normaliser, and how widths enter, are not published as code and could not be
read. The mean as α_t and the relative error, which has no unit, are ours. Ω orders tensors and predicts no divergence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qvit.measure.features import signed_features
from qvit.measure.fisher import Sums
from qvit.measure.metric import Task, register_metric
from qvit.measure.probe import Probe, require_finite
from qvit.measure.relevance import relative_errors
from qvit.measure.table import Table, site_type
from qvit.models.features import answers_with_features


def squared_gradients(task: Task) -> Sums:
    """Sums over the images' gradients of classes, or of features where the model has no classes."""
    if answers_with_features(task.model):
        return Sums(task, task.probe.features, signed_features)
    return Sums(task)


def trace(probe: Probe, site: str, grad: Tensor) -> Tensor:
    """What one gradient adds to tr(F) of a site: (heads,), float64."""
    found = probe.squares_per_head(site, probe.quantizers[site].view(grad)).double()
    require_finite(site, found, "gradients")
    return found


def normalisers(traces: dict[str, Tensor]) -> dict[str, float]:
    """α_t by kind of tensor, from the traces by site, (heads,); 0 where nothing of a kind has a gradient."""
    members: dict[str, list[Tensor]] = {}
    for site, own in traces.items():
        members.setdefault(site_type(site), []).append(own)
    means = {kind: float(torch.cat(own).mean()) for kind, own in members.items()}
    return {kind: 1 / mean if mean > 0 else 0.0 for kind, mean in means.items()}


@register_metric("lampq")
def lampq(task: Task) -> Table:
    """Ω by site: (heads, widths)."""
    sums, probe = squared_gradients(task), task.probe
    for site, tensor, grad in sums.gradients():
        sums.add(f"trace:{site}", trace(probe, site, grad))
        if probe.sites[site].role != "weight":
            sums.add(f"error:{site}", relative_errors(task, site, tensor))
    images, nothing = len(sums.images), {site: torch.zeros(probe.heads(site)).double() for site in probe.quantizers}
    reached = {site: sums[f"trace:{site}"].cpu() / images for site in nothing if f"trace:{site}" in sums}
    alpha = normalisers(nothing | reached)
    found = {site: own[:, None].repeat(1, len(task.widths)).numpy() for site, own in nothing.items()}
    for site, own in reached.items():
        weight = sums.weights.get(site)
        errors = sums[f"error:{site}"] / images if weight is None else relative_errors(task, site, weight)
        found[site] = (alpha[site_type(site)] * own[:, None] * errors.cpu()).numpy()
    return found
