"""Post-training quantization: a float model, a plan and a few hundred images; no labels, no training loop.

    rotate            channels of the residual stream and of heads are mixed    QuaRot     (`residual_rotation.py`,
                                                                                            `head_folds.py`)
    reparameterize    LayerNorm outputs, q, k, v, heads' outputs: the channels  RepQ-ViT   (`reparameterization.py`,
                      are centred and share one range                                       `head_folds.py`)
    quantize          weights per channel, probabilities on a logarithmic grid up to 4 bits
    calibrate         scales and offsets of least squared error                            (`models/calibrate.py`)
    choose forms      of LayerNorm, softmax and GELU on integers; optional                 (`measure/nonlinear.py`)
    search scales     by the similarity of outputs; optional                    Liu et al. (`similarity_scales.py`)
    fit probabilities their scales, by the error of the values' weighted sums              (`probability_scales.py`)
    round             weights, so that outputs change least                     GPTQ       (`layer_rounding.py`)
    reconstruct       each block answers like its float original; optional      BRECQ      (`reconstruction.py`)
    correct biases    the mean error of every output channel is taken back      DFQ        (`bias_correction.py`)

In a plan of 8 bits throughout nothing is rotated, heads are not folded, weights are rounded to nearest, and all tokens
count alike: there the errors are too small for any of it to help, on images that were not calibrated on.

Every part can be left out. The order matters: the reparameterization changes what is calibrated. A reconstruction
starts from corrected biases, which are nearer to the float model, and is followed by another correction: the last layer
sees other features then, and takes no part in the reconstruction.

What the plan says about widths is kept; `ptq_plan` changes what shares a scale and the grid of the probabilities:
most are far below the largest, and with 16 levels a uniform grid rounds them to zero (RepQ-ViT); with 8 levels one of
powers of √2 does, too, and powers of 2 do not. Bit operations do not depend on either.

A budget is a preset such as `w8a8`: that plan; or `6bit`, `21.455G`, `0.25`: bit operations. Without a metric only a
uniform plan can be made; with one, widths are allocated to sites within the budget, by sensitivities that are measured
on the reparameterized model and the grids that it will have.
"""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from qvit.allocate import allocate_plan
from qvit.allocate.units import Unit
from qvit.errors import UsageError
from qvit.measure import Sensitivity, default_metric, measure_sensitivity
from qvit.measure.distance import distance_of
from qvit.measure.metric import Task
from qvit.measure.nonlinear import MEASURED, choose_forms
from qvit.methods.base import Method, Preparation, register_method
from qvit.methods.lsq import scale_rules
from qvit.methods.ptq import relu
from qvit.methods.ptq.bias_correction import correct_biases, corrected_layers
from qvit.methods.ptq.class_token import IMAGES, ClassToken, choose, divergences, leaving_room, record_of
from qvit.methods.ptq.feedback import QuantizedFeedback, Round, updated
from qvit.methods.ptq.gate import UNITS, FeatureJudge, Gate, Judge
from qvit.methods.ptq.head_folds import fold_heads
from qvit.methods.ptq.images import FirstImages, OfFirstSize, Progress
from qvit.methods.ptq.layer_rounding import damage_left, round_layers, rounded_layers
from qvit.methods.ptq.options import PTQOptions
from qvit.methods.ptq.position_scales import position_rules
from qvit.methods.ptq.probability_scales import IMAGES as FITTED
from qvit.methods.ptq.probability_scales import fit_probability_scales
from qvit.methods.ptq.reconstruction import ReconstructOptions
from qvit.methods.ptq.reconstruction import reconstruct as reconstruct_blocks
from qvit.methods.ptq.reparameterization import reparameterize as even_out_channels
from qvit.methods.ptq.residual_rotation import rotate_residual
from qvit.methods.ptq.similarity_scales import IMAGES as SEARCHED
from qvit.methods.ptq.similarity_scales import fit_similarity_scales
from qvit.methods.ptq.token_weights import worth_of
from qvit.methods.ptq.unranked import unranked
from qvit.models.block_inputs import attention_blocks
from qvit.models.calibrate import calibrate
from qvit.models.convert import quantize, take_weights
from qvit.models.families import inspect_model
from qvit.models.families.tokens import ranks_tokens
from qvit.models.features import answers_with_features
from qvit.models.sizes import Size, parse_size, shown_size
from qvit.plan.budget import parse_budget
from qvit.plan.cost import CostModel
from qvit.plan.quant_plan import QuantPlan, Rule, plan_from
from qvit.plan.spec import Site
from qvit.training.config import validated

#: The largest width at which probabilities get a logarithmic grid unless another is asked for, and which.
LOG_PROBS = {3: "log2", 4: "log-sqrt2"}
#: The largest width at which the residual stream is rotated by default; wider grids gain from the heads alone.
ROTATED_UP_TO = 5
#: The table that mixed widths were chosen by, in the run's directory.
SENSITIVITY = "sensitivity.json"
#: What of it is measured so far.
PARTIAL = f"{SENSITIVITY}.partial"
#: What each token adds to it, by method `pmq`, and what of that is measured so far.
PLACES, PLACES_PARTIAL = "token_places.safetensors", "token_places.partial"
#: The folder of the blocks that are reconstructed already, there.
BLOCKS = "blocks"
Stage = Callable[[str, float], None]
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
            rotate=options.rotate,
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
        chosen = self._with_class_token(model, leaving_room(plan, cost, options.class_token, limit, allocated), given)
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
        source, options = copy.deepcopy(model).eval(), self.options
        if options.reparameterize:
            rotate = rotation_for(plan) if options.rotate == "auto" else options.rotate
            _reparameterize(source, batches, rotate, fine=False)
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


def ptq(
    model: nn.Module,
    plan: QuantPlan | str | Path,
    batches: Iterable[Tensor],
    *,
    observer: str = "mse",
    scale_search: str = "error",
    weights: str = "per-channel",
    probs: str = "auto",
    gelu: str = "uniform",
    heads: str = "auto",
    positions: str = "none",
    reparameterize: bool = True,
    rotate: str = "auto",
    bias_correction: bool = True,
    rounding: str = "auto",
    reconstruct: ReconstructOptions | None = None,
    calibration_images: int = 128,
    stage: Stage | None = None,
    progress: Progress | None = None,
    notify: Callable[[str], None] | None = None,
    keep: Path | None = None,
    seed: int = 0,
    nonlinear: str | None = None,
    chosen: Callable[[dict[str, Any]], None] | None = None,
) -> nn.Module:
    """Quantizes a float model without training.

    Args:
        model: A timm model of a supported family, in float; it stays as it is.
        plan: A plan, a preset such as `w4a4`, or a plan file.
        batches: Images (B, channels, height, width) of the training data under the evaluation transform, on the model's
            device. They are iterated several times: a list, or anything that yields the same images each time. Batches
            of several sizes take part equally; what looks at one size alone (`images.py`) takes the first batch's.
        observer, scale_search, weights, probs, gelu, heads, positions, reparameterize, rotate, bias_correction: See
            `PTQOptions`, as for `rounding`.
        reconstruct: Options of the block reconstruction; None leaves it out.
        calibration_images: How many of the images everything but the reconstruction looks at.
        stage: Called with the name of each part and the seconds that it took.
        progress: Called with a text, what is done, how much there is, and figures as text.
        notify, keep: Of the reconstruction, see `reconstruction.reconstruct`.
        seed: Draws the answers by which tokens are weighted, see `token_weights.worth_of`.
        nonlinear: Integer forms in place of the plan's, see `TrainConfig`; `chosen` is called with those that were
            given, as `measure.nonlinear.choose_forms` returns them.

    Returns:
        A calibrated model with fixed widths, in eval mode.

    Raises:
        UsageError: The plan does not fit, an unknown option, or a generator for `batches`.
        QvitError: No images, or activations or losses that are not finite; site, layer or block is named.
    """
    if iter(batches) is batches:
        raise UsageError(
            "the images are passed through the model several times: give a list of batches, not a generator"
        )
    few = FirstImages(batches, calibration_images)
    alike = OfFirstSize(few)
    clock = _Clock(stage)
    source = copy.deepcopy(model).eval()
    plan = plan_from(plan) if nonlinear is None else replace(plan_from(plan), nonlinear={})
    resolved = plan.resolve(inspect_model(model).sites)
    fine, ranks = is_fine(resolved), ranks_tokens(resolved.sites)
    feedback = rounding == "feedback" or (rounding == "auto" and not fine)
    rotate = rotation_for(resolved) if rotate == "auto" else rotate
    if reparameterize:
        _reparameterize(source, few.told("reparameterizing", progress), rotate, fine=fine)
        clock.note("reparameterize")
    original = copy.deepcopy(source)
    grids = ptq_plan(source, plan, weights=weights, probs=probs, gelu=gelu, heads=heads, positions=positions)
    quantized = quantize(source, grids, in_place=True)
    calibrate(quantized, few.told("calibrating", progress), observer=observer)
    clock.note("calibrate")
    if nonlinear is not None:
        forms = choose_forms(quantized, nonlinear, FirstImages(alike, MEASURED, "choosing integer forms", progress))
        clock.note("choose forms")
        if chosen is not None:
            chosen(forms)
    if scale_search != "error":
        told = FirstImages(alike, SEARCHED, "searching scales", progress)
        fit_similarity_scales(quantized, told, ranking=scale_search == "ranking")
        clock.note("search scales")
    layers = [path for path, layer in corrected_layers(quantized).items() if isinstance(layer, nn.Linear)]
    weighting = OfFirstSize(few.told("weighting tokens", progress))
    worth = {} if fine and not feedback else worth_of(original, layers, weighting, seed)
    if observer == "mse":
        fit_probability_scales(quantized, FirstImages(few, FITTED, "fitting probabilities", progress), worth)
        clock.note("fit probabilities")
    # Without folds of heads both are equal but for last digits, which decide edges of codes.
    reference = model if fine and rotate == "none" and not feedback else original
    by_block = unranked(quantized, original) if ranks and (feedback or reconstruct is not None) else quantized
    if feedback and attention_blocks(quantized):
        round_layers(by_block, original, alike, calibration_images, worth, progress)
        clock.note("round")
    if reconstruct is not None:
        if bias_correction:
            correct_biases(by_block, alike, reference=reference, worth=worth)
        given = OfFirstSize(batches)
        reconstruct_blocks(by_block, reference, given, reconstruct, progress=progress, notify=notify, keep=keep)
        clock.note("reconstruct")
    if by_block is not quantized:
        take_weights(quantized, by_block)
    if bias_correction:
        correct_biases(quantized, alike, reference=reference, worth=worth)
        clock.note("correct biases")
    return quantized


def _reparameterize(model: nn.Module, batches: Iterable[Tensor], rotate: str, *, fine: bool) -> None:
    """Changes a float model such that it is easier to quantize and computes the same."""
    if rotate == "all":
        rotate_residual(model)
    if rotate != "none" or not fine:
        fold_heads(model, batches, rotate=rotate != "none")
    even_out_channels(model, batches)


def rotation_for(plan: QuantPlan) -> str:
    """What is rotated for a resolved plan where nothing else is asked for, see `PTQOptions.rotate`."""
    if is_fine(plan):
        return "none"
    return "all" if min(_widths(plan), default=8) <= ROTATED_UP_TO else "heads"


def is_fine(plan: QuantPlan) -> bool:
    """Whether a resolved plan has 8 bits throughout: what narrower grids need is left out there, unless asked for."""
    return _widths(plan) == {8}


def _widths(plan: QuantPlan) -> set[int]:
    return {width for spec in plan.sites.values() if spec is not None for width in spec.widths}


def ptq_plan(
    model: nn.Module,
    plan: QuantPlan | str | Path,
    *,
    weights: str = "per-channel",
    probs: str = "auto",
    gelu: str = "uniform",
    heads: str = "auto",
    positions: str = "none",
) -> QuantPlan:
    """The plan with the granularity of scales and the grid of probabilities that suit post-training quantization."""
    given = {"weights": weights, "probs": probs, "gelu": gelu, "heads": heads, "positions": positions}
    validated(PTQOptions, given)
    sites = inspect_model(model).sites
    resolved = plan_from(plan).resolve(sites)
    known = [site for name, site in sites.items() if resolved.sites[name] is not None]
    rules = scale_rules("per-channel" if weights == "per-channel" else "per-head", known)
    if heads == "per-tensor" or (heads == "auto" and is_fine(resolved)):
        shared = [site for site in known if site.role == "activation" and site.layout.heads is not None]
        rules += [Rule(site.name, {"granularity": "per-tensor"}) for site in shared]
    for site in known:
        spec = resolved.sites[site.name]
        if spec is None or site.role != "activation" or site.name.rpartition(".")[2] != "probs" or spec.signed:
            continue
        grid = probs
        if probs == "auto":
            grid = next((name for most, name in LOG_PROBS.items() if max(spec.widths) <= most), "uniform")
        if grid != "uniform":
            rules.append(Rule(site.name, {"quantizer": grid}))
    if gelu == "twin":
        rules += _twin_rules(resolved, known)
    rules += position_rules(model, sites, resolved, positions)
    return resolved.with_rules(*rules).resolve(sites)


def _twin_rules(plan: QuantPlan, sites: Iterable[Site]) -> Iterator[Rule]:
    """Twin grids at the activations that have an offset by default; with one width, where prefix tokens had another."""
    for site in sites:
        spec = plan.sites[site.name]
        if spec is None or site.role != "activation" or site.default.symmetric:
            continue
        changes: dict[str, Any] = {"quantizer": "twin", "signed": True, "symmetric": True}
        if (split := spec.token_bit_width) is not None and not split.ranks:
            changes |= {"bit_width": split.low, "token_bit_width": None}
        yield Rule(site.name, changes)


class _Clock:
    """Reports how long each part took."""

    def __init__(self, stage: Stage | None) -> None:
        self.stage, self.started = stage, time.perf_counter()

    def note(self, name: str) -> None:
        now = time.perf_counter()
        if self.stage is not None:
            self.stage(name, now - self.started)
        self.started = now
