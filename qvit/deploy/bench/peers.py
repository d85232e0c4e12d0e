"""The runtimes that a quantized model competes with, each made from the same float model and with the same threads.

    pytorch            fp32, bf16    eager
    pytorch-compiled   fp32, bf16    torch.compile with its default backend; needs a C++ compiler
    onnxruntime        fp32          the exported graph, with ONNX Runtime's own optimizations
    onnxruntime        int8          its static quantization: QDQ, int8 weights per channel, uint8 activations
    openvino           fp32          the converted model, computed in fp32 wherever the CPU would offer less
    openvino           int8          NNCF's post-training quantization: preset mixed, transformer model type

One more peer is one more function with `@peer`. It prepares the model once, which may take minutes, and returns how to
start it for a batch size: a runtime that knows the batch size is never slower, and ours know it as well.

ONNX Runtime's threads would keep spinning after a call and take the processor from the engine that is timed next; a
session option forbids it. On CPUs without VNNI instructions ONNX Runtime recommends weights of 7 bits (`reduce_range`),
because sums of its products of uint8 and int8 saturate there. It is left off, as by default: it changes the answers,
hardly the speed, and `top1_agreement` shows the answers.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qvit.deploy.packages import cxx, has_compiler, missing, openvino_core
from qvit.errors import QvitError

Runner = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Material:
    """What a peer is made from.

    Attributes:
        model: The float model, in eval mode on the CPU.
        calibration: Batches of images (B, channels, height, width) for those that quantize.
        threads: How many a peer may use.
        folder: A folder for files, shared by all peers.
    """

    model: nn.Module
    calibration: list[Tensor]
    threads: int
    folder: Path

    @property
    def example(self) -> Tensor:
        """Two images."""
        first = self.calibration[0]
        return torch.cat([first, first])[:2]

    def singles(self) -> Iterator[Tensor]:
        """The calibration images one by one, each (1, channels, height, width)."""
        return (image for batch in self.calibration for image in batch.split(1))


@dataclass(frozen=True)
class Prepared:
    """A peer that is ready for any batch size.

    Attributes:
        start: From a batch size to what answers batches of that size.
        arithmetic: What is computed in which format, in words.
        file_bytes: Size of the model's files.
    """

    start: Callable[[int], Runner]
    arithmetic: str
    file_bytes: int


@dataclass(frozen=True)
class Peer:
    """An entry of the table.

    Attributes:
        engine: The runtime.
        precision: `fp32`, `bf16` or `int8`.
        needs: Packages that must be installed.
        compiler: Whether a C++ compiler must be there.
        prepare: Makes it.
    """

    engine: str
    precision: str
    needs: tuple[str, ...]
    compiler: bool
    prepare: Callable[[Material], Prepared]

    @property
    def name(self) -> str:
        """`openvino-int8`."""
        return f"{self.engine}-{self.precision}"

    def obstacle(self) -> str | None:
        """Why it cannot run here, and what to do; None if it can."""
        if lacking := missing(*self.needs):
            return f'{" and ".join(lacking)} not installed: pip install "qvit[bench]"'
        if self.compiler and not has_compiler():
            return (
                f"torch.compile needs a C++ compiler, and there is no {' '.join(cxx())}: install one, or name it in CXX"
            )
        return None


PEERS: dict[str, Peer] = {}


def peer(
    engine: str, precision: str, *, needs: tuple[str, ...] = (), compiler: bool = False
) -> Callable[[Callable[[Material], Prepared]], Callable[[Material], Prepared]]:
    """Decorator that registers a function from `Material` to `Prepared`."""

    def register(prepare: Callable[[Material], Prepared]) -> Callable[[Material], Prepared]:
        entry = Peer(engine, precision, needs, compiler, prepare)
        PEERS[entry.name] = entry
        return prepare

    return register


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps warnings, log messages and progress bars of other libraries away; what they raise comes through."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


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


# PyTorch


@peer("pytorch", "fp32")
def pytorch_fp32(material: Material) -> Prepared:
    """The model as it is."""
    model = material.model
    return Prepared(lambda _: _without_gradients(model), "fp32, eager", _bytes_of(model))


@peer("pytorch", "bf16")
def pytorch_bf16(material: Material) -> Prepared:
    """Weights and activations in bf16; the images are rounded within the time that is measured."""
    model = _in_bf16(material.model)
    return Prepared(lambda _: _through_bf16(model), "bf16, eager", _bytes_of(model))


@peer("pytorch-compiled", "fp32", compiler=True)
def compiled_fp32(material: Material) -> Prepared:
    """torch.compile with its default backend and mode, for one shape."""
    model = material.model
    return Prepared(lambda _: _without_gradients(_compiled(model)), "fp32, compiled", _bytes_of(model))


@peer("pytorch-compiled", "bf16", compiler=True)
def compiled_bf16(material: Material) -> Prepared:
    """The same in bf16."""
    model = _in_bf16(material.model)
    return Prepared(lambda _: _through_bf16(_compiled(model)), "bf16, compiled", _bytes_of(model))


def _compiled(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return torch.compile(model, dynamic=False)


def _in_bf16(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).to(torch.bfloat16)


def _without_gradients(model: Callable[[Tensor], Tensor]) -> Runner:
    def run(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return model(images)

    return run


def _through_bf16(model: Callable[[Tensor], Tensor]) -> Runner:
    def run(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return model(images.to(torch.bfloat16)).float()

    return run


def _bytes_of(model: nn.Module) -> int:
    return sum(value.numel() * value.element_size() for value in model.state_dict().values())


# ONNX Runtime

ONNX = ("onnx", "onnxscript", "onnxruntime")


@peer("onnxruntime", "fp32", needs=ONNX)
def onnxruntime_fp32(material: Material) -> Prepared:
    """The exported model, with all of ONNX Runtime's graph optimizations (its default)."""
    file = _exported(material)
    return Prepared(lambda batch: _session(file, batch, material.threads), "fp32", file.stat().st_size)


@peer("onnxruntime", "int8", needs=ONNX)
def onnxruntime_int8(material: Material) -> Prepared:
    """ONNX Runtime's static quantization, after the preprocessing that its documentation asks for.

    On CPUs without VNNI instructions it recommends `reduce_range`; see the beginning of this file.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.images = material.singles()

        def get_next(self) -> Any:
            image = next(self.images, None)
            return None if image is None else {"images": image.numpy()}

    prepared, quantized = (material.folder / f"onnxruntime-{name}.onnx" for name in ("prepared", "int8"))
    quant_pre_process(str(_exported(material)), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared), str(quantized), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    arithmetic = "int8 weights, uint8 activations; what ONNX Runtime cannot fuse in fp32"
    return Prepared(lambda batch: _session(quantized, batch, material.threads), arithmetic, quantized.stat().st_size)


def _exported(material: Material) -> Path:
    """The ONNX file of the float model with a free batch size; made once."""
    file = material.folder / "float.onnx"
    if not file.is_file():
        torch.onnx.export(
            material.model, (material.example,), str(file), input_names=["images"], output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},), external_data=False, dynamo=True, verbose=False,
        )  # fmt: skip
    return file


def _session(file: Path, batch: int, threads: int) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_free_dimension_override_by_name("batch", batch)
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(images: Tensor) -> Tensor:
        outputs: Any = session.run(None, {name: images.numpy()})
        return torch.from_numpy(outputs[0])

    return run


# OpenVINO


@peer("openvino", "fp32", needs=("openvino",))
def openvino_fp32(material: Material) -> Prepared:
    """The converted model, in fp32 even where the CPU would be given bf16 or fp16."""
    converted = _converted(material)
    more = {"INFERENCE_PRECISION_HINT": "f32"}
    size = _saved_bytes(converted, material.folder / "openvino-fp32.xml")
    return Prepared(lambda batch: _request(converted, material, batch, more), "fp32", size)


@peer("openvino", "int8", needs=("openvino", "nncf"))
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
