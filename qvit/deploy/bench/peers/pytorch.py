"""PyTorch as a peer: the float model, eager and compiled, in fp32 and bf16.

In bf16 the images are rounded within the time that is measured. torch.compile has its default backend, and compiles for
one shape; on CUDA its mode records CUDA graphs, as our engine does.
"""

from __future__ import annotations

import copy
import functools

import torch
from torch import Tensor

from qvit.deploy.bench.peers.base import Material, Prepared, Runner, peer, without_gradients
from qvit.tensors import total_bytes


def pytorch(material: Material, *, precision: str, dtype: torch.dtype, compiled: bool) -> Prepared:
    """The model in this type, for which its weights are converted once."""
    here = dtype is torch.float32 and material.device == "cpu"
    model = material.model if here else copy.deepcopy(material.model).to(material.device, dtype)
    mode = None if material.device == "cpu" else "reduce-overhead"

    def start(_batch: int) -> Runner:
        run = torch.compile(model, dynamic=False, mode=mode) if compiled else model

        def answer(images: Tensor) -> Tensor:
            return run(images.to(dtype)).float()

        return without_gradients(answer)

    how = "compiled" if compiled else "eager"
    return Prepared(start, f"{precision}, {how}", total_bytes(model.state_dict().values()))


for _engine, _compiled in (("pytorch", False), ("pytorch-compiled", True)):
    for _precision, _dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        peer(_engine, _precision, compiler=_compiled, order=10, devices=("cpu", "cuda"))(
            functools.partial(pytorch, precision=_precision, dtype=_dtype, compiled=_compiled)
        )
