"""ONNX Runtime as a peer: the exported float model, and its static quantization."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qvit.deploy.bench.peers.base import Material, Prepared, Runner, peer
from qvit.deploy.export.onnx import float_graph
from qvit.deploy.packages import onnxruntime_session

ONNX = ("onnx", "onnxscript", "onnxruntime")


@peer("onnxruntime", "fp32", needs=ONNX, order=20)
def onnxruntime_fp32(material: Material) -> Prepared:
    """The exported model, with all of ONNX Runtime's graph optimizations (its default)."""
    file = exported(material)
    return Prepared(lambda batch: _session(file, batch, material.threads), "fp32", file.stat().st_size)


@peer("onnxruntime", "int8", needs=ONNX, order=20)
def onnxruntime_int8(material: Material) -> Prepared:
    """ONNX Runtime's static quantization, after the preprocessing that its documentation asks for.

    On CPUs without VNNI instructions it recommends weights of 7 bits (`reduce_range`), because sums of its products of
    uint8 and int8 saturate there. It is left off, as by default: it changes the answers, hardly the speed, and
    `top1_agreement` shows the answers.
    """
    file = quantized(material)
    arithmetic = "int8 weights, uint8 activations; what ONNX Runtime cannot fuse in fp32"
    return Prepared(lambda batch: _session(file, batch, material.threads), arithmetic, file.stat().st_size)


def quantized(material: Material, *, symmetric: bool = False) -> Path:
    """The ONNX file of the model with Q and DQ nodes; `symmetric`: activations in int8 on grids around zero."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.images = material.singles()

        def get_next(self) -> Any:
            image = next(self.images, None)
            return None if image is None else {"images": image.numpy()}

    names = ("prepared", "symmetric" if symmetric else "int8")
    prepared, file = (material.folder / f"onnxruntime-{name}.onnx" for name in names)
    quant_pre_process(str(exported(material)), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared), str(file), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QInt8 if symmetric else QuantType.QUInt8, weight_type=QuantType.QInt8,
        extra_options={"ActivationSymmetric": True} if symmetric else {},
    )  # fmt: skip
    return file


def exported(material: Material) -> Path:
    """The ONNX file of the float model with a free batch size; made once."""
    file = material.folder / "float.onnx"
    if not file.is_file():
        file.write_bytes(float_graph(material.model, material.example).SerializeToString())
    return file


def _session(file: Path, batch: int, threads: int) -> Runner:
    session = onnxruntime_session(str(file), threads, batch=batch)
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
