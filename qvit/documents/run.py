"""What is written of a run: its config, its costs, its plan as pages read it, and its result."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from qvit.documents.base import (
    MOST_CLASSES,
    ClassNames,
    Count,
    Document,
    Name,
    Number,
    Percent,
    Positive,
    Step,
    Text,
    Widths,
    as_list,
)
from qvit.plan.spec import MOST_SITES


class RunHead(Document):
    """What every reader of a run's `config.json` needs; results say some of it again."""

    model: Name
    method: Name
    model_kwargs: dict[Name, Any] | None = None
    method_options: dict[Name, Any] | None = None
    data: Text | None = None
    budget: Name | None = None
    seed: Count | None = None
    versions: dict[Name, Name] | None = None
    hardware: Text | None = None
    command: Annotated[list[Text] | None, BeforeValidator(as_list)] = None


class RunRecord(RunHead):
    """`config.json` beside the options of the run."""

    num_classes: Annotated[int, Field(ge=0, le=MOST_CLASSES)]  # 0: the model answers with features
    class_names: ClassNames = []
    data_note: Text | None = None
    labels_digest: Name | None = None
    processes: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    started: Name | None = None


RESULT_VERSION = 2


Cosine = Annotated[float, Field(ge=-1, le=1)]


class TokenFeatures(Document):
    """Features of one token beside the float model's."""

    index: Count
    name: Name
    cosine: Cosine
    relative_error: Positive


class FeatureResult(Document):
    """Features beside those of the float model, see `measure/features.py`; shares in percent."""

    cosine: Cosine
    cosine_least: Cosine
    relative_error: Positive
    tokens: Count
    worst_token: TokenFeatures | None = None
    neighbours: Percent | None = None
    neighbour_images: Count
    knn: Percent | None = None
    knn_reference: Percent | None = None


class StepResult(Document):
    """What one of several steps of a run came to, see `runs/steps.py`."""

    name: Name
    accuracy: Percent | None
    agreement: Percent | None = None
    bit_operations: Count
    weight_bytes: Count
    epochs: Step


class _Scores(Document):
    """What results say.

    Attributes:
        version: 2; 0.1.0 wrote none, and `seconds` in another form (`upgraded`).
        accuracy: Of test images with labels, as `top5`; None without.
        agreement: Share of test images with the same first answer as the float model's.
        divergence: Mean of KL(p_float || p) over test images, in nats.
        features: In place of these two, of a model that answers with features.
        seconds: By stage (`calibrate`, `sensitivity`, `allocate`, `reconstruct`, `train`, `evaluate`), and `total`.
    """

    version: Annotated[int, Field(ge=1, le=RESULT_VERSION)] = RESULT_VERSION
    accuracy: Percent | None
    bit_operations: Count
    weight_bytes: Count
    top5: Percent | None = None
    agreement: Percent | None = None
    divergence: Positive | None = None
    features: FeatureResult | None = None
    images: Count | None = None
    seconds: Annotated[dict[Name, Positive], Field(max_length=100)] = {}
    model: Name | None = None
    budget: Name | None = None
    seed: Count | None = None
    epochs: Step | None = None
    steps: Annotated[list[StepResult] | None, Field(max_length=100)] = None

    @classmethod
    def upgraded(cls, data: dict[str, Any]) -> dict[str, Any]:
        """0.1.0 wrote `seconds` in all after training; after post-training by stage, beside `seconds_total`."""
        if "version" in data:
            return data
        data = {"version": 1, **data}
        seconds, total = data.get("seconds"), data.pop("seconds_total", None)
        if not isinstance(seconds, dict):
            seconds, total = {}, seconds if total is None else total
        return data | {"seconds": seconds if total is None else seconds | {"total": total}}


class GateTrial(Document):
    """A plan that an accuracy gate tried: costs, and what it lost on the images that decide, in points."""

    plan: Name
    step: Literal["search", "confirm"]
    bit_operations: Count
    weight_bytes: Count
    drop: Number
    within: bool
    images: Annotated[int, Field(ge=1, le=1 << 62)]
    lost: Count
    gained: Count
    deviation: Positive | None = None  # of the loss between images, in points; of features alone


class GateTrials(Document):
    """`gate.json`: the trials of a search so far."""

    trials: Annotated[list[GateTrial], Field(max_length=1000)]


class Gate(GateTrials):
    """What an accuracy gate found, see `methods/ptq/gate.py`; losses in points."""

    max_drop: Positive
    objective: Name
    measure: Literal["accuracy", "agreement", "features"]
    drop: Number
    images: Count
    confidence: Annotated[float, Field(ge=0, le=1)]
    drop_at_most: Number
    search_drop: Number
    search_images: Count


class FrontierPoint(Document):
    """A plan on a frontier, and how many activations have a width for the class token alone, or split patches."""

    bit_operations: Count
    predicted_loss: Positive
    class_token: Count
    split: Count


class Search(Document):
    """How method `pmq` chose its widths, see `methods/ptq/pareto.py`; seconds by part."""

    metric: Name
    images: Count
    seconds: Annotated[dict[Name, Positive], Field(max_length=100)]
    exact: bool
    chosen: FrontierPoint
    frontier: Annotated[list[FrontierPoint], Field(min_length=1, max_length=1000)]


class IntegerForms(Document):
    """The integer forms of LayerNorm, softmax and GELU, and the SQNR in dB by which they were chosen, if they were."""

    forms: Annotated[dict[Name, Name], Field(max_length=20_000)]
    sqnr: Annotated[dict[Name, dict[Name, Number]], Field(max_length=20_000)] | None = None


class Result(_Scores):
    """`result.json`: the outcome of a finished run. Accuracies are percent, the other numbers plain counts."""

    method: Name | None = None
    float_accuracy: Percent | None = None
    gate: Gate | None = None
    search: Search | None = None
    nonlinear: IntegerForms | None = None


class Outcome(_Scores):
    """A result that commands print."""

    method: Name
    float_accuracy: Percent | None

    @model_validator(mode="after")
    def _is_timed(self) -> Outcome:
        if "total" not in self.seconds:
            raise ValueError("has no 'seconds'")
        return self


class PlannedSite(Document):
    """What a page needs of a site's spec."""

    bit_width: Widths
    learn_bit_width: bool = False


class Plan(Document):
    """What a page needs of a run's `plan.json`; `plan/quant_plan.py` reads all of it."""

    format: Literal["qvit-plan"]
    version: Literal[1]
    name: Name | None = None
    sites: Annotated[dict[Name, PlannedSite | None], Field(max_length=MOST_SITES)] = {}


class SiteCosts(Document):
    """A row of `cost.json`."""

    site: Name
    macs: Count
    bit_operations: Count
    weight_bytes: Count


class Costs(Document):
    """`cost.json`: totals, and what is counted at each site."""

    macs: Count
    bit_operations: Count
    weight_bytes: Count
    sites: Annotated[list[SiteCosts], Field(max_length=MOST_SITES)] = []
