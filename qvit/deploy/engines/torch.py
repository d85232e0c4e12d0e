"""The integer form of a packed model in PyTorch, by its fastest exact products (`deploy/integer/torch.py`)."""

from __future__ import annotations

import torch

from qvit.deploy.engines.base import register_engine
from qvit.deploy.engines.reference import ReferenceEngine
from qvit.deploy.file.artifact import Artifact
from qvit.deploy.integer.torch import TorchArithmetic
from qvit.deploy.packages import has_compiler


@register_engine("torch", order=30, any_size=True, devices=("cpu", "cuda"))
class TorchEngine(ReferenceEngine):
    """The integer form with fast exact products; compiled on the first call, by default where a compiler is there."""

    name = "torch"

    def __init__(self, artifact: Artifact, threads: int | None, *, compiled: bool | None = None) -> None:
        arithmetic = TorchArithmetic()
        self._take(artifact, arithmetic, threads)
        unit = "int8 kernels" if arithmetic.int8 else "float32 units that are exact for these sums"
        self.arithmetic = f"{self.arithmetic}, by {unit}"
        if has_compiler() if compiled is None else compiled:
            self.forward = torch.compile(self.module)
