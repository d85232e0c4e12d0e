"""Method `ptq`: a run of post-training quantization, whose stages are in `stages.py`.

A budget is a preset such as `w8a8`: that plan; or `6bit`, `21.455G`, `0.25`: bit operations. Without a metric only a
uniform plan can be made; with one, widths are allocated to sites within the budget, by sensitivities that are measured
on the reparameterized model and the grids that it will have.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from qvit.allocate import allocate_plan
from qvit.allocate.choices import choices
from qvit.allocate.units import BIT_OPERATIONS, Unit
from qvit.errors import UsageError
from qvit.measure import Sensitivity, default_metric, measure_sensitivity
from qvit.measure.distance import distance_of
from qvit.measure.metric import Task
from qvit.methods.base import Method, Preparation, register_method
from qvit.methods.ptq import relu
from qvit.methods.ptq.class_token import IMAGES, ClassToken, choose, divergences, leaving_room, record_of
from qvit.methods.ptq.feedback import QuantizedFeedback, Round, updated
from qvit.methods.ptq.gate import UNITS, FeatureJudge, Gate, Judge
from qvit.methods.ptq.images import FirstImages, OfFirstSize
from qvit.methods.ptq.layer_rounding import damage_left, rounded_layers
from qvit.methods.ptq.options import PTQOptions
from qvit.methods.ptq.stages import ROTATED_UP_TO, ptq, ptq_plan, rotate_and_even_out, rotation_for
from qvit.models.families import inspect_model
from qvit.models.features import answers_with_features
from qvit.models.sizes import Size, parse_size, shown_size
from qvit.plan.budget import parse_budget
from qvit.plan.cost import CostModel
from qvit.plan.quant_plan import QuantPlan, plan_from

#: The table that mixed widths were chosen by, in the run's directory.
SENSITIVITY = "sensitivity.json"
#: What of it is measured so far.
PARTIAL = f"{SENSITIVITY}.partial"
#: What each token adds to it, by method `pmq`, and what of that is measured so far.
PLACES, PLACES_PARTIAL = "token_places.safetensors", "token_places.partial"
#: The folder of the blocks that are reconstructed already, there.
BLOCKS = "blocks"
_PRESET = re.compile(r"w\d+a\d+", re.IGNORECASE)
_BITS = re.compile(r"(\d+)\s*bits?", re.IGNORECASE)


@register_method("ptq")
class PTQMethod(Method):
    """Post-training quantization as the method of a run; it has nothing to train."""

    Options = PTQOptions
    options: PTQOptions
    trains: ClassVar[bool] = False
    calibration_batch: ClassVar[int] = 32
    #: The metric behind mixed widths, once they are chosen.
    metric: str | None = None
    #: What was decided about a width of the class token.
    class_token: ClassToken | None = None
    #: The float model that others are compared with.
    original: nn.Module
    #: What giving the MLPs a ReLU did to each.
    mlps: Sequence[relu.MlpError] = ()
    #: The rounds in which mixed widths were chosen; none if there was one.
    rounds: Sequence[Round] = ()
    #: What an accuracy gate found.
    gate: dict[str, Any] | None = None

    @property
    def mixed(self) -> bool:
        """Whether widths are allocated by sensitivities."""
        return self.options.metric is not None or self.options.sensitivity is not None

    def plan(self, cost: CostModel) -> QuantPlan | None:
        """The plan of the run; where widths are mixed, the uniform one on whose grids sensitivities are measured."""
        config = self.config
        if [config.budget, config.plan, self.options.max_drop].count(None) != 2:
            raise UsageError("give either --budget, such as w8a8 or 6bit, or --plan, a plan file, or --max-drop")
        if self.options.rounds > 1 and (not self.mixed or self.options.max_drop is not None):
            raise UsageError(
                "--rounds are of mixed widths within a budget: give --metric and --budget, or leave it out"
            )
        if (self.options.objective == "latency") != (self.options.latency_table is not None):
            raise UsageError("--objective latency and --latency-table FILE go together")
        if self.options.max_drop is not None:
            self.unit = Unit.of(self.options.latency_table or UNITS[self.options.objective], cost, config.model)
            return QuantPlan.preset("w8a8")
        if config.plan is not None:
            if self.mixed:
                raise UsageError("a --plan has its widths: leave out --metric and --sensitivity")
            plan = plan_from(config.plan).resolve(cost.sites)
        else:
            plan = self._uniform_plan((config.budget or "").strip(), cost)
        self.plan_name = plan.name
        return plan

    def _uniform_plan(self, budget: str, cost: CostModel) -> QuantPlan:
        if self.mixed:
            limit = bit_operations_of(budget, cost)
            width = next((n for n in range(2, 8) if cost.bit_operations(cost.uniform(n)) >= limit), 8)
            return QuantPlan.preset(f"w{width}a{width}")
        if _PRESET.fullmatch(budget):
            return QuantPlan.preset(budget)
        parse_budget(budget, cost)
        if bits := _BITS.fullmatch(budget):
            return QuantPlan.preset(f"w{bits[1]}a{bits[1]}")
        raise UsageError(
            f"the budget '{budget}' is met by mixed widths: say how to choose them with --metric fisher, kl or hessian"
        )

    def budget(self, cost: CostModel) -> int | None:
        return None if self.config.budget is None else bit_operations_of(self.config.budget.strip(), cost)

    @property
    def images(self) -> int:
        further = (self.options.reconstruction(self.config.seed), self.options.relu(self.config.seed))
        return max([self.config.calibration_images, *(own.images for own in further if own is not None)])

    @property
    def arguments(self) -> dict[str, Any]:
        return {} if self.options.mlp == "keep" else relu.ARGUMENTS

    @property
    def image_sizes(self) -> tuple[Size, ...]:
        return tuple(dict.fromkeys(map(parse_size, self.options.image_sizes)))

    @property
    def deciding_images(self) -> int:
        return 0 if self.options.max_drop is None else self.options.deciding_images

    def quantized(self, model: nn.Module, plan: QuantPlan, given: Preparation) -> nn.Module:
        self.original, options = model, self.options.relu(self.config.seed)
        if options is not None:
            model = copy.deepcopy(model)
            with given.watch("relu"):
                self.mlps = relu.to_relu(
                    model, OfFirstSize(given.images), options, progress=given.progress, notify=given.notify
                )
        if self.options.max_drop is not None:
            return self._gated(model, given)
        if self.mixed:
            return self._made(model, self._allocated(model, plan, given), given)
        return self._made(model, self._with_class_token(model, plan, given), given)

    def _with_class_token(self, model: nn.Module, plan: QuantPlan, given: Preparation) -> QuantPlan:
        """The plan, with a width of its own for the class token where that pays; plans of a file stay as they are."""
        options, cost, budget = self.options, inspect_model(model), (self.config.budget or "").strip()
        if self.config.plan is not None and options.class_token == "auto":
            return plan
        count = min(IMAGES, self.config.calibration_images)
        few = FirstImages(given.images, count, "trying bits for the class token", given.progress)

        def measure(wider: QuantPlan) -> tuple[float, float]:
            with given.watch("calibrate"):
                source = self._reparameterized(model, wider, few)
                grids = ptq_plan(source, wider, **options.grids())
                return divergences(self.original, source, grids, few)

        limit = None if self.config.plan is not None or _PRESET.fullmatch(budget) else bit_operations_of(budget, cost)
        chosen, self.class_token = choose(plan, cost, options.class_token, limit, measure, distance_of(model).name)
        if self.class_token is not None:
            own = self.class_token
            given.notify(f"{own.width} bits for the class token: {'yes' if own.used else 'no'}; {own.reason}")
        self.plan_name = chosen.name
        return chosen

    def _made(self, model: nn.Module, plan: QuantPlan, given: Preparation, *, final: bool = True) -> nn.Module:
        """The model of a plan; one that a search tries is not `final`, and goes without reconstruction."""
        options, images = self.options, self.config.calibration_images
        reconstruction = options.reconstruction(self.config.seed) if final else None
        if final:
            further = (
                "" if reconstruction is None else f", then reconstructing blocks on {reconstruction.images} images"
            )
            sizes = ", ".join(map(shown_size, self.image_sizes))
            given.notify(f"calibrating on {images} images{sizes and f' of {sizes} pixels'}{further}")
        blocks = given.run / BLOCKS

        def timed(stage: str, took: float) -> None:
            given.watch.add("search" if not final else "reconstruct" if stage == "reconstruct" else "calibrate", took)

        return ptq(
            model,
            plan,
            given.images,
            observer=options.observer,
            scale_search=options.scale_search,
            **options.grids(),
            reparameterize=options.reparameterize,
            rotate=self._rotation(plan) if self.mixed and options.max_drop is None else options.rotate,
            bias_correction=options.bias_correction,
            rounding=options.rounding,
            reconstruct=reconstruction,
            calibration_images=images,
            keep=blocks if options.max_drop is None else blocks / plan.name,
            seed=self.config.seed,
            notify=given.notify,
            stage=timed,
            progress=given.progress,
            nonlinear=self.config.nonlinear,
            chosen=lambda forms: setattr(self, "nonlinear", forms),
        )

    def _rotation(self, plan: QuantPlan) -> str:
        """What is rotated where a resolved plan is tried; of mixed ones the narrowest they are chosen from decides."""
        options = self.options
        if options.rotate != "auto":
            return options.rotate
        if not self.mixed and options.max_drop is None:
            return rotation_for(plan)
        return "all" if (options.min_width or 3) <= ROTATED_UP_TO else "heads"

    def _gated(self, model: nn.Module, given: Preparation) -> nn.Module:
        """The model of the cheapest plan that loses no more than was allowed."""
        options = self.options
        assert options.max_drop is not None

        judge = FeatureJudge if answers_with_features(model) else Judge
        searching, confirming = (judge(self.original, batches) for batches in given.deciding)
        gate = Gate(
            inspect_model(model),
            options.max_drop,
            options.objective,
            self.unit,
            options.min_width or 3,
            self._boundary,
            options.solver,
            lambda plan, final: self._made(model, plan, given, final=final),
            lambda grids: self._sensitivity(model, grids, given),
            searching,
            confirming,
            given.run,
            given.notify,
        )
        quantized, plan, self.gate = gate.search()
        self.plan_name = plan.name
        return quantized

    def _allocated(self, model: nn.Module, grids: QuantPlan, given: Preparation) -> QuantPlan:
        """The plan of mixed widths within the budget, with a width of its own for the class token where that pays."""
        options, cost = self.options, inspect_model(model)
        sensitivity = self._sensitivity(model, grids, given)
        budget = (self.config.budget or "").strip()
        limit = bit_operations_of(budget, cost)
        allowed, boundary = self._allowed(sensitivity, cost, limit), self._boundary

        def by(losses: Sensitivity, within: int) -> QuantPlan:
            with given.watch("allocate"):
                name = f"{sensitivity.metric}-{budget}" + ("" if options.solver == "program" else f"-{options.solver}")
                return allocate_plan(cost, losses, within, boundary=boundary, name=name, solver=options.solver)

        if options.rounds > 1:
            allowed = self._updated(model, grids, allowed, lambda losses: by(losses, limit), given)

        def allocated(within: int) -> QuantPlan:
            return by(allowed, within)

        plan = allocated(limit)
        self.plan_name = plan.name
        least = choices(cost, allowed, Unit(BIT_OPERATIONS), boundary=boundary).extremes()[0]
        roomy = leaving_room(plan, cost, options.class_token, limit, least, allocated)
        chosen = self._with_class_token(model, roomy, given)
        if self.class_token is not None and not self.class_token.used:
            self.plan_name = plan.name
            return plan
        return chosen

    def _allowed(self, sensitivity: Sensitivity, cost: CostModel, limit: int) -> Sensitivity:
        """What of a sensitivity widths are chosen from."""
        narrowest = self.options.min_width or (3 if cost.bit_operations(cost.uniform(3)) <= limit else 2)
        return sensitivity.at_widths(width for width in sensitivity.widths if width >= narrowest)

    @property
    def _boundary(self) -> int | None:
        """Width of the first and the last layer; None where they are chosen like the others."""
        return None if self.options.boundary == "free" else self.options.boundary

    def _updated(
        self,
        model: nn.Module,
        grids: QuantPlan,
        sensitivity: Sensitivity,
        allocated: Callable[[Sensitivity], QuantPlan],
        given: Preparation,
    ) -> Sensitivity:
        """The sensitivity of the best plan of some rounds, see `feedback.py`."""
        options, calibration = self.options, self.config.calibration_images
        few = FirstImages(given.images, min(calibration, options.sensitivity_images or calibration))
        with given.watch("sensitivity"):
            source = self._reparameterized(model, grids, FirstImages(given.images, calibration))
            plan = ptq_plan(source, grids, **options.grids())
            task = Task("feedback", source, sensitivity.widths, plan, list(OfFirstSize(few)), self.config.seed)
            own = QuantizedFeedback(task)
            found, self.rounds = updated(sensitivity, allocated, own.judge, own.factors, options.rounds)
        told = ", ".join(f"{each.divergence:.4g}" for each in self.rounds)
        given.notify(f"{own.distance.name} of the plans of {len(self.rounds)} rounds: {told}; the best is kept")
        return found

    def _sensitivity(self, model: nn.Module, grids: QuantPlan, given: Preparation) -> Sensitivity:
        """What widths are chosen by; what is measured is kept with the run, and measured once.

        It is measured for weights rounded to nearest; those that are rounded with feedback cost a part of that.
        """
        kept, partial = given.run / SENSITIVITY, given.run / PARTIAL
        with given.watch("sensitivity"):
            found = Sensitivity.load(kept) if kept.is_file() else self._measured(model, grids, given, partial)
        found.save(kept)
        partial.unlink(missing_ok=True)
        self.metric = found.metric
        if self.options.rounding == "nearest":
            return found
        images = FirstImages(given.images, self.config.calibration_images, "rounding", given.progress)
        source = self._reparameterized(model, grids, images)
        layers = rounded_layers(source, found.raw)
        left = damage_left(source, set(layers.values()), images)
        # A layer whose weight the model multiplies by itself, without a call, shows no inputs (`Eva`).
        return found.scaled({site: left[layer] for site, layer in layers.items() if layer in left})

    def _measured(self, model: nn.Module, grids: QuantPlan, given: Preparation, partial: Path) -> Sensitivity:
        """That of a file, or one measured on the reparameterized model and the grids that it will have."""
        options, progress = self.options, given.progress
        if options.sensitivity is not None:
            found = Sensitivity.load(options.sensitivity)
            if options.metric not in (None, found.metric):
                raise UsageError(f"{options.sensitivity} was measured by '{found.metric}', not by '{options.metric}'")
            return found
        metric, calibration = options.metric or default_metric(model), self.config.calibration_images
        few = FirstImages(given.images, min(calibration, options.sensitivity_images or calibration))
        given.notify(f"measuring sensitivities ({metric}) on {few.images} images")
        source = self._reparameterized(
            model, grids, FirstImages(given.images, calibration, "reparameterizing", progress)
        )
        plan = ptq_plan(source, grids, **options.grids())

        def told(done: int, total: int) -> None:
            if progress is not None:
                progress(f"sensitivity ({metric})", done, total, "")

        return measure_sensitivity(
            source, few, metric=metric, plan=plan, seed=self.config.seed, progress=told, partial=partial
        )

    def _reparameterized(self, model: nn.Module, plan: QuantPlan, batches: Iterable[Tensor]) -> nn.Module:
        """A copy of the float model as it is before quantization by a plan that is not of 8 bits throughout."""
        source = copy.deepcopy(model).eval()
        if self.options.reparameterize:
            rotate_and_even_out(source, batches, self._rotation(plan), fine=False)
        return source

    def record(self) -> dict[str, Any]:
        return {
            "metric": self.metric,
            "calibration_images": self.config.calibration_images,
            "reconstruction": self.options.reconstruction_record(),
            **record_of(self.class_token),
            **({"rounds": [asdict(each) for each in self.rounds]} if self.rounds else {}),
            **({"relu": [asdict(error) for error in self.mlps]} if self.mlps else {}),
            **({} if self.gate is None else {"gate": self.gate}),
        }


def bit_operations_of(budget: str, cost: CostModel) -> int:
    """Bit operations of a budget; for a preset those of its plan."""
    if _PRESET.fullmatch(budget):
        return cost.bit_operations(QuantPlan.preset(budget).resolve(cost.sites).widths())
    return parse_budget(budget, cost)
