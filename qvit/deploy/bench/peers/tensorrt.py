"""TensorRT as a peer on NVIDIA GPUs: the exported float model in fp16, and in int8 from a graph that says what is int8.

The int8 graph is ONNX Runtime's static quantization with symmetric grids, explicit quantization to TensorRT; the rest
runs in fp16. Written for TensorRT 10 by its documentation: no machine with it was at hand. There is no row
for fp8, which needs a graph that NVIDIA's own tool has quantized.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qvit.deploy.bench.peers.base import Material, Prepared, Runner, peer
from qvit.deploy.bench.peers.onnxruntime import exported, quantized
from qvit.errors import QvitError


@peer("tensorrt", "fp16", needs=("tensorrt", "onnx", "onnxscript"), order=40, devices=("cuda",))
def tensorrt_fp16(material: Material) -> Prepared:
    """The float model, where TensorRT may take fp16 for any layer."""
    file = exported(material)
    arithmetic = "fp16 where TensorRT chose it"
    return Prepared(functools.partial(_start, file, material, False), arithmetic, file.stat().st_size)


@peer("tensorrt", "int8", needs=("tensorrt", "onnx", "onnxscript", "onnxruntime"), order=40, devices=("cuda",))
def tensorrt_int8(material: Material) -> Prepared:
    """The model with Q and DQ nodes, int8 on both sides."""
    file = quantized(material, symmetric=True)
    arithmetic = "int8 by Q and DQ nodes, the rest fp16"
    return Prepared(functools.partial(_start, file, material, True), arithmetic, file.stat().st_size)


def _start(file: Path, material: Material, int8: bool, batch: int) -> Runner:
    trt: Any = importlib.import_module("tensorrt")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(file.read_bytes()):
        raise QvitError(f"TensorRT cannot read the exported graph: {parser.get_error(0).desc()}")
    config = builder.create_builder_config()
    config.set_flag(trt.BuilderFlag.FP16)
    if int8:
        config.set_flag(trt.BuilderFlag.INT8)
    shape = (batch, *material.example.shape[1:])
    profile = builder.create_optimization_profile()
    profile.set_shape("images", shape, shape, shape)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise QvitError("TensorRT made no engine of the exported graph")
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    return _Runner(engine, shape, material.device)


class _Runner:
    """An engine for batches of one shape; it keeps what TensorRT's objects refer to."""

    def __init__(self, engine: Any, shape: tuple[int, ...], device: str) -> None:
        self.engine, self.context = engine, engine.create_execution_context()
        self.context.set_input_shape("images", shape)
        self.answer = torch.empty(tuple(self.context.get_tensor_shape("logits")), device=device)
        self.context.set_tensor_address("logits", self.answer.data_ptr())

    def __call__(self, images: Tensor) -> Tensor:
        images = images.contiguous()
        self.context.set_tensor_address("images", images.data_ptr())
        self.context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
        return self.answer
