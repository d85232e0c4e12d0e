"""Exporting a packed model to a file of another runtime, and trying that file out.

What was written is run in its own runtime beside the reference engine, on random images under the model's transform:
equal sums, so answers differ by the last digits of LayerNorm, softmax and GELU, and by the few values that those move
over the edge between two integers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qvit.deploy.engines.openvino import int8_is_exact as openvino_int8_is_exact
from qvit.deploy.engines.reference import ReferenceEngine
from qvit.deploy.export.onnx import export_onnx, export_openvino
from qvit.deploy.export.onnx import image_size as size_of
from qvit.deploy.export.program import export_executorch, export_program
from qvit.deploy.file.artifact import Artifact
from qvit.deploy.file.resize import at_size
from qvit.deploy.packages import missing, onnxruntime_session, openvino_core
from qvit.errors import QvitError, UsageError, nearest
from qvit.locks import writing_file
from qvit.measure.features import cosine_distances
from qvit.models.create import create_shapes
from qvit.models.features import answers_with_features

_log = logging.getLogger(__name__)
SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2", "executorch": ".pte"}
CONTAINERS = ("small", "8bit")
#: The least cosine of what a written file and the packed model answer to noise. Models of few bits that differ in
#: rounding alone have more than 0.9, those with wrong scales one near 0.
LEAST_SIMILARITY = 0.5
RUNTIMES = {"onnx": "onnxruntime", "openvino": "openvino", "torch": "torch", "executorch": "executorch"}


def export(
    source: str | Path,
    to: str,
    out: str | Path | None = None,
    *,
    containers: str | None = None,
    batch: int | None = None,
    image_size: Sequence[int] | None = None,
    any_size: bool = False,
    vnni: bool = True,
    overwrite: bool = False,
    check: bool = True,
    notify: Callable[[str], None] = _log.info,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Exports a packed file.

    Args:
        source: The packed file.
        to: One of `SUFFIXES`.
        out: The file; None: beside the packed file, with the suffix of its format.
        containers: Of an ONNX file's weights: `small` (None) or `8bit`, see `export_onnx`.
        batch: Images in a call; None for any number, of ExecuTorch 1.
        image_size: Height and width of the images; None: those of the packed model.
        any_size: Leaves height and width open, where the model takes any.
        vnni: False: an OpenVINO model that is exact on x86 processors without VNNI, too.
        overwrite: Replaces a file that is there.
        check: Runs what was written, if its runtime is installed.
        notify: Is told what is done.
        progress: Is told how many steps are behind, of how many: read, written, run.

    Returns:
        `file`, `to`, `bytes`, `containers`, `batch`, `image_size` (None: any), `vnni`, and `check`: `images`,
        `largest_difference` of logits, `largest_logit`, `agreement` of the first class in percent or the mean `cosine`
        of features, `saturates` (whether int8 products do on this processor), or `skipped` with the reason.

    Raises:
        UsageError: Options that cannot be meant, a file that is there, a missing package.
        QvitError: A file that cannot be read, or written; or what was written answers otherwise than the packed model.
    """
    if to not in SUFFIXES:
        raise UsageError(f"unknown format '{to}'{nearest(to, SUFFIXES)} ({', '.join(SUFFIXES)})")
    if containers is not None and containers not in CONTAINERS:
        raise UsageError(
            f"unknown containers '{containers}'{nearest(containers, CONTAINERS)} ({', '.join(CONTAINERS)})"
        )
    if to != "onnx" and containers is not None:
        raise UsageError("containers are chosen for ONNX files: others hold 8 bits")
    if to == "onnx" and not vnni:
        raise UsageError("ONNX files multiply uint8 by uint8, which is exact without VNNI: leave that option out")
    if batch is not None and batch < 1:
        raise UsageError(f"a batch has at least 1 image, not {batch}")
    if to in ("torch", "executorch") and not vnni:
        raise UsageError(
            "programs of torch multiply in float units, which is exact without VNNI: leave that option out"
        )
    if any_size and (image_size is not None or to == "executorch"):
        raise UsageError("a file is for any size or for one, and that of ExecuTorch for one: leave out --any-size")
    batch = 1 if to == "executorch" and batch is None else batch
    target = Path(source).with_suffix(SUFFIXES[to]) if out is None else Path(out)
    written = [target, target.with_suffix(".bin")] if to == "openvino" else [target]
    if target.is_dir() or Path(source).resolve() in [file.resolve() for file in written]:
        raise UsageError(f"{target} is {'a folder' if target.is_dir() else 'the packed file'}: name a file with --out")
    there = [file for file in written if file.exists()]
    if there and not overwrite:
        raise UsageError(f"{there[0]} is there: choose another --out, or --overwrite")
    steps = 2 + check
    progress(0, steps)
    artifact = Artifact.load(source)
    artifact = artifact if image_size is None else at_size(artifact, image_size)
    notify(f"writing {target}")
    progress(1, steps)
    with writing_file(target):
        if to == "onnx":
            export_onnx(artifact, target, small=containers != "8bit", batch=batch, any_size=any_size)
        elif to == "torch":
            export_program(artifact, target, batch=batch, any_size=any_size)
        elif to == "executorch":
            export_executorch(artifact, target, batch=batch or 1)
        else:
            export_openvino(artifact, target, batch=batch, exact_pairs=vnni, any_size=any_size)
    progress(2, steps)
    told: dict[str, Any] = {"skipped": "not asked for"}
    if check:
        told = _checked(artifact, target, to, batch or 4, vnni, any_size)
        progress(steps, steps)
    return {
        "file": str(target),
        "to": to,
        "bytes": sum(file.stat().st_size for file in written),
        "containers": (containers or "small") if to == "onnx" else "8bit",
        "batch": batch,
        "image_size": None if any_size else list(size_of(artifact)[1:]),
        "vnni": vnni,
        "check": told,
    }


def exported_runner(path: Path, to: str) -> Callable[[Tensor], Tensor]:
    """What an exported file answers to images, in its own runtime on CPU."""
    if to == "onnx":
        session = onnxruntime_session(path)
        return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    if to == "torch":
        program = torch.export.load(path).module()
        return lambda images: program(images).detach()
    if to == "executorch":
        from executorch.runtime import Runtime  # type: ignore[import-not-found]

        method = Runtime.get().load_program(path).load_method("forward")
        return lambda images: method.execute([images])[0].clone()
    compiled = openvino_core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: torch.from_numpy(compiled([images.numpy()])[0].copy())


def _checked(artifact: Artifact, path: Path, to: str, count: int, vnni: bool, any_size: bool) -> dict[str, Any]:
    if missing(RUNTIMES[to]):
        return {"skipped": f"{RUNTIMES[to]} is not installed"}
    channels, height, width = size_of(artifact)
    saturates = to == "openvino" and vnni and not openvino_int8_is_exact()
    if any_size:  # another one than the graph was traced with
        embed: Any = artifact.skeleton.get_submodule("patch_embed")
        height += embed.patch_size[0]
    images = torch.randn(count, channels, height, width, generator=torch.Generator().manual_seed(0))
    expected = ReferenceEngine(artifact, None)(images)
    try:
        found = exported_runner(path, to)(images)
    except Exception as error:
        return {"skipped": f"{RUNTIMES[to]} does not take it: {' '.join(str(error).split())}"}
    how_near: dict[str, float] = {"agreement": 100.0 * float((found.argmax(1) == expected.argmax(1)).double().mean())}
    if answers_with_features(create_shapes(artifact.model_name, **artifact.model_kwargs)):
        how_near = {"cosine": 1 - float(cosine_distances(expected, found).mean())}
    alike = float(torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0))
    if not alike > LEAST_SIMILARITY and not saturates:
        raise QvitError(
            f"{path} was written, but {RUNTIMES[to]} answers otherwise than the packed model with it (the cosine of "
            f"the answers to {count} random images is {alike:.2f}): do not use it. --batch {count} may give one that "
            "is right"
        )
    return {
        "images": count,
        "largest_difference": float((found - expected).abs().max()),
        "largest_logit": float(expected.abs().max()),
        **how_near,
        "saturates": saturates,
    }
