"""Distillation: what a student learns from a teacher, while it trains.

    soft    T²·CE(student / T, softmax(teacher / T))      Hinton, Vinyals and Dean 2015; T = 1 by default
    hard    CE(student, argmax teacher)                   Touvron et al., ICML 2021 (DeiT), section 3

    loss = (1 - w)·CE(labels) + w·(one of the two)        w = `distill`

    features    ‖q - f‖² / ‖f‖², mean over images and tokens      Romero et al., ICLR 2015 (FitNets), eq. 3: hints

The last one is added where features are learned, with a weight of its own (`feature_loss`): q of the student, f of the
float model, in front of the classifier or as the answer of a model that has none. There it is the whole loss, and no
labels are needed. FitNets' squared error is divided by the squared length of each f, so that tokens and models of other
sizes count alike; for small errors it is twice the cosine distance beside f, and it keeps the length, too.

The teacher sees the student's batch, mixed and augmented as it is. By default it is the float model that quantization
started from. Another one may be any timm model: its own mean and deviation are put in place of the student's, and
images are resized where it takes another size. It stays in float and in eval mode, and costs a forward pass per step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qvit.errors import UsageError


class Teacher(nn.Module):
    """A model that is asked for logits and never trained.

    Args:
        model: Returns logits (B, classes).
        student_data: timm's data configuration under which the batches were made.
        own_data: That of the teacher; None if it is the same.
        num_classes: Classes of the student.
    """

    factor: Tensor | None
    shift: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        *,
        student_data: Mapping[str, Any] | None = None,
        own_data: Mapping[str, Any] | None = None,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        classes = getattr(model, "num_classes", num_classes)
        if num_classes is not None and classes != num_classes:
            raise UsageError(f"the teacher has {classes} classes, the student {num_classes}: they must be the same")
        self.model = model.eval().requires_grad_(False)
        self.size: tuple[int, ...] | None = None
        self.register_buffer("factor", None)
        self.register_buffer("shift", None)
        if student_data is not None and own_data is not None:
            require_same_channels(student_data, own_data)
            mean, std, own_mean, own_std = (
                torch.tensor(values).view(1, -1, 1, 1)
                for values in (student_data["mean"], student_data["std"], own_data["mean"], own_data["std"])
            )
            if not (torch.equal(mean, own_mean) and torch.equal(std, own_std)):
                self.factor, self.shift = std / own_std, (mean - own_mean) / own_std
            if tuple(student_data["input_size"][1:]) != tuple(own_data["input_size"][1:]):
                self.size = tuple(own_data["input_size"][1:])

    def train(self, mode: bool = True) -> Teacher:
        """Stays in eval mode, whatever is asked."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes), float32, for a batch as the student sees it."""
        if self.factor is not None and self.shift is not None:
            images = images * self.factor + self.shift
        if self.size is not None:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True)
        return self.model(images).float()


def require_same_channels(student_data: Mapping[str, Any], own_data: Mapping[str, Any]) -> None:
    """Raises UsageError unless student and teacher, of these data configurations, take images of the same channels."""
    student, teacher = student_data["input_size"][0], own_data["input_size"][0]
    if student != teacher:
        raise UsageError(f"the teacher takes images of {teacher} channel(s), the student of {student}")


def feature_loss(features: Tensor, taught: Tensor) -> Tensor:
    """The loss of a student with `features` (B, ..., C) where the float model has `taught`; a scalar."""
    squares = (features - taught).square().sum(-1)
    return (squares / taught.square().sum(-1).clamp_min(1e-12)).mean()


def distillation_loss(logits: Tensor, taught: Tensor, kind: str = "soft", temperature: float = 1.0) -> Tensor:
    """The loss of a student that gave `logits` where the teacher gave `taught`, both (B, classes); a scalar."""
    if kind == "hard":
        return F.cross_entropy(logits, taught.argmax(-1))
    soft = (taught / temperature).softmax(-1)
    return temperature**2 * F.cross_entropy(logits / temperature, soft)
