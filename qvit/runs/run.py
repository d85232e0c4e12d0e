"""One run from a config to its directory: data, float model, quantization, calibration, training, evaluation, files.

The test images are opened for the final number alone; calibration and monitoring see training images. What the files
of a run's directory are is said in `runs/directory.py`.

Under accelerate's launcher every process goes through the same steps. The first one claims the directory, writes all
files and speaks; calibration is its own, handed to the others, and an evaluation counts each image in one process.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from qvit.data.labels import SoftLabelStore
from qvit.data.labels.loading import StoredLabels
from qvit.data.loading import Source
from qvit.data.open import (
    AugmentConfig,
    DataBundle,
    calibration_batches,
    data_config_of,
    eval_loader,
    open_data,
    open_data_of,
    open_source,
    train_loader,
)
from qvit.errors import QvitError, UsageError
from qvit.files import write_json
from qvit.methods import Method, create_method
from qvit.models.calibrate import calibrate
from qvit.models.convert import plan_of, quantize
from qvit.models.create import WEIGHTS_FILE, create_model
from qvit.models.families import inspect_model
from qvit.plan.cost import CostModel
from qvit.plan.quant_plan import QuantPlan
from qvit.runs.directory import CONFIG, COST, PLAN, RESULT, claim, clear, read_config, require_finished
from qvit.training.checkpoint import last_checkpoint, load_checkpoint, save_weights, seed_everything
from qvit.training.config import TrainConfig
from qvit.training.distill import Teacher
from qvit.training.evaluate import evaluate
from qvit.training.loop import Trainer, micro_batch
from qvit.training.processes import Processes
from qvit.version import __version__

_log = logging.getLogger(__name__)
Notify = Callable[[str], None]


def train(
    config: TrainConfig, out: str | Path, *, overwrite: bool = False, quiet: bool = False, notify: Notify = _log.info
) -> dict[str, Any]:
    """Trains and evaluates a run.

    Args:
        config: All options.
        out: The run's directory; must not hold a run, unless `overwrite`.
        overwrite: Deletes the run that is there.
        quiet: No progress bar.
        notify: Receives one line per stage of the run.

    Returns:
        The content of `result.json`: `{"model", "method", "accuracy", "float_accuracy", "budget", "bit_operations",
        "weight_bytes", "seconds", "seed", ...}`, in percent, BOPs and bytes.
    """
    run, processes = Path(out), Processes(config.device)
    with processes.lost_ones_are_reported():
        if processes.is_main:
            claim(run, overwrite)
        processes.wait()
        try:
            return _execute(config, run, processes, None, quiet=quiet, notify=notify)
        finally:
            if processes.is_main and not any(run.iterdir()):
                run.rmdir()


def resume(out: str | Path, *, quiet: bool = False, notify: Notify = _log.info) -> dict[str, Any]:
    """Continues an interrupted run from its last checkpoint; see `train`. A finished run returns its result."""
    run = Path(out)
    config, _ = read_config(run)
    if (run / RESULT).is_file():
        notify(f"{run} is finished")
        return json.loads((run / RESULT).read_text(encoding="utf-8"))
    processes = Processes(config.device)
    with processes.lost_ones_are_reported():
        state = None
        if last_checkpoint(run):
            state = load_checkpoint(run)
        elif processes.is_main:
            notify(f"{run} stopped before its first checkpoint: it starts again")
            clear(run)
        processes.wait()
        return _execute(config, run, processes, state, quiet=quiet, notify=notify)


def load_run(out: str | Path, device: str = "cpu") -> nn.Module:
    """The trained model of a finished run, in eval mode. Raises QvitError for anything else."""
    run = Path(out)
    config, record = read_config(run)
    require_finished(run)
    model = create_float_model(config, int(record["num_classes"]), load=False)
    if create_method(config).quantizes:
        model = quantize(model, QuantPlan.load(run / PLAN), in_place=True)
    from safetensors.torch import load_file

    try:
        model.load_state_dict(load_file(str(run / WEIGHTS_FILE)))
    except Exception as error:
        raise QvitError(f"cannot read the weights of {run}: {str(error).splitlines()[0]}") from error
    return model.to(device).eval()


def evaluate_run(
    out: str | Path,
    data: str,
    *,
    class_map: str | Path | None = None,
    batch_size: int = 64,
    workers: int = 0,
    device: str = "auto",
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Scores a run's model on other images: `{"top1", "top5", "images"}` in percent."""
    run = Path(out)
    config, record = read_config(run)
    place = Processes(device).device
    model = load_run(run, place)
    source = _images_to_score(config, record, data, class_map)
    return evaluate(
        model,
        eval_loader(source, data_config_of(model), batch_size=batch_size, workers=workers, device=place),
        progress=progress,
    )


def _images_to_score(config: TrainConfig, record: dict[str, Any], data: str, class_map: str | Path | None) -> Source:
    """The images of `data`; where they are the run's own, of which a share was set aside, that share alone."""
    own = data == config.data or Path(data).resolve() == Path(config.data)
    same_classes = class_map is None or str(Path(class_map).resolve()) == config.class_map
    if own and same_classes and config.eval_data is None:
        return open_data(config.data, class_map=config.class_map, test_share=config.test_share).test
    return open_source(data, class_map=class_map, class_names=None if class_map else record["class_names"])


@dataclass
class _Setup:
    """What a run works with."""

    method: Method
    plan: QuantPlan | None
    bundle: DataBundle
    float_model: nn.Module
    data_config: dict[str, Any]
    cost: CostModel
    processes: Processes

    @property
    def device(self) -> str:
        return self.processes.device

    def reading(self, config: TrainConfig) -> dict[str, Any]:
        """How this process reads its part of the images: what all loaders are told."""
        return {
            "workers": config.workers,
            "device": self.device,
            "on_bad_image": config.on_bad_image,
            "rank": self.processes.rank,
            "world_size": self.processes.world_size,
        }


def _execute(
    config: TrainConfig,
    run: Path,
    processes: Processes,
    state: dict[str, Any] | None,
    *,
    quiet: bool,
    notify: Notify,
) -> dict[str, Any]:
    started = time.perf_counter()
    if config.threads:
        torch.set_num_threads(config.threads)
    if not processes.is_main:
        notify = _silence
    micro_batch(config, processes.world_size)  # refused before anything is read
    config.require_labels_alone()
    if state is not None:
        require_same_labels(run)
    setup = _prepare(config, run, processes, state is None, notify)
    model = _starting_model(config, run, setup, state, notify)
    trainer = _trainer(config, run, setup, model)
    setup.method.attach(model, setup.cost, trainer.steps_per_epoch)
    if state is not None:
        trainer.restore(state)
        notify(f"resuming {run} after step {trainer.step} of {trainer.total_steps}")
    _log_start(trainer, config, setup, resumed=state is not None)
    trainer.fit(quiet=quiet)
    setup.method.finish(trainer)
    result_model = trainer.result_model
    cost = _costs(config, setup, result_model)
    if processes.is_main:
        _plan(config, setup, result_model).save(run / PLAN)
        write_json(run / COST, cost)
        save_weights(run / WEIGHTS_FILE, result_model)
    notify(f"evaluating on {len(setup.bundle.test)} test images")
    result = _result(config, setup, result_model, cost)
    result["seconds"] = round(time.perf_counter() - started, 2)
    trainer.log.write("end", step=trainer.total_steps, accuracy=result["accuracy"], seconds=result["seconds"])
    if processes.is_main:
        write_json(run / RESULT, result)
    return result


def _silence(_: str) -> None: ...


def _prepare(config: TrainConfig, run: Path, processes: Processes, fresh: bool, notify: Notify) -> _Setup:
    """Opens data and float model, and writes the config of a fresh run."""
    method = create_method(config)
    bundle = open_data_of(config)
    notify(bundle.note)
    seed_everything(config.seed)
    float_model = create_float_model(config, bundle.num_classes, load=True).to(processes.device).eval()
    cost = inspect_model(float_model)
    plan = method.plan(cost)
    if plan is not None and config.weights is None and not config.pretrained:
        notify("no --weights and no --pretrained: the float model is untrained, and so will be what is made of it")
    if fresh and processes.is_main:
        write_json(run / CONFIG, run_record(config, bundle, processes))
    return _Setup(method, plan, bundle, float_model, data_config_of(float_model), cost, processes)


def run_record(config: TrainConfig, bundle: DataBundle, processes: Processes) -> dict[str, Any]:
    """The content of `config.json`: every option, and what is needed to understand the run later."""
    return config.model_dump() | {
        "num_classes": bundle.num_classes,
        "class_names": list(bundle.class_names),
        "data_note": bundle.note,
        "labels_digest": None if config.labels is None else SoftLabelStore(config.labels).digest,
        "versions": {
            "qvit": __version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "python": platform.python_version(),
        },
        "hardware": _hardware(processes.device),
        "processes": processes.world_size,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _starting_model(
    config: TrainConfig, run: Path, setup: _Setup, state: dict[str, Any] | None, notify: Notify
) -> nn.Module:
    """The model that training starts from: the float one, a freshly calibrated one, or that of a checkpoint."""
    if setup.plan is None:
        return setup.float_model
    if state is not None:
        model = quantize(setup.float_model, QuantPlan.from_json(json.loads(state["plan"])))
        return model.to(setup.device)
    if setup.processes.is_main:
        replace(setup.plan, model=config.model).save(run / PLAN)
    model = quantize(setup.float_model, setup.plan)
    notify(f"calibrating on {config.calibration_images} training images")
    batches = calibration_batches(
        setup.bundle.train,
        setup.data_config,
        images=config.calibration_images,
        batch_size=min(64, config.calibration_images),
        seed=config.seed,
        workers=config.workers,
        device=setup.device,
        on_bad_image=config.on_bad_image,
    )
    return setup.processes.share(calibrate(model, batches))


def _trainer(config: TrainConfig, run: Path, setup: _Setup, model: nn.Module) -> Trainer:
    loader = train_loader(
        setup.bundle.train,
        setup.data_config,
        batch_size=micro_batch(config, setup.processes.world_size),
        augment=replace(AugmentConfig.preset(config.augment), repeated_augmentation=config.repeated_augmentation),
        seed=config.seed,
        labels=stored_labels(config, getattr(setup.float_model, "num_classes", setup.bundle.num_classes)),
        **setup.reading(config),
    )
    setup.method.steps_per_epoch = len(loader) // config.accumulate
    return Trainer(
        model,
        config,
        loader,
        num_classes=setup.bundle.num_classes,
        run=run,
        hooks=setup.method,
        width_lr=setup.method.width_lr,
        teacher=_teacher(config, setup),
        monitor=_monitor(config, setup),
        plan=lambda: _plan(config, setup, model).to_json() if setup.method.quantizes else None,
        label=" ".join(filter(None, (config.method, config.budget))),
        processes=setup.processes,
    )


def _teacher(config: TrainConfig, setup: _Setup) -> Teacher | None:
    """Whom the model learns from: nobody, the float model that it was made from, or the one that is named."""
    if not config.distill:
        if config.teacher is not None:
            raise UsageError("a teacher without --distill teaches nothing: give a share, such as --distill 1")
        return None
    if config.teacher is None:
        if not setup.method.quantizes:
            raise UsageError(f"method '{config.method}' has no float model to learn from: name one with --teacher")
        return Teacher(setup.float_model)
    classes = getattr(setup.float_model, "num_classes", setup.bundle.num_classes)
    model = teacher_model(config.teacher, config.teacher_weights, config.teacher_kwargs, classes)
    teacher = Teacher(
        model,
        student_data=setup.data_config,
        own_data=data_config_of(model),
        num_classes=getattr(setup.float_model, "num_classes", None),
    )
    return teacher.to(setup.device)


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
    classes = {} if weights is None else {"num_classes": num_classes}
    return create_model(name, weights=weights, pretrained=weights is None, **(classes | dict(kwargs)))


def require_same_labels(run: Path) -> None:
    """Raises QvitError if the soft labels of a run are not those that it began with."""
    config, record = read_config(run)
    began_with = record.get("labels_digest")
    if config.labels is not None and began_with is not None and SoftLabelStore(config.labels).digest != began_with:
        raise QvitError(
            f"{config.labels} holds other soft labels than those that {run} began with: put these back, or start anew"
        )


def stored_labels(config: TrainConfig, num_classes: int) -> StoredLabels | None:
    """The soft labels that a run learns from; None where it learns from those of the data. Raises QvitError."""
    if config.labels is None:
        return None
    return StoredLabels(
        SoftLabelStore(config.labels),
        num_classes,
        crops_per_image=config.crops_per_image,
        single_from=max(0, config.epochs - config.single_crop_epochs),
        interpolation=config.crop_interpolation,
    )


def _evaluator(config: TrainConfig, setup: _Setup, source: Source) -> Callable[[nn.Module], dict[str, Any]]:
    """Scores models on some images, each image in one process."""
    loader = eval_loader(
        source,
        setup.data_config,
        batch_size=max(64, micro_batch(config, setup.processes.world_size)),
        **setup.reading(config),
    )
    return lambda model: evaluate(model, loader, reduce=setup.processes.sum)


def _monitor(config: TrainConfig, setup: _Setup) -> Callable[[nn.Module], float] | None:
    """Measures accuracy on the images held out from training, in percent; None where there are none."""
    if setup.bundle.held_out is None:
        return None
    score = _evaluator(config, setup, setup.bundle.held_out)
    return lambda model: score(model)["top1"]


def _plan(config: TrainConfig, setup: _Setup, model: nn.Module) -> QuantPlan:
    """The plan of a model as it is; for a float model one that leaves every site in float."""
    if setup.method.quantizes:
        return plan_of(model, _plan_name(config), config.model)
    return QuantPlan("float", (), dict.fromkeys(setup.cost.sites), config.model)


def _plan_name(config: TrainConfig) -> str:
    if config.budget:
        return f"{config.method}-{config.budget}"
    return Path(config.plan).stem if config.plan else config.method


def _costs(config: TrainConfig, setup: _Setup, model: nn.Module) -> dict[str, Any]:
    widths = _plan(config, setup, model).widths()
    return setup.cost.report(widths, model=config.model, plan=_plan_name(config))


def _log_start(trainer: Trainer, config: TrainConfig, setup: _Setup, *, resumed: bool) -> None:
    uniform = {str(bits): setup.cost.bit_operations(setup.cost.uniform(bits)) for bits in range(2, 9)}
    trainer.log.write(
        "resume" if resumed else "start",
        step=trainer.step,
        time=time.time(),
        epochs=config.epochs,
        steps_per_epoch=trainer.steps_per_epoch,
        budget_bit_operations=setup.method.budget(setup.cost),
        uniform_bit_operations=uniform,
    )


def _result(config: TrainConfig, setup: _Setup, model: nn.Module, cost: dict[str, Any]) -> dict[str, Any]:
    score = _evaluator(config, setup, setup.bundle.test)
    scores = score(model)
    float_scores = score(setup.float_model) if setup.method.quantizes else scores
    return {
        "model": config.model,
        "method": config.method,
        "accuracy": scores["top1"],
        "float_accuracy": float_scores["top1"],
        "budget": config.budget,
        "bit_operations": cost["bit_operations"],
        "weight_bytes": cost["weight_bytes"],
        "seconds": 0.0,
        "seed": config.seed,
        "top5": scores["top5"],
        "images": scores["images"],
        "epochs": config.epochs,
    }


def create_float_model(config: TrainConfig, num_classes: int, *, load: bool) -> nn.Module:
    """The float model of a run, with its weights if they are to be loaded."""
    kwargs = {"num_classes": num_classes, **config.model_kwargs}
    if kwargs["num_classes"] < num_classes:
        raise UsageError(f"the data have {num_classes} classes, the model is asked for {kwargs['num_classes']}")
    return create_model(
        config.model, weights=config.weights if load else None, pretrained=config.pretrained and load, **kwargs
    )


def _hardware(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(torch.device(device))
    return f"CPU, {os.cpu_count()} cores, {platform.machine()}"
