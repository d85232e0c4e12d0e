"""A packed model in the native engine: NumPy arrays in and out, no PyTorch."""

from __future__ import annotations

import json
import os
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qvit.deploy.native.library import call, failure, kinds, library
from qvit.errors import UsageError
from qvit.files import read_bytes
from qvit.tensors import MAX_FILE

Floats = NDArray[np.float32]


def load(path: str | os.PathLike[str], *, threads: int | None = None, form: str | None = None) -> NativeModel:
    """Loads a packed file.

    Args:
        path: The file.
        threads: How many threads it may use; None: one for each processor that this process may use.
        form: How products are computed (`library.forms`); None for the fastest.

    Raises:
        QvitError: A file that cannot be read, is not what it says, or holds a model that the engine does not run; no
            compiler where the library is not installed.
    """
    try:
        return NativeModel(read_bytes(os.fspath(path), "packed model", limit=MAX_FILE), threads=threads, form=form)
    except UsageError as error:
        raise UsageError(f"cannot load {path}: {error}") from None


class NativeModel:
    """A model that answers, from any number of threads.

    Args:
        content: The bytes of a packed file.
        threads, form: See `load`.

    Attributes:
        shape: (channels, height, width) of its images.
        answer: The shape of an image's answer: (classes,), or of features (channels,); of a model that does not pool
            its tokens (tokens, ...), or (rows, columns, ...) of a Swin.
        form: How its products are computed.

    Raises:
        UsageError: What `load` raises for the content.
    """

    def __init__(self, content: bytes, *, threads: int | None = None, form: str | None = None) -> None:
        self._free = library().qvit_free
        self._model = library().qvit_load_bytes(content, len(content), threads or 0, form and form.encode())
        if not self._model:
            raise UsageError(str(failure()))
        shape, answer = np.empty(4, np.int32), np.empty(3, np.int32)
        library().qvit_shape(self._model, shape)
        sides = library().qvit_answer(self._model, answer)
        self.shape, self.answer = tuple(shape[:3].tolist()), tuple(answer[:sides].tolist())
        self.form = library().qvit_form_of(self._model).decode()

    def __call__(self, images: Floats) -> Floats:
        """Answers (B, *answer) to images (B, channels, height, width). Raises UsageError for another shape."""
        images, answers = self._arrays(images)
        call("qvit_run", self._model, images, len(images), answers)
        return answers

    def profile(self, images: Floats) -> dict[str, float]:
        """Milliseconds by kind of kernel, of one run behind another; the mean over its threads."""
        images, answers = self._arrays(images)
        call("qvit_run", self._model, images, len(images), answers)
        seconds = np.zeros(len(kinds()), np.float64)
        call("qvit_profile", self._model, images, len(images), answers, seconds)
        return {kind: 1e3 * float(value) for kind, value in zip(kinds(), seconds, strict=True) if value}

    @cached_property
    def class_names(self) -> list[str]:
        """The names of its classes, in order, or none."""
        return self._document("class_names")

    @cached_property
    def data_config(self) -> dict[str, Any]:
        """How images are prepared, as timm says it."""
        return self._document("data_config")

    def _document(self, key: str) -> Any:
        return json.loads(library().qvit_text(self._model, key.encode()))

    def _arrays(self, images: Floats) -> tuple[Floats, Floats]:
        if images.ndim != 4 or images.shape[1:] != self.shape or not len(images):
            raise UsageError(f"this model takes images of shape (B, {', '.join(map(str, self.shape))}), B at least 1")
        return np.ascontiguousarray(images, np.float32), np.empty((len(images), *self.answer), np.float32)

    def __del__(self) -> None:
        if model := self.__dict__.pop("_model", None):
            self._free(model)
