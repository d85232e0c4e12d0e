"""Versions of the packed format: which are read, and how older ones become the present one.

A file says its version as a whole number. A reader takes the present one as it is, an older one through one upgrader
after the other, each from its version to the next, and refuses a newer one. An upgrader gets the metadata and the
tensors and returns those that a file of the next version would have: what comes after it knows the present version
only. A version that was once released is read for ever; tests/deploy/files has a file of each.

    1    the first
    2    has the document `network`
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from qvit.errors import QvitError

VERSION = 2
FORMAT = "qvit"
#: Metadata and tensors.
Parts = tuple[dict[str, str], dict[str, Any]]
#: Version → what makes the next one of it.
UPGRADERS: dict[int, Callable[[dict[str, str], dict[str, Any]], Parts]] = {
    1: lambda texts, tensors: (texts | {"version": "2", "network": "null"}, tensors),
}


def upgraded(texts: dict[str, str], tensors: dict[str, Any]) -> Parts:
    """Metadata and tensors of a file as the present version has them. Raises QvitError for a version without a way."""
    if texts.get("format") != FORMAT:
        raise QvitError("it is no packed model: `qvit pack RUN` writes one")
    given = texts.get("version", "")
    if not re.fullmatch(r"0|[1-9]\d{0,8}", given):
        raise QvitError(f"its version {given!r} is no number")
    version = int(given)
    if version > VERSION:
        raise QvitError(f"it was made by a newer qvit (format {version}; this one reads up to {VERSION}): update qvit")
    for step in range(version, VERSION):
        if step not in UPGRADERS:
            raise QvitError(f"its format {version} is not known")
        texts, tensors = UPGRADERS[step](dict(texts), dict(tensors))
        if texts.get("version") != str(step + 1):
            raise QvitError(f"the upgrade from format {step} did not give format {step + 1}")
    return texts, tensors
