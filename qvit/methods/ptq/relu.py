"""ReLU in place of the activation of MLPs: a change of the float model before it is quantized (GLF-Q, step 4).

What a GELU puts out has a short negative side, which takes an offset and levels of the grid of `fc2`'s input. Behind a
ReLU that grid is unsigned and begins at zero. Nothing else makes up for the other function, so each MLP learns to
answer like its original, by the weights and biases of its two layers:

    min    mean (f(x) - y)² + 2 · mean (f_c(x) - y)²

x is what reaches the MLP through those that were changed before, y the original MLP's answer to it, f the MLP with a
ReLU, and f_c the same with its hidden activations clipped at c, the 99th percentile of the original's positive ones: a
narrow grid will clip them, too. Adam, cosine to zero. GLF-Q takes 20,000 steps of 32 images at a rate of 4e-5; with
fewer steps the rate is higher, such that all steps add up to as much (`RATE`, `FASTEST`).

The model changes: another activation function, another answer for every image. What is reported about accuracy compares
with the original model all the same.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qvit.errors import QvitError, UsageError
from qvit.methods.ptq.block_pairs import relative_error
from qvit.methods.ptq.images import OneSize, Progress
from qvit.models.block_inputs import CHUNK, capture
from qvit.models.convert import in_eval_mode
from qvit.models.families.parts import MLPS, is_direct

#: What the model is made with afterwards.
ARGUMENTS = {"act_layer": "relu"}
#: The sum of the learning rates of all steps, but for the schedule, and the highest rate.
RATE, FASTEST = 4e-5 * 20_000, 1e-3
#: Which of the original's positive activations are not clipped, and what the error with clipping counts.
QUANTILE, CLIPPED = 0.99, 2.0
#: How many activations the percentile is taken from, at most.
_SAMPLE = 1 << 20


@dataclass(frozen=True)
class ReluOptions:
    """Options of `to_relu`: optimizer steps per MLP, images that take part, images per step, and what draws them."""

    steps: int = 1000
    images: int = 1024
    batch_size: int = 32
    seed: int = 0


@dataclass(frozen=True)
class MlpError:
    """The mean squared error of an MLP's output over its mean square, with a ReLU before and after training."""

    mlp: str
    before: float
    after: float


def to_relu(
    model: nn.Module,
    batches: Iterable[Tensor],
    options: ReluOptions = ReluOptions(),
    *,
    progress: Progress | None = None,
    notify: Callable[[str], None] | None = None,
) -> list[MlpError]:
    """Gives all MLPs of a float model a ReLU and trains them to answer as before, in place; its mode is restored.

    Args:
        model: A float model.
        batches: Images of one size, on the model's device; iterated more than once.
        options: Steps and images.
        progress: Called after each step with the MLP, the step, the number of steps of all MLPs, and as text the
            loss relative to the mean square of the answer.
        notify: Receives what this does to the model, and what came of it.

    Returns:
        The errors of each MLP that was changed.

    Raises:
        UsageError: A model whose MLPs are of another kind, or that timm makes with one activation alone.
        QvitError: A loss that is not finite.
    """
    paths, errors = changed_mlps(model), list[MlpError]()
    total, batches = options.steps * len(paths), OneSize(batches, "training MLPs")
    if notify is not None:
        notify(
            f"ReLU takes the place of the activation in {len(paths)} MLPs, trained for {options.steps} steps each: "
            "this changes the model"
        )
    with in_eval_mode(model):
        for index, path in enumerate(paths):
            mlp: Any = model.get_submodule(path)
            inputs = capture(model, path, batches, options.images)
            if inputs is None:
                raise UsageError(f"'{path}' takes further inputs that differ by image: its activation stays as it is")
            original = copy.deepcopy(mlp)
            target, mlp.act = inputs.through(original).x, nn.ReLU()
            before = relative_error(inputs.through(mlp).x, target)
            generator = torch.Generator().manual_seed(options.seed * len(paths) + index)
            for step, loss in enumerate(_fit(path, mlp, original, inputs.x, target, options, generator)):
                if progress is not None:
                    progress(path, index * options.steps + step + 1, total, f"error {loss:.4f}")
            errors.append(MlpError(path, before, relative_error(inputs.through(mlp).x, target)))
    if notify is not None and errors:
        first, last = (sum(getattr(error, name) for error in errors) / len(errors) for name in ("before", "after"))
        notify(f"mean error of the MLPs with a ReLU: {100 * first:.1f} % before training, {100 * last:.2f} % after")
    return errors


def changed_mlps(model: nn.Module) -> list[str]:
    """Paths of the MLPs that `to_relu` changes, in the order of the model. Raises UsageError, see there."""
    kind = type(model).__name__
    if not any(_takes_a_name(cls) for cls in type(model).__mro__[:-1]):
        raise UsageError(f"timm makes a {kind} with one activation function alone: leave out --mlp relu")
    found = {path: module for path, module in model.named_modules() if isinstance(module, MLPS)}
    other = next((path for path, module in found.items() if not is_direct(module)), None)
    if other is not None or not found:
        what = f"'{other}' is a {type(found[other]).__name__}" if other is not None else "there is none"
        raise UsageError(f"ReLU needs MLPs of two layers with an activation between them, and {what}: leave out --mlp")
    changed = [path for path, module in found.items() if not isinstance(module.get_submodule("act"), nn.ReLU)]
    if not changed:
        raise UsageError("the MLPs of this model have a ReLU already: leave out --mlp relu")
    return changed


def _takes_a_name(cls: type) -> bool:
    """Whether timm makes a class with an activation by its name; some take a class alone, which no file can hold."""
    parameter = inspect.signature(cls.__init__).parameters.get("act_layer")
    return parameter is not None and not callable(parameter.default)


def _fit(
    path: str, mlp: Any, original: Any, x: Tensor, target: Tensor, options: ReluOptions, generator: torch.Generator
) -> Iterator[float]:
    """Trains one MLP; yields the loss of every step."""
    limit, size = _limit(original, x), target.square().mean().clamp_min(1e-30)
    optimizer = torch.optim.Adam([*mlp.fc1.parameters(), *mlp.fc2.parameters()], lr=min(FASTEST, RATE / options.steps))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    for _ in range(options.steps):
        rows = torch.randint(len(x), (options.batch_size,), generator=generator)
        hidden = mlp.act(mlp.fc1(x[rows]))
        plain, clipped = ((mlp.fc2(part) - target[rows]).square().mean() for part in (hidden, hidden.clamp(max=limit)))
        loss = (plain + CLIPPED * clipped) / size
        if not bool(torch.isfinite(loss)):
            raise QvitError(f"MLP '{path}': the error with a ReLU is not finite")
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        yield float(loss.detach())


@torch.no_grad()
def _limit(original: Any, x: Tensor) -> float:
    """What hidden activations are clipped at."""
    hidden = torch.cat([original.act(original.fc1(part)).flatten() for part in x[:CHUNK].split(1)])
    positive = hidden[hidden > 0]
    return float(positive[:: max(1, len(positive) // _SAMPLE)].quantile(QUANTILE))
