"""Bias correction: the mean error of every output channel is put into the bias.

Quantizing a layer's operands shifts the mean of its output. With z the float model's output of a layer and ẑ the
quantized model's, over calibration images and tokens, weighted by what a token is worth to the answer where that is
known (`token_weights.py`),

    b' = b + E[z] - E[ẑ]                (Nagel et al., ICCV 2019, section 4.2, with the mean measured on images)

Layers are corrected in the order of the computation, each seeing the corrected ones before it. That takes a single
pass: all images form one batch, and the hook that measures a layer's mean also corrects the output that it hands on.

Costs two forward passes; memory is that of one forward pass over all images at once, so they are limited. Layers
without a bias stay as they are. The first and the last layer are corrected too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from qvit.errors import QvitError, UsageError
from qvit.methods.ptq.images import OneSize
from qvit.methods.ptq.token_weights import Worth
from qvit.models.convert import Stage, in_eval_mode, quantizers_disabled, stage_of
from qvit.models.families import inspect_model

#: No more images than this take part; the mean of an output has settled long before.
MOST_IMAGES = 128


def corrected_layers(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers with quantized operands and a bias, by path."""
    paths = dict.fromkeys(name.rpartition(".")[0] for name in inspect_model(model).sites)
    found = {path: model.get_submodule(path) for path in paths}
    return {
        path: module
        for path, module in found.items()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None
    }


@torch.no_grad()
def correct_biases(
    model: nn.Module,
    batches: Iterable[Tensor],
    *,
    reference: nn.Module | None = None,
    worth: Mapping[str, Worth] = MappingProxyType({}),
) -> dict[str, float]:
    """Corrects the biases of a calibrated model, in place; its mode is restored.

    Args:
        model: A calibrated model.
        batches: Calibration images (B, channels, height, width) of one size, on its device; at most `MOST_IMAGES` are
            used.
        reference: The float model whose outputs are right; by default `model` without its quantizers.
        worth: Weights of the tokens of a layer's output, by path; tokens count alike where it says nothing.

    Returns:
        For each corrected layer the root mean square, over channels, of what was added to its bias.

    Raises:
        UsageError: If the model is not calibrated, or images are of several sizes.
        QvitError: If there are no images, or a mean is not finite; the layer is named.
    """
    if stage_of(model) < Stage.CALIBRATED:
        raise UsageError("bias correction comes after calibration: call qvit.calibrate(model, batches) first")
    images = _first(OneSize(batches, "bias correction"), MOST_IMAGES)
    layers, right, added = corrected_layers(model), {}, {}
    source = model if reference is None else reference

    def measure(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            right[path] = _channel_means(source.get_submodule(path), output, worth.get(path))

        return hook

    def correct(path: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            error = right[path] - _channel_means(module, output, worth.get(path))
            if not bool(torch.isfinite(error).all()):
                raise QvitError(f"layer '{path}': NaN or infinite outputs while its bias is corrected")
            layers[path].bias.add_(error)  # type: ignore[union-attr]
            added[path] = float(error.square().mean().sqrt())
            return output + (error.view(-1, 1, 1) if isinstance(module, nn.Conv2d) else error)

        return hook

    with quantizers_disabled(source):
        _run(source, images, {path: measure(path) for path in layers})
    _run(model, images, {path: correct(path) for path in layers if path in right})
    return added


def _run(model: nn.Module, images: Tensor, hooks: dict[str, Callable[..., Any]]) -> None:
    """One pass in eval mode with forward hooks on some modules."""
    with in_eval_mode(model), ExitStack() as stack:
        for path, hook in hooks.items():
            stack.enter_context(model.get_submodule(path).register_forward_hook(hook))
        model(images)


def _channel_means(module: nn.Module, output: Tensor, worth: Worth | None) -> Tensor:
    """Means per output channel: axis 1 of a convolution's output, the last axis of a linear layer's."""
    if isinstance(module, nn.Conv2d):
        return output.mean((0, 2, 3))
    rows = output.flatten(0, -2)
    if worth is None:
        return rows.mean(0)
    weights = worth.rows(len(rows))
    return weights @ rows / weights.sum()


def _first(batches: Iterable[Tensor], most: int) -> Tensor:
    """The first images of the batches as one tensor."""
    taken: list[Tensor] = []
    count = 0
    for batch in batches:
        taken.append(batch[: most - count])
        count += len(taken[-1])
        if count >= most:
            break
    if not count:
        raise QvitError("no images to correct biases with: pass at least one batch of training images")
    return torch.cat(taken)
