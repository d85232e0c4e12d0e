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
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qvit.errors import UsageError
from qvit.measure.nonlinear import MEASURED, choose_forms
from qvit.methods.lsq import scale_rules
from qvit.methods.ptq.bias_correction import correct_biases, corrected_layers
from qvit.methods.ptq.head_folds import fold_heads
from qvit.methods.ptq.images import FirstImages, OfFirstSize, Progress
from qvit.methods.ptq.layer_rounding import round_layers
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
from qvit.plan.quant_plan import QuantPlan, Rule, plan_from
from qvit.plan.spec import Site
from qvit.training.config import validated

#: The largest width at which probabilities get a logarithmic grid unless another is asked for, and which.
LOG_PROBS = {3: "log2", 4: "log-sqrt2"}
#: The largest width at which the residual stream is rotated by default; wider grids gain from the heads alone.
ROTATED_UP_TO = 5
Stage = Callable[[str, float], None]


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
        rotate_and_even_out(source, few.told("reparameterizing", progress), rotate, fine=fine)
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


def rotate_and_even_out(model: nn.Module, batches: Iterable[Tensor], rotate: str, *, fine: bool) -> None:
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
