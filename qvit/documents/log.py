"""The lines of a run's `log.jsonl`, by event."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from qvit.documents.base import (
    Document,
    Name,
    Number,
    Percent,
    Positive,
    RealWidths,
    Step,
    Text,
    Width,
    as_object,
    entries,
)
from qvit.plan.spec import MOST_HEADS, MOST_SITES

_MOST_CHANGES = 1_000_000


class StartEvent(Document):
    """A line of `log.jsonl`: a run starts or goes on."""

    step: Step = 0
    time: Positive | None = None
    epochs: Step | None = None
    steps_per_epoch: Step | None = None
    budget_bit_operations: Positive | None = None
    uniform_bit_operations: Annotated[dict[Name, Positive | None], Field(max_length=32)] | None = None


class StepEvent(Document):
    """A training step; None for a number that was not finite."""

    step: Step
    loss: Number | None = None
    task_loss: Number | None = None
    penalty: Number | None = None
    bit_operations: Positive | None = None
    lr: Number | None = None


class EpochEvent(Document):
    """The end of an epoch, with the widths that are being learned."""

    step: Step
    epoch: Step = 0
    train_loss: Number | None = None
    accuracy: Percent | None = None
    bit_operations: Positive | None = None
    bit_widths: Annotated[dict[Name, RealWidths], BeforeValidator(as_object), Field(max_length=MOST_SITES)] = {}


class WeightEvent(Document):
    """The weights of a site at the end of an epoch."""

    oscillating: Number | None = None
    variation: Number | None = None
    outliers: Number | None = None


class DiagnosticsEvent(Document):
    """The weights of all sites at the end of an epoch."""

    step: Step
    sites: Annotated[dict[Name, WeightEvent], BeforeValidator(as_object), Field(max_length=MOST_SITES)] = {}


class ChangeEvent(Document):
    """A width at the freeze."""

    site: Name
    head: Annotated[int, Field(ge=0, lt=MOST_HEADS)] | None = None
    learned: Annotated[float, Field(ge=0, le=32)]
    rounded: Width
    final: Width


class FreezeEvent(Document):
    """The end of the searching stage."""

    step: Step
    budget_bit_operations: Positive | None = None
    bit_operations_learned: Positive | None = None
    bit_operations_rounded: Positive | None = None
    bit_operations: Positive | None = None
    changes: Annotated[list[ChangeEvent], BeforeValidator(entries), Field(max_length=_MOST_CHANGES)] = []


class OtherEvent(Document):
    """Any other event: the end of a run, a failure and its reason."""

    step: Step = 0
    reason: Text | None = None


EVENTS: dict[str, type[Document]] = {
    "start": StartEvent, "resume": StartEvent, "step": StepEvent, "epoch": EpochEvent, "diagnostics": DiagnosticsEvent,
    "freeze": FreezeEvent,
}  # fmt: skip
