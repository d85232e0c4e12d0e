"""Mix-QViT's criterion: the importance of a tensor times the damage of quantizing it.

    Ω(b) = I · KL(p || p̂(b))        I = Σ_j |R_j| of the site's head, mean over the images, over the largest of its kind

The damage is measured (`kl.py`), the importance is the relevance that the tensor carries (`relevance.py`). After
Mix-QViT (Ranjan and Savakis 2025), which takes both into account under a budget of average bits; how it puts them
together could not be read, and the product is ours. Importance is normalised within sites of one kind (`site_type`),
because the relevance of weights and of activations are sums of another number of terms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qvit.measure.fisher import Sums
from qvit.measure.kl import measured
from qvit.measure.metric import Task, register_metric
from qvit.measure.relevance import carried, predicted_class, relevance_graph
from qvit.measure.table import Table, site_type


def importance(task: Task) -> dict[str, Tensor]:
    """The relevance that each head of each site carries, over the largest of its kind: (heads,) in 0 to 1."""
    sums, probe = Sums(task, start=predicted_class, kept=False), task.probe
    found = {site: torch.zeros(probe.heads(site), dtype=torch.float64) for site in probe.quantizers}
    with relevance_graph(probe):
        for site, tensor, grad in sums.gradients():
            found[site] += carried(probe, site, tensor, grad).cpu()
    largest: dict[str, float] = {}
    for site, values in found.items():
        kind = site_type(site)
        largest[kind] = max(largest.get(kind, 0.0), float(values.max()))
    return {site: values / max(largest[site_type(site)], 1e-30) for site, values in found.items()}


@register_metric("mix-qvit")
def mix_qvit(task: Task) -> Table:
    """Ω by site: (heads, widths)."""
    weights = importance(task)
    with torch.no_grad():
        damage = measured(task, task.probe.logits)
    return {site: values * weights[site].numpy()[:, None] for site, values in damage.items()}
