"""What commands are asked for, as validated objects; torch is not imported, because `qvit bench --help` shows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from qvit.errors import UsageError
from qvit.training import config
from qvit.training.config import ImageOptions, Interpolation, Many, SubjectOptions, Times, validated


class Request(SubjectOptions):
    """A measurement without training: a float model, images to calibrate with, and images to judge by."""

    data: config.Data  # type: ignore[reportGeneralTypeIssues]
    eval_data: config.Location | None = Field(
        default=None, description="images to judge by; by default the data's own test split, or a share set aside"
    )
    batch_size: Times = Field(default=16, description="images that the model sees at a time")
    images: Many | None = Field(
        default=None, description="how many images to judge by, drawn by the seed; by default all"
    )
    calibration_images: Many = Field(default=64, description="how many training images to calibrate with")


class BenchRequest(SubjectOptions):
    """A benchmark of our engines beside their peers; see `qvit.deploy.bench.timing.measure`."""

    model: config.Location = Field(description="a packed model's file, or timm's name of a float model")
    plans: Sequence[str] = Field(
        default=(),
        description="preset, plan file or packed file of a MODEL, by default `w8a8`; repeatable, each is a row of "
        "every engine of ours; a packed file as MODEL has its own",
    )
    batches: Sequence[int] = Field(default=(1,), description="images at a time; repeatable")
    engines: Sequence[str] | None = Field(
        default=None,
        description="what to measure: `qvit` (all of ours), `qvit-torch` ..., a peer such as `openvino` or "
        "`openvino-int8`; repeatable, by default all that are installed",
    )
    peers: bool = Field(default=True, description="measure the peers, too")
    device: Literal["cpu", "cuda"] = Field(
        default="cpu", description="where: `cuda` is the first GPU, for the engines and peers that run there"
    )
    profile: bool = Field(default=False, description="time by kind of kernel, too, of engines that can tell")
    data: config.Location | None = Field(  # type: ignore[assignment]
        default=None,
        description="images to calibrate with and to compare answers on; by default noise, which is good for speed "
        "alone",
    )
    eval_data: config.Location | None = Field(default=None, description="images to compare answers on")
    calibration_images: int | None = Field(
        default=None, description="how many images to calibrate with, ours and peers; by default 64, or 8 of noise"
    )
    images: int = Field(default=32, description="how many images to compare answers on")
    threads: int | None = Field(default=None, description="threads of every engine; by default PyTorch's choice")
    rounds: int = Field(default=10, description="how often every engine has its turn")
    seconds: float = Field(default=2.0, description="least time of each engine and batch size, over all rounds")
    max_seconds: float = Field(
        default=300.0, description="most time for all measurements; the first round is always completed"
    )


class LabelRequest(ImageOptions):
    """Soft labels of a teacher. Data options are those of the run that will train with the labels."""

    model: config.Model = Field(description="the student: timm's name, or `vit_digits`")
    teacher: str = Field(description="the model that labels: timm's name, or a finished run")
    teacher_weights: str | None = Field(
        None, description="file of the teacher's weights; by default they come from timm's hub"
    )
    teacher_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="arguments of the teacher for `timm.create_model`"
    )
    data: config.Data = Field("digits", description="images, as for `qvit train`: those it would train on are labelled")
    on_bad_image: config.OnBadImage = Field(
        "fatal", description="`skip`: an unreadable image stays without labels and is not drawn in training"
    )
    crops: int = Field(ge=1, description="crops of each image")
    top_k: int | Literal["full"] = Field(5, description="classes to keep of each crop, or `full`")
    scale: tuple[float, float] = Field((0.08, 1.0), description="share of the area of a crop, from and to")
    ratio: tuple[float, float] = Field((3 / 4, 4 / 3), description="width over height of a crop, from and to")
    interpolation: Interpolation = Field("bicubic", description="how crops are resized")
    flip: float | None = Field(
        None, ge=0, le=1, description="probability of mirroring; by default 0.5, and 0 for digits"
    )
    seed: config.Seed = Field(0, description="chooses the crops, and a monitor share as in training")
    images_per_shard: int | None = Field(
        None,
        ge=1,
        description="images in a file; by default about 260 thousand crops, which is what a kill loses at most",
    )
    batch_size: Times = Field(64, description="crops that the teacher sees at a time")

    @classmethod
    def create(cls, /, **values: Any) -> LabelRequest:
        """Validates `values`. Raises UsageError with one line per mistake."""
        request = validated(cls, values)
        if not 0 < request.scale[0] <= request.scale[1] <= 1:
            raise UsageError(f"scale is a range within 0 to 1 of the image's area, not {request.scale}")
        if not 0 < request.ratio[0] <= request.ratio[1]:
            raise UsageError(f"ratio is a range (from, to) of positive numbers, not {request.ratio}")
        return request
