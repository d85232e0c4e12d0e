"""Speed of our engines beside PyTorch, ONNX Runtime and OpenVINO: `qvit bench` for DeiT-T and DeiT-S, w8a8.

DeiT-T at batch 1 and 8, with real weights and images where they are given, so that the answers can be compared, too;
DeiT-S, and every other of `--models`, at batch 1, with untrained weights on noise, for the speed alone. One process per
model, all plans in it. Nothing else should run on the machine meanwhile: engines take turns, so ratios survive some
disturbance, but milliseconds do not.

    python benchmarks/measure/deploy.py                                    speed alone
    python benchmarks/measure/deploy.py --weights deit_tiny_patch16_224.safetensors --data TRAIN.tar \
        --eval-data TEST.tar --class-map classes.txt
    python benchmarks/measure/deploy.py --plans w8a8 w4a4 --engines qvit-native openvino pytorch-fp32 --out FILE
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from record import RESULTS, record_of, shown

from qvit.files import write_json

#: The only one that gets weights and images, and the batch sizes of it and of others.
TRAINED = "deit_tiny_patch16_224"
BATCHES, OTHER_BATCHES = (1, 8), (1,)
FILES = ("weights", "data", "eval_data", "class_map")
SHARED = ("date", "hardware", "instructions", "versions", "threads")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in FILES:
        parser.add_argument(f"--{name.replace('_', '-')}", help="for DeiT-T, as for qvit bench")
    parser.add_argument("--models", nargs="+", default=[TRAINED, "deit_small_patch16_224"], help="timm's names")
    parser.add_argument("--plans", nargs="+", default=["w8a8"])
    parser.add_argument("--engines", nargs="+", default=[], help="by default all that are installed")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=6.0, help="least time of each engine and batch size")
    parser.add_argument("--max-seconds", type=float, default=1200.0, help="most time for measuring one model")
    parser.add_argument("--out", type=Path, default=RESULTS / "deploy.json")
    options = parser.parse_args()
    given = {name: getattr(options, name) for name in FILES if getattr(options, name)}
    runs = []
    for model in options.models:
        about = (BATCHES, given) if model == TRAINED else (OTHER_BATCHES, {})
        runs.append(measure(options, model, *about))
    write_runs(options.out, runs)


def write_runs(out: Path, runs: list[dict[str, Any]]) -> None:
    """What several runs say, with what they share said once."""
    shared = {key: runs[0][key] for key in SHARED}
    own = [{key: value for key, value in run.items() if key not in shared} for run in runs]
    write_json(out, {**record_of(), **shared, "runs": own})


def measure(
    options: argparse.Namespace, model: str, batches: Sequence[int], given: Mapping[str, str]
) -> dict[str, Any]:
    """What `qvit bench` says of a model by several plans, with files by their names alone.

    Args:
        options: plans, engines, threads, rounds, seconds, max_seconds.
        model: timm's name.
        batches: The batch sizes.
        given: Further options of `qvit bench`: files.
    """
    words = [sys.executable, "-m", "qvit.cli", "bench", model, "--json"]
    for name in ("plan", "engine"):
        words += [word for value in getattr(options, f"{name}s") for word in (f"--{name}", str(value))]
    for batch in batches:
        words += ["--batch", str(batch)]
    for name in ("threads", "rounds", "seconds", "max_seconds"):
        words += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    for name, value in given.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    sys.stderr.write(f"{model}, {', '.join(map(str, options.plans))}, batch {', '.join(map(str, batches))}\n")
    text = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout
    result = json.loads(text)
    for value in given.values():
        result["images"] = result["images"].replace(str(value), Path(value).name)
    result["command"] = shown(["qvit", *words[3:]])
    return result


if __name__ == "__main__":
    main()
