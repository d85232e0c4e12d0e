"""Sensitivity by orthogonality of layers (OMPQ, Ma et al., AAAI 2023): a proxy that looks at no gradient and no error.

    ORM(i, j) = ‖f_jᵀ f_i‖² / (‖f_iᵀ f_i‖ · ‖f_jᵀ f_j‖)          Frobenius norms, f_i (images, features) of layer i
    θ_i       = exp(-β · Σ_{j≠i} ORM(i, j))
    Ω_i(b)    = (b_max - b) · mean of θ_j over all layers j ≥ i

A layer whose features are orthogonal to those of the others says what no other says, and gets more bits. The paper
maximises Σ_i b_i · mean_{j ≥ i} θ_j, which is the least Ω (`layers.py`). Ours: β·Σ is β times the mean ORM, so that
deep models do not lose all their θ to the exponential; every operand of a layer, and every head of it, counts as one
that has the layer's θ. A transformer's layers are very alike (residuals), which leaves the proxy little to tell them
by: it is here to be compared with, at the price of one forward pass.

Ω orders layers and predicts no divergence. Memory: the outputs of all layers for all images.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qvit.measure.layers import outputs_by_layer, table_by_layer
from qvit.measure.metric import Task, register_metric
from qvit.measure.table import Table

#: β, as in the paper's experiments with larger networks.
BETA = 10.0


def orthogonality(features: list[Tensor]) -> Tensor:
    """ORM of all pairs, (layers, layers), from features (images, ...) of each layer; float64."""
    grams = torch.stack([rows @ rows.T for rows in (own.flatten(1).double() for own in features)])
    products = torch.einsum("inm,jnm->ij", grams, grams)  # tr(K_i·K_j) = ‖f_jᵀ f_i‖²
    lengths = products.diagonal().sqrt().clamp_min(1e-300)
    return products / (lengths[:, None] * lengths)


def worth(similar: Tensor, beta: float = BETA) -> Tensor:
    """mean_{j ≥ i} θ_j from ORM: (layers,)."""
    count = len(similar)
    others = (similar.sum(1) - similar.diagonal()) / max(1, count - 1)
    theta = torch.exp(-beta * others)
    return theta.flip(0).cumsum(0).flip(0) / torch.arange(count, 0, -1, dtype=theta.dtype)


@register_metric("ompq")
@torch.no_grad()
def ompq(task: Task) -> Table:
    """Ω by site: (heads, widths)."""
    seen: dict[str, list[Tensor]] = {}
    for images, outputs in outputs_by_layer(task):
        for path, calls in outputs.items():  # windows of an image are its features, too
            seen.setdefault(path, []).append(torch.cat([own.reshape(images, -1) for own in calls], 1))
    similar = orthogonality([torch.cat(own) for own in seen.values()])
    return table_by_layer(task, dict(zip(seen, worth(similar).tolist(), strict=True)))
