"""The integer form of a packed model in PyTorch, by the reference arithmetic: every other engine equals its sums."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qvit.deploy.engines.base import register_engine
from qvit.deploy.file.artifact import Artifact
from qvit.deploy.integer.arithmetic import Arithmetic
from qvit.deploy.integer.reference import arithmetic_in_words, integer_form
from qvit.models.sizes import check_size


@register_engine("reference", order=40, any_size=True, devices=("cpu", "cuda"))
class ReferenceEngine:
    """The integer form in PyTorch, one operation after the other; on the device of the images."""

    name = "reference"

    def __init__(self, artifact: Artifact, threads: int | None) -> None:
        self._take(artifact, Arithmetic(), threads)

    def _take(self, artifact: Artifact, arithmetic: Arithmetic, threads: int | None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.artifact, self.device = artifact, torch.device("cpu")
        self.module = integer_form(artifact.model(), arithmetic, artifact.integers)
        self.arithmetic = arithmetic_in_words(self.module)
        self.forward: Callable[[Tensor], Tensor] = self.module

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        check_size(self.module, images.shape[-2:])
        if images.device != self.device:
            self.module.to(images.device)
            self.device = images.device
        return self.forward(images.float())
