"""A run that is finished: its model, and how that scores on other images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from qvit.data.loading import Source
from qvit.data.open import ImageSource, Reading, data_config_of, eval_loader, open_source, require_labels
from qvit.errors import QvitError, UsageError
from qvit.methods import create_method
from qvit.models.convert import quantize
from qvit.models.create import WEIGHTS_FILE, without_storage
from qvit.models.features import answers_with_features
from qvit.plan.quant_plan import QuantPlan
from qvit.runs.directory import PLAN, read_config, require_finished
from qvit.runs.features import compare_features
from qvit.runs.scores import counted_so_far
from qvit.runs.subject import float_model, open_images
from qvit.tensors import total_bytes
from qvit.training.checkpoint import load_state, read_tensors, seed_everything
from qvit.training.config import TrainConfig
from qvit.training.evaluate import evaluate
from qvit.training.processes import Processes

TO_SCORE_BY = "to score by; `qvit ptq` judges without labels, by the agreement with the float model"


def load_run(out: str | Path, device: str = "cpu") -> nn.Module:
    """The trained model of a finished run, in eval mode. Raises QvitError for anything else."""
    run = Path(out)
    config, record = read_config(run)
    require_finished(run)
    config = config.model_copy(update={"model_kwargs": quantized_arguments(config)})
    classes = int(record["num_classes"])
    _require_bytes(run, without_storage(lambda: float_model(config, classes, load=False)))
    model = float_model(config, classes, load=False)
    if create_method(config).quantizes:
        model = quantize(model, QuantPlan.load(run / PLAN), in_place=True)
    try:
        load_state(model, read_tensors(run / WEIGHTS_FILE, "weights", limit=total_bytes(model.state_dict().values())))
    except QvitError as error:
        raise QvitError(f"cannot read the weights of {run}: {error}") from None
    return model.to(device).eval()


def quantized_arguments(config: TrainConfig) -> dict[str, Any]:
    """The arguments that a run's model is made with: the float model's, but for what the method changes."""
    return config.model_kwargs | create_method(config).arguments


def _require_bytes(run: Path, model: nn.Module) -> None:
    """Raises QvitError if a run's file of weights cannot hold those of its model, given without storage."""
    try:
        there = (run / WEIGHTS_FILE).stat().st_size
    except OSError as error:
        raise QvitError(f"cannot read the weights of {run}: {error.strerror}") from None
    needed = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if needed > there:
        raise QvitError(
            f"cannot read the weights of {run}: {WEIGHTS_FILE} has {there:,} bytes, its model takes {needed:,}"
        )


def evaluate_run(
    out: str | Path,
    data: str,
    *,
    features: bool = False,
    weights: str | None = None,
    class_map: str | Path | None = None,
    batch_size: int = 64,
    workers: int = 0,
    device: str = "auto",
    progress: Callable[[int], None] | None = None,
    start: Callable[[int], None] | None = None,
    partial: Path | None = None,
) -> dict[str, Any]:
    """Scores a run's model on other images: `{"top1", "top5", "images"}` in percent.

    Args:
        out: The run.
        data: Images, as for training.
        features: Judges features beside those of the float model instead, see `measure.features`; a model that answers
            with features is always judged so.
        weights: With features: where the float model's weights are, if no longer where the run took them from.
        class_map, batch_size, workers, device: See the command.
        start, progress: Told how many images there are, and how many are done.
        partial: File of what was counted so far; a repeated call goes on from there.
    """
    run = Path(out)
    config, record = read_config(run)
    place = Processes(device).device
    model = load_run(run, place)
    if features or answers_with_features(model):
        if not create_method(config).quantizes:
            raise UsageError(f"{run} holds a float model: its features are what those of quantized ones are judged by")
        source = _images_to_score(config, {"class_names": []}, data, class_map)  # folders of any classes
        seed_everything(config.seed)  # a model that was never trained has the weights of the seed
        classes = int(record["num_classes"])
        float_config = config if weights is None else config.model_copy(update={"weights": weights})
        reference = float_model(float_config, classes).to(place).eval()
        if start is not None:
            start(len(source))
        so_far = counted_so_far(
            partial, source, data_config_of(model), batch_size, "features", models=[model, reference]
        )
        return compare_features(
            model, reference, eval_loader(source, data_config_of(model), Reading(batch_size, workers, place)),
            labelled=source.labelled, by_token=True, progress=progress, partial=so_far,
        )  # fmt: skip
    source = _images_to_score(config, record, data, class_map)
    require_labels(source, TO_SCORE_BY)
    if class_map is None and not record.get("class_names"):
        require_all_classes(source, int(record["num_classes"]))
    if start is not None:
        start(len(source))
    return evaluate(
        model,
        eval_loader(source, data_config_of(model), Reading(batch_size, workers, place)),
        progress=progress,
        partial=counted_so_far(partial, source, data_config_of(model), batch_size, models=[model]),
    )


def _images_to_score(config: TrainConfig, record: dict[str, Any], data: str, class_map: str | Path | None) -> Source:
    """The images of `data`; where they are the run's own, of which a share was set aside, that share alone."""
    own = data == config.data or Path(data).resolve() == Path(config.data)
    same_classes = class_map is None or str(Path(class_map).resolve()) == config.class_map
    if own and same_classes and config.eval_data is None:
        return open_images(config).test
    names = None if class_map else record["class_names"] or None
    return open_source(data, class_map=class_map, class_names=names)


def require_all_classes(source: Source, classes: int) -> None:
    """Raises UsageError if folders cannot be told to be classes of a model that was made without labels."""
    if isinstance(source, ImageSource) and source.num_classes != classes:
        raise UsageError(
            f"{source.name} has {source.num_classes} class folders, and the model {classes} classes whose folders it "
            "does not know: give a class map with --class-map"
        )
