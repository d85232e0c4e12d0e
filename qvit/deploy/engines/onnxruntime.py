"""The exported graph of a packed model in ONNX Runtime, on CPU."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from qvit.deploy.engines.base import register_engine
from qvit.deploy.export.onnx import ARITHMETIC, OPSET, OnnxRuntimeArithmetic, artifact_graph, metadata_of
from qvit.deploy.file.artifact import Artifact
from qvit.deploy.packages import onnxruntime_session


@register_engine("onnxruntime", needs=("onnxruntime", "onnx", "onnxscript"), order=20)
class OnnxRuntimeEngine:
    """ONNX Runtime at its default optimization level."""

    name = "onnxruntime"

    def __init__(self, artifact: Artifact, threads: int | None) -> None:
        exact = int8_is_exact()
        graph = artifact_graph(artifact, OnnxRuntimeArithmetic(exact_pairs=exact))
        unit = "uint8 and int8" if exact else "uint8"
        self.artifact, self.arithmetic = artifact, f"{metadata_of(graph)[ARITHMETIC]}, {unit}"
        self.session = onnxruntime_session(graph.SerializeToString(), threads)

    def __call__(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self.session.run(None, {"images": images.float().cpu().numpy()})[0])


@functools.cache
def int8_is_exact() -> bool:
    """Whether ONNX Runtime's products of uint8 and int8 are exact here: tried once, on the largest codes."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper

    codes = helper.make_tensor_value_info("codes", TensorProto.UINT8, [16, 64])
    sums = helper.make_tensor_value_info("sums", TensorProto.INT32, [16, 64])
    weight = onnx.numpy_helper.from_array(np.full((64, 64), 127, np.int8), "weight")
    node = helper.make_node("MatMulInteger", ["codes", "weight"], ["sums"])
    graph = helper.make_graph([node], "probe", [codes], [sums], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    session = onnxruntime_session(model.SerializeToString())
    (found,) = session.run(None, {"codes": np.full((16, 64), 255, np.uint8)})
    return bool((np.asarray(found) == 64 * 255 * 127).all())
