"""Small models, options and images that many tests share."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from qvit.methods import create_method
from qvit.models.calibrate import calibrate
from qvit.models.convert import plan_of, quantize
from qvit.models.create import create_model
from qvit.models.families import inspect_model
from qvit.plan.quant_plan import QuantPlan
from qvit.training.config import TrainConfig
from qvit.training.loop import Trainer

SMALL = {"depth": 1, "embed_dim": 16, "num_heads": 2}
"""Arguments that make `vit_digits` train an epoch in a tenth of a second."""


@torch.no_grad()
def shake(model: nn.Module) -> nn.Module:
    """Moves every parameter: in a fresh model biases and scores are so close to zero that much could be missing."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.1))
    return model


def digits_model(seed: int = 0, **kwargs: Any) -> nn.Module:
    """`vit_digits`, one block of two heads unless asked otherwise, shaken, in eval mode."""
    torch.manual_seed(seed)
    return shake(create_model("vit_digits", **(SMALL | kwargs))).eval()


def digit_batches(count: int = 2, size: int = 8, seed: int = 1) -> list[Tensor]:
    """Random images of the shape that `vit_digits` takes."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 1, 8, 8, generator=generator) for _ in range(count)]


def calibrated_model(plan: QuantPlan | str = "w4a4", seed: int = 0, **kwargs: Any) -> nn.Module:
    """`digits_model`, quantized by `plan` and calibrated on random images."""
    return calibrate(quantize(digits_model(seed, **kwargs), plan), digit_batches())


def small_config(**changes: Any) -> TrainConfig:
    """Options of a run on digits that takes well under a second per epoch."""
    values: dict[str, Any] = {
        "model": "vit_digits",
        "model_kwargs": SMALL,
        "data": "digits",
        "device": "cpu",
        "threads": 1,
        "epochs": 2,
        "batch_size": 200,
        "calibration_images": 64,
        "log_every": 2,
    }
    return TrainConfig.create(**(values | changes))


def starting_point(config: TrainConfig, *, attach: bool = True, seed: int = 0) -> tuple[nn.Module, Any]:
    """The model that training would start from, and its method."""
    float_model = digits_model(seed)
    cost = inspect_model(float_model)
    method = create_method(config)
    plan = method.plan(cost)
    assert plan is not None
    model = calibrate(quantize(float_model, plan), digit_batches())
    if attach:
        method.attach(model, cost, 6)
    return model, method


class Batches(list[tuple[Tensor, Tensor]]):
    """A loader of batches made beforehand, the same in each epoch."""

    _skip = 0

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """The next pass starts at batch `skip`."""
        self._skip = skip

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        skip, self._skip = self._skip, 0
        return iter(self[skip:])


def tiny_trainer(run: Path, seed: int = 0, steps: int = 3, **changes: Any) -> tuple[Trainer, Any, nn.Module]:
    """A trainer on random images, which takes a few hundredths of a second per step."""
    config = small_config(**({"method": "qvit", "budget": "3bit", "batch_size": 8, "log_every": 1} | changes))
    run.mkdir(parents=True, exist_ok=True)
    model, method = starting_point(config, seed=seed, attach=False)
    method.steps_per_epoch = steps
    generator = torch.Generator().manual_seed(seed)
    labels = [torch.randint(0, 10, (8,), generator=generator) for _ in range(steps)]
    loader = Batches(zip(digit_batches(steps, 8, seed=seed), labels, strict=True))
    trainer = Trainer(
        model,
        config,
        loader,
        num_classes=10,
        run=run,
        hooks=method,
        width_lr=method.width_lr,
        plan=lambda: plan_of(model).to_json(),
    )
    method.attach(model, inspect_model(model), steps)
    return trainer, method, model


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of one kind in a run's log; what was cut off is left out, as readers do."""
    found = []
    log = run / "log.jsonl"
    for line in log.read_text().splitlines() if log.is_file() else ():
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue
        if event["event"] == kind:
            found.append(event)
    return found


def make_images(root: Path, classes: dict[str, int], size: int = 32, seed: int = 0) -> Path:
    """Smooth random JPEGs, `root/class/number.jpg`; each class has a colour of its own."""
    generator = np.random.default_rng(seed)
    for index, (folder, count) in enumerate(classes.items()):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = generator.integers(0, 120, (4, 4, 3), dtype=np.uint8)
            pixels[..., index % 3] += 120
            image = Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)
            image.save(root / folder / f"{number}.jpg", quality=95)
    return root


def saved(trainer: Trainer) -> Path:
    """The checkpoint that a trainer writes."""
    path = trainer.save()
    assert path is not None
    return path


def float_trainer(run: Path, steps: int = 3, **changes: Any) -> Trainer:
    """A trainer of the float model on random images."""
    teacher = changes.pop("teacher", None)
    config = small_config(**({"method": "float", "batch_size": 8, "log_every": 1} | changes))
    labels = [torch.randint(0, 10, (8,)) for _ in range(steps)]
    loader = Batches(zip(digit_batches(steps), labels, strict=True))
    run.mkdir(parents=True, exist_ok=True)
    _, method = starting_point(small_config(method="lsq", budget="4bit"), attach=False)
    model = digits_model()
    return Trainer(model, config, loader, num_classes=10, run=run, hooks=method, width_lr=1.0, teacher=teacher)


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (self.target,)
