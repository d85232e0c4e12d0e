"""What the JSON documents hold that people hand on: of a run, an analysis, a benchmark, and how they are checked.

    RunRecord    config.json of a run, beside its options     Analysis     analysis.json
    Result       result.json                                  Bench        a benchmark's page, as JSON
    Costs        cost.json                                    Patches      patches.json
    EVENTS       lines of log.jsonl, by event                 DemoResults  results.json of a demo

A document is a model of pydantic: every key that something reads has a type and a range, numbers are finite, texts and
lists have an end. Keys that nothing reads may be there, so that documents of other versions can be read. `checked`
turns what pydantic finds into one sentence that names file and key:

    the result runs/a/result.json: key 'accuracy' must be a number, not 'high'

Plans, sensitivities and packed files have readers of their own, in `plan/quant_plan.py`, `measure/table.py` and
`deploy/`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from qvit.errors import QvitError, nearest, shown
from qvit.files import read_object
from qvit.plan.spec import MOST_BLOCKS, MOST_HEADS, MOST_SITES

T = TypeVar("T", bound=BaseModel)
MOST_CLASSES = 1 << 16  # labels are 16-bit numbers, also in stores of soft labels
_MOST_PATCHES, _MOST_CHANGES, _MOST_CELLS, _SHOWN_MISTAKES = 2_000_000, 1_000_000, 1_000_000, 5

Count = Annotated[int, Field(ge=0, le=1 << 62)]
Step = Annotated[int, Field(ge=0, le=10**12)]
Number = Annotated[float, Field(ge=-1e30, le=1e30)]
Positive = Annotated[float, Field(ge=0, le=1e30)]
Percent = Annotated[float, Field(ge=0, le=100)]
Width = Annotated[int, Field(ge=1, le=32)]
Name = Annotated[str, Field(max_length=500)]
Text = Annotated[str, Field(max_length=10_000)]
Classes = Annotated[int, Field(ge=1, le=MOST_CLASSES)]
ClassNames = Annotated[list[Name], Field(max_length=MOST_CLASSES)]


class Document(BaseModel):
    """Base class: nothing is converted, numbers are finite, further keys are let be."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())

    @classmethod
    def upgraded(cls, data: dict[str, Any]) -> dict[str, Any]:
        """The content in its present form, where an earlier version wrote it otherwise."""
        return data


def read_document(cls: type[Document], path: str | Path, what: str, **options: Any) -> dict[str, Any]:
    """The checked content of a JSON file, in its present form; see `files.read_object` and `checked`."""
    data = cls.upgraded(read_object(path, what, **options))
    checked(cls, data, f"the {what} {path}")
    return data


def checked(cls: type[T], data: Mapping[str, Any], where: str) -> T:
    """Plain data as a `cls`. Raises QvitError that begins with `where`: `the result runs/a/result.json`."""
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        raise QvitError(f"{where}: {_in_short(error, cls, _of_document)}") from None


def mistakes(error: ValidationError, cls: type[BaseModel]) -> str:
    """What pydantic found in options, as one line; unknown ones with the nearest name."""
    return _in_short(error, cls, _of_options)


def _in_short(error: ValidationError, cls: type[BaseModel], say: Callable[[str, ErrorDetails, str], str]) -> str:
    found = error.errors(include_url=False)
    lines = []
    for item in found[:_SHOWN_MISTAKES]:
        key = ".".join(str(part) for part in item["loc"] if part != "[key]")[:200]
        key = key.encode("utf-8", "replace").decode()  # half a character is no text, in a message neither
        close = nearest(key, cls.model_fields, 1) or f" (known: {', '.join(cls.model_fields)})"
        lines.append(say(key, item, close))
    more = len(found) - len(lines)
    return "; ".join(lines) + (f"; and {more} more" if more else "")


def _of_options(key: str, item: ErrorDetails, close: str) -> str:
    if item["type"] == "extra_forbidden":
        return f"unknown option '{key}'{close}"
    if item["type"] == "value_error":
        return f"{key}: {item.get('ctx', {})['error']}"
    return f"{key} = {shown(item['input'])}: {item['msg'][0].lower()}{item['msg'][1:]}"


_KINDS = {
    "int": "a whole number", "float": "a number", "string": "a text", "bool": "true or false",
    "list": "a list", "dict": "an object", "model": "an object", "tuple": "a list", "model_attributes": "an object",
}  # fmt: skip
_LIMITS = {
    "greater_than_equal": "at least {ge}", "less_than_equal": "at most {le}", "greater_than": "more than {gt}",
    "less_than": "less than {lt}", "string_too_long": "a text of at most {max_length} characters",
    "too_long": "of at most {max_length} entries", "too_short": "of at least {min_length} entries",
    "literal_error": "{expected}", "finite_number": "a finite number", "int_from_float": "a whole number",
    "string_pattern_mismatch": "of the form {pattern}", "string_unicode": "Unicode",
}  # fmt: skip


def _of_document(key: str, item: ErrorDetails, close: str) -> str:
    kind, about = item["type"], item.get("ctx", {})
    if kind == "missing":
        return f"key '{key}' is missing"
    if kind == "value_error":
        return f"key '{key}' {about['error']}" if key else f"it {about['error']}"
    if kind == "extra_forbidden":
        return f"key '{key}' is unknown{close}"
    must = _LIMITS[kind].format(**about) if kind in _LIMITS else _KINDS.get(kind.removesuffix("_type"), item["msg"])
    return f"key '{key}' must be {must}, not {shown(item['input'])}"


def _several(value: Any) -> Any:
    return value if value is None or isinstance(value, list) else [value]


def _mapping(value: Any) -> Any:
    return {} if value is None else value


def _entries(value: Any) -> Any:
    return [] if value is None else value


#: One number, or one per head.
Widths = Annotated[list[Width], BeforeValidator(_several), Field(min_length=1, max_length=MOST_HEADS)]
RealWidths = Annotated[
    list[Annotated[float, Field(ge=0, le=32)]], BeforeValidator(_several), Field(min_length=1, max_length=MOST_HEADS)
]


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
    command: Annotated[list[Text] | None, BeforeValidator(_several)] = None


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


class Judged(Document):
    """The float model of an analysis."""

    top1: Percent
    standard_error: Positive
    images: Count


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
    bit_widths: Annotated[dict[Name, RealWidths], BeforeValidator(_mapping), Field(max_length=MOST_SITES)] = {}


class WeightEvent(Document):
    """The weights of a site at the end of an epoch."""

    oscillating: Number | None = None
    variation: Number | None = None
    outliers: Number | None = None


class DiagnosticsEvent(Document):
    """The weights of all sites at the end of an epoch."""

    step: Step
    sites: Annotated[dict[Name, WeightEvent], BeforeValidator(_mapping), Field(max_length=MOST_SITES)] = {}


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
    changes: Annotated[list[ChangeEvent], BeforeValidator(_entries), Field(max_length=_MOST_CHANGES)] = []


class OtherEvent(Document):
    """Any other event: the end of a run, a failure and its reason."""

    step: Step = 0
    reason: Text | None = None


EVENTS: dict[str, type[Document]] = {
    "start": StartEvent, "resume": StartEvent, "step": StepEvent, "epoch": EpochEvent, "diagnostics": DiagnosticsEvent,
    "freeze": FreezeEvent,
}  # fmt: skip


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


class PatchLayer(Document):
    """Which patches of an image have the higher width in one block: `0` and `1`, row by row."""

    layer: Name
    high: Width
    low: Width
    columns: Annotated[int, Field(ge=1, le=1000)]
    rows: Annotated[int, Field(ge=1, le=1000)]
    important: Annotated[str, Field(max_length=1 << 16, pattern="^[01]*$")]

    @model_validator(mode="after")
    def _fills_the_image(self) -> PatchLayer:
        if self.rows * self.columns != len(self.important):
            raise ValueError(f"has {len(self.important)} patches, which do not fill {self.rows} × {self.columns}")
        return self


class PatchImage(Document):
    """An image and its patches."""

    png: Annotated[str, Field(max_length=1 << 22, pattern="^[A-Za-z0-9+/=]*$")]
    width: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    height: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    layers: Annotated[list[PatchLayer], Field(max_length=1000)]


class Patches(Document):
    """`patches.json`."""

    model: Name
    plan: Name
    images: Annotated[list[PatchImage], Field(max_length=1000)]

    @model_validator(mode="after")
    def _can_be_drawn(self) -> Patches:
        if sum(len(layer.important) for image in self.images for layer in image.layers) > _MOST_PATCHES:
            raise ValueError(f"has more than {_MOST_PATCHES:,} patches in all, too many to be drawn")
        return self


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
