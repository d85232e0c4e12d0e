"""Everything that decides a training run, as one validated object.

It is what the command line fills in and what `config.json` of a run holds. Unknown keys are refused with the nearest
name. A run is reproduced by its config: the same config, seed and hardware give the same numbers on CPU, bit for bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from qvit.documents.base import Name, mistakes
from qvit.errors import UsageError
from qvit.models.architecture import check_arguments
from qvit.models.transformers import resolved

T = TypeVar("T", bound=BaseModel)
Location = Annotated[str, Field(max_length=4096)]
#: Numbers have an end: options are read from files of strangers, too.
Many = Annotated[int, Field(ge=1, le=10**9)]
Times = Annotated[int, Field(ge=1, le=10**6)]
Rate = Annotated[float, Field(gt=0, le=1e6)]

# Options that several requests have. A description is Markdown, seen from docs/cli.md.
Model = Annotated[
    Name,
    Field(
        description="timm's name of a Vision Transformer, or `vit_digits`; or a folder or hub repository with a model "
        "of `transformers`, see [Models of transformers](models.md#models-of-transformers)"
    ),
]
ModelArguments = Annotated[
    dict[str, Any],
    Field(
        description="arguments of the architecture for `timm.create_model`, such as `img_size=64`: numbers, booleans, "
        "registered names; nothing that loads files"
    ),
]
Weights = Annotated[
    Location | None, Field(description="float weights: a `.safetensors` or `.pth` file, or the run of a float model")
]
Pretrained = Annotated[bool, Field(description="take the float weights from timm's hub")]
Data = Annotated[
    Location, Field(description="training images: a folder, an archive, shards, or `digits`; see [Data](#data)")
]
TestData = Annotated[
    Location | None,
    Field(
        description="test images, for the final number alone; by default the data's own test split, or a share set "
        "aside"
    ),
]
ClassMap = Annotated[
    Location | None,
    Field(
        description="a file of lines `index<TAB>folder`, for data with some of the head's classes; see [Class "
        "maps](#class-maps)"
    ),
]
Unlabelled = Annotated[
    bool,
    Field(
        description="the folders of the images are no classes: judge by the agreement with the float model; see "
        "[Images without labels](#images-without-labels)"
    ),
]
TestShare = Annotated[
    float, Field(gt=0, lt=1, description="share set aside for testing where the data have no test split")
]
MonitorShare = Annotated[
    float,
    Field(
        ge=0, lt=1,
        description="share of the *training* images held out to monitor the run; the accuracy on them is logged per "
        "epoch",
    ),
]  # fmt: skip
OnBadImage = Annotated[
    Literal["fatal", "skip"],
    Field(
        description="what happens when an image cannot be read: `fatal` stops and names it; for `skip` see "
        "[Unreadable images](#unreadable-images)"
    ),
]
Workers = Annotated[
    int,
    Field(
        ge=0,
        le=4096,
        description="processes that decode images; they change nothing but the time it takes (with `wds/` also the "
        "order)",
    ),
]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1, description="seed of all random numbers")]
Device = Annotated[Name, Field(description="`auto`, `cpu`, `cuda`, `cuda:1` ...")]
Threads = Annotated[
    int | None, Field(ge=1, le=4096, description="threads of PyTorch on the CPU; by default PyTorch's choice")
]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]


class Options(BaseModel):
    """Base class: unknown keys are refused, numbers are finite; a field's description is its help everywhere."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @field_validator("model_kwargs", "teacher_kwargs", check_fields=False)
    @classmethod
    def _architecture_alone(cls, value: dict[str, Any]) -> dict[str, Any]:
        check_arguments(value)
        return value

    @classmethod
    def create(cls, /, **values: Any) -> Self:
        """Validates `values`. Raises UsageError with one line per mistake."""
        return validated(cls, values)


class MethodOptions(Options):
    """Base of a method's own options."""


class ImageOptions(Options):
    """Which images, for which model, and how they are read: what every command that looks at images is told."""

    model: Model
    model_kwargs: ModelArguments = Field(default_factory=dict)
    data: Data = "digits"
    eval_data: TestData = None
    class_map: ClassMap = None
    unlabelled: Unlabelled = False
    test_share: TestShare = 0.2
    monitor_share: MonitorShare = 0.0
    workers: Workers = 0
    on_bad_image: OnBadImage = "fatal"
    batch_size: Times = Field(64, description="images that the model sees at a time")
    seed: Seed = 0
    device: Device = "auto"


class SubjectOptions(ImageOptions):
    """A float model and its images: what `runs.subject.open_subject` opens."""

    weights: Weights = None
    pretrained: Pretrained = False


class TrainConfig(SubjectOptions):
    """Options of `qvit train`; the defaults suit a short quantization-aware finetuning from a trained float model.

    Learning rates are for the batch size as given (no scaling rule); epochs count passes over the training images.
    `batch_size` is the number of images per optimizer step, over all processes and all `accumulate` micro-batches: the
    same config on more processes is the same training.
    """

    method: Name = Field(
        "qvit",
        description="`float`, `lsq`, `lsq+`, `qvit`; `dq`, `edmips` ([Other ways to learn "
        "widths](learning-widths.md#other-ways-to-learn-widths)); `vvtq`, `qvit+vvtq`, `ofq`, `irm` ([Two "
        "bits](two-bits.md))",
    )
    method_options: dict[str, Any] = Field(
        default_factory=dict, description="options of the method, such as `head_wise=false`, see below"
    )
    budget: Name | None = Field(
        None,
        description="`4bit`: the bit operations of the uniform 4-bit model with 8 bits in the first and the last "
        "layer; `21.455G`, `12.3M`: bit operations; `0.25`, `25%`: a share of the 8-bit model's. Required by `qvit`, "
        "`dq` and `edmips`; `lsq` and `lsq+` take `Nbit`",
    )
    plan: Location | None = Field(
        None,
        description="a preset such as `w4a4`, a plan file, or a run: the widths for `lsq` and `lsq+`, the starting "
        "widths for `qvit` and `dq`",
    )

    nonlinear: Name | None = Field(
        None,
        description="LayerNorm, softmax and GELU by [integer forms](post-training.md#integer-forms): the name of one, "
        "`i-bert` or `i-vit`, for all that has it; `sqnr`: the best form of each place on calibration images; "
        "`softmax=i-bert,blocks.0.mlp.act=i-vit`; or `float`. By default what the plan says",
    )

    augment: Literal["none", "light", "deit"] = Field(
        "light",
        description="`none`: images as in evaluation; `light`: crops of 60 to 100 % of the area, mirroring; `deit`: "
        "RandAugment, random erasing, crops. Digits are turned, shifted and zoomed a little, unless `none`",
    )
    repeated_augmentation: int = Field(
        0, ge=0, le=1000,
        description="how often an image is drawn for one epoch, each time augmented anew; the epoch keeps its length",
    )  # fmt: skip
    mixup: float = Field(0.0, ge=0, le=1000, description="α of mixup")
    cutmix: float = Field(0.0, ge=0, le=1000, description="α of cutmix")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of a label spread over all classes")
    labels: Location | None = Field(
        None,
        description="a store of [soft labels](soft-labels.md) to learn from, in place of the data's labels and of "
        "augmentation",
    )
    crops_per_image: Times = Field(
        4, description="with `labels`: crops of each drawn image; an epoch is as many crops as there are images"
    )
    single_crop_epochs: int = Field(
        0, ge=0, le=10**6, description="with `labels`: how many of the last epochs draw one crop of each image"
    )
    label_recovery: Literal["smoothing", "renormalise", "hard", "label-smoothing"] = Field(
        "smoothing",
        description="with `labels`: what the classes that are not stored get, see [Recovery](soft-labels.md#recovery)",
    )
    crop_interpolation: Interpolation | None = Field(
        None, description="with `labels`: how crops are resized; by default as the teacher's were"
    )

    epochs: Times = Field(30, description="passes over the training images")
    batch_size: Times = Field(64, description="images per optimizer step, over all processes and micro-batches")
    accumulate: Times = Field(
        1, description="micro-batches per step; a micro-batch has `batch_size / (processes · accumulate)` images"
    )
    opt: Name = Field(
        "adamw",
        description="timm's name of the optimizer, with or without `lookahead_` before it; not `adahessian`, which "
        "needs second derivatives",
    )
    lr: Rate = Field(5e-4, description="learning rate of weights, scales and offsets, for the batch size as given")
    min_lr: float = Field(0.0, ge=0, le=1e6, description="learning rate at the end of the schedule")
    warmup_epochs: int = Field(0, ge=0, le=10**6, description="epochs of linear warm-up")
    sched: Name = Field("cosine", description="timm's name of the schedule; it advances every step")
    weight_decay: float = Field(
        0.05, ge=0, le=1e6,
        description="weight decay of weight matrices; not of biases, norms, tokens, scales, offsets, widths",
    )  # fmt: skip
    clip_grad: float | None = Field(None, gt=0, le=1e30, description="largest norm of the gradient")
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="keeps an exponential moving average of the model and evaluates that"
    )
    distill: float = Field(
        0.0, ge=0, le=1, description="share of the loss that learns from the soft labels of the float model"
    )
    distill_features: bool = Field(
        False,
        description="learn the float model's features, in front of the classifier or as the answer of a model without "
        "classes: see [Distilling features](models.md#distilling-features). Without classes no labels are needed",
    )
    distill_features_weight: Rate = Field(1.0, description="with `distill_features`: weight of their loss")
    distill_kind: Literal["soft", "hard"] = Field("soft", description="`hard`: the teacher's top class is the label")
    distill_temperature: Rate = Field(1.0, description="temperature of student and teacher, where labels are soft")
    teacher: Location | None = Field(
        None,
        description="another model to learn from: timm's name, a run, or a model of `transformers`; by default the "
        "float model",
    )
    teacher_weights: Location | None = Field(None, description="weights of the teacher; by default from timm's hub")
    teacher_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="arguments of the teacher, as `model_kwargs`"
    )
    start: Location | None = Field(
        None,
        description="a finished run of the same model, at higher widths: training starts from its weights, and from "
        "its scales, carried over to the new widths; the float model stays that of `weights`",
    )
    steps: Location | None = Field(
        None,
        description="widths of several steps, such as `8bit,4bit,2bit` or `w8a8,w4a4,w2a2`, in place of `budget` and "
        "`plan`: each step starts from the one before and learns from it; `epochs` is for all together, see "
        "[Multi-step distillation](two-bits.md#multi-step-distillation)",
    )
    stochastic_depth: bool = Field(
        False, description="dropout and stochastic depth during training, where the model has them"
    )

    calibration_images: Many = Field(256, description="training images that initialize the scales")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="precision of the training")
    compile: bool = Field(False, description="compile the model by `torch.compile`")
    cuda_graphs: bool = Field(
        True,
        description="on CUDA, in one process without micro-batches: forward and backward of the model are recorded "
        "once and started as a whole ([Training speed](training-speed.md))",
    )
    integer_forward: bool = Field(
        False,
        description="outputs of linear layers from integers, on CPUs with 8-bit dot products (VNNI, AMX; [Training "
        "speed](training-speed.md))",
    )
    threads: Threads = None
    log_every: Many = Field(10, description="steps between two `step` lines of the log")
    checkpoint_every: Many = Field(1, description="epochs between two checkpoints")
    checkpoint_steps: Many | None = Field(None, description="steps between two checkpoints within an epoch")
    keep_checkpoints: Many = Field(2, description="how many checkpoints are kept")
    tensorboard: bool = Field(False, description="write the log for TensorBoard, too")
    diagnostics: bool = Field(
        True, description="at the end of each epoch, log which weights oscillate, and the variation of weights"
    )

    @field_validator(
        "data", "eval_data", "class_map", "weights", "plan", "start", "teacher", "teacher_weights", "labels"
    )
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


def _named_for_timm(cls: type[BaseModel], values: dict[str, Any], field: str, weights: str) -> dict[str, Any]:
    """The values, with a model of `transformers` named by timm's name, its arguments and the folder of its weights."""
    arguments = f"{field}_kwargs"
    name, kwargs = values.get(field), values.get(arguments) or {}
    if field not in cls.model_fields or not isinstance(name, str) or not isinstance(kwargs, dict):
        return values
    name, kwargs, folder = resolved(name, kwargs)
    if folder is None:
        return values
    found = {field: name, arguments: kwargs, weights: values.get(weights) or str(folder)}
    found |= {"pretrained": False} if field == "model" else {}
    return values | {key: value for key, value in found.items() if key in cls.model_fields}


def validated(cls: type[T], values: dict[str, Any]) -> T:
    """A `cls` of `values`; pydantic's report as one line, unknown keys with the nearest name. Raises UsageError.

    A model or teacher of `transformers` is named by its folder or repository here, and by timm's name, arguments and
    the folder as its weights in what is returned: runs need nothing else to make it again.
    """
    if issubclass(cls, ImageOptions):
        for field, weights in (("model", "weights"), ("teacher", "teacher_weights")):
            values = _named_for_timm(cls, values, field, weights)
    try:
        return cls(**values)
    except ValidationError as error:
        raise UsageError(mistakes(error, cls)) from None
