"""Blocks in order, each with its inputs in the quantized and in the float model.

Whoever walks along may change a block before going on: the next one's inputs come through what became of it. Memory is
three tensors of one block's activations for all images, whatever the depth. Where a block's output is not the next
one's input (Swin's stages), the prefix is computed again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qvit.errors import UsageError
from qvit.models.block_inputs import Inputs, attention_blocks, capture, same_input

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BlockPair:
    """A block of both models.

    Attributes:
        path: Its path.
        block: The quantized block.
        original: The float one.
        quantized: Inputs that come through the quantized blocks before it.
        exact: Inputs of the float model.
        target: What the float block makes of these.
    """

    path: str
    block: nn.Module
    original: nn.Module
    quantized: Inputs
    exact: Inputs
    target: Inputs

    def error(self) -> float:
        """The mean squared error of the block's output on quantized inputs, over the output's mean square."""
        return relative_error(self.quantized.through(self.block).x, self.target.x)


def relative_error(x: Tensor, target: Tensor) -> float:
    """Mean squared error over mean square."""
    return float((x - target).square().mean() / target.square().mean().clamp_min(1e-30))


def block_pairs(model: nn.Module, reference: nn.Module, batches: Iterable[Tensor], images: int) -> Iterator[BlockPair]:
    """The blocks of a calibrated model beside those of its float original.

    Blocks that take further inputs which differ by image (CaiT's class attention) are left out.

    Args:
        model: A calibrated model in eval mode.
        reference: The float model; must compute what `model` computes without quantizers.
        batches: Images, on the models' device; iterated more than once.
        images: How many of them take part.

    Raises:
        UsageError: If the model has no blocks of attention.
    """
    blocks = attention_blocks(model)
    if not blocks:
        raise UsageError(f"{type(model).__name__} has no blocks of attention to reconstruct")
    before: tuple[str, Inputs, Inputs] | None = None
    for path, block in blocks.items():
        pair = _inputs_of(path, model, reference, batches, images, before)
        if pair is None:
            _log.info("block '%s' takes inputs that differ by image: it is left as it is", path)
            before = None
            continue
        quantized, exact = pair
        original = reference.get_submodule(path)
        target = exact.through(original)
        yield BlockPair(path, block, original, quantized, exact, target)
        before = (path, quantized.through(block), target)


@torch.no_grad()
def _inputs_of(
    path: str,
    model: nn.Module,
    reference: nn.Module,
    batches: Iterable[Tensor],
    images: int,
    before: tuple[str, Inputs, Inputs] | None,
) -> tuple[Inputs, Inputs] | None:
    """Inputs of a block in the quantized and in the float model.

    They are the outputs of the block before where the model hands those on, else computed from the images.
    """
    if before is not None and (extra := same_input(reference, before[0], path, batches)) is not None:
        return before[1].with_extra(extra), before[2].with_extra(extra)
    pair = [capture(own, path, batches, images) for own in (model, reference)]
    return None if pair[0] is None or pair[1] is None else (pair[0], pair[1])
