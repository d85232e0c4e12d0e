"""What a metric is: a function from a `Task` to the predicted loss increase of every site, head and width.

A metric is a file of this folder, or of a plugin, with one function under `@register_metric(name)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from qvit.measure.partial import Partial
from qvit.measure.probe import Probe
from qvit.measure.table import Table
from qvit.plan.quant_plan import QuantPlan
from qvit.registry import Registry


@dataclass
class Task:
    """What a metric is given.

    Attributes:
        metric: Its name.
        model: The model; a float one unless the metric reads no images.
        widths: Candidate widths, ascending.
        plan: Resolved plan of the grids; its widths play no part.
        batches: Images, (B, channels, height, width) each.
        seed: Of random numbers.
        progress: To be called with what is done and how much there is.
        file: For what has been measured so far; see `partial.py`.
    """

    metric: str
    model: nn.Module
    widths: tuple[int, ...]
    plan: QuantPlan | None = None
    batches: Sequence[Tensor] = ()
    seed: int = 0
    progress: Callable[[int, int], None] = lambda done, total: None
    file: Path | None = None

    @cached_property
    def probe(self) -> Probe:
        """The model's probe, calibrated with the images."""
        changes = {
            "bit_width": self.widths[-1],
            "bit_width_range": [self.widths[0], self.widths[-1]],
            "learn_bit_width": False,
            "switchable_scale": len(self.widths) > 1,
        }
        assert self.plan is not None
        specs = {name: None if spec is None else spec.changed(changes) for name, spec in self.plan.sites.items()}
        return Probe(self.model, self.batches, QuantPlan(self.plan.name, (), specs))

    def partial(self) -> Partial:
        """What an earlier call with equal arguments left."""
        return Partial.of_probe(self.file, self.probe, self.widths, self.batches, (self.metric, self.seed))


Measure = Callable[[Task], Table]


class Metric(NamedTuple):
    """An entry of `METRICS`.

    Attributes:
        table: Predicted loss increases by site, arrays of (heads, widths).
        reads_images: Whether it measures a float model with images; else it reads a trained model.
    """

    table: Measure
    reads_images: bool


METRICS: Registry[str, Metric] = Registry("metric", "qvit.measure")


def register_metric(name: str, *, reads_images: bool = True) -> Callable[[Measure], Measure]:
    """Decorator: makes a function available as a metric."""

    def register(table: Measure) -> Measure:
        METRICS.register(name)(Metric(table, reads_images))
        return table

    return register
