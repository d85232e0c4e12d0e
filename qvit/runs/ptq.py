"""One post-training quantization from a config to its directory: the run behind `qvit ptq`.

    open images → float model → [sensitivity → allocation] → ptq → score both models → files

The directory is that of `runs/directory.py` (without checkpoints), so `qvit evaluate`, `report`, `plan show` and
`train --plan` take it. Calibration images are drawn by the seed from the training images; the test images are opened
for the final numbers alone, and that no image is in both is checked by archive and name.

A budget is a preset such as `w8a8`: that plan; or `6bit`, `21.455G`, `0.25`: bit operations. Without a metric only a
uniform plan can be made, so bit operations need one; with a metric, widths are allocated to sites within the budget.
"""

from __future__ import annotations

import copy
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qvit.allocate import allocate_plan
from qvit.data.images import ImageSource
from qvit.data.loading import Source
from qvit.data.open import calibration_batches, data_config_of, eval_loader, open_data
from qvit.errors import QvitError, UsageError
from qvit.files import write_json
from qvit.measure import Sensitivity, measure_sensitivity
from qvit.methods.ptq.method import FirstImages, PTQOptions, ptq_plan
from qvit.methods.ptq.method import ptq as quantize_after_training
from qvit.methods.ptq.reconstruction import Progress
from qvit.methods.ptq.reparameterization import reparameterize
from qvit.models.convert import plan_of
from qvit.models.create import WEIGHTS_FILE
from qvit.models.families import inspect_model
from qvit.plan.budget import parse_budget
from qvit.plan.cost import CostModel
from qvit.plan.quant_plan import QuantPlan, plan_from
from qvit.runs.directory import CONFIG, COST, LOG, PLAN, RESULT, SENSITIVITY, claimed
from qvit.runs.run import create_float_model, run_record
from qvit.training.checkpoint import save_weights, seed_everything
from qvit.training.config import TrainConfig, validated
from qvit.training.processes import Processes

_PRESET = re.compile(r"w\d+a\d+", re.IGNORECASE)
_BITS = re.compile(r"(\d+)\s*bits?", re.IGNORECASE)


def ptq(
    config: TrainConfig,
    out: str | Path,
    *,
    overwrite: bool = False,
    notify: Callable[[str], None] = lambda _: None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Quantizes a model after training and scores it beside its float original.

    Args:
        config: Options with method `ptq`; those of training (epochs, learning rates ...) play no part.
        out: The run's directory; must not hold a run, unless `overwrite`.
        overwrite: Deletes the run that is there.
        notify: Receives one line per stage.
        progress: Called after each step of a reconstruction.

    Returns:
        The content of `result.json`, see docs/cli.md: accuracies in percent, BOPs, bytes, seconds per stage.
    """
    if config.method != "ptq":
        raise UsageError(f"qvit.ptq is for method 'ptq', not '{config.method}'")
    options = validated(PTQOptions, config.method_options)
    processes = Processes(config.device)
    if processes.world_size > 1:
        raise UsageError("post-training quantization takes one process: start it without a launcher")
    if config.threads:
        torch.set_num_threads(config.threads)
    run = Path(out)
    with claimed(run, overwrite):
        return _execute(config, options, run, processes, notify, progress)


def _execute(
    config: TrainConfig,
    options: PTQOptions,
    run: Path,
    processes: Processes,
    notify: Callable[[str], None],
    progress: Progress | None,
) -> dict[str, Any]:
    started = time.perf_counter()
    bundle = open_data(
        config.data, test_data=config.eval_data, class_map=config.class_map, test_share=config.test_share
    )
    require_apart(bundle.train, bundle.test)
    notify(bundle.note)
    seed_everything(config.seed)
    model = create_float_model(config, bundle.num_classes, load=True).to(processes.device).eval()
    if config.weights is None and not config.pretrained:
        notify("no --weights and no --pretrained: the float model is untrained, and so is what is made of it")
    images = CalibrationImages(bundle.train, config, model, processes.device, options)
    cost = inspect_model(model)
    seconds: dict[str, float] = dict.fromkeys(("calibrate", "sensitivity", "allocate", "reconstruct"), 0.0)
    record = run_record(config, bundle, processes)

    def keep(sensitivity: Sensitivity) -> None:
        write_json(run / CONFIG, record)
        sensitivity.save(run / SENSITIVITY)

    plan, metric = _plan(keep, config, options, cost, model, images, seconds, notify)
    notify(f"calibrating on {config.calibration_images} images" + _recon_note(options))

    def note(stage: str, took: float) -> None:
        seconds["reconstruct" if stage == "reconstruct" else "calibrate"] += took

    quantized = quantize_after_training(
        model,
        plan,
        images,
        observer=options.observer,
        weights=options.weights,
        probs=options.probs,
        heads=options.heads,
        reparameterize=options.reparameterize,
        bias_correction=options.bias_correction,
        reconstruct=options.reconstruction(config.seed),
        calibration_images=config.calibration_images,
        stage=note,
        progress=progress,
    )
    notify(f"scoring both models on {len(bundle.test)} images")
    loader = eval_loader(
        bundle.test,
        data_config_of(model),
        batch_size=config.batch_size,
        workers=config.workers,
        device=processes.device,
        on_bad_image=config.on_bad_image,
    )
    scores = score_beside(quantized, model, loader)
    final = plan_of(quantized, plan.name, config.model)
    report = cost.report(final.widths(), model=config.model, plan=final.name)
    result = {
        "model": config.model,
        "method": config.method,
        "accuracy": scores["top1"],
        "float_accuracy": scores["top1_float"],
        **scores,
        "budget": config.budget,
        "metric": metric,
        "bit_operations": report["bit_operations"],
        "weight_bytes": report["weight_bytes"],
        "seconds": {stage: round(took, 3) for stage, took in seconds.items()},
        "seconds_total": round(time.perf_counter() - started, 2),
        "seed": config.seed,
        "calibration_images": config.calibration_images,
        "reconstruction": options.reconstruction_record(),
    }
    _write(run, record, final, report, quantized, result)
    return result


def _recon_note(options: PTQOptions) -> str:
    return f", then reconstructing blocks on {options.recon_images} images" if options.reconstruct else ""


def _write(
    run: Path,
    record: dict[str, Any],
    plan: QuantPlan,
    report: dict[str, Any],
    model: nn.Module,
    result: dict[str, Any],
) -> None:
    """All files of the run, the config first and the result last."""
    write_json(run / CONFIG, record)
    plan.save(run / PLAN)
    write_json(run / COST, report)
    (run / LOG).write_text(json.dumps({"event": "start", "step": 0, "time": time.time()}) + "\n", encoding="utf-8")
    save_weights(run / WEIGHTS_FILE, model)
    write_json(run / RESULT, result)


def _plan(
    keep: Callable[[Sensitivity], None],
    config: TrainConfig,
    options: PTQOptions,
    cost: CostModel,
    model: nn.Module,
    images: CalibrationImages,
    seconds: dict[str, float],
    notify: Callable[[str], None],
) -> tuple[QuantPlan, str | None]:
    """The plan that a budget or a plan file stands for, and the metric behind its widths; `keep` gets what it found."""
    if (config.budget is None) == (config.plan is None):
        raise UsageError("give either --budget, such as w8a8 or 6bit, or --plan, a plan file")
    if config.plan is not None:
        if options.metric is not None or options.sensitivity is not None:
            raise UsageError("a --plan has its widths: leave out --metric and --sensitivity")
        return plan_from(config.plan).resolve(cost.sites), None
    budget = (config.budget or "").strip()
    bits = _BITS.fullmatch(budget)
    if options.metric is None and options.sensitivity is None:
        if bits is not None:
            parse_budget(budget, cost)
            return QuantPlan.preset(f"w{bits[1]}a{bits[1]}"), None
        if _PRESET.fullmatch(budget):
            return QuantPlan.preset(budget), None
        parse_budget(budget, cost)
        raise UsageError(
            f"the budget '{budget}' is met by mixed widths: say how to choose them with --metric fisher, kl or hessian"
        )
    started = time.perf_counter()
    sensitivity = _sensitivity(config, options, cost, model, images, notify)
    measured = time.perf_counter()
    keep(sensitivity)
    limit = _limit(budget, cost)
    narrowest = options.min_width or (3 if cost.bit_operations(cost.uniform(3)) <= limit else 2)
    allowed = sensitivity.at_widths(width for width in sensitivity.widths if width >= narrowest)
    boundary = None if options.boundary == "free" else options.boundary
    plan = allocate_plan(cost, allowed, limit, boundary=boundary, name=f"{sensitivity.metric}-{budget}")
    seconds["sensitivity"] += measured - started
    seconds["allocate"] += time.perf_counter() - measured
    return plan, sensitivity.metric


def _limit(budget: str, cost: CostModel) -> float:
    """Bit operations of a budget; for a preset those of its plan."""
    if _PRESET.fullmatch(budget):
        return cost.bit_operations(QuantPlan.preset(budget).resolve(cost.sites).widths())
    return parse_budget(budget, cost)


def _sensitivity(
    config: TrainConfig,
    options: PTQOptions,
    cost: CostModel,
    model: nn.Module,
    images: CalibrationImages,
    notify: Callable[[str], None],
) -> Sensitivity:
    """That of a file, or one measured on the reparameterized model and the grids it will have."""
    if options.sensitivity is not None:
        found = Sensitivity.load(options.sensitivity)
        if options.metric not in (None, found.metric):
            raise UsageError(f"{options.sensitivity} was measured by '{found.metric}', not by '{options.metric}'")
        return found
    assert options.metric is not None
    few = FirstImages(images, min(images.few, options.sensitivity_images or images.few))
    notify(f"measuring sensitivities ({options.metric}) on {few.images} images")
    source = copy.deepcopy(model)
    if options.reparameterize:
        reparameterize(source, FirstImages(images, images.few))
    limit = _limit((config.budget or "").strip(), cost)
    uniform = next((n for n in range(2, 8) if cost.bit_operations(cost.uniform(n)) >= limit), 8)
    grids = ptq_plan(source, f"w{uniform}a{uniform}", weights=options.weights, probs=options.probs, heads=options.heads)
    return measure_sensitivity(source, few, metric=options.metric, plan=grids, seed=config.seed)


class CalibrationImages:
    """The calibration images of a run, read again each time they are iterated; the same ones each time.

    The first `calibration_images` of them are what calibration sees, a reconstruction sees all.
    """

    def __init__(self, source: Source, config: TrainConfig, model: nn.Module, device: str, options: PTQOptions) -> None:
        count = config.calibration_images
        self.count = max(count, options.recon_images) if options.reconstruct else count
        self.settings: dict[str, Any] = {
            "batch_size": min(32, count),
            "seed": config.seed,
            "workers": config.workers,
            "device": device,
            "on_bad_image": config.on_bad_image,
        }
        self.source, self.data_config, self.few = source, data_config_of(model), count
        iter(self)  # too few images are an error before anything is computed

    def __iter__(self) -> Iterator[Tensor]:
        return calibration_batches(self.source, self.data_config, images=self.count, **self.settings)


def require_apart(calibration: Source, evaluation: Source) -> None:
    """Raises QvitError if images are in both sources: the same name in the same folder or archive."""
    if not isinstance(calibration, ImageSource) or not isinstance(evaluation, ImageSource):
        if calibration.name == evaluation.name:
            raise QvitError(f"calibration and evaluation images are the same, {evaluation.name}: give others to one")
        return
    seen = _identities(calibration)
    common = seen & _identities(evaluation)
    if common:
        raise QvitError(
            f"{len(common)} of {len(evaluation)} evaluation images are calibration images too, first "
            f"'{min(common)}': calibrate on images that are not evaluated"
        )


def _identities(source: ImageSource) -> set[str]:
    """The place of every image: its name below its folder or archive."""
    origin = Path(source.store.origin).expanduser()
    root = str(origin.resolve()) if origin.exists() else str(origin)
    return {f"{root}/{source.filename(index)}" for index in range(len(source))}


@torch.no_grad()
def score_beside(model: nn.Module, reference: nn.Module, loader: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Scores a model and the float model on the same images.

    Returns:
        `{"top1_float", "top1", "top5", "agreement", "images"}` in percent; agreement is the share of images with the
        same first answer, right or wrong.

    Raises:
        QvitError: If there are no images, or logits are not finite.
    """
    model.eval()
    counts, images = torch.zeros(4, dtype=torch.int64), 0
    for batch, targets in loader:
        logits, exact = model(batch), reference(batch)
        if not bool(torch.isfinite(logits).all()) or not bool(torch.isfinite(exact).all()):
            raise QvitError(f"NaN or infinite logits among images {images} to {images + len(batch) - 1}")
        answers, right = logits.topk(min(5, logits.shape[-1]), dim=-1).indices, exact.argmax(-1)
        hits = (right == targets, answers[:, 0] == targets, (answers == targets.unsqueeze(-1)).any(-1))
        counts += torch.stack([row.sum() for row in (*hits, answers[:, 0] == right)]).cpu()
        images += len(batch)
    if not images:
        raise QvitError("no images to evaluate")
    names = ("top1_float", "top1", "top5", "agreement")
    return {name: 100.0 * count / images for name, count in zip(names, counts.tolist(), strict=True)} | {
        "images": images
    }
