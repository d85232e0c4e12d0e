"""One benchmark from options to plain data: the run behind `qvit bench`.

    MODEL   float model → ptq(plan) → artifact in memory ┐
    FILE    artifact → float model with the file's dequantized weights      ┴→ our engines, peers → measure → rows

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
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from qvit.data.open import Reading, calibration_batches, data_config_of
from qvit.deploy.bench.hardware import cpu_instructions, hardware
from qvit.deploy.bench.lineup import Lineup, chosen
from qvit.deploy.bench.peers import Material
from qvit.deploy.bench.timing import Progress, answers, batch_of, measure, rows_of
from qvit.deploy.packages import missing
from qvit.errors import QvitError, UsageError
from qvit.methods.ptq.method import ptq
from qvit.models.convert import plan_of
from qvit.models.create import create_model
from qvit.models.families import inspect_model
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
class _Subject:
    """What is measured: the float model, the artifact and what it simulates, images, and how to speak of them."""

    model: nn.Module
    artifact: Any
    quantized: nn.Module
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
    _check(request)
    before = torch.get_num_threads()
    threads = request.threads or before
    torch.set_num_threads(threads)
    try:
        names = chosen(request.engines, peers=request.peers)
        subject = _open(request, notify)
        precision = _precision(subject.quantized)
        with tempfile.TemporaryDirectory(prefix="qvit-bench-") as folder:
            size = _artifact_bytes(request, subject, Path(folder))
            material = Material(subject.model, subject.calibration, threads, Path(folder))
            lineup = Lineup(names, subject.artifact, precision, material, file_bytes=size)
            rows = _measure_all(request, subject, lineup, progress)
    finally:
        torch.set_num_threads(before)
    if not rows:
        reasons = [f"{row['engine']} {row['precision']}: {row['reason']}" for row in lineup.skipped]
        raise QvitError(f"none of the engines runs here: {'; '.join(reasons)}")
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": subject.artifact.model_name,
        "plan": subject.artifact.plan.name,
        "threads": threads,
        "batch": request.batches[0] if len(request.batches) == 1 else list(request.batches),
        "rows": rows,
        "skipped": lineup.skipped,
        "images": subject.note,
        "speed_only": request.data is None or subject.float_note.startswith(UNTRAINED),
        "calibration_images": sum(map(len, subject.calibration)),
        "compared_images": len(subject.judged),
        "float_weights": subject.float_note,
        "rounds": request.rounds,
        "seconds": request.seconds,
        "max_seconds": request.max_seconds,
        "seed": request.seed,
        "hardware": hardware(),
        "instructions": cpu_instructions(),
        "date": datetime.date.today().isoformat(),
        "versions": _versions(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _check(request: BenchRequest) -> None:
    if not request.batches or min(request.batches) < 1 or len(set(request.batches)) < len(request.batches):
        raise UsageError(f"batch sizes are different positive numbers, not {', '.join(map(str, request.batches))}")
    for name in ("images", "threads", "rounds", "calibration_images"):
        value = getattr(request, name)
        if value is not None and value < 1:
            raise UsageError(f"{name.replace('_', ' ')} must be at least 1, not {value}")
    if request.seconds <= 0 or request.max_seconds <= 0:
        raise UsageError("seconds must be positive")
    if request.data is None and (request.eval_data or request.class_map or request.unlabelled):
        raise UsageError("--eval-data, --class-map and --unlabelled go with --data")
    if Path(request.model).is_file():
        if request.plan is not None or request.pretrained or request.model_kwargs:
            raise UsageError(f"{request.model} has its plan, its weights and its model: leave out the options for them")
    elif Path(request.model).suffix == SUFFIX or Path(request.model).is_absolute():
        raise QvitError(f"no file {request.model}")


# Model and images


def _open(request: BenchRequest, notify: Callable[[str], None]) -> _Subject:
    return _open_file(request) if Path(request.model).is_file() else _open_model(request, notify)


def _open_file(request: BenchRequest) -> _Subject:
    from qvit.deploy.file.artifact import Artifact

    artifact = Artifact.load(request.model)
    quantized = artifact.model().eval()
    seed_everything(request.seed)
    model = create_model(artifact.model_name, weights=request.weights, **artifact.model_kwargs).eval()
    note = f"of {Path(request.weights).name}" if request.weights else "those of the file, dequantized"
    if not request.weights:
        wanted, there = model.state_dict(), quantized.state_dict()
        if all(key in there and there[key].shape == value.shape for key, value in wanted.items()):
            model.load_state_dict({key: there[key] for key in wanted})
        else:
            note = f"{UNTRAINED}: the file's weights do not fit the float model"
    bundle = None if request.data is None else open_images(request)
    return _Subject(model, artifact, quantized, *_images(request, artifact.data_config, bundle), note)


def _open_model(request: BenchRequest, notify: Callable[[str], None]) -> _Subject:
    from qvit.deploy.file.artifact import Artifact

    bundle = None if request.data is None else open_images(request)
    classes = None if bundle is None else bundle.num_classes
    seed_everything(request.seed)
    model = float_model(request, classes, new_classifier=False).eval()
    note = UNTRAINED
    if request.weights or request.pretrained:
        note = f"of {Path(request.weights).name}" if request.weights else "timm's pretrained ones"
    config = data_config_of(model)
    calibration, judged, images = _images(request, config, bundle)
    plan = request.plan or DEFAULT_PLAN
    notify(f"quantizing {request.model} by {plan} on {sum(map(len, calibration))} images: {images}")
    quantized = ptq(model, plan, calibration)
    artifact = Artifact.from_model(
        quantized,
        model_name=request.model,
        model_kwargs=({} if classes is None else {"num_classes": classes}) | request.model_kwargs,
        data_config=config,
        class_names=() if bundle is None else tuple(bundle.class_names),
        provenance={"made_by": "qvit bench", "images": images, "float_weights": note},
        plan_name=Path(plan).stem,
    )
    return _Subject(model, artifact, artifact.model().eval(), calibration, judged, images, note)


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


def _precision(model: nn.Module) -> str:
    """`w8a8` where the blocks have one width for weights and one for activations, else `mixed`."""
    widths, sites = plan_of(model).widths(), inspect_model(model).sites
    found: dict[str, set[int]] = {"weight": set(), "activation": set()}
    for name, site in sites.items():
        if site.position not in ("first", "last"):
            found[site.role] |= set(widths[name])
    if all(len(own) == 1 for own in found.values()):
        return f"w{found['weight'].pop()}a{found['activation'].pop()}"
    return "mixed"


def _measure_all(request: BenchRequest, subject: _Subject, lineup: Lineup, progress: Progress) -> list[dict[str, Any]]:
    """The rows of all batch sizes."""
    lineup.prepare(progress)
    floats = _answers_of(subject.model, subject.judged)
    simulated = _answers_of(subject.quantized, subject.judged)
    rows: list[dict[str, Any]] = []
    for batch in request.batches:
        images = batch_of(subject.judged, batch)
        started = lineup.start(images)
        if not started:
            continue
        logits = {one.name: answers(one.run, subject.judged, batch) for one in started}
        times = measure(
            {one.name: one.run for one in started},
            images,
            rounds=request.rounds,
            seconds=request.seconds,
            max_seconds=request.max_seconds / len(request.batches),
            progress=lambda done, total, batch=batch: progress(f"batch {batch}", done, total),
        )
        rows += rows_of(started, times, batch, logits, floats, simulated)
        torch.compiler.reset()  # compiled code is for one batch size, and PyTorch keeps only so much for one model
    return rows


def _answers_of(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(part).float() for part in images.split(16)])


def _artifact_bytes(request: BenchRequest, subject: _Subject, folder: Path) -> int:
    """Size of the artifact's file."""
    file = Path(request.model)
    if not file.is_file():
        file = folder / "artifact.safetensors"
        subject.artifact.save(file)
    return file.stat().st_size


def _versions() -> dict[str, str]:
    further = [name for name in PACKAGES if not missing(name)]
    own = {"qvit": __version__, "torch": torch.__version__, "timm": timm.__version__}
    return own | {"python": platform.python_version()} | {name: version(name) for name in further}
