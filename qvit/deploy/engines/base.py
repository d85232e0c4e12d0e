"""What an engine is, the registry of all, and how one is chosen when a packed model is loaded.

    native         packed ViTs and Swins in C++, every product on integers
    openvino       the exported graph, int8 × int8 where that is exact on this processor
    onnxruntime    the exported graph, uint8 × uint8
    torch          the results of `reference` by int8 kernels or exact float32 units, glue compiled
    cuda           Triton kernels on an NVIDIA GPU; only by its name
    reference      every product on int32, one operation after the other

Without a name the first of this order is taken that is installed and runs the model. `reference` and `torch` agree bit
for bit unless the glue is compiled. Compiled code and the exported graphs have the same exact sums; their LayerNorm,
softmax and GELU are other implementations, whose last digits differ, so a value on the edge between two integers may
fall on the other side. An engine says in `arithmetic` what it computes on integers; none says more than it does.

A model that takes images of any size runs as it is in `torch` and `reference`; the others are made for one size, anew
for each size that comes (`PerSize`).
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from torch import Tensor

from qvit.deploy.file.artifact import Artifact
from qvit.deploy.file.nested import nested
from qvit.deploy.file.resize import at_size
from qvit.deploy.packages import missing
from qvit.errors import QvitError, UsageError
from qvit.kernels.build import CannotBuild
from qvit.models.sizes import takes_any_size
from qvit.registry import Registry

_log = logging.getLogger(__name__)
#: How many engines of one model are kept, each for a size of images.
MOST_SIZES = 8


class Engine(Protocol):
    """A model that answers. It is made from an artifact, a number of threads or None, and options of its own.

    Attributes:
        arithmetic: In words, what runs on integers, and what is simulated.
        artifact: What was loaded: plan, preprocessing, classes.
    """

    name: str
    arithmetic: str
    artifact: Artifact

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, channels, height, width) under the model's transform, float32."""
        ...


Make = TypeVar("Make", bound=Callable[..., Engine])


class Entry(NamedTuple):
    """An entry of `ENGINES`; see `register_engine`."""

    make: Callable[..., Engine]
    needs: tuple[str, ...]
    order: int
    any_size: bool = False
    devices: tuple[str, ...] = ("cpu",)


ENGINES: Registry[str, Entry] = Registry("engine", "qvit.deploy.engines", order=lambda entry: entry.order)


def register_engine(
    name: str,
    *,
    needs: tuple[str, ...] = (),
    order: int = 100,
    any_size: bool = False,
    devices: tuple[str, ...] = ("cpu",),
) -> Callable[[Make], Make]:
    """Decorator: makes a class available as an engine.

    Args:
        name: Its name.
        needs: Packages that must be installed.
        order: Its place among the engines; the first that is installed and runs a model is its default. Ours are at 5
            to 40.
        any_size: Whether it runs models that take images of any size as they are; else it is made for each size.
        devices: Kinds of devices whose images it takes, `cpu` and `cuda`.
    """

    def register(make: Make) -> Make:
        ENGINES.register(name)(Entry(make, needs, order, any_size, devices))
        return make

    return register


def available_engines(device: str = "cpu") -> list[str]:
    """Engines for a kind of device whose packages are installed, the best first."""
    return [name for name, entry in ENGINES.items() if device in entry.devices and not missing(*entry.needs)]


def create_engine(artifact: Artifact, name: str | None = None, *, threads: int | None = None, **options: Any) -> Engine:
    """An engine for a packed model.

    Args:
        artifact: The model.
        name: One of `ENGINES`; None for the best that is installed and runs this model.
        threads: Threads that it may use; None leaves that to the library.
        options: Of the engine: `compiled` of `torch`, `device` and `graphs` of `cuda`.

    Raises:
        UsageError: An unknown engine, or one whose package is not installed.
    """
    if name is not None:
        return _made(artifact, name, threads, options)
    *others, last = available_engines()
    for place, other in enumerate(others, 1):
        try:
            return _made(artifact, other, threads, options)
        except QvitError as error:
            level = logging.WARNING if isinstance(error, CannotBuild) else logging.INFO
            instead = [*others, last][place]
            _log.log(level, "engine '%s' is passed over, '%s' serves instead: %s", other, instead, error)
    return _made(artifact, last, threads, options)


def _made(artifact: Artifact, name: str, threads: int | None, options: dict[str, Any]) -> Engine:
    entry = ENGINES[name]
    make, needs, any_size = entry.make, entry.needs, entry.any_size
    if lacking := missing(*needs):
        raise UsageError(f"engine '{name}' needs {', '.join(lacking)}: pip install {' '.join(lacking)}")
    unknown = [option for option in options if option not in inspect.signature(make).parameters]
    if unknown:
        raise UsageError(f"engine '{name}' has no option '{unknown[0]}'")
    if takes_any_size(artifact.skeleton) and not any_size:
        return PerSize(artifact, lambda resized: make(resized, threads, **options))
    return make(artifact, threads, **options)


class PerSize:
    """An engine for each size of images, made when the first ones come; the latest `MOST_SIZES` are kept.

    Args:
        artifact: A model that takes any size.
        make: From the model for one size to its engine.
    """

    def __init__(self, artifact: Artifact, make: Callable[[Artifact], Engine]) -> None:
        self.artifact = artifact
        self._engine = lru_cache(MOST_SIZES)(lambda *size: make(at_size(artifact, size)))
        first = self._engine(*artifact.data_config["input_size"][1:])
        self.name, self.arithmetic = first.name, first.arithmetic

    def __call__(self, images: Tensor) -> Tensor:
        return self._engine(*images.shape[-2:])(images)


def load(
    source: str | Path,
    engine: str | None = None,
    *,
    threads: int | None = None,
    image_size: Sequence[int] | None = None,
    ratio: float | None = None,
    **options: Any,
) -> Engine:
    """Loads a packed model to run it.

    Args:
        source: A packed file (`qvit pack`), a folder or a hub repository that `Artifact.from_pretrained` takes.
        engine, threads, options: See `create_engine`.
        image_size: Height and width of the images, where it is to run at another size than its own.
        ratio: The share of channels whose 8-bit weights are narrowed to 4 bits, from 0 to 1; see `nested.py`.

    Returns:
        A callable: images (B, channels, height, width) to logits (B, classes).

    Raises:
        QvitError: A file that cannot be read or is not what it says.
        UsageError: See `create_engine`; or the model cannot be taken to that size or ratio.
    """
    path = Path(source)
    artifact = Artifact.load(path) if path.is_file() else Artifact.from_pretrained(str(source))
    artifact = artifact if image_size is None else at_size(artifact, image_size)
    artifact = artifact if ratio is None else nested(artifact, ratio)
    return create_engine(artifact, engine, threads=threads, **options)
