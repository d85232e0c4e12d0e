"""How far a model's answers are from another's: the measure that widths and parts are chosen by.

    classes     KL(p ‖ p̂) = Σ_k p_k · (log p_k - log p̂_k), in nats        ZeroQ (Cai et al., CVPR 2020), section 3.2
    features    1 - cosine, mean over tokens                               `measure/features.py`

Both are zero for equal answers, and quadratic for small differences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from qvit.measure.features import cosine_distances
from qvit.measure.probe import divergence_terms
from qvit.models.features import answers_with_features


class Distance(NamedTuple):
    """A distance of answers.

    Attributes:
        name: What it is called in messages.
        prepared: From an answer (B, ...) to what is kept of it.
        total: The sum over images, from two of these: those of the reference first.
    """

    name: str
    prepared: Callable[[Tensor], Tensor]
    total: Callable[[Tensor, Tensor], Tensor]


DIVERGENCE = Distance(
    "divergence",
    lambda logits: logits.log_softmax(-1),
    lambda reference, answers: divergence_terms(reference, answers).sum(),
)
COSINE = Distance(
    "cosine distance",
    lambda features: features,
    lambda reference, answers: cosine_distances(reference, answers).sum(),
)


def distance_of(model: nn.Module) -> Distance:
    """The distance that suits what a model answers with."""
    return COSINE if answers_with_features(model) else DIVERGENCE
