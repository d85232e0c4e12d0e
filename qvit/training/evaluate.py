"""Accuracy of a model on a set of images: top-1 and top-5 in percent, each image counted once.

With several processes each scores its part of the images (`eval_loader(..., rank, world_size)`), and the counts are
summed once, at the end. Parts need not be equal, and may be empty: no image is added to make them so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qvit.errors import QvitError
from qvit.models.convert import in_eval_mode


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    progress: Callable[[int], None] | None = None,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Any]:
    """Scores `model` in eval mode; its mode is restored.

    Args:
        model: Returns logits (B, classes).
        loader: Batches of images (B, ...) and class indices (B,).
        progress: Called with the number of images after each batch, those of this process.
        reduce: Sums an int64 tensor on the model's device over processes, and returns the sum. It is called exactly
            once, also in a process without images.

    Returns:
        `{"top1", "top5", "images"}`, in percent; with fewer than five classes top5 counts all of them. Images that the
        loader left out because they could not be read are not among them; if there are any, `"skipped"` says how many.

    Raises:
        QvitError: If there are no images, most could not be read, or the logits are not finite.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    correct = torch.zeros(3, dtype=torch.int64, device=device)
    images = 0
    with in_eval_mode(model):
        for batch, targets in loader:
            logits = model(batch)
            ranked = logits.topk(min(5, logits.shape[-1]), dim=-1).indices == targets.unsqueeze(-1)
            hits = torch.stack([ranked[:, 0].sum(), ranked.any(-1).sum(), (~torch.isfinite(logits)).any(-1).sum()])
            correct += hits.to(device)
            images += len(batch)
            if progress is not None:
                progress(images)
    counts = torch.cat([correct, correct.new_tensor([images, getattr(loader, "skipped", 0)])])
    if reduce is not None:
        counts = reduce(counts)
    top1, top5, broken, images, skipped = counts.tolist()
    if not images:
        raise QvitError("no images to evaluate" + (f": none of {skipped} can be read" if skipped else ""))
    if skipped > images:
        raise QvitError(f"of {images + skipped} images to evaluate {skipped} cannot be read")
    if broken:
        raise QvitError(f"the model returned NaN or infinite logits for {broken} of {images} images")
    scores = {"top1": 100.0 * top1 / images, "top5": 100.0 * top5 / images, "images": images}
    return scores | ({"skipped": skipped} if skipped else {})
