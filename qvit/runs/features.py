"""Features of a quantized model beside those of the float model that it was made of.

Post-training quantization may rotate the residual stream. What goes into the classifier is then in another basis, and
is taken back to that of the float model before the two are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from qvit.measure.features import judge_features
from qvit.measure.partial import NOTHING_KEPT, Partial
from qvit.methods.ptq.residual_rotation import unrotated
from qvit.models.convert import in_eval_mode
from qvit.models.features import feature_function, token_names


def compare_features(
    model: nn.Module,
    reference: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    labelled: bool,
    by_token: bool = False,
    progress: Callable[[int], None] | None = None,
    partial: Partial = NOTHING_KEPT,
) -> dict[str, Any]:
    """Judges the features of a model beside the float model's, see `measure.features.judge_features`.

    Args:
        model: A quantized model, or for a reference without a classifier anything that answers as it does.
        reference: The float model; its features are those in front of the classifier, or its answers without one.
        loader: Batches of images and classes.
        labelled: Whether the classes are labels.
        by_token: Whether every token is listed.
        progress: Called with the number of images after each batch.
        partial: Where an interrupted call's sums are kept.
    """
    with in_eval_mode(model), in_eval_mode(reference), feature_function(reference) as of_float:
        names = lambda shape: token_names(reference, shape)  # noqa: E731
        how: dict[str, Any] = {"labelled": labelled, "by_token": by_token, "progress": progress, "partial": partial}
        if getattr(reference, "num_classes", None) == 0:
            return judge_features(of_float, model, loader, names, **how)
        back = unrotated(reference, model)
        with feature_function(model) as features:
            return judge_features(of_float, lambda images: back(features(images)), loader, names, **how)
