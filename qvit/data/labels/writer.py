"""Writing a store of soft labels shard by shard, so that it can be killed at any moment and goes on.

A shard appears under its name when it is whole and on the disk; then the header is replaced by one that lists it. A
repeated call compares the listed shards with their checksums and writes those that are damaged, and those that follow.
The content of a shard depends on the call alone, so what comes out is, byte for byte, what one call would have made
(with the same device, threads and batch size: these may change a probability in its last digit).
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from pathlib import Path

import numpy as np

from qvit.data.labels.store import (
    HEADER,
    Header,
    LabelCall,
    Shard,
    image_checksum,
    read_header,
    shard_digest,
    shard_path,
)
from qvit.errors import QvitError, UsageError
from qvit.files import write_atomically

_log = logging.getLogger(__name__)


class StoreWriter:
    """Begins a store, or goes on with one of the same call.

    Args:
        folder: Its directory; empty, new, or that of a store of the same call.
        call: What decides the content.
        origin: What data and models were called, for people.

    Attributes:
        header: What the header says at the moment.
        todo: Numbers of the shards that are to be written.

    Raises:
        UsageError: The directory holds something else, or a store of another call.
        QvitError: It cannot be written, or the disk has too little space.
    """

    def __init__(self, folder: Path, call: LabelCall, origin: dict[str, str]) -> None:
        self.folder = folder
        if folder.is_dir():
            for left_over in folder.glob(".labels*"):  # half-written, by a process that was killed
                left_over.unlink(missing_ok=True)
        elif folder.exists():
            raise UsageError(f"{folder} is a file: choose another --out")
        if (folder / HEADER).is_file():
            self.header = read_header(folder)
            _require_same_call(folder, self.header.call, call)
            self.todo = self._damaged() + list(range(len(self.header.shards), call.shards))
        elif folder.is_dir() and any(folder.iterdir()):
            raise UsageError(f"{folder} is not empty and holds no soft labels: choose another --out")
        else:
            self.header, self.todo = Header(call=call, shards=[], origin=origin), list(range(call.shards))
        needed, place = sum(map(call.bytes_in, self.todo)), folder
        while not place.exists():
            place = place.parent
        if needed > (free := shutil.disk_usage(place).free):
            raise QvitError(f"the labels need {needed / 1e9:.2f} GB more, and {folder} has {free / 1e9:.2f} GB free")
        if not (folder / HEADER).is_file():
            self.header.save(folder)

    def write(self, number: int, images: np.ndarray, crops: np.ndarray) -> None:
        """Writes a shard and lists it: crops `[n, M]`, and images `[n]`, whose checksums are filled in."""
        for image, own in zip(images, crops, strict=True):
            image["checksum"] = image_checksum(image, own)
        content = images.tobytes() + crops.tobytes()
        write_atomically(shard_path(self.folder, number), lambda file: file.write(content))
        shards = list(self.header.shards)
        unlabelled = int((images["height"] == 0).sum())
        shards[number : number + 1] = [Shard(sha256=hashlib.sha256(content).hexdigest(), unlabelled=unlabelled)]
        self.header = self.header.model_copy(update={"shards": shards})
        self.header.save(self.folder)

    def _damaged(self) -> list[int]:
        found = []
        for number, shard in enumerate(self.header.shards):
            if shard_digest(self.folder, number) != shard.sha256:
                _log.warning("%s is damaged or missing: it is written again", shard_path(self.folder, number))
                found.append(number)
        return found


def _require_same_call(folder: Path, there: LabelCall, asked: LabelCall) -> None:
    differs = [name for name in LabelCall.model_fields if getattr(there, name) != getattr(asked, name)]
    if differs:
        first = differs[0]
        raise UsageError(
            f"{folder} holds the labels of another call: {', '.join(differs)} differ ({first} was "
            f"{getattr(there, first)!r}, and is {getattr(asked, first)!r} now): choose another --out"
        )
