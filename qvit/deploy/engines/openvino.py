"""The exported graph of a packed model in OpenVINO, on CPU."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from qvit.deploy.engines.base import register_engine
from qvit.deploy.export.onnx import (
    ARITHMETIC,
    OpenVinoArithmetic,
    artifact_graph,
    image_size,
    metadata_of,
    openvino_model,
)
from qvit.deploy.file.artifact import Artifact
from qvit.deploy.packages import openvino_core


@register_engine("openvino", needs=("openvino", "onnx", "onnxscript"), order=10)
class OpenVinoEngine:
    """OpenVINO in float32 and int8; compiled once for every batch size that comes."""

    name = "openvino"

    def __init__(self, artifact: Artifact, threads: int | None) -> None:
        exact = int8_is_exact()
        unit = "int8" if exact else "int8 where it cannot saturate on this processor, exact float32 elsewhere"
        graph = artifact_graph(artifact, OpenVinoArithmetic(exact_pairs=exact))
        self.artifact, self.arithmetic = artifact, f"{metadata_of(graph)[ARITHMETIC]}, {unit}"
        self.model = openvino_model(graph)
        self.settings = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
        self.settings |= {} if threads is None else {"INFERENCE_NUM_THREADS": threads}
        self._requests: dict[int, Any] = {}

    def __call__(self, images: Tensor) -> Tensor:
        if len(images) not in self._requests:
            model = self.model.clone()
            model.reshape([len(images), *image_size(self.artifact)])
            compiled = openvino_core().compile_model(model, "CPU", self.settings)
            self._requests[len(images)] = compiled.create_infer_request()
        return torch.from_numpy(self._requests[len(images)].infer([images.float().cpu().numpy()])[0].copy())


@functools.cache
def int8_is_exact() -> bool:
    """Whether OpenVINO's int8 products are exact here: tried once, on a product of the largest codes.

    On x86 processors without VNNI pairs of products are summed in 16 bits, which saturate.
    """
    import numpy as np
    import openvino
    from openvino import opset15 as ops

    length, outputs = 64, 64
    x = ops.parameter([16, length], np.float32)
    low, high = np.float32(-128), np.float32(127)
    codes = ops.fake_quantize(x, low, high, low, high, 256)
    weight = ops.multiply(ops.convert(ops.constant(np.full((length, outputs), 127, np.int8)), "f32"), np.float32(0.5))
    product = ops.matmul(codes, weight, False, False)
    model: Any = openvino.Model
    compiled = openvino_core().compile_model(model([product], [x]), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled([np.full((16, length), 127, np.float32)])[0]
    return bool((np.asarray(found) == length * 127 * 127 / 2).all())
