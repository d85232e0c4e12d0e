"""One run from a config to its directory: data, float model, quantization, calibration, training, evaluation, files.

    RUN/config.json         every option, versions, hardware, command, class names: enough to start it again
    RUN/plan.json           the plan: that of the start while the run is going on, then the final one
    RUN/cost.json           costs per site, as `qvit cost --json` prints them
    RUN/log.jsonl           one JSON object a line: start, step, epoch, freeze, end
    RUN/model.safetensors   final weights and scales
    RUN/result.json         the result, written last: a directory without it holds an interrupted run
    RUN/checkpoints/        the last checkpoint, from which `resume` continues bit for bit (on CPU)

The test images are opened for the final number alone; calibration and monitoring see training images.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from qvit.calibration import calibrate
from qvit.convert import plan_of, quantize
from qvit.cost import FLOAT_BITS, CostModel
from qvit.errors import QvitError, UsageError
from qvit.families import inspect_model
from qvit.files import write_json
from qvit.methods import Method, create_method
from qvit.plan import QuantPlan
from qvit.training.checkpoint import LAST, load_checkpoint, save_weights, seed_everything
from qvit.training.config import TrainConfig
from qvit.training.data import (
    AugmentConfig,
    DataBundle,
    calibration_batches,
    data_config_of,
    eval_loader,
    open_data,
    open_source,
    train_loader,
)
from qvit.training.evaluate import evaluate
from qvit.training.images import ImageSource
from qvit.training.loop import Trainer
from qvit.training.models import WEIGHTS_FILE, create_model
from qvit.version import __version__

_log = logging.getLogger(__name__)
CONFIG, RESULT, PLAN, COST, LOG = "config.json", "result.json", "plan.json", "cost.json", "log.jsonl"
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
    run = Path(out)
    _claim(run, overwrite)
    try:
        return _execute(config, run, None, quiet=quiet, notify=notify)
    finally:
        if not any(run.iterdir()):
            run.rmdir()


def resume(out: str | Path, *, quiet: bool = False, notify: Notify = _log.info) -> dict[str, Any]:
    """Continues an interrupted run from its last checkpoint; see `train`. A finished run returns its result."""
    run = Path(out)
    config, _ = read_config(run)
    if (run / RESULT).is_file():
        notify(f"{run} is finished")
        return json.loads((run / RESULT).read_text(encoding="utf-8"))
    if not (run / LAST).is_file():
        notify(f"{run} stopped before its first checkpoint: it starts again")
        _clear(run)
        return _execute(config, run, None, quiet=quiet, notify=notify)
    return _execute(config, run, load_checkpoint(run), quiet=quiet, notify=notify)


def load_run(out: str | Path, device: str = "cpu") -> nn.Module:
    """The trained model of a finished run, in eval mode. Raises QvitError for anything else."""
    run = Path(out)
    config, record = read_config(run)
    require_finished(run)
    model = _float_model(config, int(record["num_classes"]), load=False)
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
    place = pick_device(device)
    model = load_run(run, place)
    source = _images_to_score(config, record, data, class_map)
    return evaluate(
        model,
        eval_loader(source, data_config_of(model), batch_size=batch_size, workers=workers, device=place),
        progress=progress,
    )


def _images_to_score(
    config: TrainConfig, record: dict[str, Any], data: str, class_map: str | Path | None
) -> ImageSource:
    """The images of `data`; where they are the run's own, of which a share was set aside, that share alone."""
    own = data == config.data or Path(data).resolve() == Path(config.data)
    same_classes = class_map is None or str(Path(class_map).resolve()) == config.class_map
    if own and same_classes and config.eval_data is None:
        return open_data(config.data, class_map=config.class_map, test_share=config.test_share).test
    return open_source(data, class_map=class_map, class_names=None if class_map else record["class_names"])


def read_config(run: Path) -> tuple[TrainConfig, dict[str, Any]]:
    """The config of a run and everything recorded beside it. Raises QvitError if this is no run directory."""
    if not run.is_dir():
        raise QvitError(f"no run at {run}")
    try:
        record = json.loads((run / CONFIG).read_text(encoding="utf-8"))
        return TrainConfig.create(
            **{key: value for key, value in record.items() if key in TrainConfig.model_fields}
        ), record
    except FileNotFoundError:
        raise QvitError(f"{run} is not a run directory: it has no {CONFIG}") from None
    except (OSError, json.JSONDecodeError, AttributeError) as error:
        raise QvitError(f"cannot read {run / CONFIG}: {error}") from None


def require_finished(run: Path) -> None:
    """Raises QvitError, with what to do, for the directory of an interrupted run."""
    if not (run / RESULT).is_file():
        raise QvitError(
            f"{run} holds an interrupted run (it has no {RESULT}): continue it with `qvit train --resume {run}`"
        )


def pick_device(name: str) -> str:
    """`auto`: a CUDA GPU if there is one. Raises UsageError for a device that is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device '{name}' is not available: {str(error).splitlines()[0]}") from None
    return name


@dataclass
class _Setup:
    """What a run works with."""

    method: Method
    plan: QuantPlan | None
    bundle: DataBundle
    float_model: nn.Module
    data_config: dict[str, Any]
    cost: CostModel
    device: str


def _execute(
    config: TrainConfig, run: Path, state: dict[str, Any] | None, *, quiet: bool, notify: Notify
) -> dict[str, Any]:
    started = time.perf_counter()
    if config.threads:
        torch.set_num_threads(config.threads)
    setup = _prepare(config, run, state is None, notify)
    model = _starting_model(config, run, setup, state, notify)
    trainer = _trainer(config, run, setup, model)
    setup.method.attach(model, setup.cost, trainer.steps_per_epoch)
    if state is not None:
        trainer.restore(state)
        notify(f"resuming {run} after epoch {trainer.epoch} of {config.epochs}")
    _log_start(trainer, config, setup, resumed=state is not None)
    trainer.fit(quiet=quiet)
    setup.method.finish(trainer)
    result_model = trainer.result_model
    _write_costs(config, run, setup, result_model)
    save_weights(run / WEIGHTS_FILE, result_model)
    notify(f"evaluating on {len(setup.bundle.test)} test images")
    result = _result(config, setup, result_model, run)
    result["seconds"] = round(time.perf_counter() - started, 2)
    trainer.log.write(
        "end", step=config.epochs * trainer.steps_per_epoch, accuracy=result["accuracy"], seconds=result["seconds"]
    )
    write_json(run / RESULT, result)
    return result


def _prepare(config: TrainConfig, run: Path, fresh: bool, notify: Notify) -> _Setup:
    """Opens data and float model, and writes the config of a fresh run."""
    method = create_method(config)
    device = pick_device(config.device)
    bundle = open_data(
        config.data,
        test_data=config.eval_data,
        class_map=config.class_map,
        test_share=config.test_share,
        monitor_share=config.monitor_share,
        seed=config.seed,
    )
    notify(bundle.note)
    seed_everything(config.seed)
    float_model = _float_model(config, bundle.num_classes, load=True).to(device).eval()
    cost = inspect_model(float_model)
    plan = method.plan(cost)
    if plan is not None and config.weights is None and not config.pretrained:
        notify("no --weights and no --pretrained: the float model is untrained, and so will be what is made of it")
    if fresh:
        record = config.model_dump() | {
            "num_classes": bundle.num_classes,
            "class_names": list(bundle.class_names),
            "data_note": bundle.note,
            "versions": {
                "qvit": __version__,
                "torch": torch.__version__,
                "timm": timm.__version__,
                "python": platform.python_version(),
            },
            "hardware": _hardware(device),
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        write_json(run / CONFIG, record)
    return _Setup(method, plan, bundle, float_model, data_config_of(float_model), cost, device)


def _starting_model(
    config: TrainConfig, run: Path, setup: _Setup, state: dict[str, Any] | None, notify: Notify
) -> nn.Module:
    """The model that training starts from: the float one, a freshly calibrated one, or that of a checkpoint."""
    if setup.plan is None:
        return setup.float_model
    if state is not None:
        model = quantize(setup.float_model, QuantPlan.from_json(json.loads(state["plan"])))
        return model.to(setup.device)
    plan_of_start = replace(setup.plan, model=config.model)
    plan_of_start.save(run / PLAN)
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
    )
    return calibrate(model, batches)


def _trainer(config: TrainConfig, run: Path, setup: _Setup, model: nn.Module) -> Trainer:
    loader = train_loader(
        setup.bundle.train,
        setup.data_config,
        batch_size=config.batch_size,
        augment=replace(AugmentConfig.preset(config.augment), repeated_augmentation=config.repeated_augmentation),
        workers=config.workers,
        device=setup.device,
    )
    setup.method.steps_per_epoch = len(loader)
    return Trainer(
        model,
        config,
        loader,
        num_classes=setup.bundle.num_classes,
        run=run,
        hooks=setup.method,
        width_lr=setup.method.width_lr,
        teacher=setup.float_model if config.distill and setup.method.quantizes else None,
        monitor=_monitor(config, setup),
        plan=lambda: _plan_json(config, setup, model),
        label=" ".join(filter(None, (config.method, config.budget))),
    )


def _monitor(config: TrainConfig, setup: _Setup) -> Callable[[nn.Module], float] | None:
    """Measures accuracy on the images held out from training, in percent; None where there are none."""
    if setup.bundle.held_out is None:
        return None
    watched = eval_loader(
        setup.bundle.held_out,
        setup.data_config,
        batch_size=config.batch_size,
        workers=config.workers,
        device=setup.device,
    )
    return lambda model: evaluate(model, watched)["top1"]


def _plan_json(config: TrainConfig, setup: _Setup, model: nn.Module) -> dict[str, Any] | None:
    return plan_of(model, _plan_name(config), config.model).to_json() if setup.method.quantizes else None


def _plan_name(config: TrainConfig) -> str:
    return (
        f"{config.method}-{config.budget}"
        if config.budget
        else Path(config.plan).stem
        if config.plan
        else config.method
    )


def _write_costs(config: TrainConfig, run: Path, setup: _Setup, model: nn.Module) -> None:
    if setup.method.quantizes:
        plan = plan_of(model, _plan_name(config), config.model)
        plan.save(run / PLAN)
        widths = plan.widths()
    else:
        widths = {name: (FLOAT_BITS,) for name in setup.cost.sites}
        empty = QuantPlan("float", (), dict.fromkeys(setup.cost.sites), config.model)
        empty.save(run / PLAN)
    write_json(run / COST, setup.cost.report(widths, model=config.model, plan=_plan_name(config)))


def _log_start(trainer: Trainer, config: TrainConfig, setup: _Setup, *, resumed: bool) -> None:
    uniform = {str(bits): setup.cost.bit_operations(setup.cost.uniform(bits)) for bits in range(2, 9)}
    trainer.log.write(
        "resume" if resumed else "start",
        step=trainer.epoch * trainer.steps_per_epoch,
        time=time.time(),
        epochs=config.epochs,
        steps_per_epoch=trainer.steps_per_epoch,
        budget_bit_operations=setup.method.budget(setup.cost),
        uniform_bit_operations=uniform,
    )


def _result(config: TrainConfig, setup: _Setup, model: nn.Module, run: Path) -> dict[str, Any]:
    loader = eval_loader(
        setup.bundle.test,
        setup.data_config,
        batch_size=max(64, config.batch_size),
        workers=config.workers,
        device=setup.device,
    )
    scores = evaluate(model, loader)
    float_scores = evaluate(setup.float_model, loader) if setup.method.quantizes else scores
    cost = json.loads((run / COST).read_text(encoding="utf-8"))
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


def _float_model(config: TrainConfig, num_classes: int, *, load: bool) -> nn.Module:
    kwargs = {"num_classes": num_classes, **config.model_kwargs}
    if kwargs["num_classes"] < num_classes:
        raise UsageError(f"the data have {num_classes} classes, the model is asked for {kwargs['num_classes']}")
    return create_model(
        config.model, weights=config.weights if load else None, pretrained=config.pretrained and load, **kwargs
    )


def _claim(run: Path, overwrite: bool) -> None:
    """Makes sure that nothing of another run is lost or mixed in."""
    if (run / CONFIG).is_file():
        if not overwrite and ((run / RESULT).is_file() or (run / LAST).is_file()):
            state = (
                "a finished run"
                if (run / RESULT).is_file()
                else f"an interrupted run, which `qvit train --resume {run}` continues"
            )
            raise UsageError(f"{run} holds {state}: choose another --out, or --overwrite")
        _clear(run)
    elif run.is_dir() and any(run.iterdir()):
        raise UsageError(f"{run} is not empty and holds no run: choose another --out")
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise QvitError(f"cannot make {run}: {error}") from error


def _clear(run: Path) -> None:
    """Deletes the files of a run, and nothing else."""
    for name in (RESULT, PLAN, COST, LOG, WEIGHTS_FILE, CONFIG):
        (run / name).unlink(missing_ok=True)
    shutil.rmtree(run / LAST.parent, ignore_errors=True)


def _hardware(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(torch.device(device))
    return f"CPU, {os.cpu_count()} cores, {platform.machine()}"
