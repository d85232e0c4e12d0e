"""Bits against milliseconds: the native engine on DeiT-T by plans of 8 to 2 bits, beside its peers, in one run.

`qvit bench` with a row for each plan: w8a8, w6a6, w4a4, w3a3, w2a2, and a mixed one at the cost of 3 bits, which is
allocated by `qvit sensitivity` (Fisher) and `qvit allocate`, or given (a plan, or the packed file of a run that learned
its widths). With weights and photographs, in the folder of `QVIT_DATA` or ../shared/data, answers are compared, too:
the training images calibrate and allocate, others are judged. Without them images are noise, and there is no mixed plan
unless one is given. Nothing else should run on the machine meanwhile.

    python benchmarks/measure/bits_ms.py                            writes benchmarks/results/bits_ms.json
    python benchmarks/measure/bits_ms.py --mixed learned-3bit.safetensors --out benchmarks/results/bits_ms_avx2.json
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from deploy import measure, write_runs
from record import RESULTS

ROOT = Path(__file__).resolve().parents[2]
MODEL = "deit_tiny_patch16_224"
PLANS = ["w8a8", "w6a6", "w4a4", "w3a3", "w2a2"]
ENGINES = ["qvit-native", "openvino", "onnxruntime", "pytorch-fp32"]
#: Option of qvit → file in the folder of data.
FILES = {
    "weights": f"{MODEL}.safetensors",
    "data": "tiny-imagenet-train-0.tar",
    "eval_data": "imagenet-sample.tar",
    "class_map": "imagenet-classes.txt",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", nargs="+", default=PLANS)
    parser.add_argument("--mixed", help="a plan or a packed file, in place of the allocated plan")
    parser.add_argument("--engines", nargs="+", default=ENGINES)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--images", type=int, default=200, help="to compare answers on")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=4.0, help="least time of each engine, plan and batch size")
    parser.add_argument("--max-seconds", type=float, default=1200.0, help="most time for measuring")
    parser.add_argument("--out", type=Path, default=RESULTS / "bits_ms.json")
    options = parser.parse_args()
    if options.mixed and not re.search(r"\dbit", Path(options.mixed).stem):
        parser.error(f"--mixed is named by the bits at which it is drawn, such as learned-3bit, not {options.mixed}")
    given = files()
    with tempfile.TemporaryDirectory() as folder:
        mixed = options.mixed or (allocated(given, Path(folder)) if given else None)
        options.plans = [*options.plans, *([] if mixed is None else [str(mixed)])]
        images = {"images": str(options.images)} if given else {}
        write_runs(options.out, [measure(options, MODEL, options.batches, given | images)])


def files() -> dict[str, str]:
    """The files of `FILES`, by option; empty where they are not there."""
    folder = Path(os.environ.get("QVIT_DATA") or ROOT.parent / "shared" / "data").expanduser()
    found = {option: folder / name for option, name in FILES.items()}
    return {option: str(file) for option, file in found.items()} if all(f.is_file() for f in found.values()) else {}


def allocated(given: dict[str, str], folder: Path) -> Path:
    """A mixed plan at the bit operations of 3 bits, by the training images."""
    table, plan = folder / "sensitivity.json", folder / "mixed-3bit.json"
    words = [word for name in ("weights", "data", "class_map") for word in (f"--{name.replace('_', '-')}", given[name])]
    qvit = [sys.executable, "-m", "qvit.cli"]
    subprocess.run([*qvit, "sensitivity", MODEL, *words, "--out", str(table)], check=True, stdout=sys.stderr)
    subprocess.run(
        [*qvit, "allocate", str(table), "--budget", "3bit", "--out", str(plan)], check=True, stdout=sys.stderr
    )
    return plan


if __name__ == "__main__":
    main()
