"""What proxies share that look at layers' outputs alone: the outputs of one float pass, and one worth per layer.

A layer is the module that a site belongs to; q, k, v, probabilities and heads' outputs belong to their attention
module. All operands of a layer, and all of their heads, have the layer's worth.

    Ω(b) = (b_max - b) · worth

is what an answer is short of all layers at the largest width, so that the least Ω is the largest Σ b · worth.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from qvit.errors import QvitError
from qvit.measure.metric import Task
from qvit.measure.table import Table


def outputs_by_layer(task: Task) -> Iterator[tuple[int, dict[str, list[Tensor]]]]:
    """For each batch the number of images, and the outputs of all calls of each layer, in the order of the calls.

    Raises QvitError for a layer that no input reaches.
    """
    model, probe = task.probe.model, task.probe
    paths = dict.fromkeys(site.rpartition(".")[0] for site in probe.quantizers)
    now: dict[str, list[Tensor]] = {}
    with ExitStack() as stack:
        for path in paths:

            def keep(_module: nn.Module, _inputs: Any, output: Tensor, path: str = path) -> None:
                now.setdefault(path, []).append(output)

            stack.enter_context(model.get_submodule(path).register_forward_hook(keep))
        for number, batch in enumerate(task.batches, 1):
            now.clear()
            model(batch)
            if missing := [path for path in paths if path not in now]:
                raise QvitError(
                    f"metric '{task.metric}': no input reached '{missing[0]}', whose operands are quantized"
                )
            yield len(batch), dict(now)
            task.progress(number, len(task.batches))


def as_matrices(module: nn.Module, output: Tensor) -> Tensor:
    """A module's output as one matrix (tokens, channels) per image: (B, C, H, W) of a convolution, else (B, ..., C)."""
    if isinstance(module, nn.Conv2d):
        return output.flatten(2).mT
    return output.reshape(len(output), -1, output.shape[-1])


def table_by_layer(task: Task, worth: Mapping[str, float]) -> Table:
    """Ω by site from the worth of each layer: (heads, widths)."""
    if not all(math.isfinite(value) for value in worth.values()):
        raise QvitError(f"metric '{task.metric}': features are NaN or infinite")
    short = torch.tensor([task.widths[-1] - width for width in task.widths], dtype=torch.float64)
    return {
        site: (worth[site.rpartition(".")[0]] * short).expand(task.probe.heads(site), -1).numpy().copy()
        for site in task.probe.quantizers
    }
