"""Scores of a model on a set of images, each image counted once.

Top-1 and top-5 are shares of images with labels, in percent. Beside a reference, agreement is the share of images with
the same first answer, right or wrong, and divergence the mean of KL(p_reference || p) in nats: these need no labels.

With several processes each scores its part of the images (`eval_loader(..., rank, world_size)`), and the counts are
summed once, at the end. Parts need not be equal, and may be empty: no image is added to make them so.

What is counted may be kept in a file (`measure/partial.py`): the next call begins with the batch that comes after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn

from qvit.data.sampling import Passes
from qvit.errors import QvitError
from qvit.measure.partial import NOTHING_KEPT, Partial
from qvit.measure.probe import divergence_terms
from qvit.models.convert import in_eval_mode

#: A divergence is summed over processes as a whole number, like the counts beside it.
_PARTS_OF_A_NAT = 1 << 32


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    reference: nn.Module | None = None,
    labelled: bool = True,
    progress: Callable[[int], None] | None = None,
    reduce: Callable[[Tensor], Tensor] | None = None,
    partial: Partial = NOTHING_KEPT,
) -> dict[str, Any]:
    """Scores `model` in eval mode; its mode is restored.

    Args:
        model: Returns logits (B, classes).
        loader: Batches of images (B, ...) and class indices (B,).
        reference: Another model, such as the float one, that is scored on the same images.
        labelled: Whether the class indices are labels; if not, nothing is scored by them.
        progress: Called with the number of images after each batch, those of this process.
        reduce: Sums an int64 tensor on the model's device over processes, and returns the sum. It is called exactly
            once, also in a process without images.
        partial: Where an earlier call kept what it had counted, and this one does; then `loader` is one of
            `data.eval_loader`, which can leave out batches. For one process.

    Returns:
        `{"top1", "top5", "images"}`, in percent; with fewer than five classes top5 counts all of them. With a
        reference also `"top1_reference"`, `"agreement"` and `"divergence"`. Images that the loader left out because
        they could not be read are not among them; if there are any, `"skipped"` says how many.

    Raises:
        QvitError: If there are no images, most could not be read, or the logits are not finite.
    """
    models = [model] if reference is None else [model, reference]
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    hits = torch.zeros(5, dtype=torch.int64, device=device)
    distance = torch.zeros((), dtype=torch.float64, device=device)
    images = skipped = 0
    done, kept = partial.load()
    if done:
        cast(Passes, loader).set_epoch(0, done)
        hits, distance = kept["hits"].to(device), kept["distance"].to(device)
        images, skipped = kept["images"].tolist()

    def skipped_so_far() -> int:
        return skipped + getattr(loader, "skipped", 0)

    def counted() -> dict[str, Tensor]:
        return {"hits": hits, "distance": distance, "images": torch.tensor([images, skipped_so_far()])}

    with ExitStack() as modes:
        for one in models:
            modes.enter_context(in_eval_mode(one))
        for batch, targets in loader:
            logits = [one(batch) for one in models]
            answers = [own.topk(min(5, own.shape[-1]), dim=-1).indices for own in logits]
            ranked = [own == targets.unsqueeze(-1) for own in answers]
            broken = torch.stack([(~torch.isfinite(own)).any(-1) for own in logits]).any(0)
            same = answers[0][:, 0] == answers[-1][:, 0]
            found = (ranked[0][:, 0], ranked[0].any(-1), ranked[-1][:, 0], same, broken)
            hits += torch.stack([own.sum() for own in found]).to(device)
            if reference is not None:
                of_model, of_reference = (own.double().log_softmax(-1) for own in logits)
                distance += divergence_terms(of_reference, of_model).sum().to(device)
            images += len(batch)
            if progress is not None:
                progress(images)
            partial.save(getattr(loader, "passed", 0), counted)
    counts = torch.cat([hits, hits.new_tensor([images, skipped_so_far()])])
    if reference is not None:
        counts = torch.cat([counts, (distance * _PARTS_OF_A_NAT).round().long()[None]])
    if reduce is not None:
        counts = reduce(counts)
    *right, broken, images, skipped = counts[:7].tolist()
    if not images:
        raise QvitError("no images to evaluate" + (f": none of {skipped} can be read" if skipped else ""))
    if skipped > images:
        raise QvitError(f"of {images + skipped} images to evaluate {skipped} cannot be read")
    if broken:
        raise QvitError(f"the model returned NaN or infinite logits for {broken} of {images} images")
    names = ("top1", "top5") if reference is None else ("top1", "top5", "top1_reference", "agreement")
    scores: dict[str, Any] = {
        name: 100.0 * count / images
        for name, count in zip(names, right, strict=False)
        if labelled or not name.startswith("top")
    }
    if reference is not None:
        scores["divergence"] = max(0.0, int(counts[7]) / _PARTS_OF_A_NAT / images)  # zero but for rounding
    return scores | {"images": images} | ({"skipped": skipped} if skipped else {})
