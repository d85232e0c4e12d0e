"""What a method is: the plan it starts from, and its part in training.

`plan` turns a budget into the starting plan for a model's sites (None for a method that does not quantize); `attach` is
called with the calibrated model; the three hooks of `training.hooks.Hooks` do the rest. Everything else - data,
calibration, loop, evaluation, files - is the same for all methods.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict
from torch import nn

from qvit.plan.cost import CostModel
from qvit.plan.quant_plan import QuantPlan
from qvit.registry import Registry
from qvit.training.config import TrainConfig, validated
from qvit.training.hooks import NoHooks
from qvit.training.loop import Trainer

METHODS: Registry[str, type[Method]] = Registry("method", "qvit.methods")
#: Class decorator: makes a method available under names.
register_method = METHODS.register


class MethodOptions(BaseModel):
    """Base of a method's own options; unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Method(NoHooks):
    """Base class.

    Args:
        config: The run's options.
        options: The method's own, validated.
    """

    Options: ClassVar[type[MethodOptions]] = MethodOptions
    quantizes: ClassVar[bool] = True
    #: Batches of an epoch, set before `width_lr` is read.
    steps_per_epoch: int

    def __init__(self, config: TrainConfig, options: Any) -> None:
        self.config, self.options = config, options

    def plan(self, cost: CostModel) -> QuantPlan | None:
        """The starting plan, resolved or as rules; None if nothing is quantized."""
        raise NotImplementedError

    def attach(self, model: nn.Module, cost: CostModel, steps_per_epoch: int) -> None:
        """Called once with the calibrated (or resumed) model, before training."""

    def finish(self, trainer: Trainer) -> None:
        """Called after the last step, before the result is evaluated."""

    def budget(self, cost: CostModel) -> int | None:
        """The limit on BOPs that the run was given, as a number; None for none."""
        return None

    @property
    def width_lr(self) -> float:
        """Learning rate of learned widths."""
        return self.config.lr


def create_method(config: TrainConfig) -> Method:
    """The method that a config names, with its options validated. Raises UsageError with the nearest name."""
    cls = METHODS[config.method]
    return cls(config, validated(cls.Options, config.method_options))
