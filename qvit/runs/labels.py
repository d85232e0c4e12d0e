"""Soft labels from options to a store: data, teacher, crops, probabilities, files.

The images are those that `train` trains on with the same data options. The teacher sees each crop at its own input size
and in its own normalisation, so a store serves students of any input size that have its classes and channels; from
MODEL come the number of classes and of channels, as in a run.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qvit.data.digits import DIGITS
from qvit.data.images import ImageSource
from qvit.data.labels.loading import labelling_loader, require_rows
from qvit.data.labels.store import LabelCall, SoftLabelStore, digest_of_images
from qvit.data.labels.writer import StoreWriter
from qvit.data.open import Reading, data_config_of
from qvit.errors import QvitError, UsageError
from qvit.locks import is_leftover, writing
from qvit.models.create import create_model
from qvit.runs.directory import CONFIG, read_config
from qvit.runs.requests import LabelRequest
from qvit.runs.subject import open_images
from qvit.runs.teaching import teacher_model
from qvit.training.distill import Teacher, require_same_channels
from qvit.training.processes import Processes

_log = logging.getLogger(__name__)
CROPS_PER_SHARD = 2**18
"""A kill loses at most the time for so many crops; a shard of them has 7.6 MB for k = 5."""


def write_labels(
    request: LabelRequest,
    out: str | Path,
    *,
    notify: Callable[[str], None] = _log.info,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Makes a store of soft labels, or goes on with one that the same request began.

    Args:
        request: The options.
        out: The store's directory.
        notify: Receives one line per stage.
        progress: Is told the crops that are done, and how many there are.

    Returns:
        `{"store", "images", "unlabelled", "crops_per_image", "crops", "written", "shards", "bytes", "bytes_per_crop",
        "seconds", "crops_per_second"}`: `written` counts the crops of this call, `bytes` all files.

    Raises:
        UsageError: Invalid options, or a directory that holds something else.
        QvitError: Data or weights that cannot be read, a teacher that returns NaN, or a disk without space.
    """
    with writing(Path(out)):
        return _write(request, Path(out), notify, progress or (lambda done, total: None))


def _write(
    request: LabelRequest, folder: Path, notify: Callable[[str], None], report: Callable[[int, int], None]
) -> dict[str, Any]:
    device = Processes(request.device).device
    bundle = open_images(request)
    source = require_rows(bundle.train)
    notify(bundle.note)
    teacher, call = _teacher_and_call(request, source, device)
    writer = StoreWriter(folder, call, {"data": source.name, "student": request.model, "teacher": request.teacher})
    total = call.images * call.crops
    done = total - sum(map(call.images_in, writer.todo)) * call.crops
    if writer.todo and done:
        notify(f"going on with {folder}: {done} of {total} crops are labelled")
    report(done, total)
    start, before = time.perf_counter(), done
    how = Reading(request.batch_size, request.workers, device, request.on_bad_image)
    loader = labelling_loader(source, call, how)
    for shard in writer.todo:
        images, crops = call.empty(shard)
        loader.set_epoch(shard)
        for batch, places in loader:
            _fill(images, crops, places.cpu().numpy(), teacher(batch), call)
            report(done := done + len(batch), total)
        unread = (crops["height"] == 0).any(1)  # also where only some of its crops could be read
        images[unread], crops[unread] = 0, 0
        writer.write(shard, images, crops)
    seconds = time.perf_counter() - start
    store = SoftLabelStore(folder)
    size = sum(file.stat().st_size for file in folder.iterdir() if not is_leftover(file))
    return {
        "store": str(folder.absolute()),
        "images": call.images,
        "unlabelled": store.unlabelled,
        "crops_per_image": call.crops,
        "crops": total,
        "written": done - before,
        "shards": call.shards,
        "bytes": size,
        "bytes_per_crop": size / total,
        "seconds": round(seconds, 2),
        "crops_per_second": (done - before) / seconds if done > before else None,
    }


def _teacher_and_call(request: LabelRequest, source: ImageSource, device: str) -> tuple[Teacher, LabelCall]:
    """The teacher on its device, and everything that decides the labels."""
    with torch.device("meta"):
        own: dict[str, Any] = {"num_classes": source.num_classes} if source.labelled else {}
        student = create_model(request.model, **(own | request.model_kwargs))
    classes = int(getattr(student, "num_classes", source.num_classes))
    if classes < source.num_classes:
        raise UsageError(f"the data have {source.num_classes} classes, the model is asked for {classes}")
    model = teacher_model(request.teacher, request.teacher_weights, request.teacher_kwargs, classes)
    teacher, config = Teacher(model, num_classes=classes), data_config_of(model)
    require_same_channels(data_config_of(student), config)
    top_k = request.top_k
    if top_k != "full" and not 1 <= top_k <= classes:
        raise UsageError(f"the classes that are kept of a crop are 1 to {classes}, or full, not {top_k}")
    flip = request.flip if request.flip is not None else 0.0 if request.data == DIGITS else 0.5
    call = LabelCall(
        teacher=_name_of_teacher(request),
        teacher_digest=_digest_of_model(model),
        teacher_input=(tuple(config["input_size"]), tuple(config["mean"]), tuple(config["std"])),
        images=len(source),
        images_digest=digest_of_images(source),
        num_classes=classes,
        crops=request.crops,
        top_k=top_k,
        scale=request.scale,
        ratio=request.ratio,
        interpolation=request.interpolation,
        flip=flip,
        seed=request.seed,
        images_per_shard=request.images_per_shard or min(len(source), max(1, CROPS_PER_SHARD // request.crops)),
    )
    return teacher.to(device), call


def _name_of_teacher(request: LabelRequest) -> str:
    """What the teacher is, wherever its files lie."""
    if (Path(request.teacher) / CONFIG).is_file():
        config, _ = read_config(Path(request.teacher))
        return f"{config.model}, a run of {config.method}"
    arguments = ", ".join(f"{key}={value!r}" for key, value in sorted(request.teacher_kwargs.items()))
    return request.teacher + (f" ({arguments})" if arguments else "")


def _digest_of_model(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\0".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _fill(images: np.ndarray, crops: np.ndarray, places: np.ndarray, logits: Tensor, call: LabelCall) -> None:
    """Writes what the teacher said of a batch into the records of its shard."""
    probs = logits.softmax(-1)
    if call.top_k == "full":
        ids = None
    else:
        probs, found = probs.topk(call.top_k)
        ids = found.cpu().numpy()
    values = probs.cpu().numpy()
    if not np.isfinite(values).all():
        raise QvitError(f"the teacher {call.teacher} returned NaN or infinite logits")
    image = places[:, 0] % call.images_per_shard
    images["height"][image], images["width"][image] = places[:, 1], places[:, 2]
    where = (image, places[:, 3])
    for number, name in enumerate(("top", "left", "height", "width", "flip"), 4):
        crops[name][where] = places[:, number]
    crops["probs"][where] = values
    if ids is not None:
        crops["ids"][where] = ids
