"""From the directory of a finished run to its packed model, and what a packed model scores.

The packed file says where it comes from without saying where it was made: versions, method, the options that matter,
seed and accuracies; of paths only their last part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from typing import Any

from torch import Tensor, nn

from qvit.data.loading import Source
from qvit.data.open import data_config_of, eval_loader, open_source, require_labels
from qvit.deploy.engines import Engine, create_engine, load
from qvit.deploy.file.artifact import FLOAT_ARGUMENTS, Artifact
from qvit.deploy.file.container import is_packed
from qvit.deploy.file.resize import at_size
from qvit.documents.base import read_document
from qvit.documents.run import Result
from qvit.errors import UsageError
from qvit.locks import writing_file
from qvit.methods import create_method
from qvit.models.create import create_model, create_shapes
from qvit.models.features import answers_with_features
from qvit.plan.quant_plan import QuantPlan
from qvit.runs.directory import PACKED, PLAN, RESULT, own_files, read_config, require_finished, written
from qvit.runs.features import compare_features
from qvit.runs.finished import TO_SCORE_BY, load_run, quantized_arguments, require_all_classes
from qvit.runs.scores import counted_so_far
from qvit.training.config import TrainConfig
from qvit.training.evaluate import evaluate

_ALWAYS = ("method", "budget", "data", "epochs", "batch_size", "lr", "seed")
#: Where they are not the default.
_OPTIONS = (
    "method_options", "opt", "weight_decay", "augment", "mixup", "cutmix", "distill", "distill_kind",
    "calibration_images", "precision",
)  # fmt: skip
_RESULTS = (
    "accuracy", "top5", "float_accuracy", "agreement", "divergence", "features", "images", "bit_operations",
)  # fmt: skip


def pack_run(run: str | Path) -> Artifact:
    """The packed model of a finished run.

    Raises:
        UsageError: The run's model is a float one.
        QvitError: No run, an interrupted one, or one whose files cannot be read.
    """
    folder = Path(run)
    config, record = read_config(folder)
    require_finished(folder)
    if not create_method(config).quantizes:
        raise UsageError(
            f"{folder} holds a float model: quantize it with `qvit train {config.model} --weights {folder} ...` or "
            f"`qvit ptq {config.model} --weights {folder} ...`, and pack that run"
        )
    model = load_run(folder)
    kwargs = {"num_classes": int(record["num_classes"]), **quantized_arguments(config)}
    return Artifact.from_model(
        model,
        model_name=config.model.removeprefix("timm/"),
        model_kwargs=kwargs,
        data_config=data_config_of(model),
        class_names=tuple(record.get("class_names", ())),
        provenance=_provenance(record, _read_result(folder)) | _changed_arguments(config),
        plan_name=QuantPlan.load(folder / PLAN).name,
    )


def write_packed(run: str | Path, out: str | Path | None = None, *, overwrite: bool = False) -> tuple[Artifact, Path]:
    """Packs a run into a file, by default `packed.safetensors` in its directory.

    Args:
        run: Its directory.
        out: The file. A packed model that is there is replaced.
        overwrite: Replaces any other file, too, except the run's own.

    Raises:
        UsageError: The file is there and is no packed model.
        QvitError: See `pack_run`; or the file cannot be written.
    """
    folder = Path(run)
    target = folder / PACKED if out is None else Path(out)
    if target.is_dir():
        raise UsageError(f"{target} is a directory: give a file, such as {target / PACKED}")
    if target.resolve() in [(folder / name).resolve() for name in own_files() if name != PACKED]:
        raise UsageError(f"{target} belongs to the run: choose another --out")
    if target.exists() and not overwrite and not is_packed(target):
        raise UsageError(f"{target} is there and is no packed model: choose another --out, or --overwrite")
    read_config(folder)  # a directory that holds no run gets no lock
    with written(folder) if target.parent.resolve() == folder.resolve() else writing_file(target):
        artifact = pack_run(folder)
        artifact.save(target)
    return artifact, target


class Running(nn.Module):
    """An engine where a model is expected."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine = engine

    def forward(self, images: Tensor) -> Tensor:
        return self.engine(images)


def evaluate_packed(
    file: str | Path,
    data: str,
    *,
    engine: str | None = None,
    features: bool = False,
    weights: str | None = None,
    pretrained: bool = False,
    image_size: Sequence[int] | None = None,
    class_map: str | Path | None = None,
    batch_size: int = 64,
    workers: int = 0,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
    start: Callable[[int], None] | None = None,
    partial: Path | None = None,
) -> dict[str, Any]:
    """Scores a packed model on images, by an engine of `qvit.load`.

    Args:
        file: The packed model.
        data: Images, as for training.
        engine: Which engine; by default the first that runs it.
        features: Judges features beside those of the float model instead, see `measure.features`; a model that answers
            with features is always judged so. Engines answer with classes where there is a classifier: then it is the
            simulated model whose features are judged.
        weights, pretrained: With features: of the float model, see `create_model`.
        image_size: Height and width of the images; None: those of the model.
        class_map, batch_size, workers, threads: See the command.
        start, progress: Told how many images there are, and how many are done.
        partial: File of what was counted so far; a repeated call goes on from there.

    Returns:
        `{"top1", "top5", "images", "engine", "arithmetic"}`, in percent; or those of features.
    """
    artifact = Artifact.load(file)
    artifact = artifact if image_size is None else at_size(artifact, image_size)
    shapes = create_shapes(artifact.model_name, **artifact.model_kwargs)
    if features or answers_with_features(shapes):
        if weights is None and not pretrained:
            raise UsageError(
                "features are judged beside those of the float model: give its weights with --weights, or --pretrained"
            )
        own = {"weights": weights, "pretrained": pretrained, **artifact.float_kwargs}
        reference = create_model(artifact.model_name, **own).eval()
        source = open_source(data, class_map=class_map, split="test")
        loader = eval_loader(source, dict(artifact.data_config), batch_size=batch_size, workers=workers)
        model, how = _with_features(artifact, shapes, engine, threads)
        if start is not None:
            start(len(source))
        so_far = counted_so_far(
            partial, source, artifact.data_config, batch_size, "features", how.get("engine"),
            file=file, models=[reference],
        )  # fmt: skip
        how_judged: dict[str, Any] = {"labelled": source.labelled, "by_token": True, "progress": progress}
        how_judged["partial"] = so_far
        return compare_features(model, reference, loader, **how_judged) | how
    running = create_engine(artifact, engine, threads=threads)
    names = None if class_map else list(artifact.class_names) or None
    source = open_source(data, class_map=class_map, class_names=names, split="test")
    require_labels(source, TO_SCORE_BY)
    if class_map is None and names is None and "num_classes" in artifact.model_kwargs:
        require_all_classes(source, artifact.model_kwargs["num_classes"])
    loader = eval_loader(source, dict(artifact.data_config), batch_size=batch_size, workers=workers)
    if start is not None:
        start(len(source))
    so_far = counted_so_far(partial, source, artifact.data_config, batch_size, running.name, file=file)
    scores = evaluate(Running(running), loader, progress=progress, partial=so_far)
    return scores | {"engine": running.name, "arithmetic": running.arithmetic}


def _with_features(
    artifact: Artifact, shapes: nn.Module, engine: str | None, threads: int | None
) -> tuple[nn.Module, dict[str, Any]]:
    """What has a packed model's features, in eval mode, and how it computes: an engine, where it answers with them."""
    if getattr(shapes, "num_classes", None) == 0:
        running = create_engine(artifact, engine, threads=threads)
        return Running(running), {"engine": running.name, "arithmetic": running.arithmetic}
    if engine is not None:
        raise UsageError(
            f"engine '{engine}' answers with classes: leave out --engine, features in front of a classifier are those "
            "of the simulated model"
        )
    return artifact.model().eval(), {}


def compare_packed(
    file: str | Path, source: Source, *, engine: str = "reference", batch_size: int = 64
) -> dict[str, Any]:
    """Scores a packed model by an engine and beside it the simulated model, on the same images.

    Returns:
        `{"engine", "arithmetic", "top1", "top1_simulated", "agreement", "images"}`, in percent; agreement is the share
        of images whose first class is the same.
    """
    running = load(file, engine)
    loader = eval_loader(source, dict(running.artifact.data_config), batch_size=batch_size)
    scores = evaluate(Running(running), loader, reference=running.artifact.model())
    return {
        "engine": running.name,
        "arithmetic": running.arithmetic,
        "top1": scores["top1"],
        "top1_simulated": scores["top1_reference"],
        "agreement": scores["agreement"],
        "images": scores["images"],
    }


def _read_result(folder: Path) -> dict[str, Any]:
    result = read_document(Result, folder / RESULT, "result")
    return {key: result[key] for key in _RESULTS if key in result}


def _provenance(record: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    defaults = {key: field.get_default(call_default_factory=True) for key, field in TrainConfig.model_fields.items()}
    found = {key: record[key] for key in _ALWAYS if record.get(key) is not None}
    found |= {key: record[key] for key in _OPTIONS if key in record and record[key] != defaults[key]}
    return _without_paths(found | result)


def _changed_arguments(config: TrainConfig) -> dict[str, Any]:
    """What the method changed of the model's arguments, as it was before; null where nothing was given."""
    before = {key: config.model_kwargs.get(key) for key in create_method(config).arguments}
    return {FLOAT_ARGUMENTS: before} if before else {}


def _without_paths(data: Any) -> Any:
    """The same data with the last part of each path in place of the path."""
    if isinstance(data, dict):
        return {key: _without_paths(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_without_paths(value) for value in data]
    return PurePath(data).name if isinstance(data, str) and "/" in data else data
