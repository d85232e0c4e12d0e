"""One run from a config to its directory: data, float model, quantization, training, evaluation, files.

    open images → float model → the method's quantized model → [training] → score it beside the float model → files

Post-training quantization is this path without the training. The test images are opened for the final number alone;
calibration and monitoring see training images. What the files of a run's directory are is said in `runs/directory.py`.

Under accelerate's launcher every process goes through the same steps. The first one claims the directory, writes all
files and speaks; calibration is its own, handed to the others, and an evaluation counts each image in one process.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qvit.data.labels import SoftLabelStore
from qvit.data.labels.loading import StoredLabels
from qvit.data.loading import Source
from qvit.data.open import AugmentConfig, data_config_of, eval_loader, require_apart, train_loader
from qvit.documents.base import read_document
from qvit.documents.run import RESULT_VERSION, Outcome
from qvit.errors import QvitError, UsageError
from qvit.files import parse_json, write_json
from qvit.kernels import trial
from qvit.methods import Method, create_method
from qvit.methods.base import Preparation
from qvit.methods.ptq.images import Progress
from qvit.methods.ptq.method import BLOCKS
from qvit.models.convert import plan_of, quantize
from qvit.models.create import WEIGHTS_FILE
from qvit.models.families import inspect_model
from qvit.models.families.tokens import ranks_tokens
from qvit.models.features import answers_with_features, feature_function
from qvit.plan.cost import CostModel
from qvit.plan.quant_plan import QuantPlan
from qvit.runs.directory import CONFIG, COST, LOG, PLAN, RESULT, claimed, clear, read_config, written
from qvit.runs.features import compare_features
from qvit.runs.finished import load_run
from qvit.runs.patchwise import write_patches
from qvit.runs.record import run_record
from qvit.runs.steps import conclude, step_configs
from qvit.runs.subject import Subject, open_subject
from qvit.runs.teaching import require_same_labels, require_what_teaches, teacher_model
from qvit.training.checkpoint import last_checkpoint, load_checkpoint, save_weights
from qvit.training.config import TrainConfig
from qvit.training.distill import Teacher
from qvit.training.evaluate import evaluate
from qvit.training.log import RunLog, Stopwatch
from qvit.training.loop import Trainer, micro_batch
from qvit.training.processes import Processes
from qvit.training.progress import TrainingProgress

_log = logging.getLogger(__name__)
Notify = Callable[[str], None]


def train(
    config: TrainConfig,
    out: str | Path,
    *,
    overwrite: bool = False,
    quiet: bool = False,
    notify: Notify = _log.info,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Makes a run: quantizes and trains as its method does, and evaluates.

    Args:
        config: All options.
        out: The run's directory; must not hold a run, unless `overwrite`.
        overwrite: Deletes the run that is there.
        quiet: No progress bar.
        notify: Receives one line per stage of the run.
        progress: Called during post-training quantization with a text, what is done, how much there is, and figures.

    Returns:
        The content of `result.json`, see `documents.Result`: accuracies in percent, BOPs, bytes, seconds per stage.
    """
    run, processes = Path(out), Processes(config.device)
    with (
        processes.lost_ones_are_reported(),
        claimed(run, overwrite) if processes.is_main else contextlib.nullcontext(),
    ):
        processes.wait()
        if config.steps is not None:
            return _in_steps(config, run, processes, quiet=quiet, notify=notify, progress=progress)
        return _execute(config, run, processes, None, quiet=quiet, notify=notify, progress=progress)


def resume(
    out: str | Path, *, quiet: bool = False, notify: Notify = _log.info, progress: Progress | None = None
) -> dict[str, Any]:
    """Continues an interrupted run from its last checkpoint; see `train`. A finished run returns its result."""
    run = Path(out)
    config, _ = read_config(run)
    if (run / RESULT).is_file():
        return _finished(run, notify)
    processes = Processes(config.device)
    with processes.lost_ones_are_reported(), written(run) if processes.is_main else contextlib.nullcontext():
        processes.wait()
        config, _ = read_config(run)  # as it is now that nobody else writes
        if (run / RESULT).is_file():
            return _finished(run, notify)
        if config.steps is not None:
            return _in_steps(config, run, processes, quiet=quiet, notify=notify, progress=progress)
        state = None
        if last_checkpoint(run):
            state = load_checkpoint(run)
        elif processes.is_main:
            done = len(list((run / BLOCKS).glob("*.safetensors")))
            if done:
                notify(f"{run} stopped after the reconstruction of {done} block(s): it goes on with the next one")
            else:
                notify(f"{run} stopped before its first checkpoint: it starts again")
            clear(run, interrupted=True)
        processes.wait()
        return _execute(config, run, processes, state, quiet=quiet, notify=notify, progress=progress)


def _finished(run: Path, notify: Notify) -> dict[str, Any]:
    notify(f"{run} is finished")
    return read_document(Outcome, run / RESULT, "result")


def _execute(
    config: TrainConfig,
    folder: Path,
    processes: Processes,
    state: dict[str, Any] | None,
    *,
    quiet: bool,
    notify: Notify,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Makes a run, or goes on from the `state` of a checkpoint."""
    watch = Stopwatch()
    if config.threads:
        torch.set_num_threads(config.threads)
    if not processes.is_main:
        notify = _silence
    micro_batch(config, processes.world_size)  # refused before anything is read
    config.require_labels_alone()
    if state is not None:
        require_same_labels(folder)
    method = create_method(config)
    _require_start(config, method)
    if not method.trains and not processes.alone:
        raise UsageError("post-training quantization takes one process: start it without a launcher")
    subject = open_subject(config, processes, notify, new_classifier=method.trains)
    if not method.trains:
        require_apart(subject.bundle.train, subject.bundle.test)
    else:
        require_what_teaches(config, subject.model, subject.bundle.train)
    run = _Run(config, folder, method, subject, inspect_model(subject.model), watch, notify, quiet)
    plan = method.plan(run.cost)
    if plan is not None and config.weights is None and not config.pretrained:
        notify("no --weights and no --pretrained: the float model is untrained, and so will be what is made of it")
    if state is None and processes.is_main:
        write_json(folder / CONFIG, run_record(config, subject, processes))
    model = run.starting_model(plan, state, progress)
    if method.trains:
        return run.end(*run.trained(model, state, quiet=quiet))
    log = RunLog(folder / LOG, tensorboard=config.tensorboard)
    log.write("start", step=0, time=time.time(), **run.budgets())
    return run.end(model, log, 0)


def _in_steps(
    config: TrainConfig,
    run: Path,
    processes: Processes,
    *,
    quiet: bool,
    notify: Notify,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Makes a run of several steps, see `runs/steps.py`, or goes on with the one that was interrupted."""
    steps = step_configs(config, run)
    subject = open_subject(config, processes)
    cost = inspect_model(subject.model)
    for step in steps.values():  # all are refused before the first one takes hours
        _require_start(step, create_method(step))
        create_method(step).plan(cost)
    if processes.is_main and not (run / CONFIG).is_file():
        write_json(run / CONFIG, run_record(config, subject, processes))
    del subject
    results = {}
    for number, (folder, step) in enumerate(steps.items(), 1):
        begun = (folder / CONFIG).is_file()
        processes.wait()
        if processes.is_main:
            notify(f"step {number} of {len(steps)}: {step.budget or step.plan}, {step.epochs} epoch(s)")
        telling: dict[str, Any] = {"quiet": quiet, "notify": notify, "progress": progress}
        results[folder] = resume(folder, **telling) if begun else train(step, folder, **telling)
    return conclude(run, results, write=processes.is_main)


def _require_start(config: TrainConfig, method: Method) -> None:
    """Raises UsageError if a run is to continue another one and its method cannot."""
    if config.start is not None and not (method.quantizes and method.trains):
        raise UsageError(f"method '{config.method}' continues no quantized run: leave out start={config.start!r}")


def _silence(_: str) -> None: ...


@dataclass
class _Run:
    """A run that is being made: its options and directory, and what it works with."""

    config: TrainConfig
    folder: Path
    method: Method
    subject: Subject
    cost: CostModel
    watch: Stopwatch
    notify: Notify
    quiet: bool

    @property
    def processes(self) -> Processes:
        return self.subject.processes

    @property
    def micro_batch(self) -> int:
        """Images that a process takes at a time in training."""
        return micro_batch(self.config, self.processes.world_size)

    @property
    def num_classes(self) -> int:
        """Classes of the model, which may have more than the data."""
        return getattr(self.subject.model, "num_classes", self.subject.bundle.num_classes or 0)

    def starting_model(
        self, plan: QuantPlan | None, state: dict[str, Any] | None, progress: Progress | None
    ) -> nn.Module:
        """The model that training starts from: the float one, what the method makes of it, or that of a checkpoint."""
        subject, method = self.subject, self.method
        if plan is None:
            return subject.model
        if self.config.nonlinear is not None:  # says it in place of the plan
            plan = replace(plan, nonlinear={})
        if state is not None:
            model = quantize(subject.model, QuantPlan.from_json(_plan_of_checkpoint(self.folder, state)))
            return model.to(subject.device)
        if self.processes.is_main:
            replace(plan, model=self.config.model).save(self.folder / PLAN)
        size = min(method.calibration_batch, self.config.calibration_images)
        images = subject.calibration_images(method.images, size, method.image_sizes)
        given = Preparation(images, self.folder, self.watch, self.notify, progress)
        if self.config.start is not None:
            given = replace(given, start=load_run(self.config.start, subject.device))
        if method.deciding_images:
            given = replace(given, deciding=subject.deciding_images(method.deciding_images, method.images))
        return self.processes.share(method.quantized(subject.model, plan, given))

    def trained(self, model: nn.Module, state: dict[str, Any] | None, *, quiet: bool) -> tuple[nn.Module, RunLog, int]:
        """The model that training results in, the log, and the number of its steps."""
        config, trainer = self.config, self.trainer(model)
        self.method.attach(model, self.cost, trainer.steps_per_epoch)
        if state is not None:
            trainer.restore(state)
            self.notify(f"resuming {self.folder} after step {trainer.step} of {trainer.total_steps}")
        trainer.log.write(
            "start" if state is None else "resume",
            step=trainer.step,
            time=time.time(),
            epochs=config.epochs,
            steps_per_epoch=trainer.steps_per_epoch,
            **self.budgets(),
        )
        with self.watch("train"):
            trainer.fit(quiet=quiet)
        self.method.finish(trainer)
        return trainer.result_model, trainer.log, trainer.total_steps

    def trainer(self, model: nn.Module) -> Trainer:
        config, subject, method = self.config, self.subject, self.method
        augment = AugmentConfig.preset(config.augment)
        loader = train_loader(
            subject.bundle.train,
            subject.data_config,
            subject.reading(self.micro_batch),
            augment=replace(augment, repeated_augmentation=config.repeated_augmentation),
            labels=self.stored_labels(),
        )
        method.steps_per_epoch = len(loader) // config.accumulate
        return Trainer(
            model,
            config,
            loader,
            num_classes=subject.bundle.num_classes or self.num_classes,
            run=self.folder,
            hooks=method,
            width_lr=method.width_lr,
            teacher=self.teacher(),
            hints=self.hints(),
            monitor=self.monitor(),
            plan=lambda: self.plan_of(model).to_json() if method.quantizes else None,
            label=" ".join(filter(None, (config.method, config.budget))),
            processes=self.processes,
        )

    def stored_labels(self) -> StoredLabels | None:
        """The soft labels that a run learns from; None where it learns from those of the data. Raises QvitError."""
        config = self.config
        if config.labels is None:
            return None
        return StoredLabels(
            SoftLabelStore(config.labels),
            self.num_classes,
            crops_per_image=config.crops_per_image,
            single_from=max(0, config.epochs - config.single_crop_epochs),
            interpolation=config.crop_interpolation,
        )

    def teacher(self) -> Teacher | None:
        """Whom the model learns from: nobody, the float model that it was made from, or the one that is named."""
        config, subject = self.config, self.subject
        if not config.distill:
            if config.teacher is not None:
                raise UsageError("a teacher without --distill teaches nothing: give a share, such as --distill 1")
            return None
        if config.teacher is None:
            if not self.method.quantizes:
                raise UsageError(f"method '{config.method}' has no float model to learn from: name one with --teacher")
            return Teacher(subject.model)
        model = teacher_model(config.teacher, config.teacher_weights, config.teacher_kwargs, self.num_classes)
        teacher = Teacher(
            model,
            student_data=subject.data_config,
            own_data=data_config_of(model),
            num_classes=getattr(subject.model, "num_classes", None),
        )
        return teacher.to(subject.device)

    def hints(self) -> Callable[[Tensor], Tensor] | None:
        """The features that are distilled, those of the float model; None where none are."""
        if not self.config.distill_features:
            return None
        if not self.method.quantizes:
            raise UsageError(
                f"method '{self.config.method}' makes a float model: there are no features of another to learn"
            )
        model = self.subject.model.eval().requires_grad_(False)

        @torch.no_grad()
        def features(images: Tensor) -> Tensor:
            with feature_function(model) as run:
                return run(images).float()

        return features

    def evaluator(self, source: Source) -> Callable[..., dict[str, Any]]:
        """Scores a model on some images, beside the reference if one is given; each image in one process."""
        size = max(64 if self.method.trains else 1, self.micro_batch)
        if answers_with_features(self.subject.model):
            return self._feature_evaluator(source, size)
        loader = self.subject.loader(source, size)

        def score(model: nn.Module, reference: nn.Module | None = None, **options: Any) -> dict[str, Any]:
            common = {"labelled": source.labelled, "reduce": self.processes.sum}
            return evaluate(model, loader, reference=reference, **common, **options)

        return score

    def _feature_evaluator(self, source: Source, size: int) -> Callable[..., dict[str, Any]]:
        """Judges features beside those of the reference; every process has all images, which are neighbours."""
        reading = replace(self.subject.reading(size), rank=0, world_size=1)
        loader = eval_loader(source, self.subject.data_config, reading)

        def score(model: nn.Module, reference: nn.Module | None = None, **options: Any) -> dict[str, Any]:
            if reference is None:
                return {"images": len(source)}
            found = compare_features(model, reference, loader, labelled=source.labelled, **options)
            return {"images": found.pop("images"), "features": found}

        return score

    def monitor(self) -> Callable[[nn.Module], float] | None:
        """Measures accuracy on the images held out from training, in percent; None where there are none."""
        if self.subject.bundle.held_out is None:
            return None
        score = self.evaluator(self.subject.bundle.held_out)
        return lambda model: score(model)["top1"]

    def plan_of(self, model: nn.Module) -> QuantPlan:
        """The plan of a model as it is; for a float model one that leaves every site in float."""
        if self.method.quantizes:
            return plan_of(model, self.method.plan_name, self.config.model)
        return QuantPlan("float", (), dict.fromkeys(self.cost.sites), self.config.model)

    def budgets(self) -> dict[str, Any]:
        """Bit operations that a log's figures are seen beside."""
        cost = self.cost
        uniform = {str(bits): cost.bit_operations(cost.uniform(bits)) for bits in range(2, 9)}
        return {"budget_bit_operations": self.method.budget(cost), "uniform_bit_operations": uniform}

    def end(self, model: nn.Module, log: RunLog, steps: int) -> dict[str, Any]:
        """Writes and scores the final model; returns the result."""
        config, method, plan = self.config, self.method, self.plan_of(model)
        cost = self.cost.report(plan.widths(), model=config.model, plan=method.plan_name)
        if self.processes.is_main:
            plan.save(self.folder / PLAN)
            write_json(self.folder / COST, cost)
            save_weights(self.folder / WEIGHTS_FILE, model)
        test = self.subject.bundle.test
        self.notify(f"evaluating on {len(test)} test images")
        own = -(-len(test) // self.processes.world_size)
        bar = TrainingProgress("evaluating", own, enabled=self.processes.is_main and not self.quiet)
        reference = self.subject.model if method.quantizes else None
        with self.watch("evaluate"), bar:
            scores = self.evaluator(test)(model, reference, progress=lambda images: bar.update(images, {}))
        result = {
            "version": RESULT_VERSION,
            "model": config.model,
            "method": config.method,
            "accuracy": scores.get("top1"),
            "float_accuracy": scores.get("top1_reference", scores.get("top1")),
            "top5": scores.get("top5"),
            "agreement": scores.get("agreement"),
            "divergence": scores.get("divergence"),
            **({"features": scores["features"]} if "features" in scores else {}),
            "images": scores["images"],
            "budget": config.budget,
            "bit_operations": cost["bit_operations"],
            "weight_bytes": cost["weight_bytes"],
            "seconds": self.watch.record(),
            "seed": config.seed,
            "epochs": config.epochs if method.trains else 0,
            **({"nonlinear": method.nonlinear or {"forms": plan.nonlinear}} if plan.nonlinear else {}),
            **method.record(),
        }
        formulas = {"plain_operators": plain} if (plain := trial.plain()) else {}
        log.write("end", step=steps, accuracy=result["accuracy"], seconds=result["seconds"]["total"], **formulas)
        if self.processes.is_main:
            if method.pictures and ranks_tokens(plan.sites):
                write_patches(self.subject, model, self.folder, method.pictures, method.plan_name)
            write_json(self.folder / RESULT, result)
            shutil.rmtree(self.folder / BLOCKS, ignore_errors=True)
        return result


def _plan_of_checkpoint(run: Path, state: dict[str, Any]) -> Any:
    try:
        return parse_json(state["plan"])
    except ValueError as error:
        raise QvitError(f"the checkpoint of {run} does not fit this run: its plan cannot be read: {error}") from None
