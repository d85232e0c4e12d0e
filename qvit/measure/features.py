"""How near features are to others, such as those of a quantized model to the float model's: no labels, no softmax.

For f of the float model and q of the other one, one row per token t (models/features.py says what rows there are):

    cosine           f·q / (‖f‖·‖q‖), mean over images and tokens, and the least one of all; 1 where both are zero
    relative error   √(Σ ‖q - f‖² / Σ ‖f‖²), over images and tokens
    worst token      the t of the least mean cosine, with its place and name, where there are several
    neighbours       share of images whose nearest neighbour (largest cosine, among the other judged images) is the same
                     image by f as by q; with labels also the accuracy of a 1-nearest-neighbour classifier by either,
                     each image left out once (Wu et al., CVPR 2018, judge features so, by more neighbours)

An image's vector for the neighbours is its only row, the class token's, or the mean of all patches. Batches are added
one by one; what grows with the images is their vectors alone, and no more than `MOST_NEIGHBOURS` images are neighbours.

Where widths are chosen by the features' error, the loss is the cosine distance, mean over tokens of 1 - cosine. Its
Hessian at q = f is P/‖f‖², with P = I - f·fᵀ/‖f‖² the projection beside f. Random signs r give vectors u = P·r/‖f‖ with
E[u·uᵀ] = P/‖f‖², from which the squared gradients of `fisher` start in place of those of a softmax.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor

from qvit.data.sampling import Passes
from qvit.errors import QvitError
from qvit.measure.partial import NOTHING_KEPT, Partial
from qvit.models.features import CLASS_TOKEN, Features, token_rows

#: Images that are each other's neighbours, at most: the first ones.
MOST_NEIGHBOURS = 10_000
_CHUNK = 512


def cosines(reference: Tensor, found: Tensor) -> Tensor:
    """The cosine similarity of vectors (..., C); 1 where both are zero, 0 where one is: (...), float64."""
    a, b = reference.double(), found.double()
    lengths = a.norm(dim=-1) * b.norm(dim=-1)
    both = (a.norm(dim=-1) == 0) & (b.norm(dim=-1) == 0)
    similar = ((a * b).sum(-1) / lengths.clamp_min(1e-300)).clamp(-1, 1)
    return torch.where(both, torch.ones_like(similar), similar)


def cosine_distances(reference: Tensor, found: Tensor) -> Tensor:
    """The mean over tokens of 1 - cosine, by image: (B,), float64."""
    return 1 - cosines(token_rows(reference), token_rows(found)).mean(1)


def signed_features(features: Tensor, generator: torch.Generator) -> Tensor:
    """The vectors u above for features (B, ..., C): E[u·uᵀ] is the Hessian of `cosine_distances`; detached."""
    rows = features.detach().float()
    signs = (torch.randint(0, 2, rows.shape, generator=generator) * 2 - 1).to(rows)
    length = rows.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    unit = rows / length
    tokens = rows[0].numel() // rows.shape[-1]
    return ((signs - unit * (unit * signs).sum(-1, keepdim=True)) / (length * tokens**0.5)).to(features.dtype)


class FeatureScores:
    """Sums over batches, see the first lines of this file."""

    def __init__(self) -> None:
        self.images = 0
        self._least = 1.0
        self._cosines = self._errors = self._lengths = torch.zeros(0, dtype=torch.float64)
        self._vectors: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._classes: list[Tensor] = []
        self.names: list[str] = []

    def add(self, reference: Tensor, found: Tensor, targets: Tensor, names: list[str]) -> None:
        """Adds a batch.

        Args:
            reference, found: Features (B, ..., C) of both models.
            targets: Classes (B,), negative where there are none.
            names: Of the rows, the same for all batches.
        """
        if reference.shape != found.shape or (self.names and names != self.names):
            raise QvitError(
                f"features of shape {tuple(found.shape[1:])} cannot be compared with {tuple(reference.shape[1:])}"
            )
        self.names = names
        f, q = token_rows(reference).cpu(), token_rows(found).cpu()
        if not bool(torch.isfinite(f).all() and torch.isfinite(q).all()):
            raise QvitError("features are NaN or infinite")
        similar = cosines(f, q)
        self._least = min(self._least, float(similar.min()))
        sums = (similar, (q.double() - f.double()).square().sum(-1), f.double().square().sum(-1))
        fresh = not self.images
        self._cosines, self._errors, self._lengths = (
            own.sum(0) if fresh else before + own.sum(0)
            for before, own in zip((self._cosines, self._errors, self._lengths), sums, strict=True)
        )
        room = max(0, MOST_NEIGHBOURS - self.images)
        for kept, rows in zip(self._vectors, (f, q), strict=True):
            kept.append(self._of_images(rows[:room]).float())
        self._classes.append(targets[:room].cpu())
        self.images += len(f)

    def state(self, skipped: int) -> dict[str, Tensor]:
        """What was added so far, and the number of unreadable images, as tensors; see `restore`."""
        sums = {"cosines": self._cosines, "errors": self._errors, "lengths": self._lengths}
        vectors = {"reference": torch.cat(self._vectors[0]), "found": torch.cat(self._vectors[1])}
        counts = {"images": torch.tensor([self.images, skipped]), "classes": torch.cat(self._classes)}
        return {**sums, **vectors, **counts, "least": torch.tensor(self._least, dtype=torch.float64)}

    def restore(self, state: dict[str, Tensor]) -> int:
        """Goes on from an earlier `state`; returns the unreadable images of that time."""
        self._cosines, self._errors, self._lengths = (state[name] for name in ("cosines", "errors", "lengths"))
        self._vectors, self._classes = ([state["reference"]], [state["found"]]), [state["classes"]]
        self._least = float(state["least"])
        self.images, skipped = state["images"].tolist()
        return skipped

    def _of_images(self, rows: Tensor) -> Tensor:
        """One vector per image (B, C) from its rows (B, N, C)."""
        if CLASS_TOKEN in self.names:
            return rows[:, self.names.index(CLASS_TOKEN)]
        patches = [index for index, name in enumerate(self.names) if name.startswith("patch")]
        return rows[:, patches or slice(None)].mean(1)

    def record(self, *, by_token: bool = False) -> dict[str, Any]:
        """What was found, as plain data; shares in percent.

        Args:
            by_token: Whether the cosine and the relative error of every token are listed, too.
        """
        if not self.images:
            raise QvitError("no images to judge features by")
        mean = self._cosines / self.images
        errors = (self._errors / self._lengths.clamp_min(1e-300)).sqrt()
        worst = int(mean.argmin())
        told: dict[str, Any] = {
            "cosine": float(mean.mean()),
            "cosine_least": self._least,
            "relative_error": float((self._errors.sum() / self._lengths.sum().clamp_min(1e-300)).sqrt()),
            "tokens": len(mean),
            "worst_token": None,
            **self._neighbours(),
        }
        rows = [
            {"index": index, "name": name, "cosine": float(mean[index]), "relative_error": float(errors[index])}
            for index, name in enumerate(self.names)
        ]
        if len(mean) > 1:
            told["worst_token"] = rows[worst]
        return told | ({"by_token": rows} if by_token else {})

    def _neighbours(self) -> dict[str, Any]:
        vectors, classes = [torch.cat(own) for own in self._vectors], torch.cat(self._classes)
        told: dict[str, Any] = {"neighbours": None, "neighbour_images": len(classes)}
        if len(classes) < 2:
            return told
        of_reference, of_found = map(nearest_neighbours, vectors)
        told["neighbours"] = _percent(of_reference == of_found)
        if bool((classes >= 0).all()):
            told["knn_reference"], told["knn"] = (
                _percent(classes[nearest] == classes) for nearest in (of_reference, of_found)
            )
        return told


def nearest_neighbours(vectors: Tensor) -> Tensor:
    """The index of the other vector of the largest cosine, the first of equal ones: (N,) from (N, C) with N > 1."""
    unit = torch.nn.functional.normalize(vectors, dim=-1)
    found = []
    for start in range(0, len(unit), _CHUNK):
        near = unit[start : start + _CHUNK] @ unit.t()
        own = torch.arange(len(near))
        near[own, own + start] = -2
        found.append(near.argmax(-1))
    return torch.cat(found)


@torch.no_grad()
def judge_features(
    reference: Features,
    found: Features,
    loader: Iterable[tuple[Tensor, Tensor]],
    names: Callable[[tuple[int, ...]], list[str]],
    *,
    labelled: bool = True,
    by_token: bool = False,
    progress: Callable[[int], None] | None = None,
    partial: Partial = NOTHING_KEPT,
) -> dict[str, Any]:
    """Judges features on images.

    Args:
        reference, found: From images to features (B, ..., C), such as those of the float and of a quantized model.
        loader: Batches of images and classes.
        names: From the shape of features to the names of their rows, see `models.features.token_names`.
        labelled: Whether the classes are labels.
        by_token: See `FeatureScores.record`.
        progress: Called with the number of images after each batch.
        partial: Where an earlier call kept what it had found, and this one does; see `training.evaluate`.

    Returns:
        `FeatureScores.record`, with `images`, and `skipped` where some could not be read.

    Raises:
        QvitError: No images, most could not be read, or features that are not finite or of different shapes.
    """
    scores = FeatureScores()
    done, kept = partial.load()
    before = scores.restore(kept) if done else 0
    if done:
        cast(Passes, loader).set_epoch(0, done)
    for images, targets in loader:
        ours, theirs = found(images), reference(images)
        classes = targets if labelled else torch.full_like(targets, -1)
        scores.add(theirs, ours, classes, names(tuple(ours.shape)))
        if progress is not None:
            progress(scores.images)
        partial.save(getattr(loader, "passed", 0), lambda: scores.state(before + getattr(loader, "skipped", 0)))
    skipped = before + getattr(loader, "skipped", 0)
    if skipped > scores.images:
        raise QvitError(f"of {scores.images + skipped} images to judge features by {skipped} cannot be read")
    return scores.record(by_token=by_token) | {"images": scores.images} | ({"skipped": skipped} if skipped else {})


def _percent(same: Tensor) -> float:
    return 100.0 * float(same.double().mean())
