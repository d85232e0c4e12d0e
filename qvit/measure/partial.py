"""What a measurement has found so far, in a file beside its result, so that an interrupted call goes on where it was.

    FILE.partial      safetensors: the sums or tables that it keeps, and in its metadata a digest and a count

The digest is of everything that the numbers depend on, such as metric, seed, widths, grids, parameters, scales and
images. A file of another call, or one that cannot be read, is left out of account and overwritten. Numbers are kept in
full precision, so a measurement that was interrupted ends with the same bits as one that was not.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from qvit.files import write_atomically
from qvit.measure.probe import Probe

_SAVE_EVERY = 10.0  # seconds


class Partial:
    """The file of one measurement.

    Args:
        path: Where; None keeps nothing.
        tensors: What the numbers depend on; not read where nothing is kept.
        key: What else they depend on, as plain data.
    """

    def __init__(self, path: Path | None, tensors: Iterable[Tensor] = (), *key: object) -> None:
        self.path, self._saved = path, time.monotonic()
        self._digest = "" if path is None else _digest(tensors, key)

    @classmethod
    def of_probe(
        cls, path: Path | None, probe: Probe, widths: Sequence[int], images: Sequence[Tensor], key: tuple[object, ...]
    ) -> Partial:
        """The file of a measurement of `probe` at `widths` with `images`; `key` is metric and seed."""
        state = (value for name, value in probe.model.state_dict().items() if "bit_width" not in name)
        specs = [str(quantizer.spec) for quantizer in probe.quantizers.values()]
        return cls(path, (*state, *images), key, tuple(widths), specs)

    def load(self) -> tuple[int, dict[str, Tensor]]:
        """How much was done, and the tensors; `(0, {})` if there is nothing of this call."""
        if self.path is None or not self.path.is_file():
            return 0, {}
        try:
            with safe_open(str(self.path), "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("digest") != self._digest:
                    return 0, {}
                return int(metadata["done"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError, KeyError):
            return 0, {}

    def save(self, done: int, tensors: Callable[[], dict[str, Tensor]]) -> None:
        """Writes the file, unless it was written a moment ago."""
        if self.path is None or time.monotonic() - self._saved < _SAVE_EVERY:
            return
        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors().items()}
        content = save(kept, {"digest": self._digest, "done": str(done)})
        write_atomically(self.path, lambda file: file.write(content))
        self._saved = time.monotonic()


#: For what keeps no file.
NOTHING_KEPT = Partial(None)


def _digest(tensors: Iterable[Tensor], key: tuple[object, ...]) -> str:
    digest = hashlib.sha256(repr(key).encode())
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
