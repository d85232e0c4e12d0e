"""The engine `cuda`: a packed model in Triton kernels on an NVIDIA GPU (`deploy/cuda/`).

Each batch shape is recorded as a CUDA graph when it comes first, and started as a whole after that. A graph keeps all
memory of its pass, so only those of the latest `MOST_GRAPHS` shapes are kept. The engine is never chosen by itself:
name it. With `TRITON_INTERPRET=1` the kernels run in Triton's interpreter on the CPU, where tests compare them with the
reference.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import torch
from torch import Tensor

from qvit.deploy.engines.base import register_engine
from qvit.deploy.file.artifact import Artifact
from qvit.deploy.integer.reference import integer_form, report_in_words, report_of
from qvit.deploy.integer.simulated import require_codes, require_float_functions
from qvit.deploy.integer.torch import TorchArithmetic
from qvit.errors import UsageError, first_line

#: Shapes of batches that have a graph at a time.
MOST_GRAPHS = 8
T = TypeVar("T")


class Latest(Generic[T]):
    """What was made for the latest keys.

    Args:
        most: How many are kept; the one that was asked for longest ago goes before another one is made.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._kept: OrderedDict[Hashable, T] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """What is kept for `key`, or else made now."""
        if key not in self._kept:
            while len(self._kept) >= self.most:
                self._kept.popitem(last=False)
            self._kept[key] = make()
        self._kept.move_to_end(key)
        return self._kept[key]


@register_engine("cuda", needs=("triton",), order=35, devices=("cuda",))
class CudaEngine:
    """A model on one GPU.

    Args:
        artifact: The model.
        threads: Of PyTorch, for what is done on the CPU.
        device: `cuda`, `cuda:1`; `cpu` in Triton's interpreter. None for the first GPU.
        graphs: Whether batches are recorded as CUDA graphs.
    """

    name = "cuda"

    def __init__(
        self, artifact: Artifact, threads: int | None, *, device: str | None = None, graphs: bool = True
    ) -> None:
        from qvit.deploy.cuda.form import attentions_taken, cuda_form, kernels_in_words
        from qvit.deploy.cuda.operators import interpreted, sums_are_exact

        if not torch.cuda.is_available() and not interpreted():
            raise UsageError("engine 'cuda' needs a CUDA device, and PyTorch finds none: take the engine 'native'")
        if threads is not None:
            torch.set_num_threads(threads)
        self.device = torch.device(device or ("cpu" if interpreted() else "cuda"))
        try:
            exact = sums_are_exact(self.device)
        except Exception as error:  # a driver, a device or a compiler that Triton does not know
            raise UsageError(f"engine 'cuda' cannot run its kernels on {self.device}: {first_line(error)}") from error
        if not exact:
            raise UsageError(f"engine 'cuda' is not for {self.device}: products of the largest codes are wrong there")
        model = artifact.model()
        require_codes(model)
        require_float_functions(model, "engine 'cuda'")
        form = integer_form(model, TorchArithmetic(int8=False), artifact.integers)
        report = report_of(form)
        self.module = cuda_form(form).to(self.device)
        report |= attentions_taken(self.module)
        self.artifact = artifact
        self.arithmetic = f"{report_in_words(report)}, {kernels_in_words(self.module)}"
        self.records = graphs and self.device.type == "cuda"
        self._recorded: Latest[Callable[[Tensor], Tensor]] = Latest(MOST_GRAPHS)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        here = images.to(self.device, torch.float32)
        if not self.records:
            return self.module(here).to(images.device)
        run = self._recorded.get(here.shape, lambda: self._record(here))
        return run(here).to(images.device)

    def _record(self, images: Tensor) -> Callable[[Tensor], Tensor]:
        """The model for batches of one shape as a graph; kernels are compiled and libraries started before."""
        given, stream = images.clone(), torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.module(given)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            answer = self.module(given)

        def run(batch: Tensor) -> Tensor:
            given.copy_(batch)
            graph.replay()
            return answer.clone()  # the next batch overwrites it

        return run
