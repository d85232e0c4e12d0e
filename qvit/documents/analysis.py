"""`analysis.json`: what stays right with parts of a model quantized."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from qvit.documents.base import Count, Document, Name, Percent, Positive, Text, Width
from qvit.plan.spec import MOST_BLOCKS, MOST_HEADS

_MOST_CELLS = 1_000_000


class Judged(Document):
    """The float model of an analysis."""

    top1: Percent
    standard_error: Positive
    images: Count


class AnalysisTraining(Document):
    """How the points of an analysis were trained."""

    epochs: Annotated[int, Field(ge=1, le=10**6)]


class AnalysisSettings(Document):
    """What an analysis depends on."""

    model: Name
    data: Text
    eval_data: Text | None
    images: Count
    calibration_images: Count
    seed: Count
    training: AnalysisTraining | None = None


class AnalysisPoint(Document):
    """One measurement of an analysis."""

    what: Literal["widths", "parts", "heads"]
    bit_width: Width
    part: Name | None
    layer: Name | None
    head: Annotated[int, Field(ge=0, lt=MOST_HEADS)] | None
    others: Width | None
    top1: Percent
    standard_error: Positive
    drop: Annotated[float, Field(ge=-100, le=100)]
    drop_standard_error: Positive
    agreement: Percent
    bit_operations: Count | None

    @model_validator(mode="after")
    def _has_a_place(self) -> AnalysisPoint:
        if self.what == "parts" and self.part is None or self.head is not None and self.layer is None:
            raise ValueError("has no part, or a head without its layer")
        return self


class AnalysisLayer(Document):
    """A layer with attention heads."""

    layer: Name
    heads: Annotated[int, Field(ge=1, le=MOST_HEADS)]


class Analysis(Document):
    """`analysis.json`."""

    format: Name
    version: Count
    settings: AnalysisSettings
    layers: Annotated[list[AnalysisLayer], Field(max_length=MOST_BLOCKS)] = []
    float_: Annotated[Judged | None, Field(alias="float")]
    points: Annotated[list[AnalysisPoint], Field(max_length=20_000)]
    seconds: Positive

    @model_validator(mode="after")
    def _can_be_drawn(self) -> Analysis:
        if self.points and self.float_ is None:
            raise ValueError("has points, but no float model beside them")
        if len({point.layer for point in self.points}) > MOST_BLOCKS:
            raise ValueError(f"has points of more than {MOST_BLOCKS} layers")
        setups = {(point.bit_width, point.others) for point in self.points if point.head is not None}
        if len(setups) * MOST_BLOCKS * max((point.head or 0 for point in self.points), default=0) > _MOST_CELLS:
            raise ValueError("has too many heads at too many widths to be drawn")
        return self
