"""Block reconstruction: each transformer block learns to answer like its float original, on calibration images.

    min over W, b, s, β of a block     E[ F ∘ (B̂(x̃) - B(x))² ]                    block by block, in order

B is the float block on float inputs x, B̂ the quantized one on inputs x̃ that come through the quantized blocks before
it (Li et al., BRECQ, ICLR 2021). Weights are trained through the straight-through estimator together with scales,
offsets, biases and norms, so nothing has to be merged afterwards. F is 1, or with `fisher` the squared gradient of the
float model's cross-entropy with its own answer, averaged over images. With `suffix` the loss is

    L_g / L_g(first step) + 2 · L_l / L_l(first step)      L_l the error above, L_g that of the feature in front of the
                                                           classifier, through the float model (GLF-Q; `suffix.py`)

QDrop (Wei et al., ICLR 2022): each element of x̃ is the float value with probability `float_inputs`, and in every
quantizer of an activation each row of the last axis stays unquantized with probability `float_rows`. So the block sees
errors without being fitted to these alone. The paper drops elements there, too; rows cost a fraction of the random
numbers, which is what counts on a CPU.

Adam, cosine to zero. Steps are in units of the grid: a weight moves at `weight_lr` times its scale per step, a scale at
`scale_lr` times itself; so the same options serve every width. By default a weight can move about half a grid
step, however many steps there are.

A share of the images (`HELD_OUT`) is not trained on. A block whose error on them did not fall is put back as it was.
Blocks that take further inputs which differ by image (CaiT's class attention) stay as they are.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qvit.errors import QvitError, UsageError
from qvit.measure.features import signed_features
from qvit.methods.ptq.block_pairs import BlockPair, block_pairs, relative_error
from qvit.methods.ptq.class_token import step_of, upper_scales_held
from qvit.methods.ptq.images import OneSize, Progress
from qvit.methods.ptq.suffix import Suffix, features_of, suffix_of
from qvit.models.block_inputs import CHUNK, attention_blocks
from qvit.models.convert import Stage, in_eval_mode, stage_of
from qvit.models.features import answers_with_features
from qvit.quantizers import Quantizer, quantizers_of
from qvit.tensors import total_bytes
from qvit.training.checkpoint import load_state, read_tensors, save_weights

_log = logging.getLogger(__name__)
#: The share of the images that decides whether a block got better.
HELD_OUT = 1 / 8
#: The largest default of `weight_lr`.
_FASTEST = 0.01
#: Weights of the local error and of that of the feature, both relative to their first value (GLF-Q).
_SHARES = (2.0, 1.0)
_TINY = 1e-30
#: After how many steps the time of all of them is known.
TIMED_STEPS = 5


@dataclass(frozen=True)
class ReconstructOptions:
    """Options of `reconstruct`.

    Attributes:
        steps: Optimizer steps per block.
        images: How many of the calibration images take part.
        batch_size: Images per step.
        weight_lr: Step of a weight in units of its scale; None: such that all steps add up to about half a unit.
        scale_lr: Step of a scale or offset relative to the scale.
        lr: Step of biases and of the normalisation's parameters, absolute.
        float_inputs: Probability that an element of the block's input is the float model's.
        float_rows: Probability that a row of an activation is not quantized.
        fisher: Weights the error by the squared gradient of the float model's own answer.
        suffix: Adds the error of the feature that the float blocks behind make of the output; a step takes several
            times as long.
        seed: Chooses batches and mixed inputs.
    """

    steps: int = 2000
    images: int = 1024
    batch_size: int = 16
    weight_lr: float | None = None
    scale_lr: float = 0.003
    lr: float = 2e-4
    float_inputs: float = 0.5
    float_rows: float = 0.25
    fisher: bool = True
    suffix: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.images, self.batch_size) < 1:
            raise UsageError("steps, images and batch size of a reconstruction must be at least 1")
        if min(self.weight_rate, self.scale_lr, self.lr) < 0:
            raise UsageError("learning rates of a reconstruction must not be negative")
        if not (0 <= self.float_inputs <= 1 and 0 <= self.float_rows <= 1):
            raise UsageError("float_inputs and float_rows must lie between 0 and 1")

    @property
    def weight_rate(self) -> float:
        """`weight_lr`, or what it is by default: a cosine schedule sums to half of the steps."""
        return min(_FASTEST, 1 / self.steps) if self.weight_lr is None else self.weight_lr


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
    notify: Callable[[str], None] | None = None,
    keep: Path | None = None,
) -> list[BlockError]:
    """Reconstructs all blocks of a calibrated model, in place; its mode is restored.

    Args:
        model: A calibrated model.
        reference: The float model; must compute what `model` computes without quantizers.
        batches: Calibration images of one size, on the models' device. Iterated more than once: a list, or anything
            that yields the same images each time.
        options: Steps, images, learning rates.
        progress: Called after each step with the block, the step, the number of steps of all blocks, and the loss as
            text.
        notify: Receives a line with the time that all steps will take, once it is known.
        keep: A folder that each block is written to when it is done; a block that is there is not trained again.

    Returns:
        The error of each block that was reconstructed, on quantized inputs, before and after.

    Raises:
        UsageError: If the model is not calibrated or has no blocks of attention, or images are of several sizes.
        QvitError: If a loss is not finite; the block is named.
    """
    if stage_of(model) < Stage.CALIBRATED:
        raise UsageError("reconstruction comes after calibration: call qvit.calibrate(model, batches) first")
    blocks, batches = attention_blocks(model), OneSize(batches, "reconstruction")
    if not blocks:
        raise UsageError(f"{type(model).__name__} has no blocks of attention to reconstruct")
    fisher = fisher_weights(reference, list(blocks), batches, options.images) if options.fisher else {}
    features = features_of(reference, batches, options.images) if options.suffix else None
    total, errors = options.steps * len(blocks), []
    clock = _Clock(total, notify)
    with in_eval_mode(model):
        for index, pair in enumerate(block_pairs(model, reference, batches, options.images)):
            file = None if keep is None else keep / f"{pair.path}.safetensors"
            first = last = pair.quantized.through(pair.block).x
            if file is not None and file.is_file():
                limit = total_bytes(pair.block.state_dict().values())
                load_state(pair.block, read_tensors(file, "reconstructed block", limit=limit), pair.path)
                last = pair.quantized.through(pair.block).x
                clock.skip(options.steps)
            else:
                generator = torch.Generator().manual_seed(options.seed * len(blocks) + index)
                start, weight = copy.deepcopy(pair.block.state_dict()), fisher.get(pair.path)
                with ExitStack() as stack:
                    further = None
                    if features is not None:
                        one = next(iter(batches))[:1]
                        further = stack.enter_context(suffix_of(reference, list(blocks), pair.path, one)), features
                    error = _held_out_error(pair, weight, further, first)
                    for step, loss in enumerate(_fit(pair, weight, further, options, generator)):
                        clock.step()
                        if progress is not None:
                            progress(pair.path, index * options.steps + step + 1, total, f"error {loss:.4f}")
                    last = pair.quantized.through(pair.block).x
                    if not _held_out_error(pair, weight, further, last) < error:
                        _log.info("block '%s' did not get better on images held out: it is put back", pair.path)
                        pair.block.load_state_dict(start)
                        last = first
                if file is not None:
                    save_weights(file, pair.block)
            before, after = (relative_error(x, pair.target.x) for x in (first, last))
            errors.append(BlockError(pair.path, before, after))
    return errors


class _Clock:
    """Says after a few steps how long all of them will take."""

    def __init__(self, steps: int, notify: Callable[[str], None] | None) -> None:
        self.left, self.notify, self.done, self.started = steps, notify, 0, 0.0

    def skip(self, steps: int) -> None:
        """These steps were made by an earlier call."""
        self.left -= steps

    def step(self) -> None:
        """One step is done; the first one, which warms up, is not counted."""
        self.done += 1
        if self.done == 1:
            self.started = time.perf_counter()
        elif self.done == 1 + TIMED_STEPS and self.notify is not None:
            seconds = (time.perf_counter() - self.started) / TIMED_STEPS * self.left
            self.notify(f"the reconstruction will take about {seconds / 60:.0f} min ({self.left} steps)")


def _fitted_to(count: int) -> int:
    """How many of some images are trained on; all if they are too few to hold one out."""
    return count - int(count * HELD_OUT) or count


@torch.no_grad()
def _held_out_error(pair: BlockPair, weight: Tensor | None, further: tuple[Suffix, Tensor] | None, x: Tensor) -> float:
    """What a block is trained on, of its outputs `x` for images that are not: a weighted error, or a feature's."""
    first = _fitted_to(len(x)) % len(x)
    if further is not None:
        found = torch.cat([further[0](part) for part in x[first:].split(CHUNK)])
        return relative_error(found, further[1][first:])
    error = (x[first:] - pair.target.x[first:]).square()
    return float((error if weight is None else error * weight).mean())


def _fit(
    pair: BlockPair,
    weight: Tensor | None,
    further: tuple[Suffix, Tensor] | None,
    options: ReconstructOptions,
    generator: torch.Generator,
) -> Iterator[float]:
    """Trains one block; yields the loss of every step.

    `further` is what follows the block in the float model, and the features that it should end in.
    """
    path, block, quantized, target = pair.path, pair.block, pair.quantized, pair.target
    optimizer = torch.optim.Adam(_parameter_groups(block, options), lr=options.lr, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / options.steps))
    )
    sizes = [target.x.square().mean()]
    with ExitStack() as stack:
        stack.enter_context(upper_scales_held(block))
        for site, quantizer in quantizers_of(block):
            if options.float_rows and not site.endswith("weight"):
                hook = partial(_drop_rows, options.float_rows, generator)
                stack.enter_context(quantizer.register_forward_hook(hook))
        for step, rows in enumerate(_rows(_fitted_to(len(target.x)), options, generator)):
            x = quantized.x[rows]
            if options.float_inputs:
                mixed = torch.rand(x.shape, generator=generator).to(x.device) < options.float_inputs
                x = torch.where(mixed, pair.exact.x[rows], x)
            y = quantized.call(block, x)
            error = (y - target.x[rows]).square()
            losses = [(error if weight is None else error * weight).mean()]
            if further is not None:
                losses.append((further[0](y) - further[1][rows]).square().mean())
                if step == 0:
                    sizes = [loss.detach() / share for loss, share in zip(losses, _SHARES, strict=True)]
            loss = torch.stack([loss / size.clamp_min(_TINY) for loss, size in zip(losses, sizes, strict=True)]).sum()
            if not bool(torch.isfinite(loss)):
                raise QvitError(
                    f"block '{path}': the reconstruction error is not finite at step {step + 1}; "
                    "lower the learning rates"
                )
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            yield float(loss.detach())


def _drop_rows(
    share: float, generator: torch.Generator, _quantizer: Quantizer, inputs: tuple[Tensor, ...], output: Tensor
) -> Tensor:
    """Forward hook of a quantizer: a share of the rows passes as it came."""
    x = inputs[0]
    kept = torch.rand((*x.shape[:-1], 1), generator=generator).to(x.device) < share
    return torch.where(kept, x, output)


def _parameter_groups(block: nn.Module, options: ReconstructOptions) -> list[dict[str, Any]]:
    """Adam's groups: every tensor's rate in its own unit, see the module's text."""
    groups: list[dict[str, Any]] = []
    taken: set[int] = set()
    for site, quantizer in quantizers_of(block):
        size = step_of(quantizer)
        own = [parameter for name, parameter in quantizer.named_parameters() if name != "bit_width"]
        groups.append({"params": own, "lr": options.scale_lr * size})
        taken |= {id(parameter) for parameter in quantizer.parameters()}
        path, _, leaf = site.rpartition(".")
        if leaf.endswith("weight"):
            weight = block.get_submodule(path).get_parameter("weight")
            if id(weight) not in taken:
                groups.append({"params": [weight], "lr": options.weight_rate * size})
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

    L is the cross-entropy with the model's own answer, or for features their product with the random vectors of
    `measure.features.signed_features`. The mean over images is kept and not a gradient per image.
    """
    sums: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)

    def keep(path: str, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        outputs[path] = output

    seen = 0
    with ExitStack() as stack:
        for path in paths:
            stack.enter_context(model.get_submodule(path).register_forward_hook(partial(keep, path)))
        for batch in batches:
            answer = model(batch[: images - seen])
            if answers_with_features(model):
                loss = (answer * signed_features(answer, generator)).sum()
            else:
                loss = nn.functional.cross_entropy(answer, answer.argmax(-1), reduction="sum")
            for path, grad in zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True):
                sums[path] = sums.get(path, torch.zeros_like(grad[0])) + grad.square().sum(0)
            outputs.clear()
            seen += len(answer)
            if seen >= images:
                break
    return {path: total / total.mean().clamp_min(1e-30) for path, total in sums.items()}
