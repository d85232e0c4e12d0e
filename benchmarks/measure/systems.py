r"""Post-training systems beside each other at equal bit operations, on real images: accuracy and seconds of search.

    uniform       one width everywhere: the plan w6a6, w4a4, w3a3
    log2, twin    the same with the probabilities of FQ-ViT; with the grids of PTQ4ViT
    similarity    the same with the scales of Liu et al. (2021); `ranking`: and with their ranking loss
    fisher ...    mixed widths within the same budget by that metric; `lampq` in three rounds; `greedy`: Fisher's by
                  greedy descent
    pmq           method `pmq`: widths per head, 8 bits for the class token where the program gives them, and two widths
                  for the patches of an activation, by their importance
    plain, class  the same without the class token's width and the patches'; without the patches'
    chance        the plan of `pmq` with patches ranked by chance, everything else made anew
    float-glue    a uniform width, LayerNorm, softmax and GELU in float; `i-bert`, `i-vit`: all three on integers by
                  those forms; `fq-vit`: its softmax, the rest of `i-vit`; `sqnr`: the best form of each place

An archive of class folders is cut into two halves by class (`ptq_halves.py`); every arm calibrates and chooses on one
half and is scored on the other, both ways, and McNemar's p is that of all scored images, each scored once, against the
first arm. At 3 bits the narrowest width is 2: at a width of 3 that budget has nothing to choose from. A sensitivity is
measured once per metric and way, for all budgets and for all arms of `pmq`. What measuring a metric takes is processor
time: that of the run which did it, less that of the same arm at another budget, which did not. Every run has a
directory of its own; runs that are there are not made again.

    python benchmarks/measure/systems.py --weights W.safetensors --images IMAGES.tar --class-map classes.txt
    python benchmarks/measure/systems.py ... --arms plain class pmq chance --out benchmarks/results/pmq_arms.json
    python benchmarks/measure/systems.py ... --budgets 8bit 6bit --arms float-glue i-bert i-vit fq-vit sqnr
        --out benchmarks/results/nonlinear.json
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any
from unittest import mock

import torch
from patchwise import RANKINGS, sign_test
from ptq import config_of
from ptq_halves import add_subject, halves, head_of
from record import RESULTS

from qvit.files import write_json
from qvit.models.families import tokens
from qvit.runs.directory import CONFIG, PLAN, RESULT, SENSITIVITY
from qvit.runs.finished import load_run
from qvit.runs.run import train
from qvit.runs.subject import answers, open_subject
from qvit.training.config import TrainConfig

UNIFORM: dict[str, dict[str, Any]] = {
    "uniform": {},
    "log2": {"probs": "log2"},
    "twin": {"probs": "twin", "gelu": "twin"},
    "similarity": {"scale_search": "similarity"},
    "ranking": {"scale_search": "ranking"},
}
#: Mixed widths by a metric of `qvit ptq`, that of the arm's name where none is given.
MIXED: dict[str, dict[str, Any]] = {
    "fisher": {},
    "greedy": {"metric": "fisher", "solver": "greedy"},
    "hessian": {},
    "relevance": {},
    "mix-qvit": {"sensitivity_images": 16},
    "nuclear-norm": {},
    "ompq": {},
    "topological-entropy": {},
    "lampq": {"rounds": 3},
    "kl": {"sensitivity_images": 16},
}
PMQ: dict[str, dict[str, Any]] = {
    "plain": {"class_token": "off", "patches": False},
    "class": {"class_token": 8, "patches": False},
    "pmq": {"class_token": 8, "patches": True},
    "chance": {},
}
#: Integer forms of LayerNorm, softmax and GELU at one width everywhere.
GLUE: dict[str, str | None] = {
    "float-glue": None,
    "i-bert": "i-bert",
    "i-vit": "i-vit",
    "fq-vit": "layernorm=i-vit,softmax=fq-vit,gelu=i-vit",
    "sqnr": "sqnr",
}
#: The predicted and the true class of every scored image, and seconds of the processor, in the directory of a run.
ANSWERS = "answers.json"


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    parts = halves(options.images, options.runs, options.split_seed)
    data: dict[str, Any] = {**head_of(options), "rows": []}
    for budget in options.budgets:
        first: list[list[bool]] = []
        for arm in options.arms:
            ways = [measure(options, budget, arm, parts, way) for way in options.ways]
            first = first or [way["right"] for way in ways]
            data["rows"].append({"budget": budget, "arm": arm, **summed_up(ways, first)})
            sys.stderr.write(json.dumps(data["rows"][-1]) + "\n")
            write_json(options.out, data)
    for row in data["rows"]:
        own = "plain" if row["arm"] in PMQ else metric_of(row["arm"])
        took = [metric_seconds(options, own, way) for way in options.ways if own in MIXED or own in PMQ]
        if took and not math.isnan(sum(took)):
            row["metric_seconds"] = mean(took)
    write_json(options.out, data)


def measure(options: argparse.Namespace, budget: str, arm: str, parts: tuple[Path, Path], way: int) -> dict[str, Any]:
    """The result of an arm, one way, and which of the scored images it is right about."""
    folder = options.runs / f"seed{options.seed}-way{way}"
    run = folder / f"{budget}-{arm}"
    shared = folder / f"sensitivity-{'pmq' if arm in PMQ else metric_of(arm)}.json"
    config = config_of(options, budget, {}, str(parts[way]), str(parts[1 - way]))
    config = TrainConfig.create(**(config.model_dump() | changes_of(arm, budget, folder, shared)))
    ranking = RANKINGS["random"] if arm == "chance" else tokens.rank_tokens
    if not (run / ANSWERS).is_file():
        started = time.process_time()
        with mock.patch.object(tokens, "rank_tokens", ranking):
            if not (run / RESULT).is_file():
                train(config, run, overwrite=True, quiet=True, notify=lambda line: print(line, file=sys.stderr))
            took = time.process_time() - started
            predicted, truth = answers(load_run(run), open_subject(config).loader())
        found = {"predicted": predicted.tolist(), "truth": truth.tolist(), "processor_seconds": round(took, 1)}
        write_json(run / ANSWERS, found)
    if (run / SENSITIVITY).is_file() and not shared.is_file():
        shared.write_bytes((run / SENSITIVITY).read_bytes())
    result, found = (json.loads((run / name).read_text(encoding="utf-8")) for name in (RESULT, ANSWERS))
    right = [own == true for own, true in zip(found["predicted"], found["truth"], strict=True)]
    return result | {"right": right, "processor_seconds": found["processor_seconds"]}


def metric_seconds(options: argparse.Namespace, arm: str, way: int) -> float:
    """Processor time of measuring a metric; NaN where no other budget was run."""
    measured, given = [], []
    for run in sorted((options.runs / f"seed{options.seed}-way{way}").glob(f"*bit-{arm}")):
        if (run / ANSWERS).is_file():
            took = json.loads((run / ANSWERS).read_text(encoding="utf-8"))["processor_seconds"]
            config = json.loads((run / CONFIG).read_text(encoding="utf-8"))
            (given if config["method_options"].get("sensitivity") else measured).append(took)
    return measured[0] - mean(given) if measured and given else math.nan


def changes_of(arm: str, budget: str, folder: Path, shared: Path) -> dict[str, Any]:
    """What of the config of a uniform run an arm changes."""
    if arm == "chance":
        return {"budget": None, "plan": str(folder / f"{budget}-pmq" / PLAN)}
    if arm in UNIFORM or arm in GLUE:
        width = budget.removesuffix("bit")
        return {
            "budget": f"w{width}a{width}",
            "method_options": UNIFORM.get(arm, {}),
            "nonlinear": GLUE.get(arm),
        }
    own: dict[str, Any] = {"min_width": 2 if budget in ("2bit", "3bit") else None}
    own["sensitivity"] = str(shared) if shared.is_file() else None
    if arm in PMQ:
        return {"method": "pmq", "method_options": own | PMQ[arm] | {"picture": 0}}
    return {"method_options": own | MIXED[arm] | {"metric": metric_of(arm)}}


def metric_of(arm: str) -> str:
    """The metric of an arm of mixed widths; the arm's own name elsewhere."""
    return MIXED.get(arm, {}).get("metric", arm)


def summed_up(ways: list[dict[str, Any]], first: list[list[bool]]) -> dict[str, Any]:
    """All scored images of an arm beside those of the first arm."""
    pairs = [pair for way, others in zip(ways, first, strict=True) for pair in zip(way["right"], others, strict=True)]
    gained, lost = sum(own and not other for own, other in pairs), sum(other and not own for own, other in pairs)
    images = [way["images"] for way in ways]

    def over_images(key: str) -> float:
        return sum(way[key] * own for way, own in zip(ways, images, strict=True)) / sum(images)

    row = {
        "images": images,
        "top1": 100 * sum(own for own, _ in pairs) / len(pairs),
        "top1_float": over_images("float_accuracy"),
        "agreement": over_images("agreement"),
        "only_this_right": gained,
        "only_first_right": lost,
        "p_value": sign_test(gained, lost),
        "right": "".join("01"[own] for own, _ in pairs),
        "bit_operations": [way["bit_operations"] for way in ways],
        "processor_seconds": mean(way["processor_seconds"] for way in ways),
    }
    if any(way.get("nonlinear") for way in ways):
        row["forms"] = [way["nonlinear"]["forms"] for way in ways]
    if all("sqnr" in way.get("nonlinear", {}) for way in ways):
        row["sqnr"] = [way["nonlinear"]["sqnr"] for way in ways]
    if all("search" in way for way in ways):
        row["chosen"] = [way["search"]["chosen"] for way in ways]
        row["search_seconds"] = [way["search"]["seconds"] for way in ways]
    return row


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_subject(parser)
    parser.add_argument("--budgets", nargs="*", default=["6bit", "4bit", "3bit"])
    parser.add_argument(
        "--arms",
        nargs="*",
        choices=[*UNIFORM, *MIXED, *PMQ, *GLUE],
        default=[*UNIFORM, *MIXED, "pmq"],
        help="the first is compared",
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("runs/systems"))
    parser.add_argument("--out", type=Path, default=RESULTS / "systems.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
