"""The divergence of the model's answer when one site (one head) alone is quantized: measured, not estimated.

    Ω(b) = mean over images of  Σ_k p_k · (log p_k - log p̂_k)          ZeroQ (Cai et al., CVPR 2020), section 3.2

One forward over all images for every head of every site at every width, from the site's block on (`prefix.py`): 2,700
for DeiT-T with widths 2 to 8. It is the yardstick for the estimates, and slow: what is done is kept in a file
(`partial.py`) and taken up by the next call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qvit.measure.metric import Task, register_metric
from qvit.measure.prefix import Prefix
from qvit.measure.probe import require_finite
from qvit.measure.table import Table


@register_metric("kl")
@torch.no_grad()
def kl(task: Task) -> Table:
    """Ω by site: (heads, widths)."""
    return measured(task, task.probe.logits)


def measured(task: Task, answer: Callable[[Tensor], Tensor]) -> Table:
    """The mean distance from the float model's answers by site: (heads, widths). `answer` is one of the probe's."""
    probe, partial = task.probe, task.partial()
    _, done = partial.load()
    prefix = Prefix(probe, task.batches, answer)
    reference = [prefix.log_answers(index) for index in range(len(task.batches))]
    images = sum(len(batch) for batch in task.batches)
    for count, site in enumerate(probe.quantizers, 1):
        if site not in done:
            prefix.leave_out(prefix.before(site), reference)
            rows = [
                [divergence(prefix, site, head, width, reference) / images for width in task.widths]
                for head in range(probe.heads(site))
            ]
            done[site] = torch.tensor(rows, dtype=torch.float64)
            partial.save(len(done), lambda: done)
        task.progress(count, len(probe.quantizers))
    return {site: done[site].numpy() for site in probe.quantizers}


@torch.no_grad()
def divergence(prefix: Prefix, site: str, head: int, width: int, reference: Sequence[Tensor]) -> float:
    """The sum over images of KL(p || p̂), or the cosine distance of features, with one head of a site at `width` bits.

    Args:
        prefix: Model and images; it leaves out no more than what runs before the site.
        site, head, width: What is quantized; see `Probe.only`.
        reference: The answers to each batch, as `Prefix.log_answers` returns them.
    """
    total = 0.0
    with prefix.probe.only(site, head, width):
        for index, before in enumerate(reference):
            after = prefix.log_answers(index)
            require_finite(site, after, "answers once it is quantized")
            total += float(prefix.distance.total(before, after))
    return total
