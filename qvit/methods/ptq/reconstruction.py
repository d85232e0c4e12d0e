"""Block reconstruction: each transformer block learns to answer like its float original, on calibration images.

    min over W, b, s, β of a block     E[ F ∘ (B̂(x̃) - B(x))² ]                    block by block, in order

B is the float block on float inputs x, B̂ the quantized one on inputs x̃ that come through the quantized blocks before
it (Li et al., BRECQ, ICLR 2021). Weights are trained through the straight-through estimator together with scales,
offsets, biases and norms, so nothing has to be merged afterwards. Each element of x̃ is the float value with
probability `float_inputs` (QDrop, Wei et al., ICLR 2022, at a block's input): the block sees errors without being
fitted to these alone. F is 1, or with `fisher` the squared gradient of the float model's cross-entropy with its own
answer, averaged over images.

Adam, cosine to zero. Steps are in units of the grid: a weight moves at `weight_lr` times its scale per step, a scale at
`scale_lr` times itself; so the same options serve every width.

Memory is three tensors of one block's activations for all images (x̃, x and B(x)), whatever the depth. Where a block's
output is not the next one's input (Swin's stages), the prefix is computed again. Blocks that take further inputs which
differ by image (CaiT's class attention) stay as they are.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qvit.errors import QvitError, UsageError
from qvit.models.block_inputs import Inputs, attention_blocks, capture, same_input
from qvit.models.convert import Stage, in_eval_mode, stage_of
from qvit.quantizers import quantizers_of

_log = logging.getLogger(__name__)
Progress = Callable[[str, int, int, float], None]


@dataclass(frozen=True)
class ReconstructOptions:
    """Options of `reconstruct`.

    Attributes:
        steps: Optimizer steps per block.
        images: How many of the calibration images take part.
        batch_size: Images per step.
        weight_lr: Step of a weight in units of its scale.
        scale_lr: Step of a scale or offset relative to the scale.
        lr: Step of biases and of the normalisation's parameters, absolute.
        float_inputs: Probability that an element of the block's input is the float model's.
        fisher: Weights the error by the squared gradient of the float model's own answer.
        seed: Chooses batches and mixed inputs.
    """

    steps: int = 2000
    images: int = 1024
    batch_size: int = 16
    weight_lr: float = 0.01
    scale_lr: float = 0.003
    lr: float = 2e-4
    float_inputs: float = 0.5
    fisher: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.images, self.batch_size) < 1:
            raise UsageError("steps, images and batch size of a reconstruction must be at least 1")
        if min(self.weight_lr, self.scale_lr, self.lr) < 0 or not 0 <= self.float_inputs <= 1:
            raise UsageError("learning rates must not be negative, and float_inputs must lie between 0 and 1")


@dataclass(frozen=True)
class BlockError:
    """The mean squared error of a block's output relative to the output's mean square, before and after."""

    block: str
    before: float
    after: float


def reconstruct(
    model: nn.Module,
    reference: nn.Module,
    batches: Iterable[Tensor],
    options: ReconstructOptions = ReconstructOptions(),
    *,
    progress: Progress | None = None,
) -> list[BlockError]:
    """Reconstructs all blocks of a calibrated model, in place; its mode is restored.

    Args:
        model: A calibrated model.
        reference: The float model; must compute what `model` computes without quantizers.
        batches: Calibration images, on the models' device. Iterated more than once: a list, or anything that yields the
            same images each time.
        options: Steps, images, learning rates.
        progress: Called after each step with the block, the step, the number of steps, and the loss.

    Returns:
        The error of each block that was reconstructed, on quantized inputs, before and after.

    Raises:
        UsageError: If the model is not calibrated or has no blocks of attention.
        QvitError: If a loss is not finite; the block is named.
    """
    if stage_of(model) < Stage.CALIBRATED:
        raise UsageError("reconstruction comes after calibration: call qvit.calibrate(model, batches) first")
    blocks = attention_blocks(model)
    if not blocks:
        raise UsageError(f"{type(model).__name__} has no blocks of attention to reconstruct")
    errors = []
    originals = {path: reference.get_submodule(path) for path in blocks}
    fisher = fisher_weights(reference, list(blocks), batches, options.images) if options.fisher else {}
    generator = torch.Generator().manual_seed(options.seed)
    before: tuple[str, Inputs, Inputs] | None = None
    with in_eval_mode(model):
        for path, block in blocks.items():
            pair = _inputs_of(path, model, reference, batches, options, before)
            if pair is None:
                _log.info("block '%s' takes inputs that differ by image: it is not reconstructed", path)
                before = None
                continue
            quantized, exact = pair
            target = exact.through(originals[path])
            error = relative_error(quantized.through(block).x, target.x)
            _fit(path, block, quantized, exact, target, fisher.get(path), options, generator, progress)
            quantized = quantized.through(block)
            errors.append(BlockError(path, error, relative_error(quantized.x, target.x)))
            before = (path, quantized, target)
    return errors


def relative_error(x: Tensor, target: Tensor) -> float:
    """Mean squared error over mean square."""
    return float((x - target).square().mean() / target.square().mean().clamp_min(1e-30))


def _inputs_of(
    path: str,
    model: nn.Module,
    reference: nn.Module,
    batches: Iterable[Tensor],
    options: ReconstructOptions,
    before: tuple[str, Inputs, Inputs] | None,
) -> tuple[Inputs, Inputs] | None:
    """Inputs of a block in the quantized and in the float model.

    They are the outputs of the block before where the model hands those on, else computed from the images.
    """
    if before is not None and (extra := same_input(reference, before[0], path, batches)) is not None:
        return before[1].with_extra(extra), before[2].with_extra(extra)
    pair = [capture(own, path, batches, options.images) for own in (model, reference)]
    return None if pair[0] is None or pair[1] is None else (pair[0], pair[1])


def _fit(
    path: str,
    block: nn.Module,
    quantized: Inputs,
    exact: Inputs,
    target: Inputs,
    weight: Tensor | None,
    options: ReconstructOptions,
    generator: torch.Generator,
    progress: Progress | None,
) -> None:
    """Trains one block."""
    optimizer = torch.optim.Adam(_parameter_groups(block, options), lr=options.lr, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / options.steps))
    )
    size = target.x.square().mean().clamp_min(1e-30)
    for step, rows in enumerate(_rows(len(target.x), options, generator)):
        x = quantized.x[rows]
        if options.float_inputs:
            mixed = torch.rand(x.shape, generator=generator).to(x.device) < options.float_inputs
            x = torch.where(mixed, exact.x[rows], x)
        error = (quantized.call(block, x) - target.x[rows]).square()
        loss = (error if weight is None else error * weight).mean() / size
        if not bool(torch.isfinite(loss)):
            raise QvitError(
                f"block '{path}': the reconstruction error is not finite at step {step + 1}; lower the learning rates"
            )
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if progress is not None:
            progress(path, step + 1, options.steps, float(loss.detach()))


def _parameter_groups(block: nn.Module, options: ReconstructOptions) -> list[dict[str, Any]]:
    """Adam's groups: every tensor's rate in its own unit, see the module's text."""
    groups: list[dict[str, Any]] = []
    taken: set[int] = set()
    for site, quantizer in quantizers_of(block):
        size = float(quantizer.grid()[0].mean())
        own = [parameter for name, parameter in quantizer.named_parameters() if name != "bit_width"]
        groups.append({"params": own, "lr": options.scale_lr * size})
        taken |= {id(parameter) for parameter in quantizer.parameters()}
        path, _, leaf = site.rpartition(".")
        if leaf.endswith("weight"):
            weight = block.get_submodule(path).get_parameter("weight")
            if id(weight) not in taken:
                groups.append({"params": [weight], "lr": options.weight_lr * size})
                taken.add(id(weight))
    groups.append({"params": [p for p in block.parameters() if id(p) not in taken], "lr": options.lr})
    return [group for group in groups if group["params"]]


def _rows(count: int, options: ReconstructOptions, generator: torch.Generator) -> Iterator[Tensor]:
    """The rows of every step: passes over shuffled images, without a smaller last batch."""
    size, done = min(options.batch_size, count), 0
    while True:
        for rows in torch.randperm(count, generator=generator).split(size):
            if len(rows) == size:
                yield rows
                done += 1
                if done == options.steps:
                    return


def fisher_weights(model: nn.Module, paths: list[str], batches: Iterable[Tensor], images: int) -> dict[str, Tensor]:
    """For each block E[(∂L/∂y)²] of its output y without the batch axis, divided by its mean.

    L is the cross-entropy with the model's own answer. The mean over images is kept and not a gradient per image.
    """
    sums: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep(path: str, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        outputs[path] = output

    seen = 0
    with ExitStack() as stack:
        for path in paths:
            stack.enter_context(model.get_submodule(path).register_forward_hook(partial(keep, path)))
        for batch in batches:
            logits = model(batch[: images - seen])
            loss = nn.functional.cross_entropy(logits, logits.argmax(-1), reduction="sum")
            for path, grad in zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True):
                sums[path] = sums.get(path, torch.zeros_like(grad[0])) + grad.square().sum(0)
            outputs.clear()
            seen += len(logits)
            if seen >= images:
                break
    return {path: total / total.mean().clamp_min(1e-30) for path, total in sums.items()}
