"""Patch-wise quantization of a float model from start to result, and the picture of which patches got which bits.

    plain plan → split per block (methods/pmq.py) → calibrate once → judge float, plain and patch-wise → files

What is chosen is chosen on training images: scales on the calibration images, splits by their divergence from the float
model on other training images of the same draw. The judged images decide nothing.

OUT/plan.json        the plan, with token groups
OUT/cost.json        its costs per site, token groups counted
OUT/patches.json     on request, some judged images and the important patches of every block
OUT/patchwise.json   the result, written last
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from qvit.errors import QvitError, UsageError, nearest
from qvit.files import write_json
from qvit.locks import writing
from qvit.measure.probe import Probe
from qvit.methods.pmq import (
    HIGH,
    LOW,
    Split,
    allocate_splits,
    block_widths,
    candidate_splits,
    has_class_width,
    measure_splits,
    patchwise_plan,
    split_plan,
    switchable,
)
from qvit.models.families import inspect_model
from qvit.models.families.tokens import patch_grid
from qvit.plan.budget import format_bops, parse_budget
from qvit.plan.cost import CostModel
from qvit.plan.quant_plan import QuantPlan, plan_from
from qvit.plan.spec import TensorSpec
from qvit.quantizers import quantizers_of
from qvit.runs.directory import COST, PATCHES, PLAN
from qvit.runs.subject import Progress, Request, Subject, answers, open_subject, percent_equal
from qvit.training.log import Stopwatch

RESULT = "patchwise.json"
#: Splits measured so far, until the result is there: a call that was interrupted goes on from them.
MEASURED = "splits.partial"
ALLOCATIONS = ("same", "average", "free")
SHARES = (0.25, 0.5, 0.75)


def patchwise(
    request: Request,
    out: str | Path,
    *,
    budget: str,
    share: float | None = None,
    allocation: str = "same",
    plan: QuantPlan | str | Path | None = None,
    key: bool = False,
    score_images: int = 32,
    picture: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Quantizes a model patch-wise and judges it beside the plain plan.

    Args:
        request: Model and images.
        out: The directory.
        budget: BOPs, as for `parse_budget`.
        share: Important share of the tokens; None: 0.5, or the best of 0.25, 0.5 and 0.75 where splits are allocated.
        allocation: `same`: every block has the narrowest split that keeps its average. `average`: for every block the
            best that keeps its average, or none. `free`: the best set of splits within the budget.
        plan: The plain plan; None: the widest uniform one within the budget. A plan with token groups is taken as it
            is; where splits are allocated, one with a width for the class token alone is split further.
        key: Whether the keys are split, too.
        score_images: How many training images the splits are chosen by; others than the calibration images.
        picture: How many judged images to draw.
        overwrite: Replaces a result that is there.
        progress: Gets a text, the images done and the images in all.

    Returns:
        The content of `patchwise.json`: top-1 of float, plain and patch-wise in percent, agreement with float, BOPs.

    Raises:
        UsageError: Options that cannot be meant, a share without widths, an occupied directory.
        QvitError: An impossible budget; the smallest and the largest possible are shown.
    """
    if allocation not in ALLOCATIONS:
        meant = nearest(allocation, ALLOCATIONS)
        raise UsageError(f"unknown allocation '{allocation}'{meant} ({', '.join(ALLOCATIONS)})")
    folder = Path(out)
    with writing(folder):
        if (folder / RESULT).exists() and not overwrite:
            raise UsageError(f"{folder} holds a result: choose another --out, or --overwrite")
        watch, notify = Stopwatch(), progress or (lambda *_: None)
        subject = open_subject(request)
        cost = inspect_model(subject.model)
        limit = parse_budget(budget, cost)
        plain = _plain_plan(plan, cost, limit)
        with watch("allocation"):
            file = folder / MEASURED
            chosen = _chosen_plan(subject, cost, plain, limit, allocation, share, key, score_images, notify, file)
        given = plain
        if _groups(given):
            plain = _plain_plan(None, cost, limit)
        chosen = replace(chosen, model=request.model)
        with watch("calibration"):
            plain_plan = switchable(plain, cost)
            probe = Probe(subject.model, subject.calibration(), plain_plan)
            uniform = probe.under(plain_plan)
            if given is not plain:  # whose grids may be others
                probe = Probe(subject.model, subject.calibration(), chosen)
            model = probe.under(chosen)
        found: dict[str, Tensor] = {}
        truth, count = torch.zeros(0), len(subject.judged)
        for number, (name, own) in enumerate((("float", subject.model), ("uniform", uniform), ("patchwise", model))):
            with watch(name):
                found[name], truth = answers(
                    own, subject.loader(), lambda n, name=name, at=number * count: notify(name, at + n, 3 * count)
                )
        bit_operations = cost.bit_operations(chosen.widths())
        result = {
            "model": request.model,
            "top1_float": percent_equal(found["float"], truth),
            "top1": percent_equal(found["patchwise"], truth),
            "agreement": percent_equal(found["patchwise"], found["float"]),
            "bit_operations": bit_operations,
            "budget": limit,
            "weight_bytes": cost.weight_bytes(chosen.widths()),
            "uniform_top1": percent_equal(found["uniform"], truth),
            "uniform_agreement": percent_equal(found["uniform"], found["float"]),
            "uniform_bit_operations": cost.bit_operations(plain.widths()),
            "only_patchwise_right": int(((found["patchwise"] == truth) & (found["uniform"] != truth)).sum()),
            "only_uniform_right": int(((found["uniform"] == truth) & (found["patchwise"] != truth)).sum()),
            "allocation": allocation,
            "splits": _splits_of(chosen),
            "score_images": 0 if allocation == "same" else score_images,
            "seconds": watch.record(),
            "settings": subject.settings(),
        }
        chosen.save(folder / PLAN)
        write_json(folder / COST, cost.report(chosen.widths(), model=request.model, plan=chosen.name))
        if picture:
            write_patches(subject, model, folder, picture, chosen.name)
        write_json(folder / RESULT, result)
        (folder / MEASURED).unlink(missing_ok=True)
        return result


def _plain_plan(plan: QuantPlan | str | Path | None, cost: CostModel, limit: int) -> QuantPlan:
    """The plan that is split; it must fit the budget."""
    if plan is None:
        fitting = [bits for bits in range(LOW, HIGH + 1) if cost.bit_operations(cost.uniform(bits)) <= limit]
        bits = max(fitting, default=0)
        if not bits:
            lowest, highest = (cost.bit_operations(cost.uniform(b)) for b in (LOW, HIGH))
            raise QvitError(
                f"no uniform plan fits into {format_bops(limit)} bit operations: with 8 bits in the first and the last "
                f"layer this model takes between {format_bops(lowest)} and {format_bops(highest)}; give a --plan"
            )
        return QuantPlan.preset(f"w{bits}a{bits}").resolve(cost.sites)
    resolved = plan_from(plan).resolve(cost.sites)
    needed = cost.bit_operations(resolved.widths())
    if needed > limit:
        raise QvitError(
            f"plan '{resolved.name}' takes {format_bops(needed)} bit operations, the budget is {format_bops(limit)}"
        )
    return resolved


def _chosen_plan(
    subject: Subject,
    cost: CostModel,
    plain: QuantPlan,
    limit: int,
    allocation: str,
    share: float | None,
    key: bool,
    score_images: int,
    notify: Progress,
    file: Path,
) -> QuantPlan:
    """The patch-wise plan that the options ask for."""
    groups = _groups(plain)
    if groups and (allocation == "same" or not all(map(has_class_width, groups))):
        return plain
    if allocation == "same":
        return patchwise_plan(plain, cost, 0.5 if share is None else share, key=key)
    shares = SHARES if share is None else (share,)
    candidates = {
        block: candidate_splits(width, shares, free=allocation == "free")
        for block, width in block_widths(plain, cost, key=key).items()
    }
    damages = measure_splits(
        subject.model,
        plain,
        cost,
        candidates,
        subject.calibration(),
        list(subject.calibration(images=score_images, skip=subject.request.calibration_images)),
        key=key,
        progress=lambda done, total: notify("measuring splits", done, total),
        partial=file,
    )
    room = limit if allocation == "free" else cost.bit_operations(plain.widths())
    splits = allocate_splits(plain, cost, candidates, damages, room, key=key)
    return split_plan(plain, cost, splits, key=key, name=f"{plain.name}-patchwise-{allocation}")


def _groups(plan: QuantPlan) -> list[TensorSpec]:
    """What a resolved plan says of the tensors whose tokens differ in width."""
    return [spec for spec in plan.sites.values() if spec is not None and spec.token_bit_width is not None]


def _splits_of(plan: QuantPlan) -> dict[str, dict[str, Any]]:
    """The splits of a plan by block, read at the input of fc1."""
    found = {}
    for name, spec in plan.sites.items():
        if spec is not None and name.endswith(".mlp.fc1.input"):
            split = spec.token_bit_width
            high = (split and split.high) or spec.widths[0]
            own = Split(high, split.low if split else high, split.share if split else 1.0)
            found[name.removesuffix(".mlp.fc1.input")] = asdict(own)
    return found


@torch.no_grad()
def important_patches(model: nn.Module, images: Tensor) -> dict[str, tuple[Tensor, int, int]]:
    """Which patches are important to each block's MLP.

    Args:
        model: A calibrated model with token groups.
        images: (B, channels, height, width).

    Returns:
        By block: bool (B, rows, columns), and the widths of important and other patches.
    """
    ranks: dict[str, Tensor] = {}
    specs: dict[str, TensorSpec] = {}
    hooks = []

    def note(block: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, Tensor]) -> None:
            ranks[block] = inputs[1]

        return hook

    for site, quantizer in quantizers_of(model):
        if site.endswith(".mlp.fc1.input") and quantizer.spec.token_bit_width is not None:
            block = site.removesuffix(".mlp.fc1.input")
            specs[block] = quantizer.spec
            if quantizer.spec.token_bit_width.ranks:
                hooks.append(quantizer.register_forward_pre_hook(note(block)))
    try:
        model.eval()(images)
    finally:
        for hook in hooks:
            hook.remove()
    found = {}
    for block, spec in specs.items():
        split, rank = spec.token_bit_width, ranks.get(block)
        assert split is not None
        grid = patch_grid(model, block, (images.shape[2], images.shape[3]))
        if rank is None:
            important = torch.zeros(len(images), math.prod(grid), dtype=torch.bool)
        else:
            prefix = int((rank[0] < 0).sum())
            important = rank[:, prefix:] < split.important(rank.shape[1])
        found[block] = (important.unflatten(1, grid), split.high or spec.widths[0], split.low)
    return found


def write_patches(subject: Subject, model: nn.Module, folder: Path, count: int, plan: str) -> None:
    """Writes `patches.json` of the first judged images."""
    pictures = _pictures(subject, model, count)
    write_json(folder / PATCHES, {"model": subject.options.model, "plan": plan, "images": pictures})


def _pictures(subject: Subject, model: nn.Module, count: int) -> list[dict[str, Any]]:
    """The first judged images as PNG, with the important patches of every block."""
    images = torch.cat([batch for batch, _ in _first(subject, count)])[:count]
    found = important_patches(model, images)
    mean, std = (torch.tensor(subject.data_config[name]).view(-1, 1, 1) for name in ("mean", "std"))
    pictures = []
    for number, image in enumerate(images.cpu()):
        layers = []
        for block, (important, high, low) in found.items():
            marks = "".join("1" if mark else "0" for mark in important[number].flatten().tolist())
            grid = {"rows": important.shape[1], "columns": important.shape[2], "important": marks}
            layers.append({"layer": block, "high": high, "low": low} | grid)
        pixels = ((image * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
        pictures.append({"png": _png(pixels), "height": pixels.shape[1], "width": pixels.shape[2], "layers": layers})
    return pictures


def _first(subject: Subject, count: int) -> Sequence[tuple[Tensor, Tensor]]:
    taken, seen = [], 0
    for batch in subject.loader():
        taken.append(batch)
        seen += len(batch[0])
        if seen >= count:
            break
    return taken


def _png(pixels: Tensor) -> str:
    """A picture (channels, height, width) of bytes as base64 PNG."""
    array = pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode()
