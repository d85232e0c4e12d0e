"""PMQ from end to end: a metric, a Pareto frontier over all widths there are, and the plan that a budget picks from it.

After Xiao, Li, Yang and Gu, Patch-wise Mixed-Precision Quantization of Vision Transformer (2023, arXiv 2305.06559), of
which its abstract could be read; docs/patchwise.md says what is theirs and what is ours.

    sensitivities of all sites        any metric                                           `measure/`
    damage by token                   Fisher, by the place in the ranking                  `measure/token_places.py`
    one program                       component widths, class token, splits of patches     `allocate/tokens.py`
    frontier, plan within the budget  exact                                                `allocate/`
    the quantized model               as by `ptq`, whose parts and options all hold        `ptq/method.py`

The plan is chosen on calibration images; the test images are opened for the final number alone.
"""

from __future__ import annotations

import time
from typing import Any

from torch import nn

from qvit.allocate.frontier import lower_hull
from qvit.allocate.plans import within_budget
from qvit.allocate.relaxation import Relaxation
from qvit.allocate.tokens import TokenCandidates, token_choices, token_plan
from qvit.allocate.units import BIT_OPERATIONS, Unit
from qvit.errors import UsageError
from qvit.measure.table import Sensitivity
from qvit.measure.token_places import Places, load_places, measure_places, save_places, spread
from qvit.methods.base import Preparation, register_method
from qvit.methods.pmq import token_blocks
from qvit.methods.ptq.class_token import TRIED
from qvit.methods.ptq.images import FirstImages
from qvit.methods.ptq.method import PLACES, PLACES_PARTIAL, PTQMethod, bit_operations_of
from qvit.methods.ptq.options import PMQOptions
from qvit.methods.ptq.stages import ptq_plan
from qvit.models.families import inspect_model
from qvit.plan.cost import CostModel, TokenWidths, Widths
from qvit.plan.quant_plan import QuantPlan


@register_method("pmq")
class PMQMethod(PTQMethod):
    """Post-training quantization with widths of components, class token and patches from one frontier."""

    Options = PMQOptions
    options: PMQOptions
    #: What a result says of the search.
    search: dict[str, Any]

    @property
    def mixed(self) -> bool:
        return True

    @property
    def pictures(self) -> int:
        return self.options.picture

    def plan(self, cost: CostModel) -> QuantPlan | None:
        if self.config.budget is None:
            raise UsageError("method 'pmq' chooses widths within a budget: give --budget, such as 4bit")
        if self.config.plan is not None or self.options.max_drop is not None:
            raise UsageError("method 'pmq' chooses widths within a budget: `qvit ptq` takes a --plan or a --max-drop")
        if self.options.rounds > 1:
            raise UsageError("method 'pmq' chooses widths once: rounds are of `qvit ptq`")
        if self.options.image_sizes:
            raise UsageError("tokens are counted at the model's own image size: leave out image_sizes")
        return super().plan(cost)

    def _allocated(self, model: nn.Module, grids: QuantPlan, given: Preparation) -> QuantPlan:
        cost, budget = inspect_model(model), (self.config.budget or "").strip()
        measured = self._sensitivity(model, grids, given)
        limit = bit_operations_of(budget, cost)
        allowed = self._allowed(measured, cost, limit)
        places, seconds = self._places(model, grids, allowed, cost, given)
        started = time.monotonic()
        with given.watch("allocate"):
            problem = token_choices(
                cost, allowed, spread(places, allowed), self._candidates(allowed), boundary=self._boundary
            )
            answer = within_budget(problem, Unit(BIT_OPERATIONS), limit, cost, self.options.solver)
            corners = lower_hull(problem, self.options.points)
        took = time.monotonic() - started

        def point(answer: list[int]) -> dict[str, Any]:
            found = problem.widths(answer)
            return {
                "bit_operations": cost.bit_operations(found),
                "predicted_loss": problem.problem.damage(answer),
                **_counted(found),
            }

        chosen = problem.widths(answer)
        self.search = {
            "metric": measured.metric,
            "images": measured.images,
            "seconds": {"sensitivity": measured.seconds, "tokens": seconds, "allocate": took},
            "exact": Relaxation(problem.problem).is_forest,
            "chosen": point(answer),
            "frontier": [point(own) for *_, own in corners],
        }
        plan = token_plan(cost, allowed, chosen, f"pmq-{measured.metric}-{budget}")
        self.plan_name = plan.name
        counted = _counted(chosen)
        if places:
            given.notify(
                f"of {len(places)} activations {counted['class_token']} have a width for the class token alone, "
                f"{counted['split']} have patches of two widths"
            )
        given.notify(f"widths chosen by {measured.metric} in {measured.seconds + seconds + took:.0f} s")
        return plan

    def _candidates(self, sensitivity: Sensitivity) -> TokenCandidates:
        """The widths of tokens that are tried, as far as they were measured. Raises UsageError for one that was not."""
        option = self.options.class_token
        width = option if isinstance(option, int) else TRIED
        if isinstance(option, int) and width not in sensitivity.widths:
            tried = ", ".join(map(str, sensitivity.widths))
            raise UsageError(f"a class token of {width} bits: widths that can be chosen here are {tried}")
        class_widths = (width,) if option != "off" and width in sensitivity.widths else ()
        several = self.options.patches and len(sensitivity.widths) > 1
        return TokenCandidates(class_widths, tuple(self.options.shares) if several else ())

    def _places(
        self, model: nn.Module, grids: QuantPlan, sensitivity: Sensitivity, cost: CostModel, given: Preparation
    ) -> tuple[Places, float]:
        """The damages by token of the activations whose tokens may differ, and the seconds that they took."""
        candidates, kept = self._candidates(sensitivity), given.run / PLACES
        if len(sensitivity.widths) < 2 or not (candidates.class_widths or candidates.shares):
            return {}, 0.0
        if not any(site.tokens for site in cost.sites.values()):
            given.notify("the tokens of this model cannot differ in width: widths of components are chosen alone")
            return {}, 0.0
        if kept.is_file():
            return load_places(kept)
        sites = [site for own in token_blocks(cost, key=self.options.key).values() for site in own]
        count = self.config.calibration_images
        images = FirstImages(given.images, count, "reparameterizing", given.progress)
        few = FirstImages(given.images, min(count, self.options.sensitivity_images or count))
        given.notify(f"measuring what each token adds on {few.images} images")
        started = time.monotonic()
        with given.watch("sensitivity"):
            source = self._reparameterized(model, grids, images)
            places = measure_places(
                source,
                few,
                ptq_plan(source, grids, **self.options.grids()),
                sites,
                sensitivity.widths,
                seed=self.config.seed,
                progress=lambda done, total: given.progress and given.progress("tokens", done, total, ""),
                partial=given.run / PLACES_PARTIAL,
            )
        seconds = time.monotonic() - started
        save_places(kept, places, seconds)
        (given.run / PLACES_PARTIAL).unlink(missing_ok=True)
        return places, seconds

    def record(self) -> dict[str, Any]:
        return super().record() | {"search": self.search}


def _counted(widths: Widths) -> dict[str, int]:
    """How many activations have a width for the class token alone, and how many patches of two widths."""
    splits = [own.split for own in widths.values() if isinstance(own, TokenWidths)]
    return {"class_token": sum(not split.ranks for split in splits), "split": sum(split.ranks for split in splits)}
