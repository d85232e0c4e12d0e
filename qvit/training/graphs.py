"""A model's forward and backward pass as CUDA graphs.

A quantized ViT is thousands of small kernels, and starting them from Python takes several times as long as they run. A
graph records them once, with their memory, and starts them all at a time (`torch.cuda.make_graphed_callables`). Values
are those of the same kernels. Widths and scales are read on the device, so they may move; what is frozen, calibrated or
replaced needs another graph: the loop makes one whenever the trained parameters change.

Loss, penalty and optimizer stay outside. A model whose modules have hooks is looked at from outside, which a graph
would not show: it runs as it is, and so does a batch of another shape.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from qvit.errors import first_line
from qvit.quantizers.base import has_hooks

Around = Callable[[], AbstractContextManager[object]]
_log = logging.getLogger(__name__)


class GraphedModel:
    """Calls a model through graphs that are recorded at the first batch.

    Args:
        model: On a CUDA device, in the mode and with the parameters that it will be trained in. It is left as it is:
            calls to it, as in an evaluation, do not go through the graphs.
        around: Makes the context that the model runs in.
    """

    def __init__(self, model: nn.Module, around: Around = nullcontext) -> None:
        self.model, self.within = model, Within(model, around)
        self.graphed: Callable[[Tensor], Tensor] | None = None
        self.shape: tuple[int, ...] | None = None
        self.training = model.training

    def __call__(self, batch: Tensor) -> Tensor:
        if self.shape is None:
            self._record(batch)
        same = tuple(batch.shape) == self.shape and self.model.training == self.training and torch.is_grad_enabled()
        return self.graphed(batch) if self.graphed is not None and same else self.within(batch)

    def _record(self, batch: Tensor) -> None:
        self.shape, self.training = tuple(batch.shape), self.model.training
        if any(has_hooks(module) for module in self.model.modules()):
            return
        try:
            record: Any = torch.cuda.make_graphed_callables  # its types leave out what it returns for a module
            self.graphed = record(_Shell(self.within), (batch.clone(),), allow_unused_input=True)
        except Exception as error:  # something in the model waits for the device, or its memory is full
            _log.warning("no CUDA graphs, so steps take longer: %s", first_line(error))


class Within:
    """Calls a model within a context.

    Args:
        model: What is called.
        around: Makes the context.
    """

    def __init__(self, model: nn.Module, around: Around) -> None:
        self.model, self.around = model, around

    def __call__(self, batch: Tensor) -> Tensor:
        with self.around():
            return self.model(batch)


class _Shell(nn.Module):
    """A module whose `forward` may be replaced."""

    def __init__(self, within: Within) -> None:
        super().__init__()
        self.model, self.within = within.model, within

    def forward(self, batch: Tensor) -> Tensor:
        return self.within(batch)


def can_be_graphed(device: str, *, alone: bool, accumulate: int) -> bool:
    """Whether a run's steps are the same kernels on the same memory: on CUDA, in one process, without micro-batches.

    Micro-batches share quantized weights, processes exchange gradients while they are computed.
    """
    return device.startswith("cuda") and alone and accumulate == 1
