"""The divergence of the model's answer when one site (one head) alone is quantized: measured, not estimated.

    Ω(b) = mean over images of  Σ_k p_k · (log p_k - log p̂_k)          ZeroQ (Cai et al., CVPR 2020), section 3.2

One forward over all images for every head of every site at every width: 2,700 for DeiT-T with widths 2 to 8. It is the
yardstick for the estimates and slow, so what is done is written beside the result (`partial`) and taken up again when
the same call is repeated: same weights, images, widths and grids, by their digest.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qvit.files import write_json
from qvit.sensitivity.probe import Probe, require_finite

_SAVE_EVERY = 10.0  # seconds


@torch.no_grad()
def kl_table(
    probe: Probe, batches: Sequence[Tensor], progress: Callable[[int], None], partial: Path | None = None
) -> dict[str, NDArray[np.float64]]:
    """Ω by site: (heads, widths).

    Args:
        probe: The model.
        batches: Images, (B, channels, height, width) each.
        progress: Called with the number of sites after each.
        partial: File for results of a measurement under way; None keeps none.
    """
    digest = _digest(probe, batches)
    done = _taken_up(partial, digest)
    reference = [probe.logits(batch).float().log_softmax(-1) for batch in batches]
    images = sum(len(batch) for batch in batches)
    saved = time.monotonic()
    for count, site in enumerate(probe.quantizers, 1):
        if site not in done:
            done[site] = [
                [divergence(probe, site, head, width, batches, reference) / images for width in probe.widths]
                for head in range(probe.heads(site))
            ]
            if partial is not None and time.monotonic() - saved > _SAVE_EVERY:
                write_json(partial, {"digest": digest, "sites": done})
                saved = time.monotonic()
        progress(count)
    return {site: np.array(done[site]) for site in probe.quantizers}


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


def _digest(probe: Probe, batches: Sequence[Tensor]) -> str:
    """What the measurement depends on: parameters, scales and images, widths and grids."""
    digest = hashlib.sha256(repr((probe.widths, [str(q.spec) for q in probe.quantizers.values()])).encode())
    for tensor in (*(value for name, value in probe.model.state_dict().items() if "bit_width" not in name), *batches):
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _taken_up(partial: Path | None, digest: str) -> dict[str, Any]:
    """Sites that an interrupted call had finished; none if it was another call or its file cannot be read."""
    if partial is None or not partial.is_file():
        return {}
    try:
        data = json.loads(partial.read_text(encoding="utf-8"))
        return dict(data["sites"]) if data["digest"] == digest else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
