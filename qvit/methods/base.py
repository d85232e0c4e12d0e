"""What a method is: the plan it starts from, how it makes the quantized model, and its part in training.

`plan` turns a budget into the starting plan for a model's sites (None for a method that does not quantize); `quantized`
makes the model of it, which is the end of a method that does not train; `attach` is called with that model, `finish` at
the end; the hooks of `training/hooks.py` do the rest, of which a class defines its own part alone. Everything else -
data, loop, evaluation, files - is the same for all methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from qvit.measure.nonlinear import choose_forms
from qvit.models.calibrate import calibrate
from qvit.models.convert import quantize
from qvit.models.inherit import inherit
from qvit.models.sizes import Size
from qvit.plan.cost import CostModel
from qvit.plan.quant_plan import QuantPlan
from qvit.registry import Registry
from qvit.training.config import MethodOptions, TrainConfig, validated
from qvit.training.hooks import ComposedHooks
from qvit.training.log import Stopwatch

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


@dataclass(frozen=True)
class Preparation:
    """What a method makes the quantized model with.

    Attributes:
        images: Batches (B, channels, height, width) of `Method.images` training images under the evaluation transform,
            the same ones each time they are iterated.
        run: The run's directory, for what the method keeps there.
        watch: Takes the seconds of each stage.
        notify: Receives one line per stage.
        progress: Called with a text, what is done, how much there is, and figures as text.
        deciding: Two sets of batches of images and class indices (negative without labels), together of
            `Method.deciding_images` training images, none of them in `images`; none where none were asked for.
        start: A quantized model to continue, on the images' device; None to begin from the float model.
    """

    images: Iterable[Tensor]
    run: Path
    watch: Stopwatch
    notify: Callable[[str], None]
    progress: Callable[[str, int, int, str], None] | None = None
    deciding: Sequence[Iterable[tuple[Tensor, Tensor]]] = ()
    start: nn.Module | None = None


class Method(ComposedHooks):
    """Base class.

    Args:
        config: The run's options.
        options: The method's own, validated.
    """

    Options: ClassVar[type[MethodOptions]] = MethodOptions
    quantizes: ClassVar[bool] = True
    #: False: the model that `quantized` returns is the result.
    trains: ClassVar[bool] = True
    #: Calibration images that pass through the model at a time.
    calibration_batch: ClassVar[int] = 64
    #: The integer forms that LayerNorm, softmax and GELU were given, as a result says it; None for those of the plan.
    nonlinear: dict[str, Any] | None = None
    #: Batches of an epoch, set before `width_lr` is read.
    steps_per_epoch: int

    def __init__(self, config: TrainConfig, options: Any) -> None:
        self.config, self.options = config, options
        #: The name of the plan that the run ends with.
        self.plan_name = config.method
        if config.budget:
            self.plan_name = f"{config.method}-{config.budget}"
        elif config.plan:
            self.plan_name = Path(config.plan).stem

    def plan(self, cost: CostModel) -> QuantPlan | None:
        """The starting plan, resolved or as rules; None if nothing is quantized."""
        raise NotImplementedError

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of the architecture that `quantized` changes; none where the float model stays what it is."""
        return {}

    @property
    def images(self) -> int:
        """How many training images `quantized` looks at."""
        return self.config.calibration_images

    @property
    def image_sizes(self) -> tuple[Size, ...]:
        """Heights and widths that these images have in turn; none: the model's."""
        return ()

    @property
    def pictures(self) -> int:
        """How many test images are drawn with the widths of their patches, where these differ."""
        return 0

    @property
    def deciding_images(self) -> int:
        """How many further training images `quantized` decides by; fewer will do if there are no more."""
        return 0

    def quantized(self, model: nn.Module, plan: QuantPlan, given: Preparation) -> nn.Module:
        """The calibrated model with the quantizers of `plan`, made of a float model, which stays as it is."""
        given.notify(f"calibrating on {self.config.calibration_images} training images")
        with given.watch("calibrate"):
            start = given.start
            made = quantize(model, plan)
            made = calibrate(made, given.images) if start is None else inherit(made, start, given.images)
            if self.config.nonlinear is not None:
                self.nonlinear = choose_forms(made, self.config.nonlinear, given.images)
        return made

    def state_dict(self) -> dict[str, Any]:
        """What choosing integer forms has measured: the forms themselves are the plan's."""
        return {"nonlinear": self.nonlinear} if self.nonlinear else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.nonlinear = state["nonlinear"]

    def record(self) -> dict[str, Any]:
        """What `result.json` says about this method beside what it says about all."""
        return {}

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
