"""What runs a packed model: engines with one interface, chosen when the file is loaded.

    reference      every product on int32, one operation after the other                         (`integer.py`)
    torch          the same results by int8 kernels or exact float32 units, glue compiled        (`torch_integer.py`)
    onnxruntime    the exported graph, uint8 × uint8                                             (`onnx.py`)
    openvino       the exported graph, int8 × int8 where that is exact on this processor         (`onnx.py`)

`reference` and `torch` agree bit for bit unless the glue is compiled. Compiled code and the exported graphs have the
same exact sums; their LayerNorm, softmax and GELU are other implementations, whose last digits differ, so a value on
the edge between two integers may fall on the other side. An engine says in `arithmetic` what it computes on integers;
none says more than it does.

Without a name the best installed engine is taken: OpenVINO, then ONNX Runtime, then PyTorch.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from qvit.deploy.export.onnx import (
    ARITHMETIC,
    OPSET,
    OnnxRuntimeArithmetic,
    OpenVinoArithmetic,
    artifact_graph,
    image_size,
    metadata_of,
    openvino_model,
)
from qvit.deploy.file.artifact import Artifact
from qvit.deploy.integer.arithmetic import Arithmetic
from qvit.deploy.integer.reference import arithmetic_in_words, integer_form
from qvit.deploy.integer.torch import TorchArithmetic
from qvit.deploy.packages import has_compiler, missing, openvino_core
from qvit.errors import UsageError, nearest


class Engine(Protocol):
    """A model that answers.

    Attributes:
        name: `reference`, `torch`, `onnxruntime` or `openvino`.
        arithmetic: In words, what runs on integers, and what is simulated.
        artifact: What was loaded: plan, preprocessing, classes.
    """

    name: str
    arithmetic: str
    artifact: Artifact

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, channels, height, width) under the model's transform, float32."""
        ...


class ReferenceEngine:
    """The integer form in PyTorch, one operation after the other; on the device of the images."""

    name = "reference"

    def __init__(self, artifact: Artifact, threads: int | None) -> None:
        self._take(artifact, Arithmetic(), threads)

    def _take(self, artifact: Artifact, arithmetic: Arithmetic, threads: int | None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.artifact, self.device = artifact, torch.device("cpu")
        self.module = integer_form(artifact.model(), arithmetic, artifact.integers)
        self.arithmetic = arithmetic_in_words(self.module)
        self.forward: Callable[[Tensor], Tensor] = self.module

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        if images.device != self.device:
            self.module.to(images.device)
            self.device = images.device
        return self.forward(images.float())


class TorchEngine(ReferenceEngine):
    """The integer form with fast exact products; compiled on the first call, by default where a compiler is there."""

    name = "torch"

    def __init__(self, artifact: Artifact, threads: int | None, *, compiled: bool | None = None) -> None:
        arithmetic = TorchArithmetic()
        self._take(artifact, arithmetic, threads)
        unit = "int8 kernels" if arithmetic.int8 else "float32 units that are exact for these sums"
        self.arithmetic = f"{self.arithmetic}, by {unit}"
        if has_compiler() if compiled is None else compiled:
            self.forward = torch.compile(self.module)


class OnnxRuntimeEngine:
    """The exported graph in ONNX Runtime, on CPU, at its default optimization level."""

    name = "onnxruntime"

    def __init__(self, artifact: Artifact, threads: int | None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        exact = onnxruntime_int8_is_exact()
        graph = artifact_graph(artifact, OnnxRuntimeArithmetic(exact_pairs=exact))
        unit = "uint8 and int8" if exact else "uint8"
        self.artifact, self.arithmetic = artifact, f"{metadata_of(graph)[ARITHMETIC]}, {unit}"
        self.session = onnxruntime.InferenceSession(graph.SerializeToString(), options, ["CPUExecutionProvider"])

    def __call__(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self.session.run(None, {"images": images.float().cpu().numpy()})[0])


class OpenVinoEngine:
    """The exported graph in OpenVINO, on CPU; compiled once for every batch size that comes."""

    name = "openvino"

    def __init__(self, artifact: Artifact, threads: int | None) -> None:
        exact = openvino_int8_is_exact()
        unit = "int8" if exact else "int8 where it cannot saturate on this processor, exact float32 elsewhere"
        graph = artifact_graph(artifact, OpenVinoArithmetic(exact_pairs=exact))
        self.artifact, self.arithmetic = artifact, f"{metadata_of(graph)[ARITHMETIC]}, {unit}"
        self.model = openvino_model(graph)
        self.settings = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
        self.settings |= {} if threads is None else {"INFERENCE_NUM_THREADS": threads}
        self._requests: dict[int, Any] = {}

    def __call__(self, images: Tensor) -> Tensor:
        if len(images) not in self._requests:
            self._requests[len(images)] = self._compiled(len(images))
        return torch.from_numpy(self._requests[len(images)].infer([images.float().cpu().numpy()])[0].copy())

    def _compiled(self, batch: int) -> Any:
        model = self.model.clone()
        model.reshape([batch, *image_size(self.artifact)])
        return openvino_core().compile_model(model, "CPU", self.settings).create_infer_request()


ENGINES: dict[str, tuple[Callable[..., Engine], tuple[str, ...]]] = {
    "openvino": (OpenVinoEngine, ("openvino", "onnx", "onnxscript")),
    "onnxruntime": (OnnxRuntimeEngine, ("onnxruntime", "onnx", "onnxscript")),
    "torch": (TorchEngine, ()),
    "reference": (ReferenceEngine, ()),
}


def available_engines() -> list[str]:
    """Engines whose packages are installed, the best first."""
    return [name for name, (_, packages) in ENGINES.items() if not missing(*packages)]


def create_engine(artifact: Artifact, name: str | None = None, *, threads: int | None = None, **options: Any) -> Engine:
    """An engine for a packed model.

    Args:
        artifact: The model.
        name: One of `ENGINES`; None for the best that is installed.
        threads: Threads that it may use; None leaves that to the library.
        options: Of the engine: `compiled` of `torch`.

    Raises:
        UsageError: An unknown engine, or one whose package is not installed.
    """
    name = name or available_engines()[0]
    if name not in ENGINES:
        raise UsageError(f"unknown engine '{name}'{nearest(name, ENGINES)} ({', '.join(ENGINES)})")
    make, packages = ENGINES[name]
    if lacking := missing(*packages):
        raise UsageError(f"engine '{name}' needs {', '.join(lacking)}: pip install {' '.join(lacking)}")
    unknown = [option for option in options if option not in inspect.signature(make).parameters]
    if unknown:
        raise UsageError(f"engine '{name}' has no option '{unknown[0]}'")
    return make(artifact, threads, **options)


def load(source: str | Path, engine: str | None = None, *, threads: int | None = None, **options: Any) -> Engine:
    """Loads a packed model to run it.

    Args:
        source: A packed file (`qvit pack`), a folder or a hub repository that `Artifact.from_pretrained` takes.
        engine, threads, options: See `create_engine`.

    Returns:
        A callable: images (B, channels, height, width) to logits (B, classes).

    Raises:
        QvitError: A file that cannot be read or is not what it says.
    """
    path = Path(source)
    artifact = Artifact.load(path) if path.is_file() else Artifact.from_pretrained(str(source))
    return create_engine(artifact, engine, threads=threads, **options)


@functools.cache
def onnxruntime_int8_is_exact() -> bool:
    """Whether ONNX Runtime's products of uint8 and int8 are exact here: tried once, on the largest codes."""
    import numpy as np
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    codes = helper.make_tensor_value_info("codes", TensorProto.UINT8, [16, 64])
    sums = helper.make_tensor_value_info("sums", TensorProto.INT32, [16, 64])
    weight = onnx.numpy_helper.from_array(np.full((64, 64), 127, np.int8), "weight")
    node = helper.make_node("MatMulInteger", ["codes", "weight"], ["sums"])
    graph = helper.make_graph([node], "probe", [codes], [sums], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), None, ["CPUExecutionProvider"])
    (found,) = session.run(None, {"codes": np.full((16, 64), 255, np.uint8)})
    return bool((np.asarray(found) == 64 * 255 * 127).all())


@functools.cache
def openvino_int8_is_exact() -> bool:
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
