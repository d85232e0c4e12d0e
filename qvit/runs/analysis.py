"""How robust the parts of a model are against quantization: the analyses of the Q-ViT paper, for any model.

    widths    accuracy against one width for the whole model                                     (Figure 1)
    parts     GELU outputs alone, fully-connected layers alone, attention alone, the rest float  (Figure 2a)
    heads     one attention head at few bits, everything else at many                            (Figure 2b)

By default nothing is trained: the model is calibrated once, with a scale for each width of each site, and a point is
the same model with other widths (`Probe`). The paper fine-tunes for Figures 1 and 2a: with `epochs` each point is a run
of its own, `lsq+` at the widths of the point, in DIR/trained (`TrainedProbe`). A part is told from the site:

    msa     everything below `attn`
    gelu    inputs below `mlp` with an unsigned default: what GELU, or another activation function whose negative side
            is bounded, put out
    fc      the other operands of the layers below `mlp`

Head h of a layer is q, k, v, probs and output of that head, its rows of W_q, W_k, W_v and its columns of W_o. First and
last layer have 8 bits in `widths` and `heads`, as in the paper's tables.

`analyze` measures point by point into one file, DIR/analysis.json, written whole after each point: a call that was
stopped, or that asks for more, goes on where the file ends.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qvit.documents.analysis import Analysis
from qvit.documents.base import read_document
from qvit.errors import QvitError, UsageError, nearest
from qvit.files import write_json
from qvit.locks import writing
from qvit.measure.probe import Probe, divergence_terms
from qvit.models.families import inspect_model
from qvit.plan.cost import CostModel
from qvit.plan.quant_plan import QuantPlan
from qvit.plan.spec import Site, TensorSpec
from qvit.runs.directory import CONFIG
from qvit.runs.finished import load_run
from qvit.runs.run import resume, train
from qvit.runs.subject import (
    Progress,
    Request,
    Subject,
    logits,
    open_subject,
    paired_standard_error,
    percent_equal,
    standard_error,
)
from qvit.training.config import TrainConfig

WIDTHS = tuple(range(2, 9))
KINDS = ("widths", "parts", "heads")
PARTS = ("gelu", "fc", "msa")
ANALYSIS, TRAINED = "analysis.json", "trained"
FORMAT, VERSION = "qvit-analysis", 1
_log = logging.getLogger(__name__)
Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Point:
    """One measurement of an analysis.

    Attributes:
        what: `widths`, `parts` or `heads`.
        bit_width: The width of what is looked at.
        part: Which part, of `parts`.
        layer: Path of the attention module, of `heads`; None for the model that no head was lowered in.
        head: Which of its heads.
        others: Width of everything else, of `heads`.
    """

    what: str
    bit_width: int
    part: str | None = None
    layer: str | None = None
    head: int | None = None
    others: int | None = None

    def widths(self, cost: CostModel) -> dict[str, tuple[int, ...]]:
        """Widths by site, one per head where the site has heads; sites that stay in float are left out."""
        chosen: dict[str, tuple[int, ...]] = {}
        for name, site in cost.sites.items():
            heads = site.layout.num_heads
            if self.what == "parts":
                if part_of(site) == self.part:
                    chosen[name] = (self.bit_width,) * heads
                continue
            if site.position != "block":
                chosen[name] = (8,) * heads
                continue
            own = [self.bit_width if self.what == "widths" else self.others or 8] * heads
            if self.head is not None and site.layout.heads and name.startswith(f"{self.layer}."):
                own[self.head] = self.bit_width
            chosen[name] = tuple(own)
        return chosen


def part_of(site: Site) -> str | None:
    """The part of a block that a site belongs to, one of `PARTS`; None for sites outside of the blocks."""
    modules = site.name.split(".")
    if site.position != "block":
        return None
    if "attn" in modules:
        return "msa"
    if "mlp" in modules:
        return "fc" if site.default.signed else "gelu"
    return None


def attention_layers(cost: CostModel) -> dict[str, int]:
    """Path of every attention module with heads of their own, in order, and its number of heads."""
    return {
        name.removesuffix(".probs"): site.layout.num_heads
        for name, site in cost.sites.items()
        if name.endswith(".probs") and site.layout.heads
    }


class AnalysisProbe(Probe):
    """A probe whose answers are judged: against the truth, and against those of the float model."""

    _float: tuple[Tensor, Tensor] | None = None  # logarithms of probabilities, and the truth

    def float_answers(self, images: Batches, progress: Callable[[int], None] | None = None) -> tuple[Tensor, Tensor]:
        """What the float model says about the images, and the truth; computed once."""
        reference, truth = self._reference(images, progress)
        return reference.argmax(-1), truth

    def measure(self, point: Point, images: Batches, progress: Callable[[int], None] | None = None) -> dict[str, Any]:
        """The point as plain data: top-1, what it lost against float, agreement and divergence from float, and BOPs.

        All but the divergence KL(float || quantized), the mean over images in nats, and BOPs in percent. The standard
        error of the loss is that of a difference on the same images. A point that leaves tensors in float has no
        meaningful BOPs: there it is None.
        """
        start = time.perf_counter()
        reference, truth = self._reference(images)
        of_float, widths = reference.argmax(-1), point.widths(self.cost)
        answers = logits(self.quantized(point, widths), images, progress)
        given = torch.cat([own for own, _ in answers]).float().log_softmax(-1)
        predicted = given.argmax(-1)
        divergence = divergence_terms(reference, given).sum(-1)
        top1 = percent_equal(predicted, truth)
        whole = len(widths) == len(self.cost.sites)
        return asdict(point) | {
            "top1": top1,
            "standard_error": standard_error(top1, len(truth)),
            "drop": percent_equal(of_float, truth) - top1,
            "drop_standard_error": paired_standard_error(of_float == truth, predicted == truth),
            "agreement": percent_equal(predicted, of_float),
            "divergence": float(divergence.mean()),
            "divergence_standard_error": float(divergence.std(correction=0)) / math.sqrt(len(truth)),
            "bit_operations": self.cost.bit_operations(widths) if whole else None,
            "images": len(truth),
            "seconds": round(time.perf_counter() - start, 3),
        }

    def quantized(self, point: Point, widths: dict[str, tuple[int, ...]]) -> nn.Module:
        """The model of a point, which has these widths."""
        return self.apply(widths)

    def _reference(self, images: Batches, progress: Callable[[int], None] | None = None) -> tuple[Tensor, Tensor]:
        if self._float is None:
            own, truth = zip(*logits(self.float_model.eval(), images, progress), strict=True)
            self._float = torch.cat(own).float().log_softmax(-1), torch.cat(truth)
        return self._float


class TrainedProbe(AnalysisProbe):
    """A probe whose points are trained, each as a run that ends before it is judged.

    Args:
        subject: Model and images.
        folder: Where the runs are. Those that are there are finished, or resumed.
        training: Fields of `TrainConfig`, `epochs` among them.
    """

    def __init__(self, subject: Subject, folder: Path, training: Mapping[str, Any]) -> None:
        super().__init__(subject.model, subject.calibration(images=1))
        self.folder, self.device = folder, subject.device
        same = set(TrainConfig.model_fields) & set(Request.model_fields) - {"batch_size", "calibration_images"}
        own = {name: getattr(subject.request, name) for name in same}
        self.config = TrainConfig.create(**own, method="lsq+", plan="w8a8", **training)

    def quantized(self, point: Point, widths: dict[str, tuple[int, ...]]) -> nn.Module:
        run = self.folder / _name(point).replace(" ", "-")
        if (run / CONFIG).is_file():
            resume(run, quiet=True, notify=_log.info)
        else:
            plan = run.with_suffix(".json")
            QuantPlan(plan.stem, (), self._specs(widths)).save(plan)
            train(self.config.model_copy(update={"plan": str(plan)}), run, quiet=True, notify=_log.info)
        return load_run(run, self.device).eval()

    def _specs(self, widths: dict[str, tuple[int, ...]]) -> dict[str, TensorSpec | None]:
        """The sites' defaults at these widths; those that are not named stay in float."""
        specs: dict[str, TensorSpec | None] = dict.fromkeys(self.sites)
        for name, own in widths.items():
            bits = list(own) if len(set(own)) > 1 else own[0]
            specs[name] = self.sites[name].default.changed({"bit_width": bits})
        return specs


def _name(point: Point) -> str:
    place = [point.what, point.part, point.layer, None if point.head is None else str(point.head)]
    return f"{' '.join(value for value in place if value is not None)} {point.bit_width} bit"


def width_points(widths: Sequence[int] = WIDTHS) -> list[Point]:
    """The points of Figure 1."""
    return [Point("widths", width) for width in _checked(widths)]


def part_points(cost: CostModel, parts: Sequence[str] | None = None, widths: Sequence[int] = WIDTHS) -> list[Point]:
    """The points of Figure 2a.

    Raises UsageError for a part that this model does not have.
    """
    present = [part for part in PARTS if any(part_of(site) == part for site in cost.sites.values())]
    for part in parts or ():
        if part not in present:
            raise UsageError(f"unknown part '{part}'{nearest(part, present)} (this model has: {', '.join(present)})")
    return [Point("parts", width, part=part) for part in parts or present for width in _checked(widths)]


def head_points(
    cost: CostModel, layers: Sequence[int] | None = (0,), *, low_bits: int = 2, high_bits: int = 8
) -> list[Point]:
    """The points of Figure 2b: first that of no head lowered, then one per head.

    Args:
        cost: The model's sites.
        layers: Indices of attention layers from 0, in the order of the computation; None for all.
        low_bits: Width of the one head.
        high_bits: Width of everything else.

    Raises:
        UsageError: If there is no such layer, or the widths are not ordered.
    """
    found = list(attention_layers(cost).items())
    _checked((low_bits, high_bits))
    if low_bits >= high_bits:
        raise UsageError(f"the head's width ({low_bits}) must be below that of the rest ({high_bits})")
    for layer in layers or ():
        if not 0 <= layer < len(found):
            raise UsageError(f"layer {layer} does not exist: this model has attention layers 0 to {len(found) - 1}")
    points = [Point("heads", high_bits, others=high_bits)]
    for layer in range(len(found)) if layers is None else layers:
        path, heads = found[layer]
        points += [Point("heads", low_bits, layer=path, head=head, others=high_bits) for head in range(heads)]
    return points


def analyze_widths(
    model: nn.Module, calibration: Iterable[Tensor], images: Batches, *, widths: Sequence[int] = WIDTHS
) -> list[dict[str, Any]]:
    """Figure 1: accuracy of a float model against the width of all its blocks; rows as from `AnalysisProbe.measure`.

    Args:
        model: A float model of a supported family.
        calibration: Batches of training images (B, channels, height, width).
        images: Batches of other images and class indices; passed over once per point.
        widths: From 2 to 8.
    """
    points, probe = width_points(widths), AnalysisProbe(model, calibration)
    return [probe.measure(point, images) for point in points]


def analyze_parts(
    model: nn.Module,
    calibration: Iterable[Tensor],
    images: Batches,
    *,
    parts: Sequence[str] | None = None,
    widths: Sequence[int] = WIDTHS,
) -> list[dict[str, Any]]:
    """Figure 2a: one part of all blocks quantized, the rest in float. `parts` None means all; see `analyze_widths`."""
    points, probe = part_points(inspect_model(model), parts, widths), AnalysisProbe(model, calibration)
    return [probe.measure(point, images) for point in points]


def analyze_heads(
    model: nn.Module,
    calibration: Iterable[Tensor],
    images: Batches,
    *,
    layers: Sequence[int] | None = (0,),
    low_bits: int = 2,
    high_bits: int = 8,
) -> list[dict[str, Any]]:
    """Figure 2b: one head at `low_bits`, the rest at `high_bits`. `layers` None means all; see `analyze_widths`."""
    points = head_points(inspect_model(model), layers, low_bits=low_bits, high_bits=high_bits)
    probe = AnalysisProbe(model, calibration)
    return [probe.measure(point, images) for point in points]


def analyze(
    request: Request,
    out: str | Path,
    *,
    what: Sequence[str] = KINDS,
    widths: Sequence[int] = WIDTHS,
    parts: Sequence[str] | None = None,
    layers: Sequence[int] | None = (0,),
    low_bits: int = 2,
    high_bits: int = 8,
    training: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measures analyses into `out`/analysis.json; points that are there already are not measured again.

    Args:
        request: Model and images.
        out: The directory.
        what: Some of `widths`, `parts`, `heads`.
        widths, parts, layers, low_bits, high_bits: See the functions of the points.
        training: Fields of `TrainConfig` by which every point is trained before it is judged, such as `epochs`; None
            trains nothing.
        overwrite: Begins anew whatever is there.
        progress: Gets a text, the images done and the images in all, after each batch.

    Returns:
        The content of the file: `{"settings", "float", "points", "seconds"}`.

    Raises:
        UsageError: An unknown analysis, part or layer, or a directory with an analysis of something else.
    """
    for kind in what:
        if kind not in KINDS:
            raise UsageError(f"unknown analysis '{kind}'{nearest(kind, KINDS)} ({', '.join(KINDS)}, all)")
    file = Path(out) / ANALYSIS
    with writing(file.parent):
        subject = open_subject(request)
        cost = inspect_model(subject.model)
        asked: list[Point] = []
        asked += width_points(widths) if "widths" in what else []
        asked += part_points(cost, parts, widths) if "parts" in what else []
        asked += head_points(cost, layers, low_bits=low_bits, high_bits=high_bits) if "heads" in what else []
        settings = subject.settings() | {"training": None if training is None else dict(training)}
        record = _begun(file, settings, cost) if not overwrite else _fresh(settings, cost)
        if overwrite:
            shutil.rmtree(file.parent / TRAINED, ignore_errors=True)
        known = {_key(row) for row in record["points"]}
        if missing := [point for point in asked if _key(asdict(point)) not in known]:
            _add(missing, record, file, subject, progress or (lambda *_: None), training)
    return record


def _add(
    missing: list[Point],
    record: dict[str, Any],
    file: Path,
    subject: Subject,
    notify: Progress,
    training: Mapping[str, Any] | None,
) -> None:
    """Measures points into a record, which is written after each."""
    step = len(subject.judged)
    total = step * (len(missing) + 1)
    start = time.perf_counter()
    notify("calibrating", 0, total)
    probe = (
        AnalysisProbe(subject.model, subject.calibration())
        if training is None
        else TrainedProbe(subject, file.parent / TRAINED, training)
    )
    loader = subject.loader()
    of_float, truth = probe.float_answers(loader, lambda n: notify("float", n, total))
    top1 = percent_equal(of_float, truth)
    record["float"] = {"top1": top1, "standard_error": standard_error(top1, len(truth)), "images": len(truth)}
    for number, point in enumerate(missing, 1):
        text = _name(point)
        notify(text, number * step, total)
        row = probe.measure(point, loader, lambda n, text=text, at=number * step: notify(text, at + n, total))
        record["points"].append(row)
        record["seconds"] = round(record["seconds"] + time.perf_counter() - start, 2)
        start = time.perf_counter()
        write_json(file, record)


def _fresh(settings: dict[str, Any], cost: CostModel) -> dict[str, Any]:
    layers = [{"layer": path, "heads": heads} for path, heads in attention_layers(cost).items()]
    head: dict[str, Any] = {"format": FORMAT, "version": VERSION, "settings": settings, "layers": layers}
    return head | {"float": None, "points": [], "seconds": 0.0}


def _begun(file: Path, settings: dict[str, Any], cost: CostModel) -> dict[str, Any]:
    """The analysis that the file holds, if it is one of the same model and images; else a fresh one."""
    if not file.is_file():
        return _fresh(settings, cost)
    try:
        record = read_document(Analysis, file, "analysis")
    except QvitError as error:
        raise QvitError(f"{error}; --overwrite begins anew") from None
    same = record["format"] == FORMAT and record["version"] == VERSION
    before: dict[str, Any] = record["settings"]
    differing = [key for key in settings if before.get(key) != settings[key]]
    if not same or differing:
        key = differing[0] if differing else "version"
        raise UsageError(
            f"{file} is an analysis with {key} {before.get(key)!r}, not {settings.get(key)!r}: "
            "choose another --out, or --overwrite"
        )
    return record


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in Point.__dataclass_fields__)


def _checked(widths: Sequence[int]) -> Sequence[int]:
    for width in widths:
        if width not in WIDTHS:
            raise UsageError(f"width {width} is outside of {WIDTHS[0]} to {WIDTHS[-1]}")
    return widths
