"""What a run learns from: labels of the data, a teacher's answers, features of the float model, stored soft labels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from qvit.data.labels import SoftLabelStore
from qvit.data.loading import Source
from qvit.data.open import require_labels
from qvit.errors import QvitError, UsageError
from qvit.models.create import create_model
from qvit.models.features import answers_with_features
from qvit.runs.directory import CONFIG, read_config
from qvit.runs.finished import load_run
from qvit.training.config import TrainConfig

TO_TRAIN_BY = (
    "to train by: give class folders, or learn from a teacher's answers (`qvit labels`, then --set labels=STORE)"
)


def require_what_teaches(config: TrainConfig, model: nn.Module, train: Source) -> None:
    """Raises UsageError unless there is something to train by: labels, or the float model's features."""
    if not answers_with_features(model):
        if config.labels is None and not (config.distill_features and config.distill == 1):
            require_labels(train, TO_TRAIN_BY)
        if config.labels is None and not train.labelled and (config.mixup or config.cutmix):
            raise UsageError(f"{train.name} has no labels to mix: leave out mixup and cutmix")
        return
    if not config.distill_features:
        raise UsageError(
            f"{config.model} answers with features, not with classes, so that labels teach it nothing: "
            "--distill-features learns those of the float model"
        )
    for name in ("labels", "mixup", "cutmix", "label_smoothing", "distill", "monitor_share"):
        if value := getattr(config, name):
            raise UsageError(f"{config.model} answers with features: leave out {name}={value!r}, which needs classes")


def require_same_labels(run: Path) -> None:
    """Raises QvitError if the soft labels of a run are not those that it began with."""
    config, record = read_config(run)
    began_with = record.get("labels_digest")
    if config.labels is not None and began_with is not None and SoftLabelStore(config.labels).digest != began_with:
        raise QvitError(
            f"{config.labels} holds other soft labels than those that {run} began with: put these back, or start anew"
        )


def teacher_model(name: str, weights: str | None, kwargs: Mapping[str, Any], num_classes: int) -> nn.Module:
    """The model that is named as a teacher: that of a finished run, or timm's, with its weights from a file or the hub.

    Args:
        name: A run's directory, or timm's name.
        weights: A file of weights for timm's model; None to take them from the hub.
        kwargs: For `timm.create_model`.
        num_classes: Classes of the student; those of timm's model where weights are given and `kwargs` say nothing.
    """
    if (Path(name) / CONFIG).is_file():
        return load_run(name)
    classes: dict[str, Any] = {} if weights is None else {"num_classes": num_classes}
    return create_model(name, weights=weights, pretrained=weights is None, **(classes | dict(kwargs)))
