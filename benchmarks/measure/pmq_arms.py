r"""What a width of the class token and splits of patches add to mixed widths at equal bit operations, on real images.

    plain     widths of components alone, one per head
    class     and 8 bits for the class token where the program gives them
    splits    and two widths for the patches of an activation, by their importance
    chance    the plan of `splits` with patches ranked by chance, everything else made anew

An archive of class folders is cut into two halves by class (`ptq_halves.py`); every arm calibrates and chooses on one
half and is scored on the other, both ways, and McNemar's p is that of all scored images, each scored once. At 3 bits
and below the narrowest width is 2: at a width of 3 that budget has nothing to choose from. The arms of a budget share
one sensitivity. Every run has a directory of its own; runs that are there are not made again.

Each row has the seconds of its search. The second part times two metrics alone: `fisher`, and `kl`, which measures one
tensor, head and width at a time.

    python benchmarks/measure/pmq_arms.py --weights W.safetensors --images IMAGES.tar --class-map classes.txt
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from patchwise import RANKINGS, sign_test
from ptq import config_of
from ptq_halves import add_subject, halves, head_of
from record import RESULTS

from qvit.files import write_json
from qvit.measure import measure_sensitivity
from qvit.methods.ptq.method import SENSITIVITY
from qvit.models.families import tokens
from qvit.runs.directory import PLAN, RESULT
from qvit.runs.run import load_run, train
from qvit.runs.subject import answers, open_subject
from qvit.training.config import TrainConfig

ARMS: dict[str, dict[str, Any]] = {
    "plain": {"class_token": "off", "patches": False},
    "class": {"class_token": 8, "patches": False},
    "splits": {"class_token": 8, "patches": True},
    "chance": {},
}
#: The predicted and the true class of every scored image, in the directory of its run.
ANSWERS = "answers.json"


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    parts = halves(options.images, options.runs, options.split_seed)
    data: dict[str, Any] = {**head_of(options), "rows": [], "search": []}
    for budget in options.budgets:
        plain: list[list[bool]] = []
        for arm in options.arms:
            ways = [measure(options, budget, arm, parts, first) for first in options.ways]
            plain = plain or [way["right"] for way in ways]
            data["rows"].append({"budget": budget, "arm": arm, **summed_up(ways, plain)})
            sys.stderr.write(json.dumps(data["rows"][-1]) + "\n")
            write_json(options.out, data)
    for metric, images in (("fisher", options.fisher_images), ("kl", options.kl_images)):
        if images:
            data["search"].append(search(options, metric, images, str(parts[0]), str(parts[1])))
            write_json(options.out, data)


def measure(options: argparse.Namespace, budget: str, arm: str, parts: tuple[Path, Path], first: int) -> dict[str, Any]:
    """The result of an arm, one way, and which of the scored images it is right about."""
    folder = options.runs / f"{budget}-seed{options.seed}-way{first}"
    run, shared = folder / arm, folder / options.arms[0] / SENSITIVITY
    config = config_of(options, budget, {}, str(parts[first]), str(parts[1 - first]))
    if arm == "chance":
        changes: dict[str, Any] = {"budget": None, "plan": str(folder / "splits" / PLAN)}
    else:
        method_options = {**ARMS[arm], "picture": 0, "min_width": 2 if budget in ("2bit", "3bit") else None}
        method_options["sensitivity"] = str(shared) if shared.is_file() else None
        changes = {"method": "pmq", "method_options": method_options}
    config = TrainConfig.create(**(config.model_dump() | changes))
    ranking = RANKINGS["random"] if arm == "chance" else tokens.rank_tokens
    if not (run / ANSWERS).is_file():
        with mock.patch.object(tokens, "rank_tokens", ranking):
            if not (run / RESULT).is_file():
                train(config, run, overwrite=True, quiet=True, notify=lambda line: print(line, file=sys.stderr))
            subject = open_subject(config)
            predicted, truth = answers(load_run(run), subject.loader())
        write_json(run / ANSWERS, {"predicted": predicted.tolist(), "truth": truth.tolist()})
    result, found = (json.loads((run / name).read_text(encoding="utf-8")) for name in (RESULT, ANSWERS))
    return result | {"right": [a == b for a, b in zip(found["predicted"], found["truth"], strict=True)]}


def summed_up(ways: list[dict[str, Any]], plain: list[list[bool]]) -> dict[str, Any]:
    """All scored images of an arm beside those of the arm `plain`."""
    pairs = [pair for way, others in zip(ways, plain, strict=True) for pair in zip(way["right"], others, strict=True)]
    gained, lost = sum(own and not other for own, other in pairs), sum(other and not own for own, other in pairs)
    images = [way["images"] for way in ways]
    searches = [way["search"] for way in ways if "search" in way]
    return {
        "images": images,
        "top1": 100 * sum(own for own, _ in pairs) / len(pairs),
        "top1_float": sum(way["float_accuracy"] * own for way, own in zip(ways, images, strict=True)) / sum(images),
        "divergence": sum(way["divergence"] * own for way, own in zip(ways, images, strict=True)) / sum(images),
        "only_this_right": gained,
        "only_plain_right": lost,
        "p_value": sign_test(gained, lost),
        "bit_operations": [way["bit_operations"] for way in ways],
        "chosen": [own["chosen"] for own in searches],
        "search_seconds": [own["seconds"] for own in searches],
        "seconds": [way["seconds"] for way in ways],
    }


def search(options: argparse.Namespace, metric: str, images: int, data: str, eval_data: str) -> dict[str, Any]:
    """The seconds of a metric on so many images."""
    subject = open_subject(config_of(options, "4bit", {}, data, eval_data))
    found = measure_sensitivity(subject.model, list(subject.calibration_images(images, 16)), metric=metric)
    return {"metric": metric, "images": images, "seconds": round(found.seconds, 1)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_subject(parser)
    parser.add_argument("--budgets", nargs="*", default=["6bit", "4bit", "3bit"])
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), default=list(ARMS), help="the first is compared with")
    parser.add_argument("--fisher-images", type=int, default=16, help="of the timing; 0 for none")
    parser.add_argument("--kl-images", type=int, default=16, help="of the timing, thousands of passes; 0 for none")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("runs/pmq-arms"))
    parser.add_argument("--out", type=Path, default=RESULTS / "pmq_arms.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
