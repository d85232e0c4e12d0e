"""Everything that decides a training run, as one validated object.

It is what the command line fills in and what `config.json` of a run holds. Unknown keys are refused with the nearest
name. A run is reproduced by its config: the same config, seed and hardware give the same numbers on CPU, bit for bit.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from qvit.errors import UsageError

T = TypeVar("T", bound=BaseModel)


class TrainConfig(BaseModel):
    """Options of `qvit train`; the defaults suit a short quantization-aware finetuning from a trained float model.

    Learning rates are for the batch size as given (no scaling rule); epochs count passes over the training images.
    `batch_size` is the number of images per optimizer step, over all processes and all `accumulate` micro-batches: the
    same config on more processes is the same training.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str
    model_kwargs: dict[str, Any] = Field(default_factory=dict)
    weights: str | None = None
    pretrained: bool = False
    method: str = "qvit"
    method_options: dict[str, Any] = Field(default_factory=dict)
    budget: str | None = None
    plan: str | None = None

    data: str = "digits"
    eval_data: str | None = None
    class_map: str | None = None
    test_share: float = Field(0.2, gt=0, lt=1)
    monitor_share: float = Field(0.0, ge=0, lt=1)
    workers: int = Field(0, ge=0)
    on_bad_image: Literal["fatal", "skip"] = "fatal"
    augment: Literal["none", "light", "deit"] = "light"
    repeated_augmentation: int = Field(0, ge=0)
    mixup: float = Field(0.0, ge=0)
    cutmix: float = Field(0.0, ge=0)
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    labels: str | None = None
    crops_per_image: int = Field(4, ge=1)
    single_crop_epochs: int = Field(0, ge=0)
    label_recovery: Literal["smoothing", "renormalise", "hard", "label-smoothing"] = "smoothing"
    crop_interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = None

    epochs: int = Field(30, ge=1)
    batch_size: int = Field(64, ge=1)
    accumulate: int = Field(1, ge=1)
    opt: str = "adamw"
    lr: float = Field(5e-4, gt=0)
    min_lr: float = Field(0.0, ge=0)
    warmup_epochs: int = Field(0, ge=0)
    sched: str = "cosine"
    weight_decay: float = Field(0.05, ge=0)
    clip_grad: float | None = Field(None, gt=0)
    ema_decay: float | None = Field(None, gt=0, lt=1)
    distill: float = Field(0.0, ge=0, le=1)
    distill_kind: Literal["soft", "hard"] = "soft"
    distill_temperature: float = Field(1.0, gt=0)
    teacher: str | None = None
    teacher_weights: str | None = None
    teacher_kwargs: dict[str, Any] = Field(default_factory=dict)
    stochastic_depth: bool = False

    calibration_images: int = Field(256, ge=1)
    seed: int = Field(0, ge=0)
    device: str = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    cuda_graphs: bool = True
    integer_forward: bool = False
    threads: int | None = Field(None, ge=1)
    log_every: int = Field(10, ge=1)
    checkpoint_every: int = Field(1, ge=1)
    checkpoint_steps: int | None = Field(None, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    tensorboard: bool = False
    diagnostics: bool = True

    @field_validator("data", "eval_data", "class_map", "weights", "plan", "teacher", "teacher_weights", "labels")
    @classmethod
    def _absolute_if_it_exists(cls, value: str | None) -> str | None:
        """Paths become absolute, so that a run can be resumed from another directory."""
        if not value or value == "digits":
            return value
        if value.startswith("wds/"):  # a folder, or a pattern of file names in one
            path = Path(value.removeprefix("wds/"))
            return f"wds/{path.absolute()}" if path.exists() or path.parent.is_dir() else value
        return str(Path(value).resolve()) if Path(value).exists() else value

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

    @classmethod
    def create(cls, **values: Any) -> TrainConfig:
        """Validates `values`. Raises UsageError with one line per mistake."""
        return validated(cls, values)


def validated(cls: type[T], values: dict[str, Any]) -> T:
    """A `cls` of `values`; pydantic's report as one line, unknown keys with the nearest name. Raises UsageError."""
    try:
        return cls(**values)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"])
            close = difflib.get_close_matches(key, list(cls.model_fields), n=1)
            if item["type"] == "extra_forbidden":
                lines.append(
                    f"unknown option '{key}'"
                    + (f"; did you mean '{close[0]}'?" if close else f" (known: {', '.join(cls.model_fields)})")
                )
            else:
                lines.append(f"{key} = {item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}")
        raise UsageError("; ".join(lines)) from None
