"""A packed model as a program of torch.export (`.pt2`), which runs with PyTorch alone, or of ExecuTorch (`.pte`).

    torch.export.load("model.pt2").module()(images)      # logits; images under the model's transform

The integer form of the model (`integer/reference.py`) is traced with exact products in float units, as the engine
`torch` has them: codes in float32 while sums stay below 2^24, which is checked for every layer, in float64 elsewhere.
The sums are those of int32, bit for bit, and the operations are plain ones (mm, bmm, mul, round, clamp) that every
backend of torch has. Weights are stored as int8 codes and widened where they are multiplied: a byte each, whatever the
width.

Beside the program the file says what its model is (`ABOUT`). ExecuTorch's file is made of the same program. PyTorch
reads `.pt2` files partly by pickle, so load none from strangers; nothing here reads one that it has not written.
"""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qvit.deploy.export.onnx import cannot_export, image_size, origin_of, traced_images
from qvit.deploy.file.artifact import Artifact
from qvit.deploy.integer.arithmetic import Grid, Operand
from qvit.deploy.integer.reference import integer_form
from qvit.deploy.integer.torch import TorchArithmetic
from qvit.deploy.packages import missing
from qvit.errors import QvitError, UsageError
from qvit.files import write_atomically

#: Name of the JSON object in the file that says what the model is.
ABOUT = "qvit.json"
FITS_INT8 = (-128, 127)


class ProgramArithmetic(TorchArithmetic):
    """Exact products in float units; weights stay int8 codes until then."""

    def __init__(self) -> None:
        super().__init__(int8=False)

    def weight_form(self, codes: Tensor, grid: Grid) -> Tensor:
        fits = FITS_INT8[0] <= int(codes.min()) and int(codes.max()) <= FITS_INT8[1]
        return codes.to(torch.int8 if fits else torch.int16).t().contiguous()

    def linear(self, operand: Operand, weight: Tensor, weight_scale: Tensor) -> Tensor:
        return super().linear(operand, weight.to(operand.codes.dtype), weight_scale)


def artifact_program(artifact: Artifact, *, batch: int | None = None, any_size: bool = False) -> Any:
    """A packed model as a `torch.export.ExportedProgram`, for a number of images or (None) any, of one size or any.

    Raises:
        UsageError: Any number or size of images is asked for, and the model or its program takes one only.
        QvitError: What torch cannot export, with its reason.
    """
    model = artifact.model()
    form = integer_form(model, ProgramArithmetic(), artifact.integers)
    images, dynamic = traced_images(model, image_size(artifact), batch, any_size)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.export.export(form, (images,), dynamic_shapes=dynamic)
    except Exception as error:
        if batch is None and "Constraints violated" in str(error):
            name = type(artifact.skeleton).__name__
            raise UsageError(f"a program of this {name} takes one number of images only: give it as `batch`") from error
        raise cannot_export(form, error) from error
    for node in program.graph.nodes:
        for key in set(node.meta) - {"val", "tensor_meta"}:  # where it comes from: more bytes than the weights
            del node.meta[key]
    return program


def export_program(artifact: Artifact, path: str | Path, *, batch: int | None = None, any_size: bool = False) -> Path:
    """Writes a `.pt2` file, which `torch.export.load` reads; it is replaced if it is there.

    Raises QvitError: see `artifact_program`; or the file cannot be written.
    """
    program = artifact_program(artifact, batch=batch, any_size=any_size)
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={ABOUT: json.dumps(origin_of(artifact))})
    write_atomically(Path(path), lambda file: file.write(buffer.getvalue()))
    return Path(path)


def export_executorch(artifact: Artifact, path: str | Path, *, batch: int = 1) -> Path:
    """Writes a `.pte` file for ExecuTorch, its XNNPACK backend where that has the operation; for `batch` images.

    Raises:
        UsageError: ExecuTorch is not installed.
        QvitError: What torch or ExecuTorch cannot export, with its reason; or the file cannot be written.
    """
    if missing("executorch"):
        raise UsageError("this needs executorch, in a version for this PyTorch: pip install executorch")
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner  # type: ignore[import-not-found]
    from executorch.exir import to_edge_transform_and_lower  # type: ignore[import-not-found]

    program = artifact_program(artifact, batch=batch)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise QvitError(f"ExecuTorch cannot lower this model: {reason}") from error
    write_atomically(Path(path), lambda file: file.write(made.buffer))
    return Path(path)
