"""What `qvit bench --json` writes, and a page of it shows."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from qvit.documents.base import Count, Document, Name, Percent, Positive, Text
from qvit.documents.run import Cosine


class BenchRow(Document):
    """The times of one engine at one batch size.

    Attributes:
        plan: Of rows of ours; files of one plan may leave it out.
        right: Whether a peer answers as the float model does; None where nothing tells.
        cosine_to_float, cosine_to_simulated: Of features; the agreements are None then.
        kernels: Milliseconds by kind of kernel.
    """

    engine: Name
    precision: Name
    plan: Name | None = None
    arithmetic: Text
    ours: bool
    batch: Annotated[int, Field(ge=1, le=1_000_000)]
    milliseconds_median: Positive
    milliseconds_quartiles: Annotated[list[Positive], Field(min_length=2, max_length=2)]
    images_per_second: Positive
    ratio_to_openvino_int8: Positive | None
    ratio_to_pytorch_fp32: Positive | None
    ratio_to_right_peer: Positive | None = None
    right: bool | None = None
    kernels: Annotated[dict[Name, Positive], Field(max_length=1000)] | None = None
    top1_agreement: Percent | None
    cosine_to_float: Cosine | None = None
    cosine_to_simulated: Cosine | None = None
    error_to_float: Positive
    error_to_simulated: Positive | None
    agreement_with_simulated: Percent | None
    file_bytes: Count | None
    calls: Count


class SkippedEngine(Document):
    """An engine that a benchmark left out."""

    engine: Name
    precision: Name
    plan: Name | None = None
    reason: Text


class Bench(Document):
    """The JSON file beside a benchmark's page; its rows' `right` and `right_percent` are newer than version 1."""

    model: Name
    plan: Text
    threads: Count
    rows: Annotated[list[BenchRow], Field(max_length=2000)]
    skipped: Annotated[list[SkippedEngine], Field(max_length=2000)] | None = None
    images: Text
    speed_only: bool
    right_percent: Percent | None = None
    right_cosine: Cosine | None = None
    calibration_images: Count
    compared_images: Count
    float_weights: Text
    hardware: Text
    instructions: Annotated[list[Name], Field(max_length=1000)] | None = None
    versions: dict[Name, Name | None]
    date: Name
    command: Text

    @model_validator(mode="after")
    def _says_what_is_right(self) -> Bench:
        if self.right_percent is self.right_cosine is None and any(row.right is not None for row in self.rows):
            raise ValueError("has rows that are right or wrong, but no 'right_percent' or 'right_cosine'")
        if any(row.top1_agreement is row.cosine_to_float is None for row in self.rows):
            raise ValueError("has rows without 'top1_agreement' or 'cosine_to_float'")
        return self
