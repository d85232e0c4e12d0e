"""Diagonal Fisher sensitivity: all sites and widths from one forward and one backward per image.

    Ω(b) = 1/2 · mean over images of  Σ_j g_j² · (t̂_j(b) - t_j)²

with g the gradient at the quantized tensor itself, weight or activation: the second-order estimate of the loss increase
with the Fisher's diagonal for the Hessian, in the form of NVIDIA ModelOpt's AutoQuantize, which has it at module
outputs.

The loss and its label. No labels are needed: Ω estimates how far the model's answer moves from what it was, the
divergence KL(p || p̂) that the metric `kl` measures, whose Hessian is exactly the Fisher matrix F = Jᵀ(diag(p) - ppᵀ)J
of the model's own distribution p. The cross-entropy to the predicted label would do badly: its gradient vanishes where
the model is sure. A label sampled from p is unbiased but rarely informative for the same reason. So all labels enter at
once, with random signs: the backward pass starts from

    u = √p∘r - p·(√p·r),     r_k = ±1          E[u uᵀ] = diag(p) - ppᵀ

and E[g²] is the diagonal of F.  Each image is a backward pass of its own (a batch's gradient at a weight would sum over
images before squaring); a site's error at b bits is the same as in the quantized model with all other sites in float.

Cost: one forward and backward per image, and quantizing every activation once per width. Memory: one image's graph and
a copy of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qvit.sensitivity.probe import Probe, require_finite


def signed_answer(logits: Tensor, generator: torch.Generator) -> Tensor:
    """The vector u above for (1, classes) logits, detached."""
    probabilities = logits.detach().float().softmax(dim=-1)
    signs = torch.randint(0, 2, probabilities.shape, generator=generator).to(probabilities) * 2 - 1
    root = probabilities.sqrt() * signs
    return (root - probabilities * root.sum()).to(logits.dtype)


def signed_gradients(
    probe: Probe, images: Sequence[Tensor], seed: int, progress: Callable[[int], None]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(site, tensor, g) of every quantized tensor of every image, detached; arguments as for `fisher_table`."""
    generator = torch.Generator().manual_seed(seed)
    with probe.watched() as seen:
        for count, image in enumerate(images, 1):
            logits = probe.logits(image.detach().requires_grad_())
            tensors = [tensor for _, tensor in seen]
            grads = torch.autograd.grad(logits, tensors, signed_answer(logits, generator), allow_unused=True)
            for (site, tensor), grad in zip(seen, grads, strict=True):
                if grad is not None:
                    yield site, tensor.detach(), grad
            seen.clear()
            progress(count)


def fisher_table(
    probe: Probe, images: Sequence[Tensor], seed: int, progress: Callable[[int], None]
) -> dict[str, NDArray[np.float64]]:
    """Ω by site: (heads, widths).

    Args:
        probe: The model.
        images: One by one, each (1, channels, height, width).
        seed: Of the random signs.
        progress: Called with the number of images after each.
    """
    table = {site: np.zeros((probe.heads(site), len(probe.widths))) for site in probe.quantizers}
    fisher: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for site, tensor, grad in signed_gradients(probe, images, seed, progress):
        if probe.sites[site].role == "weight":
            weights[site] = tensor
            fisher[site] = grad.square() if site not in fisher else fisher[site].addcmul_(grad, grad)
        else:
            _add(probe, site, tensor, grad.abs(), table[site])
    for site, total in fisher.items():
        _add(probe, site, weights[site], total.sqrt(), table[site])
    return {site: values * (0.5 / len(images)) for site, values in table.items()}


def _add(probe: Probe, site: str, tensor: Tensor, importance: Tensor, into: NDArray[np.float64]) -> None:
    """Adds Σ (importance · error)² per head, for every width."""
    viewed = probe.quantizers[site].view(importance)
    sums = [probe.squares_per_head(site, error.mul_(viewed)) for error in probe.errors(site, tensor)]
    found = torch.stack(sums, dim=1).double()
    require_finite(site, found, "gradients")
    into += found.cpu().numpy()
