"""From the bytes of an image file to pixels, or to the reason why there are none.

Whatever a decoder does with damaged data (raise one of a dozen exceptions, warn and go on, refuse a size) ends in a
single exception, `UnreadableImage`. `BadImages` remembers what was unreadable, so that it is logged once and can be
listed at the end of a run. What happens next is a policy of the loader: with `on_bad_image="fatal"` the image is named
in an error; with "skip" training takes the next readable image in its place, and evaluation and calibration go without.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable
from typing import Literal

from PIL import Image

from qvit.errors import QvitError

logger = logging.getLogger(__name__)

BadImagePolicy = Literal["fatal", "skip"]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Read whatever a file's name says. Other formats of Pillow start programs, or are hardly tried on damaged files."""

IN_A_ROW = 100
"""So many unreadable images one after another are no damaged files: a disk has gone, or a folder holds no images."""


def mode_of(channels: int) -> str:
    """PIL's name for images of so many channels."""
    return "L" if channels == 1 else "RGB"


def one_line(error: BaseException) -> str:
    """What an exception says, for the middle of a sentence."""
    return " ".join(str(error).split()) or type(error).__name__


class UnreadableImage(QvitError):
    """An image that cannot be read or decoded.

    Attributes:
        image: Its name inside the folder, archive or data set.
        reason: What is wrong with it, for the middle of a sentence.
    """

    def __init__(self, image: str, origin: str, reason: str) -> None:
        super().__init__(f"cannot read image {image!r} in {origin}: {reason}; remove or repair it")
        self.image = image
        self.reason = reason


def decode(read: Callable[[], bytes], mode: str, name: Callable[[], str], origin: str) -> Image.Image:
    """Decodes an image.

    Args:
        read: Returns the encoded image.
        mode: "RGB" or "L".
        name: Returns its name, for messages.
        origin: What the user named to get it, for messages.

    Raises:
        UnreadableImage: It cannot be read, is damaged, or has more pixels than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    try:
        with warnings.catch_warnings():
            # Remarks about odd metadata help nobody among a million images. One about a size is a small file that
            # would take all memory.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(read()), formats=FORMATS) as opened:
                return opened.convert(mode)
    except MemoryError:
        raise
    except Exception as error:  # on damaged data decoders raise OSError, SyntaxError, struct.error and more
        reason = "not an image, or damaged" if isinstance(error, Image.UnidentifiedImageError) else one_line(error)
        raise UnreadableImage(name(), origin, reason) from error


class BadImages:
    """Names of images that turned out to be unreadable, in the order they were met; each is logged once."""

    def __init__(self) -> None:
        self._reasons: dict[str, str] = {}

    def note(self, image: str, reason: str, origin: str) -> None:
        """Records an image, with a warning if it is new."""
        if image not in self._reasons:
            logger.warning("left out image %r in %s: %s", image, origin, reason)
            self._reasons[image] = reason

    def names(self) -> list[str]:
        """The names."""
        return list(self._reasons)
