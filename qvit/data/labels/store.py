"""The store of soft labels: a folder with a JSON header and a few binary files that are read in place.

    labels.json        what decided the content (`LabelCall`), layout, SHA-256 of each shard, and a checksum of itself
    labels-00000.bin   a shard of n images with M crops each: n records of an image, then n·M records of a crop

    image, 8 bytes     height u2, width u2, checksum u4                     sizes 0 where the image could not be read
    crop, 9 + 4k       top u2, left u2, height u2, width u2, flip u1, ids k × u2, probs k × f2
                       (k = "full": no ids, and a probability for each class in its order: 9 + 2C bytes)

All little-endian, without padding: 29 bytes a crop for k = 5, 18.6 GB for ImageNet with 500 crops. A box is in pixels
of the decoded image; ids are in falling order of probability. `checksum` is CRC-32 over the image's two sizes and its M
crops: it is compared whenever an image is read, so that opening a store looks at sizes of files alone, and yet no
damaged label is learned from. `verify` compares the SHA-256 of everything.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qvit.errors import QvitError, UsageError
from qvit.files import write_json

HEADER, FORMAT, VERSION = "labels.json", "qvit-soft-labels", 1
IMAGE = np.dtype([("height", "<u2"), ("width", "<u2"), ("checksum", "<u4")])
_BOX = [("top", "<u2"), ("left", "<u2"), ("height", "<u2"), ("width", "<u2"), ("flip", "u1")]
_OPEN_SHARDS = 64


class LabelCall(BaseModel):
    """Everything that decides the content of a store; two calls that agree in it make the same one.

    Attributes:
        teacher: timm's name, or which run's model it was, with its arguments.
        teacher_digest: SHA-256 of the teacher's parameters and buffers.
        teacher_input: Size of its images (channels, height, width), then their mean and deviation.
        images: How many images there are.
        images_digest: SHA-256 of their names, in order, and of the class names.
        num_classes: Classes of teacher and student.
        crops: Crops of each image.
        top_k: Classes that are kept of each crop, or "full".
        scale, ratio, interpolation, flip: Of the crops.
        seed: Chooses the crops.
        images_per_shard: Images in each shard but the last.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    teacher: str
    teacher_digest: str
    teacher_input: tuple[tuple[int, int, int], tuple[float, ...], tuple[float, ...]]
    images: int = Field(ge=1)
    images_digest: str
    num_classes: int = Field(ge=2, le=2**16)
    crops: int = Field(ge=1)
    top_k: int | Literal["full"]
    scale: tuple[float, float]
    ratio: tuple[float, float]
    interpolation: str
    flip: float
    seed: int
    images_per_shard: int = Field(ge=1)

    @property
    def channels(self) -> int:
        """1 for grey images, 3 for colour."""
        return self.teacher_input[0][0]

    @property
    def crop_dtype(self) -> np.dtype:
        """The record of a crop."""
        if self.top_k == "full":
            return np.dtype([*_BOX, ("probs", "<f2", (self.num_classes,))])
        return np.dtype([*_BOX, ("ids", "<u2", (self.top_k,)), ("probs", "<f2", (self.top_k,))])

    @property
    def shards(self) -> int:
        """How many shards there are."""
        return -(-self.images // self.images_per_shard)

    def images_in(self, shard: int) -> int:
        """How many images a shard has."""
        return min(self.images_per_shard, self.images - shard * self.images_per_shard)

    def bytes_in(self, shard: int) -> int:
        """The size of a shard's file."""
        return self.images_in(shard) * (IMAGE.itemsize + self.crops * self.crop_dtype.itemsize)

    def empty(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """A shard without labels: images `[n]` and crops `[n, M]`."""
        count = self.images_in(shard)
        return np.zeros(count, IMAGE), np.zeros((count, self.crops), self.crop_dtype)


class Shard(BaseModel):
    """What the header says of a finished shard."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    unlabelled: int = Field(ge=0)


class Header(BaseModel):
    """The content of `labels.json`: the call, the finished shards, and, for people, where the content is from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    call: LabelCall
    shards: list[Shard]
    origin: dict[str, str]

    @property
    def missing(self) -> int:
        """Shards that are still to be written."""
        return self.call.shards - len(self.shards)

    def save(self, folder: Path) -> None:
        """Writes the header, atomically."""
        call = self.call
        content = {
            "format": FORMAT,
            "version": VERSION,
            **self.model_dump(mode="json"),
            "layout": {
                "image": [list(field) for field in IMAGE.descr],
                "crop": [list(field) for field in call.crop_dtype.descr],
                "bytes_per_crop": call.crop_dtype.itemsize,
            },
        }
        write_json(folder / HEADER, content | {"checksum": _checksum(content)})


def read_header(folder: Path) -> Header:
    """Reads and checks the header of a store, finished or not. Raises QvitError if there is none, or a damaged one."""
    path = folder / HEADER
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise QvitError(f"no store of soft labels at {folder}: it has no {HEADER}; `qvit labels` makes one") from None
    except (OSError, ValueError, RecursionError) as error:
        raise QvitError(f"cannot read {path}: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise QvitError(f"{path} is not the header of a store of soft labels")
    if content.get("version") != VERSION:
        raise QvitError(f"{path} has version {content.get('version')!r}; this qvit reads version {VERSION}")
    try:
        if content.pop("checksum", None) != _checksum(content):
            raise QvitError(f"{path} is damaged: its content does not have its checksum; make the store again")
        header = Header.model_validate({key: content.get(key) for key in Header.model_fields})
    except (ValidationError, ValueError) as error:
        raise QvitError(f"{path} is damaged: {str(error).splitlines()[0]}") from None
    if header.missing < 0:
        raise QvitError(f"{path} is damaged: it lists {len(header.shards)} shards of {header.call.shards}")
    return header


def shard_path(folder: Path, shard: int) -> Path:
    """Where a shard is."""
    return folder / f"labels-{shard:05d}.bin"


def shard_digest(folder: Path, shard: int) -> str | None:
    """SHA-256 of a shard's file; None if there is none."""
    try:
        with shard_path(folder, shard).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise QvitError(f"cannot read {shard_path(folder, shard)}: {error.strerror or error}") from error


def image_checksum(image: np.ndarray, crops: np.ndarray) -> int:
    """CRC-32 of the record of an image: its sizes and its crops."""
    sizes = np.array([image["height"], image["width"]], "<u2").tobytes()
    return zlib.crc32(crops.tobytes(), zlib.crc32(sizes))


class LabelledSource(Protocol):
    """What is asked of images that have labels; `ImageSource` has it."""

    name: str
    class_names: list[str]

    def __len__(self) -> int: ...

    def filename(self, index: int) -> str: ...


def digest_of_images(source: LabelledSource) -> str:
    """SHA-256 of the names of images, in order, and of those of their classes."""
    digest = hashlib.sha256()
    for names in (source.class_names, (source.filename(index) for index in range(len(source)))):
        for name in names:
            digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
        digest.update(b"\0")
    return digest.hexdigest()


class SoftLabelStore:
    """A finished store, open for reading.

    Args:
        folder: Its directory.

    Attributes:
        folder: Its directory.
        call: What decided its content.
        unlabelled: How many images could not be read when it was made.

    Raises:
        QvitError: There is none, or it is unfinished, damaged or of another version. Shards are checked by their size.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._header = read_header(self.folder)
        self.call = self._header.call
        self.unlabelled = sum(shard.unlabelled for shard in self._header.shards)
        if self._header.missing:
            raise QvitError(
                f"the labels in {folder} are unfinished ({self._header.missing} of {self.call.shards} shards are "
                "missing): repeat the call that made them, and it goes on"
            )
        for shard in range(self.call.shards):
            self._require_size(shard)
        self._shard = lru_cache(_OPEN_SHARDS)(self._map)

    def __reduce__(self) -> tuple[type[SoftLabelStore], tuple[Path]]:
        return SoftLabelStore, (self.folder,)  # what is mapped stays with the process

    def __len__(self) -> int:
        return self.call.images

    @property
    def digest(self) -> str:
        """SHA-256 of the call and of the shards: the same for stores of the same content."""
        content = self._header.model_dump(mode="json", exclude={"origin"})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """The call that decided the content, and where it is from, as plain data."""
        return {"call": self.call.model_dump(mode="json"), "origin": self._header.origin}

    def read(self, image: int) -> tuple[tuple[int, int], np.ndarray]:
        """Height and width of an image, and its crops `[M]`. Raises QvitError if they are damaged."""
        shard, place = divmod(image, self.call.images_per_shard)
        images, crops = self._shard(shard)
        record, own = images[place], crops[place]
        if image_checksum(record, own) != record["checksum"]:
            raise QvitError(
                f"{shard_path(self.folder, shard)} is damaged at image {image}: repeat the call of `qvit labels` that "
                "made the store, which writes this shard again"
            )
        return (int(record["height"]), int(record["width"])), own

    def targets(self, crops: np.ndarray) -> np.ndarray:
        """Ids over probabilities of some crops, `[count, 2, k]` float32, as `recover` takes them."""
        probs = crops["probs"].astype(np.float32)
        ids = np.arange(probs.shape[1]) if self.call.top_k == "full" else crops["ids"]
        return np.stack([np.broadcast_to(ids, probs.shape).astype(np.float32), probs], axis=1)

    def labelled(self) -> np.ndarray:
        """Numbers of the images that have labels, `[images]` int64."""
        if not self.unlabelled:
            return np.arange(len(self))
        return np.flatnonzero(np.concatenate([self._shard(n)[0]["height"] for n in range(self.call.shards)]))

    def verify(self) -> None:
        """Compares every byte with the checksums. Raises QvitError naming what is damaged."""
        damaged = [
            shard_path(self.folder, number).name
            for number, shard in enumerate(self._header.shards)
            if shard_digest(self.folder, number) != shard.sha256
        ]
        if damaged:
            raise QvitError(
                f"damaged in {self.folder}: {', '.join(damaged)}; repeat the call of `qvit labels` that made the "
                "store, which writes these shards again"
            )

    def require_images(self, source: LabelledSource, *, num_classes: int, channels: int) -> None:
        """Raises UsageError unless the labels are of these images, classes and channels."""
        call = self.call
        pairs: Sequence[tuple[str, Any, Any]] = (
            ("classes", call.num_classes, num_classes),
            ("channels", call.channels, channels),
            ("images", call.images, len(source)),
            ("images and classes by name", call.images_digest, digest_of_images(source)),
        )
        for what, labelled, given in pairs:
            if labelled != given:
                counts = f"{labelled} {what}, not {given}" if isinstance(given, int) else f"other {what}"
                raise UsageError(
                    f"the labels in {self.folder} are for {counts} as in {source.name}: make them with the same data, "
                    "eval data, class map, shares (and seed, with a monitor share) as the run"
                )

    def _require_size(self, shard: int) -> None:
        path, size = shard_path(self.folder, shard), self.call.bytes_in(shard)
        found = path.stat().st_size if path.is_file() else 0
        if found != size:
            raise QvitError(
                f"{path} has {found} bytes instead of {size}: it is truncated or missing; repeat the call of `qvit "
                "labels` that made the store, which writes it again"
            )

    def _map(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        self._require_size(shard)
        count, path = self.call.images_in(shard), shard_path(self.folder, shard)
        try:
            whole = np.memmap(path, mode="r")
        except OSError as error:
            raise QvitError(f"cannot read {path}: {error.strerror or error}") from error
        split = count * IMAGE.itemsize
        return whole[:split].view(IMAGE), whole[split:].view(self.call.crop_dtype).reshape(count, self.call.crops)


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
