"""`results.json` of the demo: its runs, and its packed files."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from qvit.documents.base import Count, Document, Name, Percent, Positive, Text


class PackedRow(Document):
    """A packed file of a demo."""

    file: Name
    method: Name
    budget: Name | None
    seed: Count
    file_bytes: Count
    float_bytes: Count
    weight_bytes: Count
    arithmetic: Text
    top1: Percent
    top1_simulated: Percent
    agreement: Percent
    images: Count


class DemoResults(Document):
    """What a demo needs of the `results.json` of the call before."""

    packed: Annotated[list[PackedRow], Field(max_length=1000)] = []
    seconds: Positive | None = None
