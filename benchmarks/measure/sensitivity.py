"""What a search costs and what its predictions are worth: `fisher` and `hessian` against one site at a time (`kl`).

On DeiT-T with real weights and photographs, where the folder of `QVIT_DATA` (or ../shared/data) is there:

    seconds      the whole of `measure_sensitivity` with `fisher`, calibration included, and the exact allocation
    exhaustive   `kl` takes a pass over the images for every head of every site at every width. A random sample of heads
                 is measured at some widths; the time of all is extrapolated by their number, as nobody waited for it
    agreement    that sample against the predictions from the same images: Spearman's rank correlation, in all and by
                 width; once more against the predictions of the timed search, from more images

    python benchmarks/measure/sensitivity.py                     writes benchmarks/results/sensitivity.json
    python benchmarks/measure/sensitivity.py --page out.html     draws the frontier, too
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import RESULTS, record_of

from qvit.allocate import allocate_plan, frontier_report
from qvit.data.open import calibration_batches, data_config_of, open_source
from qvit.files import write_json
from qvit.measure import Sensitivity, agreement_of, measure_sensitivity
from qvit.measure.kl import divergence
from qvit.measure.metric import Task
from qvit.measure.prefix import Prefix
from qvit.models.create import create_model
from qvit.models.families import inspect_model
from qvit.plan.quant_plan import QuantPlan

ROOT = Path(__file__).resolve().parents[2]
MODEL = "deit_tiny_patch16_224"


def folder() -> Path:
    found = Path(os.environ.get("QVIT_DATA") or ROOT.parent / "shared" / "data").expanduser()
    if not (found / f"{MODEL}.safetensors").is_file():
        sys.exit(f"no weights in {found}: set QVIT_DATA to a folder with {MODEL}.safetensors and imagenet-sample.tar")
    return found


def images_of(model: torch.nn.Module, data: Path, count: int, seed: int) -> list[torch.Tensor]:
    source = open_source(data / "imagenet-sample.tar", split="train", class_map=data / "imagenet-classes.txt")
    config = data_config_of(model)
    return list(calibration_batches(source, config, images=count, batch_size=min(16, count), seed=seed))


def sampled_kl(task: Task, options: argparse.Namespace) -> tuple[Sensitivity, dict[str, Any]]:
    """KL of a random sample of heads, all widths each, and the time that all would take."""
    probe, batches, widths = task.probe, task.batches, task.widths
    everything = [(site, head) for site in probe.quantizers for head in range(probe.heads(site))]
    chosen = random.Random(options.seed).sample(everything, options.heads)
    chosen.sort(key=everything.index)
    raw = {site: np.full((probe.heads(site), len(widths)), np.nan) for site, _ in chosen}
    started = time.monotonic()
    with torch.no_grad():
        prefix = Prefix(probe, batches)
        reference = [prefix.log_answers(index) for index in range(len(batches))]
        images = sum(map(len, batches))
        for site, head in chosen:
            prefix.leave_out(prefix.before(site), reference)
            for column, width in enumerate(widths):
                raw[site][head, column] = divergence(prefix, site, head, width, reference) / images
    seconds = time.monotonic() - started
    passes, total = len(chosen) * len(widths), len(everything) * len(options.all_widths)
    scale = options.images / images
    found = Sensitivity.from_raw(
        raw, model=MODEL, metric="kl", images=images, seed=options.seed, seconds=seconds, widths=widths
    )
    facts = {
        "heads_measured": len(chosen),
        "heads": len(everything),
        "widths_measured": list(widths),
        "images_measured": images,
        "passes_measured": passes,
        "seconds_measured": round(seconds, 1),
        "passes_of_all": total,
        "images_of_all": options.images,
        "seconds_of_all_extrapolated": round(seconds / passes * total * scale),
    }
    return found, facts


def compared(predicted: Sensitivity, measured: Sensitivity) -> dict[str, Any]:
    """`agreement_of` without the heads that the sample left out."""
    data = agreement_of(predicted, measured)
    rows = [row for row in data["rows"] if not np.isnan(row[4])]
    raw = {site: values[~np.isnan(values).any(1)] for site, values in measured.raw.items()}
    kept = {site: predicted.raw[site][~np.isnan(measured.raw[site]).any(1)] for site in measured.raw}
    common = {"model": MODEL, "seed": 0, "seconds": 0.0}
    ours = Sensitivity.from_raw(
        kept, metric=predicted.metric, images=predicted.images, widths=predicted.widths, **common
    )
    theirs = Sensitivity.from_raw(raw, metric="kl", images=measured.images, widths=measured.widths, **common)
    return agreement_of(ours, theirs) | {"rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=32, help="for the timed search")
    parser.add_argument("--kl-images", type=int, default=8)
    parser.add_argument("--heads", type=int, default=60, help="how many heads of how many sites `kl` measures")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--page", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS / "sensitivity.json")
    options = parser.parse_args()
    options.all_widths = tuple(range(2, 9))
    torch.set_num_threads(options.threads)
    data = folder()
    model = create_model(MODEL, weights=data / f"{MODEL}.safetensors").eval()
    cost = inspect_model(model)

    searches, processor_start = {}, time.process_time()
    images = images_of(model, data, options.images, options.seed)
    found = measure_sensitivity(model, images, seed=options.seed)
    searches["fisher"] = {
        "images": options.images,
        "widths": list(found.widths),
        "seconds": round(found.seconds, 1),
        "processor_seconds": round(time.process_time() - processor_start, 1),
    }
    started = time.monotonic()
    allocate_plan(cost, found, "4bit")
    searches["fisher"]["seconds_of_exact_allocation_at_4bit"] = round(time.monotonic() - started, 2)

    few, widths = images_of(model, data, options.kl_images, options.seed), (2, 3, 4, 6, 8)
    predictions = {}
    for metric in ("fisher", "hessian"):
        predictions[metric] = measure_sensitivity(model, few, metric=metric, widths=widths, seed=options.seed)
    task = Task("kl", model, widths, QuantPlan("default").resolve(cost.sites, MODEL), few)
    measured, exhaustive = sampled_kl(task, options)
    agreements = {metric: compared(predicted, measured) for metric, predicted in predictions.items()}
    agreements[f"fisher_from_{options.images}_images"] = compared(found, measured)
    load = os.getloadavg()[0]
    result = {
        **record_of(),
        "model": f"{MODEL} (fixed-point LayerNorm)",
        "images": "500 ImageNet training images, a random choice of them",
        "hardware": f"CPU, {platform.machine()}, {os.cpu_count()} cores, {options.threads} threads, "
        f"load average {load:.1f}",
        "seed": options.seed,
        "searches": searches,
        "exhaustive_kl": exhaustive,
        "agreement": agreements,
    }
    write_json(options.out, result)
    summary = {name: {k: v for k, v in own.items() if k != "rows"} for name, own in agreements.items()}
    sys.stdout.write(json.dumps(result | {"agreement": summary}, indent=1) + "\n")
    if options.page is not None:
        from qvit.report import write_frontier_page

        chosen = [(budget, allocate_plan(cost, found, budget).widths()) for budget in ("3bit", "4bit", "6bit")]
        report = frontier_report(cost, found, chosen) | {"agreement": agreements["fisher"]}
        write_frontier_page(report, options.page)


if __name__ == "__main__":
    main()
