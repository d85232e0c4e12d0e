"""Everything that decides a training run, as one validated object.

It is what the command line fills in and what `config.json` of a run holds. Unknown keys are refused with the nearest
name. A run is reproduced by its config: the same config, seed and hardware give the same numbers on CPU, bit for bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from qvit.documents import Name, mistakes
from qvit.errors import UsageError
from qvit.models.architecture import check_arguments

T = TypeVar("T", bound=BaseModel)
Location = Annotated[str, Field(max_length=4096)]
#: Numbers have an end: options are read from files of strangers, too.
Many = Annotated[int, Field(ge=1, le=10**9)]
Times = Annotated[int, Field(ge=1, le=10**6)]
Rate = Annotated[float, Field(gt=0, le=1e6)]


class ImageOptions(BaseModel):
    """Which images, for which model, and how they are read: what every command that looks at images is told."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    model: Name
    model_kwargs: dict[str, Any] = Field(default_factory=dict)
    data: Location = "digits"
    eval_data: Location | None = None
    class_map: Location | None = None
    test_share: float = Field(0.2, gt=0, lt=1)
    monitor_share: float = Field(0.0, ge=0, lt=1)
    workers: int = Field(0, ge=0, le=4096)
    on_bad_image: Literal["fatal", "skip"] = "fatal"
    batch_size: Times = 64
    seed: int = Field(0, ge=0, le=2**63 - 1)
    device: Name = "auto"

    @field_validator("model_kwargs", "teacher_kwargs", check_fields=False)
    @classmethod
    def _architecture_alone(cls, value: dict[str, Any]) -> dict[str, Any]:
        check_arguments(value)
        return value

    @classmethod
    def create(cls, /, **values: Any) -> Self:
        """Validates `values`. Raises UsageError with one line per mistake."""
        return validated(cls, values)


class SubjectOptions(ImageOptions):
    """A float model and its images: what `runs.subject.open_subject` opens.

    Attributes:
        model: timm's name.
        model_kwargs: For `timm.create_model`.
        weights: File of float weights, or the run of a float model.
        pretrained: Takes the weights from timm's hub.
        data: Training images, also those for calibration; see `open_data`.
        eval_data: Images to judge by; None: the test split of `data`, or a share of it.
        class_map: File of lines `index<TAB>folder`.
        test_share, monitor_share: See `open_data`.
        workers, on_bad_image, batch_size, seed: See `Reading`.
        device: Where the model computes.
    """

    weights: Location | None = None
    pretrained: bool = False


class TrainConfig(SubjectOptions):
    """Options of `qvit train`; the defaults suit a short quantization-aware finetuning from a trained float model.

    Learning rates are for the batch size as given (no scaling rule); epochs count passes over the training images.
    `batch_size` is the number of images per optimizer step, over all processes and all `accumulate` micro-batches: the
    same config on more processes is the same training.
    """

    method: Name = "qvit"
    method_options: dict[str, Any] = Field(default_factory=dict)
    budget: Name | None = None
    plan: Location | None = None

    augment: Literal["none", "light", "deit"] = "light"
    repeated_augmentation: int = Field(0, ge=0, le=1000)
    mixup: float = Field(0.0, ge=0, le=1000)
    cutmix: float = Field(0.0, ge=0, le=1000)
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    labels: Location | None = None
    crops_per_image: Times = 4
    single_crop_epochs: int = Field(0, ge=0, le=10**6)
    label_recovery: Literal["smoothing", "renormalise", "hard", "label-smoothing"] = "smoothing"
    crop_interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = None

    epochs: Times = 30
    accumulate: Times = 1
    opt: Name = "adamw"
    lr: Rate = 5e-4
    min_lr: float = Field(0.0, ge=0, le=1e6)
    warmup_epochs: int = Field(0, ge=0, le=10**6)
    sched: Name = "cosine"
    weight_decay: float = Field(0.05, ge=0, le=1e6)
    clip_grad: float | None = Field(None, gt=0, le=1e30)
    ema_decay: float | None = Field(None, gt=0, lt=1)
    distill: float = Field(0.0, ge=0, le=1)
    distill_kind: Literal["soft", "hard"] = "soft"
    distill_temperature: Rate = 1.0
    teacher: Location | None = None
    teacher_weights: Location | None = None
    teacher_kwargs: dict[str, Any] = Field(default_factory=dict)
    stochastic_depth: bool = False

    calibration_images: Many = 256
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    cuda_graphs: bool = True
    integer_forward: bool = False
    threads: int | None = Field(None, ge=1, le=4096)
    log_every: Many = 10
    checkpoint_every: Many = 1
    checkpoint_steps: Many | None = None
    keep_checkpoints: Many = 2
    tensorboard: bool = False
    diagnostics: bool = True

    @field_validator("data", "eval_data", "class_map", "weights", "plan", "teacher", "teacher_weights", "labels")
    @classmethod
    def _absolute_if_it_exists(cls, value: str | None) -> str | None:
        """Paths become absolute, so that a run can be resumed from another directory."""
        if not value or value == "digits":
            return value
        try:
            if value.startswith("wds/"):  # a folder, or a pattern of file names in one
                path = Path(value.removeprefix("wds/"))
                return f"wds/{path.absolute()}" if path.exists() or path.parent.is_dir() else value
            return str(Path(value).resolve()) if Path(value).exists() else value
        except OSError as error:  # such as a name that no file can have
            raise ValueError(f"no path: {error.strerror}") from None

    def require_labels_alone(self) -> None:
        """Raises UsageError for options that contradict learning from stored soft labels."""
        if self.labels is None:
            return
        for name in ("mixup", "cutmix", "label_smoothing", "distill", "repeated_augmentation"):
            if value := getattr(self, name):
                raise UsageError(
                    f"labels={self.labels!r} are learned from alone, on the crops they were made for: leave out "
                    f"{name}={value!r}"
                )


def validated(cls: type[T], values: dict[str, Any]) -> T:
    """A `cls` of `values`; pydantic's report as one line, unknown keys with the nearest name. Raises UsageError."""
    try:
        return cls(**values)
    except ValidationError as error:
        raise UsageError(mistakes(error, cls)) from None
