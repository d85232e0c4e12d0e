"""Weights of all blocks are rounded for the inputs that they will really have, layer after layer.

In the order of the computation, with X the input of a layer in the float model and X̂ what arrives through everything
that is quantized before it:

    1.  the scale of every row, and rounding with feedback, by the moments E[X̂ᵀX̂]                    (`rounding.py`)
    2.  b* = b + W·E[X] - Ŵ·E[X̂]: the output has the float model's mean

All moments are centred, because the bias is free, and weighted by what a token is worth to the answer
(`token_weights.py`). The weight that would be best in float, given X̂, is not taken: a regression on inputs with errors
shrinks, and what shrinks in every layer is gone after twelve (on DeiT-T at 4 bits it nearly doubles the divergence).

Closed form, no gradients: per layer a few products of tokens and channels. Memory is that of one block's activations
for all images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qvit.errors import QvitError, UsageError
from qvit.methods.ptq.block_pairs import BlockPair, block_pairs
from qvit.methods.ptq.images import OneSize, Progress
from qvit.methods.ptq.rounding import cost_with_feedback, damped, round_with_feedback, row_factors
from qvit.methods.ptq.token_weights import Worth
from qvit.models.block_inputs import attention_blocks
from qvit.models.convert import Stage, in_eval_mode, stage_of
from qvit.models.layers import QuantLinear, QuantQKV, quantizer_at, weight_parts

#: What is added to the diagonal of the moments, in units of its mean.
DAMPING = 0.01
LAYERS = (QuantLinear, QuantQKV)


@torch.no_grad()
def round_layers(
    model: nn.Module,
    reference: nn.Module,
    batches: Iterable[Tensor],
    images: int,
    worth: Mapping[str, Worth],
    progress: Progress | None = None,
) -> None:
    """Rounds the linear layers of all blocks of a calibrated model, in place; its mode is restored.

    Args:
        model: A calibrated model.
        reference: The float model that `model` was made of: the same weights, not only the same answers.
        batches: Calibration images of one size, on the models' device; iterated more than once.
        images: How many of them take part.
        worth: Of the layers' outputs; layers without stay as they are.
        progress: Called after each block with a text, the blocks done, and all of them.

    Raises:
        UsageError: If the model is not calibrated or has no blocks of attention, or images are of several sizes.
        QvitError: If activations are not finite; the layer is named.
    """
    if stage_of(model) < Stage.CALIBRATED:
        raise UsageError("rounding comes after calibration: call qvit.calibrate(model, batches) first")
    with in_eval_mode(model):
        pairs = block_pairs(model, reference, OneSize(batches, "rounding"), images)
        for done, pair in enumerate(pairs, 1):
            _round_block(pair, worth)
            if progress is not None:
                progress("rounding weights", done, len(attention_blocks(model)), "")


def _round_block(pair: BlockPair, worth: Mapping[str, Worth]) -> None:
    """Rounds the layers of a block in one pass: each hands on what it computes with its new weight."""
    exact: dict[str, Tensor] = {}
    layers = {
        name: layer
        for name, layer in pair.block.named_modules()
        if type(layer) in LAYERS and f"{pair.path}.{name}" in worth
    }

    def keep(name: str, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        exact[name] = inputs[0]

    def fit(name: str, layer: Any, inputs: tuple[Tensor, ...]) -> None:
        path = f"{pair.path}.{name}"
        original: Any = pair.original.get_submodule(name)
        _round_layer(path, layer, original, exact.pop(name), inputs[0], worth[path])

    with ExitStack() as stack:
        for name in layers:
            stack.enter_context(pair.original.get_submodule(name).register_forward_pre_hook(partial(keep, name)))
        pair.exact.call(pair.original, pair.exact.x)
    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.enter_context(layer.register_forward_pre_hook(partial(fit, name)))
        pair.quantized.call(pair.block, pair.quantized.x)


def _round_layer(
    path: str, layer: QuantLinear, original: nn.Linear, exact: Tensor, found: Tensor, worth: Worth
) -> None:
    """Rounds a layer that gets `found` where the float model's gets `exact`."""
    quantizer = quantizer_at(layer, "input")
    found = found if quantizer is None else quantizer(found)
    if exact.shape != found.shape:
        raise QvitError(f"layer '{path}': its input has other tokens than in the float model")
    if not bool(torch.isfinite(found).all()):
        raise QvitError(f"layer '{path}': NaN or infinite inputs")
    exact, found = exact.flatten(0, -2), found.flatten(0, -2)
    weights = worth.rows(len(exact))
    share = (weights / weights.sum()).unsqueeze(1)
    mean = (found * share).sum(0)
    right = original((exact * share).sum(0))
    found = (found - mean) * share.sqrt()
    _round_weight(layer, found.t() @ found)
    if layer.bias is not None:
        layer.bias.copy_(right - layer.quantized_weight() @ mean)


def _round_weight(layer: QuantLinear, moments: Tensor) -> None:
    """Puts a layer's weight on its grid, with scales chosen again; parts on other than plain grids stay as they are."""
    moments = damped(moments, DAMPING)
    for leaf, part in weight_parts(layer).items():
        quantizer = quantizer_at(layer, leaf)
        if quantizer is None or not quantizer.rounds_only or not quantizer.spec.symmetric:
            continue

        def spread_out(number: Tensor, quantizer: Any = quantizer, part: Tensor = part) -> Tensor:
            return number.expand(quantizer.view(part).shape).reshape(part.shape)

        low, high = map(spread_out, quantizer.quant_range())
        scale, _ = quantizer.grid()
        if scale.numel() == len(part):
            factors = row_factors(part, spread_out(scale), low, high, moments)
            quantizer.restore({"scale": scale * factors.view_as(scale)})
        part.copy_(round_with_feedback(part, spread_out(quantizer.grid()[0]), low, high, moments))


def rounded_layers(model: nn.Module, sites: Iterable[str]) -> dict[str, str]:
    """The linear layers of a float model's blocks of attention, by the sites of their weights."""
    names = list(sites)
    blocks = {name.rpartition(".")[0].rpartition(".")[0] for name in names if name.endswith(".probs")}
    inside = tuple(f"{block}." for block in blocks if block)
    weights = {name: name.rpartition(".")[0] for name in names if name.endswith("weight") and name.startswith(inside)}
    return {name: path for name, path in weights.items() if isinstance(model.get_submodule(path), nn.Linear)}


@torch.no_grad()
def damage_left(model: nn.Module, layers: Iterable[str], batches: Iterable[Tensor]) -> dict[str, float]:
    """By layer, the expected cost of rounding its weight as here, over that of rounding to nearest with its bias as is.

    What the bias takes back and what the feedback saves does not depend on the width: both costs are moments of the
    inputs times the mean square of a rounding error.

    Args:
        model: A float model, in eval mode.
        layers: Paths of linear layers.
        batches: Calibration images, on the model's device.
    """
    squares: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    count: Counter[str] = Counter()

    def add(path: str, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].flatten(0, -2)
        squares[path] = squares.get(path, 0) + x.t() @ x
        sums[path] = sums.get(path, 0) + x.sum(0)
        count[path] += len(x)

    with ExitStack() as stack:
        for path in layers:
            stack.enter_context(model.get_submodule(path).register_forward_pre_hook(partial(add, path)))
        for batch in batches:
            model(batch)
    found = {}
    for path, total in squares.items():
        mean = sums[path] / count[path]
        moments = total / count[path]
        centred = damped(moments - torch.outer(mean, mean), DAMPING)
        found[path] = min(1.0, float(cost_with_feedback(centred) / moments.trace().clamp_min(1e-30)))
    return found
