"""One benchmark from options to plain data: the run behind `qvit bench`.

    MODEL   float model → ptq(plan) → artifact in memory, for every plan  ┐
    FILE    artifact → float model with the file's dequantized weights    ┴→ our engines, peers → measure → rows

Images are of the user's data, or noise. Noise is as good for the speed, which does not depend on the values; what the
engines answer to it says little, and the result says that it is noise. Peers quantize on the same calibration images as
we do.

The result is plain data: `qvit.report` draws it, and docs/cli.md describes it.
"""

from __future__ import annotations

import datetime
import logging
import platform
import shlex
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from qvit.data.open import Reading, calibration_batches, data_config_of
from qvit.deploy.bench.hardware import cpu_instructions, hardware
from qvit.deploy.bench.lineup import Lineup, Packed, chosen
from qvit.deploy.bench.peers import Material
from qvit.deploy.bench.timing import RIGHT, RIGHT_COSINE, Progress, answers, batch_of, measure, profiles, rows_of
from qvit.deploy.packages import missing
from qvit.errors import QvitError, UsageError
from qvit.methods.ptq.stages import ptq
from qvit.models.convert import plan_of
from qvit.models.create import create_model
from qvit.models.families import inspect_model
from qvit.models.features import answers_with_features
from qvit.runs.requests import BenchRequest
from qvit.runs.subject import float_model, open_images
from qvit.training.checkpoint import seed_everything
from qvit.version import __version__

_log = logging.getLogger(__name__)
FORMAT, VERSION = "qvit-bench", 1
DEFAULT_PLAN = "w8a8"
SUFFIX = ".safetensors"
NOISE, UNTRAINED = "noise", "untrained"
#: How many images calibrate by default: of data, and of noise, from which there is nothing to learn.
CALIBRATION_IMAGES, CALIBRATION_NOISE = 64, 8
PACKAGES = ("openvino", "nncf", "onnxruntime", "onnx")


@dataclass(frozen=True)
class BenchSubject:
    """What is measured: the float model, ours by every plan, images, and how to speak of them."""

    name: str
    model: nn.Module
    packed: list[Packed]
    calibration: list[Tensor]
    judged: Tensor
    note: str
    float_note: str


def bench(
    request: BenchRequest,
    *,
    notify: Callable[[str], None] = _log.info,
    progress: Progress = lambda text, done, total: None,
) -> dict[str, Any]:
    """Measures our engines beside their peers.

    Args:
        request: The options.
        notify: Receives one line per stage.
        progress: Called with a text, what is done and the total.

    Returns:
        The content of the JSON file, see docs/cli.md: threads, batch, a row for each engine and batch size, what was
        left out and why, and where and how it was measured.

    Raises:
        UsageError: An invalid option.
        QvitError: Weights, data or a file that cannot be read, or no engine that runs.
    """
    check(request)
    before = torch.get_num_threads()
    threads = request.threads or before
    torch.set_num_threads(threads)
    try:
        names = chosen(request.engines, peers=request.peers, device=request.device)
        with tempfile.TemporaryDirectory(prefix="qvit-bench-") as folder:
            subject = open_bench(request, Path(folder), notify, progress)
            material = Material(subject.model, subject.calibration, threads, Path(folder), request.device)
            lineup = Lineup(names, subject.packed, material)
            rows = _measure_all(request, subject, lineup, progress)
    finally:
        torch.set_num_threads(before)
    if not rows:
        reasons = [f"{row['engine']} {row['precision']}: {row['reason']}" for row in lineup.skipped]
        raise QvitError(f"none of the engines runs here: {'; '.join(reasons)}")
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": subject.name,
        "plan": ", ".join(packed.plan for packed in subject.packed),
        "threads": threads,
        "batch": request.batches[0] if len(request.batches) == 1 else list(request.batches),
        "rows": rows,
        "skipped": lineup.skipped,
        "images": subject.note,
        "speed_only": _speed_only(request, subject),
        **({"right_cosine": RIGHT_COSINE} if answers_with_features(subject.model) else {"right_percent": RIGHT}),
        "calibration_images": sum(map(len, subject.calibration)),
        "compared_images": len(subject.judged),
        "float_weights": subject.float_note,
        **how_measured(request),
    }


def how_measured(request: BenchRequest) -> dict[str, Any]:
    """How long, where, when and by which command something was measured."""
    return {
        "rounds": request.rounds,
        "seconds": request.seconds,
        "max_seconds": request.max_seconds,
        "seed": request.seed,
        "hardware": hardware() if request.device == "cpu" else f"{torch.cuda.get_device_name()}, {hardware()}",
        "instructions": cpu_instructions(),
        "date": datetime.date.today().isoformat(),
        "versions": _versions(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _speed_only(request: BenchRequest, subject: BenchSubject) -> bool:
    """Whether answers tell nothing: to noise, or of weights that were never trained."""
    return request.data is None or subject.float_note.startswith(UNTRAINED)


def check(request: BenchRequest) -> None:
    """Raises UsageError for an invalid option, QvitError for a file that is not there."""
    if not request.batches or min(request.batches) < 1 or len(set(request.batches)) < len(request.batches):
        raise UsageError(f"batch sizes are different positive numbers, not {', '.join(map(str, request.batches))}")
    for name in ("images", "threads", "rounds", "calibration_images"):
        value = getattr(request, name)
        if value is not None and value < 1:
            raise UsageError(f"{name.replace('_', ' ')} must be at least 1, not {value}")
    if request.device == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "--device cuda needs a CUDA device, and PyTorch finds none: leave it out to measure on the CPU"
        )
    if request.seconds <= 0 or request.max_seconds <= 0:
        raise UsageError("seconds must be positive")
    if request.data is None and (request.eval_data or request.class_map or request.unlabelled):
        raise UsageError("--eval-data, --class-map and --unlabelled go with --data")
    if len(set(request.plans)) < len(request.plans):
        raise UsageError(f"plans are different ones, not {', '.join(request.plans)}")
    if Path(request.model).is_file():
        if request.plans or request.pretrained or request.model_kwargs:
            raise UsageError(f"{request.model} has its plan, its weights and its model: leave out the options for them")
    elif Path(request.model).suffix == SUFFIX or Path(request.model).is_absolute():
        raise QvitError(f"no file {request.model}")


# Model and images


def open_bench(request: BenchRequest, folder: Path, notify: Callable[[str], None], progress: Progress) -> BenchSubject:
    """The models and images of a request; files of artifacts are made in a folder."""
    return _open_file(request) if Path(request.model).is_file() else _open_model(request, folder, notify, progress)


def _open_file(request: BenchRequest) -> BenchSubject:
    from qvit.deploy.file.artifact import Artifact

    artifact = Artifact.load(request.model)
    quantized = artifact.model().eval()
    seed_everything(request.seed)
    kwargs = artifact.float_kwargs if request.weights else artifact.model_kwargs
    model = create_model(artifact.model_name, weights=request.weights, **kwargs).eval()
    note = f"of {Path(request.weights).name}" if request.weights else "those of the file, dequantized"
    if not request.weights:
        wanted, there = model.state_dict(), quantized.state_dict()
        if all(key in there and there[key].shape == value.shape for key, value in wanted.items()):
            model.load_state_dict({key: there[key] for key in wanted})
        else:
            note = f"{UNTRAINED}: the file's weights do not fit the float model"
    bundle = None if request.data is None else open_images(request)
    packed = Packed(artifact.plan.name, artifact, precision_of(quantized), Path(request.model).stat().st_size)
    return BenchSubject(artifact.model_name, model, [packed], *_images(request, artifact.data_config, bundle), note)


def _open_model(request: BenchRequest, folder: Path, notify: Callable[[str], None], progress: Progress) -> BenchSubject:
    bundle = None if request.data is None else open_images(request)
    classes = None if bundle is None else bundle.num_classes
    seed_everything(request.seed)
    model = float_model(request, classes, new_classifier=False).eval()
    note = UNTRAINED
    if request.weights or request.pretrained:
        note = f"of {Path(request.weights).name}" if request.weights else "timm's pretrained ones"
    config = data_config_of(model)
    calibration, judged, images = _images(request, config, bundle)
    facts = {
        "model_name": request.model,
        "model_kwargs": {"num_classes": getattr(model, "num_classes", classes)} | request.model_kwargs,
        "data_config": config,
        "class_names": () if bundle is None else tuple(bundle.class_names),
        "provenance": {"made_by": "qvit bench", "images": images, "float_weights": note},
    }
    plans = _named(request.plans or (DEFAULT_PLAN,))
    if new := [plan for plan in plans if Path(plan).suffix != SUFFIX]:
        notify(f"quantizing {request.model} by {', '.join(new)} on {sum(map(len, calibration))} images: {images}")
    packed = []
    for done, (plan, name) in enumerate(plans.items()):
        progress(f"quantizing by {name}", done, len(plans))
        if plan in new:
            packed.append(_quantized(model, plan, name, calibration, facts, folder))
        else:
            packed.append(_packed_file(plan, name, model, request.model))
    return BenchSubject(request.model, model, packed, calibration, judged, images, note)


def _named(plans: Sequence[str]) -> dict[str, str]:
    """Plans and their names: that of the file, or where two have the same one, its path."""
    names = {plan: Path(plan).stem for plan in plans}
    count = Counter(names.values())
    return {plan: name if count[name] == 1 else plan for plan, name in names.items()}


def _quantized(
    model: nn.Module, plan: str, name: str, calibration: list[Tensor], facts: dict[str, Any], folder: Path
) -> Packed:
    from qvit.deploy.file.artifact import Artifact

    quantized = ptq(model, plan, calibration)
    artifact = Artifact.from_model(quantized, **facts, plan_name=name)
    file = folder / f"artifact{SUFFIX}"
    artifact.save(file)
    return Packed(name, artifact, precision_of(quantized), file.stat().st_size)


def _packed_file(file: str, name: str, model: nn.Module, model_name: str) -> Packed:
    from qvit.deploy.file.artifact import Artifact

    artifact = Artifact.load(file)
    quantized = artifact.model()
    if artifact.model_name != model_name or inspect_model(quantized).macs != inspect_model(model).macs:
        raise UsageError(f"{file} is a {artifact.model_name}, not this {model_name}, or one of other sizes")
    return Packed(name, artifact, precision_of(quantized), Path(file).stat().st_size)


def _images(request: BenchRequest, config: dict[str, Any], bundle: Any) -> tuple[list[Tensor], Tensor, str]:
    """Images to calibrate with, in batches, images to compare answers on, and where they are from."""
    if bundle is None:
        count = request.calibration_images or CALIBRATION_NOISE
        generator = torch.Generator().manual_seed(request.seed)
        noise = torch.randn(count + request.images, *config["input_size"], generator=generator)
        return list(noise[:count].split(16)), noise[count:], NOISE
    how = Reading(16, request.workers, seed=request.seed)
    count = request.calibration_images or min(CALIBRATION_IMAGES, len(bundle.train))
    calibration = list(calibration_batches(bundle.train, config, how, images=count))
    judged = list(calibration_batches(bundle.test, config, how, images=min(request.images, len(bundle.test))))
    return calibration, torch.cat(judged), str(bundle.note)


def precision_of(model: nn.Module) -> str:
    """`w8a8` where the blocks have one width for weights and one for activations, else `mixed`."""
    widths, sites = plan_of(model).widths(), inspect_model(model).sites
    found: dict[str, set[int]] = {"weight": set(), "activation": set()}
    for name, site in sites.items():
        if site.position not in ("first", "last"):
            found[site.role] |= set(widths[name])
    if all(len(own) == 1 for own in found.values()):
        return f"w{found['weight'].pop()}a{found['activation'].pop()}"
    return "mixed"


def _measure_all(
    request: BenchRequest, subject: BenchSubject, lineup: Lineup, progress: Progress
) -> list[dict[str, Any]]:
    """The rows of all batch sizes."""
    lineup.prepare(progress)
    floats = _answers_of(subject.model, subject.judged)
    simulated = {one.plan: _answers_of(one.artifact.model().eval(), subject.judged) for one in subject.packed}
    rows: list[dict[str, Any]] = []
    judged, tells = subject.judged.to(request.device), not _speed_only(request, subject)
    for batch in request.batches:
        images = batch_of(judged, batch)
        started = lineup.start(images)
        if not started:
            continue
        logits = {one.name: answers(one.run, judged, batch).cpu() for one in started}
        times = measure(
            {one.name: one.run for one in started},
            images,
            rounds=request.rounds,
            seconds=request.seconds,
            max_seconds=request.max_seconds / len(request.batches),
            progress=lambda done, total, batch=batch: progress(f"batch {batch}", done, total),
        )
        kernels = profiles(started, images, rounds=request.rounds) if request.profile else {}
        rows += rows_of(
            started, times, batch, logits, floats, simulated, judged=tells, kernels=kernels,
            features=answers_with_features(subject.model),
        )  # fmt: skip
        torch.compiler.reset()  # compiled code is for one batch size, and PyTorch keeps only so much for one model
    return rows


def _answers_of(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(part).float() for part in images.split(16)])


def _versions() -> dict[str, str]:
    further = [name for name in PACKAGES if not missing(name)]
    own = {"qvit": __version__, "torch": torch.__version__, "timm": timm.__version__}
    return own | {"python": platform.python_version()} | {name: version(name) for name in further}
