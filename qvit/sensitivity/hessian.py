"""HAWQ-V2's sensitivity: the average curvature of a tensor times its squared quantization error.

    Ω(b) = 1/2 · Tr(H_t)/n · ||t̂(b) - t||²            Dong et al., NeurIPS 2020, eq. 5 (without the factor 1/2)

Tr(H_t) is estimated as vᵀH_t v with random signs v (Hutchinson): one v per image and tensor, drawn for all tensors
together. Their cross terms have mean zero, so one product of the Hessian with a vector serves every site. It is the
same for activations, whose trace is taken at each image by itself.

H is the Hessian of the cross-entropy between the model's answer and that answer held fixed, at the point where both
agree: the exact Hessian of KL(p || p̂), which needs no labels. As the gradient there is zero, it is the Gauss-Newton
matrix, without negative curvature. HAWQ-V2 takes the task's loss with labels, and weights only.

Cost: a forward, a backward, and a backward through both, per image: about twice that of `fisher`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qvit.sensitivity.probe import Probe, require_finite


def hessian_table(
    probe: Probe, images: Sequence[Tensor], seed: int, progress: Callable[[int], None]
) -> dict[str, NDArray[np.float64]]:
    """Ω by site: (heads, widths); arguments as for `fisher.fisher_table`."""
    generator = torch.Generator().manual_seed(seed)
    table = {site: np.zeros((probe.heads(site), len(probe.widths))) for site in probe.quantizers}
    traces = {site: np.zeros(probe.heads(site)) for site in probe.quantizers}
    weights: dict[str, Tensor] = {}
    with probe.watched() as seen:
        for count, image in enumerate(images, 1):
            for (site, tensor), trace in zip(seen, _traces(probe, image, seen, generator), strict=True):
                if probe.sites[site].role == "weight":
                    weights[site] = tensor.detach()
                    traces[site] += trace
                else:
                    table[site] += trace[:, None] * _mean_squares(probe, site, tensor)
            seen.clear()
            progress(count)
    for site, weight in weights.items():
        table[site] = traces[site][:, None] * _mean_squares(probe, site, weight)
    return {site: values * (0.5 / len(images)) for site, values in table.items()}


def _traces(
    probe: Probe, image: Tensor, seen: list[tuple[str, Tensor]], generator: torch.Generator
) -> list[NDArray[np.float64]]:
    """vᵀHv by head of every tensor of one image, in the order in which they are seen."""
    logits = probe.logits(image.detach().requires_grad_()).float()
    loss = -(logits.detach().softmax(-1) * logits.log_softmax(-1)).sum()
    tensors = [tensor for _, tensor in seen]
    grads = torch.autograd.grad(loss, tensors, create_graph=True, allow_unused=True)
    signs = [torch.randint(0, 2, tensor.shape, generator=generator).to(tensor) * 2 - 1 for tensor in tensors]
    linear = sum(
        ((grad * sign).sum() for grad, sign in zip(grads, signs, strict=True) if grad is not None),
        start=logits.new_zeros(()),
    )
    products = torch.autograd.grad(linear, tensors, allow_unused=True)
    found = []
    for (site, tensor), product, sign in zip(seen, products, signs, strict=True):
        product = torch.zeros_like(tensor) if product is None else product
        require_finite(site, product, "second derivatives")
        viewed = probe.quantizers[site].view((product * sign).detach())
        found.append(probe.per_head(site, viewed).double().cpu().numpy())
    return found


def _mean_squares(probe: Probe, site: str, tensor: Tensor) -> NDArray[np.float64]:
    """||t̂ - t||²/n by head and width; n is the number of elements of a head."""
    columns = [probe.squares_per_head(site, error) for error in probe.errors(site, tensor)]
    return torch.stack(columns, dim=1).double().cpu().numpy() * (probe.heads(site) / tensor.numel())
