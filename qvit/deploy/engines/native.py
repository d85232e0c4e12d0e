"""The integer form of a Vision Transformer in C++ (`deploy/native/`): the products and the glue of the smallest models.

It is not the default yet: it is asked for by name, `qvit.load(file, engine="native")`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qvit.deploy.engines.base import register_engine
from qvit.deploy.file.artifact import Artifact
from qvit.deploy.integer.reference import integer_form, report_of
from qvit.deploy.native.vit import NativeVit


@register_engine("native", order=50)
class NativeEngine:
    """A Vision Transformer in C++; the library is compiled when the first one is made."""

    name = "native"

    def __init__(self, artifact: Artifact, threads: int | None, *, form: str | None = None) -> None:
        model = integer_form(artifact.model(), None, artifact.integers)
        self.artifact, self.model = artifact, NativeVit(model, threads, form)
        self.arithmetic = f"all {len(report_of(model))} products in integers, {self.model.form}"

    def __call__(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self.model(images.detach().cpu().float().numpy()))
