"""Figures 1 and 2 of the Q-ViT paper for DeiT-T with real weights, post-training: which parts are fragile?

    widths   accuracy against one width for all blocks                                              (Figure 1)
    parts    GELU outputs alone, fully-connected layers alone, attention alone                      (Figure 2a)
    heads    one head at 2 bits, everything else at 8, each head of every layer                      (Figure 2b)

`qvit/runs/analysis.py` says what a point is. In FOLDER: deit_tiny_patch16_224.safetensors, imagenet-sample.tar
(judged), tiny-imagenet-train-0.tar (calibration) and imagenet-classes.txt. Points that were measured are not measured
again, so a call that was stopped goes on.

    python benchmarks/measure/fragile.py --data FOLDER --runs DIR
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, record_of

from qvit.files import write_json
from qvit.runs.analysis import KINDS, analyze
from qvit.runs.subject import Request

MODEL, JUDGED, TRAINING = "deit_tiny_patch16_224", "imagenet-sample.tar", "tiny-imagenet-train-0.tar"
RESULT = RESULTS / "fragile.json"


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    folder: Path = options.data
    request = Request.create(
        model=MODEL,
        data=str(folder / TRAINING),
        eval_data=str(folder / JUDGED),
        weights=str(folder / f"{MODEL}.safetensors"),
        class_map=str(folder / "imagenet-classes.txt"),
        images=options.images,
        calibration_images=options.calibration_images,
        device="cpu",
    )
    record = analyze(request, options.runs, what=options.what, layers=options.layers, progress=tell)
    write_json(options.out, {**shown(record), "threads": options.threads, **record_of()})


def shown(record: dict[str, Any]) -> dict[str, Any]:
    """The analysis without the paths of this machine."""
    settings = record["settings"]
    names = {key: Path(settings[key]).name for key in ("data", "eval_data")}
    return {**record, "settings": settings | names, "weights": "DeiT-T (fixed-point LayerNorm)"}


def tell(text: str, done: int, total: int) -> None:
    sys.stderr.write(f"\r\033[K{done} of {total} images: {text}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of weights and images")
    parser.add_argument("--what", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--layers", nargs="+", type=int, help="whose heads are lowered; default: all")
    parser.add_argument("--images", type=int, default=500, help="to judge by; there are 500")
    parser.add_argument("--calibration-images", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("runs/fragile"))
    parser.add_argument("--out", type=Path, default=RESULT)
    return parser.parse_args()


if __name__ == "__main__":
    main()
