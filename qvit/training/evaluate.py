"""Accuracy of a model on a set of images: top-1 and top-5 in percent, each image counted once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qvit.errors import QvitError


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], *, progress: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """Scores `model` in eval mode; its mode is restored.

    Args:
        model: Returns logits (B, classes).
        loader: Batches of images (B, ...) and class indices (B,).
        progress: Called with the number of images after each batch.

    Returns:
        `{"top1", "top5", "images"}`, in percent; with fewer than five classes top5 counts all of them.

    Raises:
        QvitError: If there are no images, or the logits are not finite.
    """
    was_training = model.training
    model.eval()
    correct: Tensor | None = None
    images = 0
    try:
        for batch, targets in loader:
            logits = model(batch)
            ranked = logits.topk(min(5, logits.shape[-1]), dim=-1).indices == targets.unsqueeze(-1)
            hits = torch.stack([ranked[:, 0].sum(), ranked.any(-1).sum(), (~torch.isfinite(logits)).any(-1).sum()])
            correct = hits if correct is None else correct + hits
            images += len(batch)
            if progress is not None:
                progress(images)
    finally:
        model.train(was_training)
    if correct is None:
        raise QvitError("no images to evaluate")
    top1, top5, broken = correct.tolist()
    if broken:
        raise QvitError(f"the model returned NaN or infinite logits for {broken} of {images} images")
    return {"top1": 100.0 * top1 / images, "top5": 100.0 * top5 / images, "images": images}
