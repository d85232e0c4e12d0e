"""The runtimes that a quantized model competes with, each made from the same float model and with the same threads.

    pytorch            fp32, bf16    eager
    pytorch-compiled   fp32, bf16    torch.compile with its default backend; needs a C++ compiler
    onnxruntime        fp32          the exported graph, with ONNX Runtime's own optimizations
    onnxruntime        int8          its static quantization: QDQ, int8 weights per channel, uint8 activations
    openvino           fp32          the converted model, computed in fp32 wherever the CPU would offer less
    openvino           int8          NNCF's post-training quantization: preset mixed, transformer model type
    tensorrt           fp16, int8    on CUDA alone; PyTorch's four run there, too, compiled ones as CUDA graphs

One more peer is one more function with `@peer`. It prepares the model once, which may take minutes, and returns how to
start it for a batch size: a runtime that knows the batch size is never slower, and ours know it as well.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from qvit.deploy.packages import cxx, has_compiler, missing
from qvit.registry import Registry

Runner = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Material:
    """What a peer is made from.

    Attributes:
        model: The float model, in eval mode on the CPU.
        calibration: Batches of images (B, channels, height, width) for those that quantize.
        threads: How many a peer may use.
        folder: A folder for files, shared by all peers.
        device: Where peers run, and where the images of a measurement are: `cpu`, `cuda`.
    """

    model: nn.Module
    calibration: list[Tensor]
    threads: int
    folder: Path
    device: str = "cpu"

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
    """An entry of `PEERS`.

    Attributes:
        engine: The runtime.
        precision: `fp32`, `bf16` or `int8`.
        needs: Packages that must be installed.
        compiler: Whether a C++ compiler must be there.
        prepare: Makes it.
        order: Its place among the peers; qvit's own are at 10 to 40.
        devices: Kinds of devices that it runs on, `cpu` and `cuda`.
    """

    engine: str
    precision: str
    needs: tuple[str, ...]
    compiler: bool
    prepare: Callable[[Material], Prepared]
    order: int = 100
    devices: tuple[str, ...] = ("cpu",)

    @property
    def name(self) -> str:
        """`openvino-int8`."""
        return f"{self.engine}-{self.precision}"

    def obstacle(self) -> str | None:
        """Why it cannot run here, and what to do; None if it can."""
        if lacking := missing(*self.needs):
            extra = '"qvit[bench]"' if "cpu" in self.devices else " ".join(lacking)
            return f"{' and '.join(lacking)} not installed: pip install {extra}"
        if self.compiler and not has_compiler():
            return (
                f"torch.compile needs a C++ compiler, and there is no {' '.join(cxx())}: install one, or name it in CXX"
            )
        return None


PEERS: Registry[str, Peer] = Registry("peer", "qvit.deploy.bench.peers", order=lambda peer: peer.order)


def peer(
    engine: str,
    precision: str,
    *,
    needs: tuple[str, ...] = (),
    compiler: bool = False,
    order: int = 100,
    devices: tuple[str, ...] = ("cpu",),
) -> Callable[[Callable[[Material], Prepared]], Callable[[Material], Prepared]]:
    """Decorator that registers a function from `Material` to `Prepared`; see `Peer`."""

    def register(prepare: Callable[[Material], Prepared]) -> Callable[[Material], Prepared]:
        entry = Peer(engine, precision, needs, compiler, prepare, order, devices)
        PEERS.register(entry.name)(entry)
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


def without_gradients(model: Callable[[Tensor], Tensor]) -> Runner:
    """Runs a model in inference mode."""

    def run(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return model(images)

    return run
