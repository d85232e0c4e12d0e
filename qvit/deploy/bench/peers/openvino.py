"""OpenVINO as a peer: the converted float model, and NNCF's post-training quantization of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qvit.deploy.bench.peers.base import Material, Prepared, Runner, peer
from qvit.deploy.packages import openvino_core
from qvit.errors import QvitError


@contextlib.contextmanager
def without_statistics() -> Iterator[None]:
    """Keeps OpenVINO and NNCF from sending usage statistics, as they do from a forked process, unless CI is set."""
    before = os.environ.get("CI")
    os.environ["CI"] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ["CI"]
        else:
            os.environ["CI"] = before


@peer("openvino", "fp32", needs=("openvino",), order=30)
def openvino_fp32(material: Material) -> Prepared:
    """The converted model, in fp32 even where the CPU would be given bf16 or fp16."""
    converted = _converted(material)
    more = {"INFERENCE_PRECISION_HINT": "f32"}
    size = _saved_bytes(converted, material.folder / "openvino-fp32.xml")
    return Prepared(lambda batch: _request(converted, material, batch, more), "fp32", size)


@peer("openvino", "int8", needs=("openvino", "nncf"), order=30)
@without_statistics()
def openvino_int8(material: Material) -> Prepared:
    """NNCF's post-training quantization with its defaults for transformers.

    What is not quantized is computed in what OpenVINO chooses for this CPU: bf16 on those with AMX, fp32 on others.
    """
    import nncf

    singles = [image.numpy() for image in material.singles()]
    quantized = nncf.quantize(
        _converted(material),
        nncf.Dataset(singles),
        preset=nncf.QuantizationPreset.MIXED,
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(singles),
    )
    rest = openvino_core().get_property("CPU", "INFERENCE_PRECISION_HINT").get_type_name()
    size = _saved_bytes(quantized, material.folder / "openvino-int8.xml")
    arithmetic = f"int8 where NNCF put it, the rest in {rest}"
    return Prepared(lambda batch: _request(quantized, material, batch, {}), arithmetic, size)


@without_statistics()
def _converted(material: Material) -> Any:
    import openvino

    converted = openvino.convert_model(material.model, example_input=material.example)
    converted.reshape([-1, *material.example.shape[1:]])
    return converted


def _saved_bytes(model: Any, file: Path) -> int:
    import openvino

    openvino.save_model(model, str(file), compress_to_fp16=False)
    return sum(part.stat().st_size for part in (file, file.with_suffix(".bin")))


def _request(model: Any, material: Material, batch: int, more: dict[str, Any]) -> Runner:
    fixed = model.clone()
    fixed.reshape([batch, *material.example.shape[1:]])
    properties = {"INFERENCE_NUM_THREADS": material.threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY", **more}
    compiled = openvino_core().compile_model(fixed, "CPU", properties)
    if compiled.get_property("INFERENCE_NUM_THREADS") != material.threads:
        raise QvitError(f"OpenVINO does not take {material.threads} threads here")
    request = compiled.create_infer_request()

    def run(images: Tensor) -> Tensor:
        outputs = request.infer({0: images.numpy()}, share_inputs=True)
        return torch.from_numpy(outputs[0])

    return run
