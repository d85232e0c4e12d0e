r"""Post-training quantization judged on images of the kind that it was calibrated on, and on none of the same.

An archive of class folders is cut into two halves by class, at random by a seed. Every row calibrates on one half and
is scored on the other, both ways; a row is the mean of both, and says both. Every way is one `qvit ptq` run with its
own directory; runs that are there are not made again.

    python benchmarks/measure/ptq_halves.py --weights W.safetensors --images IMAGES.tar --class-map classes.txt
    python benchmarks/measure/ptq_halves.py ... --plans w4a4 w3a3 --efforts fast standard      with reconstruction
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

from ptq import config_of
from record import RESULTS, record_of

from qvit.files import write_json
from qvit.runs.directory import RESULT
from qvit.runs.run import train

#: What of a result is summed up, and under which name.
MEANS = {"accuracy": "top1", "float_accuracy": "top1_float", "agreement": "agreement"}
PROCESSOR = "processor.json"


def main() -> None:
    options = parse()
    parts = halves(options.images, options.runs, options.split_seed)
    rows: list[dict[str, Any]] = []
    for plan in options.plans:
        for effort in (None, *options.efforts) if options.plain else options.efforts:
            ways = [measure(options, plan, effort, parts, first) for first in options.ways]
            rows.append({"plan": plan, "effort": effort, **summed_up(ways)})
            sys.stderr.write(json.dumps(rows[-1]) + "\n")
            write(options, rows)


def halves(archive: Path, folder: Path, seed: int) -> tuple[Path, Path]:
    """Two archives with half of the class folders each; made once."""
    targets = (folder / f"half-{seed}-0.tar", folder / f"half-{seed}-1.tar")
    if all(target.is_file() for target in targets):
        return targets
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as images:
        members = [member for member in images if member.isfile()]
        classes = sorted({Path(member.name).parent.name for member in members})
        first = set(random.Random(seed).sample(classes, len(classes) // 2))
        for index, target in enumerate(targets):
            with tarfile.open(target, "w") as out:
                for member in members:
                    if (Path(member.name).parent.name in first) == (index == 0):
                        out.addfile(member, images.extractfile(member))
    return targets


def measure(
    options: argparse.Namespace, plan: str, effort: str | None, parts: tuple[Path, Path], first: int
) -> dict[str, Any]:
    """The result of one way, with processor seconds; what is there already is read."""
    method_options = {"effort": effort, **dict(options.option)}
    if effort is not None:
        method_options["recon_images"] = options.recon_images
    run = options.runs / "-".join((plan, effort or "plain", f"seed{options.seed}", f"way{first}"))
    if not (run / RESULT).is_file():
        config = config_of(options, plan, method_options, str(parts[first]), str(parts[1 - first]))
        started = time.process_time()
        train(config, run, overwrite=True, quiet=True, notify=lambda line: print(line, file=sys.stderr, flush=True))
        write_json(run / PROCESSOR, {"processor_seconds": round(time.process_time() - started, 1)})
    result = json.loads((run / RESULT).read_text(encoding="utf-8"))
    return result | json.loads((run / PROCESSOR).read_text(encoding="utf-8"))


def summed_up(ways: list[dict[str, Any]]) -> dict[str, Any]:
    """The means of both ways, and each of them."""
    row: dict[str, Any] = {name: statistics.mean(way[key] for way in ways) for key, name in MEANS.items()}
    row["drop"] = row["top1_float"] - row["top1"]
    row["ways"] = [{name: way[key] for key, name in MEANS.items()} for way in ways]
    row["images"] = [way["images"] for way in ways]
    for key in ("bit_operations", "weight_bytes", "reconstruction"):
        row[key] = ways[0][key]
    stages = ("calibrate", "reconstruct")
    row["seconds"] = statistics.mean(sum(way["seconds"].get(stage, 0.0) for stage in stages) for way in ways)
    row["processor_seconds"] = statistics.mean(way["processor_seconds"] for way in ways)
    return row


def write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    write_json(options.out, head_of(options) | {"rows": rows})


def add_subject(parser: argparse.ArgumentParser) -> None:
    """The arguments of every measurement on halves: model, images, and how they are cut."""
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--images", type=Path, required=True, help="archive of class folders, to be cut in two")
    parser.add_argument("--class-map", required=True)
    parser.add_argument("--ways", nargs="*", type=int, default=[0, 1], help="halves that are calibrated on")
    parser.add_argument("--calibration-images", type=int, default=128)
    parser.add_argument("--split-seed", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")


def head_of(options: argparse.Namespace) -> dict[str, Any]:
    """What a file of results on halves says of itself."""
    return {
        "model": options.model,
        "weights": Path(options.weights).name,
        "images": options.images.name,
        "calibration_images": options.calibration_images,
        "split_seed": options.split_seed,
        "seed": options.seed,
        "ways": len(options.ways),
        **record_of(device=options.device, threads=options.threads),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_subject(parser)
    parser.add_argument("--plans", nargs="*", default=["w8a8", "w6a6", "w4a4", "w3a3"])
    parser.add_argument("--efforts", nargs="*", default=[], help="of reconstructions: fast, standard, full")
    parser.add_argument("--no-plain", dest="plain", action="store_false", help="reconstructed rows only")
    parser.add_argument(
        "--option", nargs="*", default=[], type=lambda word: tuple(word.split("=", 1)), help="KEY=VALUE of the method"
    )
    parser.add_argument("--recon-images", type=int, default=250, help="of a half, in place of those of the effort")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=Path("runs/ptq-halves"))
    parser.add_argument("--out", type=Path, default=RESULTS / "ptq_halves.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
