"""An accuracy gate: the cheapest plan whose measured loss stays within a drop, and never one that misses.

    widest        8 bits everywhere; if even they lose more, nothing is returned
    uniform       bisection over one width for all blocks, down to the narrowest sensible one
    mixed         bisection over budgets below that: what a sensitivity names gets the bits that are left
    confirmation  the cheapest plan that passed, made with everything that was asked for, is judged on images that
                  chose nothing; if it misses there, the next wider one is

Images that decide are training images beyond those that calibrate, in two halves: one searches, the other confirms.
The test images of the result stay out of it. The loss is, in points,

    with labels      top-1 of the float model minus that of the quantized one, on the same images
    without labels   the share of images whose first answer changed
    features         100 · (1 - cosine) beside the float model's, mean over images and tokens: labels play no part

A search that tries a dozen plans on the same images favours those that were lucky on them; the confirmation was not
chosen by, so its number is the one to quote. How much n images can say is said beside it: the confidence that the loss
on any number of such images is within the drop, from the binomial distribution without labels (Clopper and Pearson,
1934), with labels from the difference of paired proportions, half an image added to each cell (Agresti and Min, 2005),
of features from the normal distribution of a mean.

A trial costs a whole quantization without reconstruction, so that what passes is what will be returned. Trials are kept
in the run's directory; an interrupted run that is resumed does not repeat them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch
from scipy.special import betainc, betaincinv
from torch import Tensor, nn

from qvit.allocate import allocate_plan
from qvit.allocate.choices import choices
from qvit.allocate.units import BIT_OPERATIONS, WEIGHT_BYTES, Unit
from qvit.documents.base import read_document
from qvit.documents.run import GateTrials
from qvit.errors import QvitError
from qvit.files import write_json
from qvit.measure import Sensitivity
from qvit.measure.features import cosine_distances
from qvit.plan.cost import CostModel
from qvit.plan.quant_plan import QuantPlan

#: The trials of a run, in its directory.
GATE = "gate.json"
#: A search ends when the cheapest plan that passes costs at most so much more than the budget that missed.
RESOLUTION = 1.05
WIDEST, LEVEL = 8, 0.95
#: The unit of an objective; that of `latency` is in a file.
UNITS = {"bops": BIT_OPERATIONS, "bytes": WEIGHT_BYTES}
Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Loss:
    """What quantizing a model changed on some images.

    Attributes:
        images: How many.
        lost: Answers that became wrong, or without labels others.
        gained: Answers that became right; 0 without labels.
        labelled: Whether the images have labels.
    """

    images: int
    lost: int
    gained: int
    labelled: bool

    @property
    def drop(self) -> float:
        """In points."""
        return 100.0 * (self.lost - self.gained) / self.images

    def confidence(self, limit: float) -> float:
        """The confidence, 0 to 1, that the loss on further images of this kind is at most `limit` points."""
        if not self.labelled:
            share = min(1.0, limit / 100)
            return (
                1.0
                if share == 1
                else 0.0
                if self.lost == self.images
                else float(betainc(self.lost + 1, self.images - self.lost, share))
            )
        mean, error = self._adjusted()
        return NormalDist().cdf((limit / 100 - mean) / error)

    def at_most(self, level: float = LEVEL) -> float:
        """The loss in points that is not exceeded on further images of this kind, with the confidence `level`."""
        if not self.labelled:
            return (
                100.0
                if self.lost == self.images
                else 100.0 * float(betaincinv(self.lost + 1, self.images - self.lost, level))
            )
        mean, error = self._adjusted()
        return 100.0 * (mean + NormalDist().inv_cdf(level) * error)

    def _adjusted(self) -> tuple[float, float]:
        """Mean and standard error of the paired difference, with half an image in each of the four cells."""
        images, difference = self.images + 2, self.lost - self.gained
        mean = difference / images
        return mean, math.sqrt(self.lost + self.gained + 1 - difference * mean) / images


@dataclass(frozen=True)
class FeatureLoss:
    """What quantizing a model did to its features on some images.

    Attributes:
        images: How many.
        drop: The mean of 100 · (1 - cosine), in points.
        deviation: Its standard deviation between images.
    """

    images: int
    drop: float
    deviation: float
    lost: int = 0
    gained: int = 0

    def confidence(self, limit: float) -> float:
        """The confidence, 0 to 1, that the loss on further images of this kind is at most `limit` points."""
        return NormalDist().cdf((limit - self.drop) / self._error)

    def at_most(self, level: float = LEVEL) -> float:
        """The loss in points that is not exceeded on further images of this kind, with the confidence `level`."""
        return self.drop + NormalDist().inv_cdf(level) * self._error

    @property
    def _error(self) -> float:
        """The standard error of the mean; of one image there is none, and so next to no confidence."""
        return max(self.deviation / math.sqrt(self.images), 1e-9)


class FeatureJudge:
    """How far the features of quantized models are from those of a float model on some images.

    Those of the float model are computed anew for every loss: with a row per token they would fill the memory.

    Args:
        model: The float model.
        batches: As for `Judge`.
    """

    labelled = False
    measure = "features"
    what = "100 · (1 - cosine) of features beside the float model's"

    def __init__(self, model: nn.Module, batches: Batches) -> None:
        self.model, self.batches = model, batches
        self.images = sum(len(images) for images, _ in batches)

    @torch.no_grad()
    def loss(self, quantized: nn.Module) -> FeatureLoss:
        """Raises QvitError for features that are not finite."""
        found = torch.cat([100 * cosine_distances(self.model(x), quantized(x)).cpu() for x, _ in self.batches])
        if not bool(torch.isfinite(found).all()):
            raise QvitError("the model returned NaN or infinite features for images that decide")
        return FeatureLoss(len(found), float(found.mean()), float(found.std(correction=0)))

    def known(self, trial: dict[str, Any]) -> FeatureLoss:
        """The loss of an earlier trial."""
        return FeatureLoss(trial["images"], trial["drop"], trial["deviation"])

    def in_words(self, drop: float) -> str:
        return f"moves features by {drop:.2f} points (100 · (1 - cosine))"


class Judge:
    """What a float model answers on some images, and what a quantized one loses against it.

    Args:
        model: The float model.
        batches: Images and class indices, negative without labels; the same ones each time they are iterated.
    """

    def __init__(self, model: nn.Module, batches: Batches) -> None:
        self.batches = batches
        self.answers, truth = _answers(model, batches)
        self.labelled = bool((truth >= 0).all())
        self.truth = truth if self.labelled else self.answers
        self.images = len(truth)
        self.measure = "accuracy" if self.labelled else "agreement"
        self.what = "top-1 lost" if self.labelled else "answers that differ from the float model's (no labels)"

    def loss(self, quantized: nn.Module) -> Loss:
        """Raises QvitError for logits that are not finite."""
        answers, _ = _answers(quantized, self.batches)
        before, after = self.answers == self.truth, answers == self.truth
        lost, gained = int((before & ~after).sum()), int((~before & after).sum())
        return Loss(len(self.truth), lost, gained, self.labelled)

    def known(self, trial: dict[str, Any]) -> Loss:
        """The loss of an earlier trial."""
        return Loss(trial["images"], trial["lost"], trial["gained"], self.labelled)

    def in_words(self, drop: float) -> str:
        return f"loses {drop:.2f} points of top-1" if self.labelled else f"changes {drop:.2f} % of the answers"


@torch.no_grad()
def _answers(model: nn.Module, batches: Batches) -> tuple[Tensor, Tensor]:
    answers, truth = [], []
    for images, targets in batches:
        logits = model(images)
        if not bool(torch.isfinite(logits).all()):
            raise QvitError("the model returned NaN or infinite logits for images that decide")
        answers.append(logits.argmax(-1).cpu())
        truth.append(targets.cpu())
    return torch.cat(answers), torch.cat(truth)


@dataclass(frozen=True)
class Gate:
    """What a search needs.

    Attributes:
        cost: The model's costs.
        max_drop: Largest loss, in points.
        objective: What is to be cheap: `bops`, `bytes` or `latency`.
        unit: In which that is counted.
        narrowest: Narrowest width.
        boundary: Width of the first and the last layer in mixed plans; None for free.
        solver: What chooses mixed widths, see `allocate_plan`.
        quantize: Makes a calibrated model of a plan; True for the one that is returned.
        sensitivity: Measures one on the grids of a plan.
        searching, confirming: The two halves of the images that decide.
        run: The run's directory.
        notify: Receives one line for each trial.
    """

    cost: CostModel
    max_drop: float
    objective: str
    unit: Unit
    narrowest: int
    boundary: int | None
    solver: str
    quantize: Callable[[QuantPlan, bool], nn.Module]
    sensitivity: Callable[[QuantPlan], Sensitivity]
    searching: Judge | FeatureJudge
    confirming: Judge | FeatureJudge
    run: Path
    notify: Callable[[str], None]

    def search(self) -> tuple[nn.Module, QuantPlan, dict[str, Any]]:
        """The quantized model, its plan, and the record of the search.

        Raises:
            QvitError: Even 8 bits lose more than the drop; the message has their loss.
        """
        return _Search(self).result()


class _Search:
    """A search that is going on: its trials, by plan."""

    def __init__(self, gate: Gate) -> None:
        self.gate, self.unit = gate, gate.unit
        self.kept: list[dict[str, Any]] = []
        if (gate.run / GATE).is_file():
            self.kept = read_document(GateTrials, gate.run / GATE, "trials")["trials"]
        self.trials: list[dict[str, Any]] = []
        self.passed: list[QuantPlan] = []

    def result(self) -> tuple[nn.Module, QuantPlan, dict[str, Any]]:
        gate = self.gate
        self.say_what_decides()
        widest = self.uniform(WIDEST)
        if not self.passes(widest):
            raise self.missed(widest, self.trials[-1]["drop"])
        width = self.narrowest_uniform()
        self.mixed_below(width)
        candidates = {plan.name: plan for plan in (*self.passed, *map(self.uniform, range(width + 1, WIDEST)))}
        worst = 0.0
        for plan in sorted(candidates.values(), key=self.price):
            model = gate.quantize(plan, True)
            loss, searched = gate.confirming.loss(model), gate.searching.loss(model)
            worst = max(loss.drop, searched.drop)
            self.note(plan, "confirm", loss, within=worst <= gate.max_drop)
            if worst <= gate.max_drop:
                return model, plan, self.record(loss, searched)
        raise self.missed(widest, worst)

    def record(self, loss: Loss | FeatureLoss, searched: Loss | FeatureLoss) -> dict[str, Any]:
        gate = self.gate
        return {
            "max_drop": gate.max_drop,
            "objective": gate.objective,
            "measure": gate.searching.measure,
            "drop": loss.drop,
            "images": loss.images,
            "confidence": loss.confidence(gate.max_drop),
            "drop_at_most": loss.at_most(),
            "search_drop": searched.drop,
            "search_images": searched.images,
            "trials": self.trials,
        }

    def say_what_decides(self) -> None:
        gate, images = self.gate, [judge.images for judge in (self.gate.searching, self.gate.confirming)]
        steps = isinstance(gate.searching, Judge)  # features move by less than an image
        gate.notify(
            f"searching the cheapest plan by {gate.objective} that loses at most {gate.max_drop:g} points: "
            f"{gate.searching.what}, {images[0]} images search, {images[1]} others confirm"
            + f"; one image is {100 / min(images):.2g} points"
            * steps
        )

    def uniform(self, bits: int) -> QuantPlan:
        """One width for all blocks; where bytes count, activations keep 8 bits, which cost none."""
        name = f"w{bits}a{WIDEST}" if self.gate.objective == "bytes" else f"w{bits}a{bits}"
        return QuantPlan.preset(name).resolve(self.gate.cost.sites)

    def price(self, plan: QuantPlan) -> float:
        return self.unit.total(self.gate.cost, plan.widths())

    def narrowest_uniform(self) -> int:
        """The narrowest width that passes, by bisection."""
        missing, passing = self.gate.narrowest - 1, WIDEST
        while passing - missing > 1:
            middle = (missing + passing) // 2
            if self.passes(self.uniform(middle)):
                passing = middle
            else:
                missing = middle
        return passing

    def mixed_below(self, width: int) -> None:
        """Tries mixed plans that are cheaper than the uniform one of `width` bits, by bisection over the budget."""
        gate = self.gate
        low, high = (self.price(self.uniform(bits)) for bits in (min(gate.narrowest, width), width))
        if high <= low * RESOLUTION:
            return
        found = gate.sensitivity(self.uniform(min(width, WIDEST - 1)))  # 8 bits share a scale among heads
        allowed = found.at_widths(bits for bits in found.widths if gate.narrowest <= bits <= WIDEST)
        low = max(low, choices(gate.cost, allowed, self.unit, boundary=gate.boundary).extremes()[0])
        while high > low * RESOLUTION:
            middle = math.sqrt(low * high)
            plan = allocate_plan(gate.cost, allowed, middle, unit=self.unit, boundary=gate.boundary, solver=gate.solver)
            plan = replace(plan, name=f"{found.metric}-{self.short(middle)}")
            if self.passes(plan):
                high = self.price(plan)
            else:
                low = middle

    def short(self, price: float) -> str:
        """A budget in a name: `31.420G`, `2.718MB`."""
        return "".join(self.unit.format(price).split(" ")[:2])

    def passes(self, plan: QuantPlan) -> bool:
        """Whether a plan stays within the drop on the images that search; tried, or known from before a kill."""
        judge = self.gate.searching
        asked = {"plan": plan.name, "step": "search", "images": judge.images}
        known = next((one for one in self.kept if asked.items() <= one.items()), None)
        if known is not None:
            loss = judge.known(known)
        else:
            loss = judge.loss(self.gate.quantize(plan, False))
        within = loss.drop <= self.gate.max_drop
        self.note(plan, "search", loss, within=within, new=known is None)
        if within:
            self.passed.append(plan)
        return within

    def note(self, plan: QuantPlan, step: str, loss: Loss | FeatureLoss, *, within: bool, new: bool = True) -> None:
        """Records a trial, and says what it found; a `new` one is kept for a call that continues."""
        cost, widths = self.gate.cost, plan.widths()
        trial = {
            "plan": plan.name,
            "step": step,
            "bit_operations": cost.bit_operations(widths),
            "weight_bytes": cost.weight_bytes(widths),
            "drop": loss.drop,
            "within": within,
            "images": loss.images,
            "lost": loss.lost,
            "gained": loss.gained,
            **({"deviation": loss.deviation} if isinstance(loss, FeatureLoss) else {}),
        }
        self.trials.append(trial)
        if new:
            write_json(self.gate.run / GATE, {"trials": self.trials})
        verdict, kept = "within" if within else "more than", "" if new else " (kept from before)"
        self.gate.notify(
            f"{step} {plan.name}{kept}: {self.unit.format(self.price(plan))}, loses {loss.drop:.2f} points on "
            f"{loss.images} images, {verdict} {self.gate.max_drop:g}"
        )

    def missed(self, widest: QuantPlan, drop: float) -> QvitError:
        lost = self.gate.searching.in_words(drop)
        return QvitError(
            f"no plan loses at most {self.gate.max_drop:g} points: even {widest.name} {lost} on "
            "images that did not calibrate; allow a larger --max-drop, or calibrate on more images"
        )
