"""The divergence of the model's answer when one site (one head) alone is quantized: measured, not estimated.

    Ω(b) = mean over images of  Σ_k p_k · (log p_k - log p̂_k)          ZeroQ (Cai et al., CVPR 2020), section 3.2

One forward over all images for every head of every site at every width: 2,700 for DeiT-T with widths 2 to 8. It is the
yardstick for the estimates, and slow: what is done is kept in a file (`partial.py`) and taken up by the next call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qvit.sensitivity.partial import Partial
from qvit.sensitivity.probe import Probe, require_finite


@torch.no_grad()
def kl_table(
    probe: Probe, batches: Sequence[Tensor], progress: Callable[[int], None], partial: Partial
) -> dict[str, NDArray[np.float64]]:
    """Ω by site: (heads, widths).

    Args:
        probe: The model.
        batches: Images, (B, channels, height, width) each.
        progress: Called with the number of sites after each.
        partial: Keeps the sites that are done.
    """
    _, done = partial.load()
    reference = [probe.logits(batch).float().log_softmax(-1) for batch in batches]
    images = sum(len(batch) for batch in batches)
    for count, site in enumerate(probe.quantizers, 1):
        if site not in done:
            rows = [
                [divergence(probe, site, head, width, batches, reference) / images for width in probe.widths]
                for head in range(probe.heads(site))
            ]
            done[site] = torch.tensor(rows, dtype=torch.float64)
            partial.save(len(done), lambda: done)
        progress(count)
    return {site: done[site].numpy() for site in probe.quantizers}


@torch.no_grad()
def divergence(
    probe: Probe, site: str, head: int, width: int, batches: Sequence[Tensor], reference: Sequence[Tensor]
) -> float:
    """The sum over images of KL(p || p̂) with one head of one site at `width` bits.

    Args:
        probe, site, head, width: What is quantized; see `Probe.only`.
        batches: Images.
        reference: log p of each batch.
    """
    total = 0.0
    with probe.only(site, head, width):
        for batch, before in zip(batches, reference, strict=True):
            after = probe.logits(batch).float().log_softmax(-1)
            require_finite(site, after, "answers once it is quantized")
            total += float((before.exp() * (before - after)).sum())
    return total
