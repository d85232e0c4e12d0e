"""Mixed widths in rounds, with the quantized model's feedback (LampQ, AAAI 2026).

Sensitivities are measured in a float model, one tensor quantized at a time. A plan quantizes all, and gradients differ
there: a tensor behind coarse ones may matter more or less than it did. So each round

    1. allocates within the budget by the present sensitivities,
    2. judges the plan: divergence from the float model on calibration images, or cosine distance of features,
    3. measures the squared gradients again in the model that the plan quantizes, and scales each head's losses,

           Ω'(b) = Ω(b) · tr F̂ / tr F           F̂ at the tensors of the quantized model, F at those of the float one

until a plan repeats or the rounds are used up; the sensitivities of the best plan are kept, the first's among them, so
another round never makes a plan that these images judge worse.

The text was not available: that bits are updated by what the quantized model says is LampQ's, the ratio of traces is
ours. It leaves the errors of the tensors as they were measured, and works with any metric. Ratios are limited to
`LIMIT` either way: few images say little about single heads. Both traces take the same images and random signs.

Cost of a round: a forward and a backward per image, one more forward for the judgement.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qvit.measure import Sensitivity
from qvit.measure.distance import distance_of
from qvit.measure.lampq import squared_gradients, trace
from qvit.measure.metric import Task
from qvit.measure.probe import Probe
from qvit.models.families import inspect_model
from qvit.plan.cost import Widths
from qvit.plan.quant_plan import QuantPlan

#: The largest change of a head's losses in a round, as a factor.
LIMIT = 16.0


@dataclass(frozen=True)
class Round:
    """One round.

    Attributes:
        divergence: Of its plan, on calibration images.
        changed: Heads and sites whose width is another than in the round before; all of them in the first.
        best: Whether its plan is the one that was kept.
    """

    divergence: float
    changed: int
    best: bool


def updated(
    sensitivity: Sensitivity,
    allocated: Callable[[Sensitivity], QuantPlan],
    judge: Callable[[Widths], float],
    feedback: Callable[[Widths], Mapping[str, Tensor]],
    rounds: int,
) -> tuple[Sensitivity, list[Round]]:
    """The sensitivities whose plan is judged best, and what each round found.

    Args:
        sensitivity: As measured.
        allocated: The plan of sensitivities.
        judge: How far from the float model the model of some widths is.
        feedback: Factors of the losses as measured, (heads,) by site, in the model of some widths.
        rounds: Plans that are tried, at most.
    """
    present, tried = sensitivity, []
    for _ in range(rounds):
        widths = {site: tuple(own) for site, own in allocated(present).widths().items()}
        if any(widths == own for own, _, _ in tried):
            break
        tried.append((widths, judge(widths), present))
        if len(tried) < rounds:
            present = sensitivity.scaled_by_head({site: own.numpy() for site, own in feedback(widths).items()})
    best = min(range(len(tried)), key=lambda index: tried[index][1])
    before: list[Widths] = [{}, *(widths for widths, _, _ in tried)]
    found = [
        Round(distance, _differences(before[index], widths), index == best)
        for index, (widths, distance, _) in enumerate(tried)
    ]
    return tried[best][2], found


class QuantizedFeedback:
    """Judges plans, and measures squared gradients under them.

    Args:
        task: Float model, grids and images; widths as in the sensitivity.
    """

    def __init__(self, task: Task) -> None:
        assert task.plan is not None
        sites = inspect_model(task.model).sites
        heads = {name: (task.widths[-1],) * sites[name].layout.num_heads for name in task.plan.widths()}
        span = {"bit_width_range": [task.widths[0], task.widths[-1]], "switchable_scale": len(task.widths) > 1}
        specs = {
            name: None if spec is None else spec.changed(span)
            for name, spec in task.plan.with_widths(heads).sites.items()
        }
        self.task, self.probe = task, Probe(task.model, task.batches, QuantPlan(task.plan.name, (), specs))
        task.probe = self.probe
        self.distance = distance_of(task.model)
        with torch.no_grad():
            self.reference = [self.distance.prepared(self._model({})(batch)) for batch in task.batches]
        self.floating = self._traces({})

    def judge(self, widths: Widths) -> float:
        """The mean distance from the float model."""
        model, total = self._model(widths), 0.0
        with torch.no_grad():
            for batch, before in zip(self.task.batches, self.reference, strict=True):
                total += float(self.distance.total(before, self.distance.prepared(model(batch))))
        return total / sum(map(len, self.task.batches))

    def factors(self, widths: Widths) -> dict[str, Tensor]:
        """tr F̂ / tr F by site, (heads,), within the limits; 1 where the float model has no gradient."""
        found = self._traces(widths)
        return {
            site: torch.where(own > 0, found[site] / own.clamp_min(1e-300), 1.0).clamp(1 / LIMIT, LIMIT)
            for site, own in self.floating.items()
            if site in found
        }

    def _model(self, widths: Widths) -> nn.Module:
        """The model of some widths, of which one may serve all heads."""
        heads = {
            site: self.probe.quantizers[site].bit_width.numel() for site in widths if site in self.probe.quantizers
        }
        return self.probe.apply(
            {site: tuple(own) * (heads[site] // len(own)) for site, own in widths.items() if site in heads}
        )

    def _traces(self, widths: Widths) -> dict[str, Tensor]:
        self._model(widths)
        found: dict[str, Tensor] = {}
        for site, _, grad in squared_gradients(self.task).gradients():
            own = trace(self.probe, site, grad).cpu()
            found[site] = found[site] + own if site in found else own
        return found


def _differences(before: Widths, after: Widths) -> int:
    return sum(
        old != new
        for site, own in after.items()
        for old, new in zip(before.get(site, (0,) * len(own)), own, strict=True)
    )
