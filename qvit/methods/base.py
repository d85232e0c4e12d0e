"""What a method is: the plan it starts from, and its part in training.

`plan` turns a budget into the starting plan for a model's sites (None for a method that does not quantize); `attach` is
called with the calibrated model, `finish` at the end; the hooks of `training/hooks.py` do the rest, of which a class
defines its own part alone. Everything else - data, calibration, loop, evaluation, files - is the same for all methods.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

from qvit.plan.cost import CostModel
from qvit.plan.quant_plan import QuantPlan
from qvit.registry import Registry
from qvit.training.config import MethodOptions, TrainConfig, validated
from qvit.training.hooks import ComposedHooks

METHODS: Registry[str, type[Method]] = Registry("method", "qvit.methods")
#: Class decorator: makes a method available under names.
register_method = METHODS.register
#: A field of options.
Asymmetric = Annotated[
    tuple[str, ...],
    Field(
        description="patterns of further activation sites that get an offset, such as "
        """`-o asymmetric='["*.qkv.input"]'`"""
    ),
]


class Method(ComposedHooks):
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
