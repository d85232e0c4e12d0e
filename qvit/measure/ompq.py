"""Sensitivity by orthogonality of layers (OMPQ, Ma et al., AAAI 2023): a proxy that looks at no gradient and no error.

    ORM(i, j) = ‖f_jᵀ f_i‖² / (‖f_iᵀ f_i‖ · ‖f_jᵀ f_j‖)          Frobenius norms, f_i (images, features) of layer i
    θ_i       = exp(-β · Σ_{j≠i} ORM(i, j))
    Ω_i(b)    = (b_max - b) · mean of θ_j over all layers j ≥ i

A layer whose features are orthogonal to those of the others says what no other says, and gets more bits. The paper
maximises Σ_i b_i · mean_{j ≥ i} θ_j; Ω is what an answer is short of all layers at the largest width, so that the least
Ω is that maximum. Ours: β·Σ is β times the mean ORM, so that deep models do not lose all their θ to the exponential;
every operand of a layer, and every head of it, counts as one that has the layer's θ; q, k, v, probabilities and heads'
outputs belong to their attention module. A transformer's layers are very alike (residuals), which leaves the proxy
little to tell them by: it is here to be compared with, at the price of one forward pass.

Ω orders layers and predicts no divergence. Memory: the outputs of all layers for all images.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from qvit.errors import QvitError
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
    model, probe = task.probe.model, task.probe
    paths = dict.fromkeys(site.rpartition(".")[0] for site in probe.quantizers)
    seen: dict[str, list[Tensor]] = {}
    now: dict[str, list[Tensor]] = {}

    with ExitStack() as stack:
        for path in paths:

            def keep(_module: nn.Module, _inputs: Any, output: Tensor, path: str = path) -> None:
                now.setdefault(path, []).append(output)

            stack.enter_context(model.get_submodule(path).register_forward_hook(keep))
        for number, batch in enumerate(task.batches, 1):
            now.clear()
            model(batch)
            for path, outputs in now.items():  # windows of an image are its features, too
                seen.setdefault(path, []).append(torch.cat([own.reshape(len(batch), -1) for own in outputs], 1))
            task.progress(number, len(task.batches))
    if missing := [path for path in paths if path not in seen]:
        raise QvitError(f"metric 'ompq': no input reached '{missing[0]}', whose operands are quantized")
    order = list(seen)
    own = dict(zip(order, worth(orthogonality([torch.cat(seen[path]) for path in order])).tolist(), strict=True))
    if not all(math.isfinite(value) for value in own.values()):
        raise QvitError("metric 'ompq': features are NaN or infinite")
    short = torch.tensor([task.widths[-1] - width for width in task.widths], dtype=torch.float64)
    return {
        site: (own[site.rpartition(".")[0]] * short).expand(probe.heads(site), -1).numpy().copy()
        for site in probe.quantizers
    }
