"""Patch-wise widths against plain ones at equal bit operations: DeiT-T, post-training, real images.

    python benchmarks/measure/patchwise.py --data DIR                               writes results/patchwise.json
    python benchmarks/measure/patchwise.py --data DIR --variants uniform,random,reversed,class --out FILE    controls

DIR holds `deit_tiny_patch16_224.safetensors` (timm keys), `tiny-imagenet-train-0.tar` (calibration and every choice),
`imagenet-sample.tar` (judged, and nothing else) and `imagenet-classes.txt`. For each budget four models share one
calibration: the uniform one, the same split in all blocks, the best split of equal average per block, and free splits.
What would be chosen without the judged images is the variant with the least divergence from the float model on training
images that neither calibrated nor chose a split; the file says which one it was. Controls have the split of `same`, but
another ranking: by chance, or the least attended tokens first. The control `class` has no important patch: the class
token alone has 8 bits, all patches the plain width, which exceeds the budget by a few thousandths.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from record import RESULTS, record_of
from scipy.stats import binomtest

from qvit.files import write_json
from qvit.measure.probe import Probe
from qvit.methods import pmq
from qvit.models.families import inspect_model, tokens
from qvit.models.families.tokens import rank_tokens
from qvit.plan.budget import parse_budget
from qvit.plan.quant_plan import QuantPlan
from qvit.runs.subject import Request, Subject, answers, open_subject, percent_equal

SHARES = {"average": (0.25, 0.5, 0.75), "free": (0.5,)}
GENERATOR = torch.Generator().manual_seed(0)
#: Rankings of the controls, in place of that by attention.
RANKINGS: dict[str, Callable[..., torch.Tensor]] = {
    "random": lambda scores, prefix=0: rank_tokens(torch.rand(scores.shape, generator=GENERATOR), prefix),
    "reversed": lambda scores, prefix=0: rank_tokens(-scores, prefix),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--budgets", default="6bit,4bit")
    parser.add_argument("--variants", default="uniform,same,average,free")
    parser.add_argument("--images", type=int, default=None)
    parser.add_argument("--score-images", type=int, default=16)
    parser.add_argument("--out", type=Path, default=RESULTS / "patchwise.json")
    options = parser.parse_args()
    folder: Path = options.data
    request = Request.create(
        model="deit_tiny_patch16_224",
        data=str(folder / "tiny-imagenet-train-0.tar"),
        eval_data=str(folder / "imagenet-sample.tar"),
        weights=str(folder / "deit_tiny_patch16_224.safetensors"),
        class_map=str(folder / "imagenet-classes.txt"),
        images=options.images,
        device="cpu",
    )
    subject, start, cpu = open_subject(request), time.perf_counter(), time.process_time()
    truth_of_float = answers(subject.model, subject.loader())
    record: dict[str, Any] = {
        **record_of(),
        "model": "deit_tiny_patch16_224 (fixed-point LayerNorm)",
        "images": len(subject.judged),
        "calibration_images": request.calibration_images,
        "score_images": options.score_images,
        "seed": request.seed,
        "top1_float": percent_equal(*truth_of_float),
        "budgets": [],
    }
    for budget in options.budgets.split(","):
        record["budgets"].append(
            measure(subject, budget, truth_of_float, options.score_images, options.variants.split(","))
        )
        seconds = time.perf_counter() - start, time.process_time() - cpu
        write_json(options.out, record | {"seconds": round(seconds[0], 1), "cpu_seconds": round(seconds[1], 1)})


def measure(
    subject: Subject,
    budget: str,
    of_float: tuple[torch.Tensor, torch.Tensor],
    score_images: int,
    variants: list[str],
) -> dict[str, Any]:
    """All variants at one budget."""
    cost = inspect_model(subject.model)
    limit = parse_budget(budget, cost)
    bits = max(b for b in range(2, 9) if cost.bit_operations(cost.uniform(b)) <= limit)
    plain = QuantPlan.preset(f"w{bits}a{bits}").resolve(cost.sites)
    used = subject.request.calibration_images
    scored = list(subject.calibration(images=score_images, skip=used))
    unseen = list(subject.calibration(images=64, skip=used + score_images))
    same = pmq.patchwise_plan(plain, cost, 0.5)
    plans = {"uniform": pmq.switchable(plain, cost).resolve(cost.sites)}
    plans |= {kind: same for kind in ("same", *RANKINGS) if kind in variants}
    if "class" in variants:
        widths = pmq.block_widths(plain, cost)
        alone = {block: pmq.Split(8, width, 0.0) for block, width in widths.items()}
        plans["class"] = pmq.split_plan(plain, cost, alone)
    seconds: dict[str, float] = {}
    for kind, shares in ((kind, shares) for kind, shares in SHARES.items() if kind in variants):
        start = time.perf_counter()
        candidates = {
            block: pmq.candidate_splits(width, shares, free=kind == "free")
            for block, width in pmq.block_widths(plain, cost).items()
        }
        damages = pmq.measure_splits(subject.model, plain, cost, candidates, subject.calibration(), scored)
        splits = pmq.allocate_splits(plain, cost, candidates, damages, limit)
        plans[kind] = pmq.split_plan(plain, cost, splits)
        seconds[kind] = round(time.perf_counter() - start, 1)
    probe = Probe(subject.model, subject.calibration(), plans["uniform"])
    with torch.no_grad():
        reference = [subject.model(batch).log_softmax(-1) for batch in unseen]
    rows, predicted = [], {}
    for kind, plan in plans.items():
        model = probe.under(plan)
        with mock.patch.object(tokens, "rank_tokens", RANKINGS.get(kind, rank_tokens)):
            divergence = pmq.divergence(model, unseen, reference)
            predicted[kind], truth = answers(model, subject.loader())
        right, plain_right = predicted[kind] == truth, predicted["uniform"] == truth
        gained, lost = int((right & ~plain_right).sum()), int((plain_right & ~right).sum())
        rows.append(
            {
                "variant": kind,
                "top1": percent_equal(predicted[kind], truth),
                "agreement": percent_equal(predicted[kind], of_float[0]),
                "divergence_on_training_images": divergence,
                "bit_operations": cost.bit_operations(plan.widths()),
                "only_this_right": gained,
                "only_uniform_right": lost,
                "p_value": sign_test(gained, lost),
                "splits": {
                    block: [spec.widths[0], spec.token_bit_width.low, spec.token_bit_width.share]
                    for block in pmq.token_blocks(cost)
                    if (spec := plan.sites[f"{block}.mlp.fc1.input"]) is not None and spec.token_bit_width is not None
                },
            }
        )
    chosen = min(rows, key=lambda row: row["divergence_on_training_images"])["variant"]
    return {
        "budget": budget,
        "budget_bit_operations": limit,
        "variants": rows,
        "chosen": chosen,
        "allocation_seconds": seconds,
    }


def sign_test(gained: int, lost: int) -> float:
    """Two-sided exact p-value that as many images are gained as lost by chance (McNemar's test)."""
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


if __name__ == "__main__":
    main()
