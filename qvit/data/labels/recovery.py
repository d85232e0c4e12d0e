"""From the k classes that a store keeps of a crop to a distribution over all C classes, and the loss of a student.

With p the kept probabilities, at temperature 1, and s their sum:

    smoothing         p on the kept classes, (1 − s) / (C − k) on each other one    ("marginal smoothing"; the default)
    renormalise       p / s on the kept classes, 0 elsewhere
    hard              1 on the first class
    label-smoothing   p₁ on the first class, (1 − p₁) / (C − 1) on each other one

    loss = −(1/B) Σ p · log softmax(z)                      soft labels alone: no class of the data, no temperature

Targets travel as `[batch, 2, k]` float32, ids over probabilities: ids below 2¹⁶ are exact there, and one tensor is what
loaders move. They become distributions on the device, without waiting for it. Rounded to float16, kept probabilities
may add up to a little more than 1; they are divided by their sum then.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qvit.errors import UsageError

Recovery = Literal["smoothing", "renormalise", "hard", "label-smoothing"]


def recover(targets: Tensor, num_classes: int, how: Recovery = "smoothing") -> Tensor:
    """Distributions `[batch, classes]` float32 from targets `[batch, 2, k]`. See the module's docstring."""
    ids, probs = targets[:, 0].long(), targets[:, 1].float()
    kept = probs.shape[1]
    if how == "smoothing" and kept < num_classes:
        probs = probs / probs.sum(1, keepdim=True).clamp(min=1)
        rest = (1 - probs.sum(1, keepdim=True)).clamp(min=0) / (num_classes - kept)
    elif how in ("smoothing", "renormalise"):
        probs = probs / probs.sum(1, keepdim=True)
        rest = torch.zeros_like(probs[:, :1])
    elif how in ("hard", "label-smoothing"):
        first = probs.argmax(1, keepdim=True)
        ids = ids.gather(1, first)
        probs = torch.ones_like(probs[:, :1]) if how == "hard" else probs.gather(1, first)
        rest = (1 - probs) / (num_classes - 1)
    else:
        raise UsageError(f"label_recovery is one of {', '.join(get_args(Recovery))}, not {how!r}")
    return rest.expand(-1, num_classes).scatter(1, ids, probs)


def first_classes(targets: Tensor) -> Tensor:
    """The teacher's first class of each crop, `[batch]` int64."""
    return targets[:, 0].gather(1, targets[:, 1].argmax(1, keepdim=True)).squeeze(1).long()


class SoftLabelLoss(nn.Module):
    """Cross-entropy with the recovered distributions: of logits `[batch, classes]` and targets `[batch, 2, k]`."""

    def __init__(self, how: Recovery = "smoothing") -> None:
        super().__init__()
        self.how: Recovery = how

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean over the batch, a scalar."""
        return F.cross_entropy(logits, recover(targets, logits.shape[1], self.how))
