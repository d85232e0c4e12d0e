"""Do two checkouts of qvit give the same results? Short digits runs of every method, compared tensor by tensor.

Each case is one command line, run with the code of both checkouts, the same seeds and one thread; runs are packed. The
same are: every tensor of `model.safetensors`, every byte of `packed.safetensors`, and `plan.json`. A run that was
killed after its first epoch and resumed is among the cases. Exit status 1 if anything differs.

    git worktree add ../before v0.1.0
    python benchmarks/measure/same_results.py ../before .
    python benchmarks/measure/same_results.py ../before . --only lsq+ qvit ptq
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

MAIN = "import sys; from qvit.cli import main; sys.exit(main())"
DIGITS = ["vit_digits", "--data", "digits", "--batch-size", "100", "--seed", "3"]
SHORT = [*DIGITS, "--weights", "float", "--epochs", "2", "--lr", "2e-3", "--distill", "1"]
PTQ = ["ptq", "vit_digits", "--data", "digits", "--weights", "float"]


def trained(method: str, *options: str, epochs: int = 2) -> list[str]:
    return ["train", *SHORT, "--epochs", str(epochs), "--method", method, *options]


CASES = {
    "float": ["train", *DIGITS, "--method", "float", "--epochs", "3", "--lr", "4e-3"],
    "lsq": trained("lsq", "--plan", "w2a2"),
    "lsq+": trained("lsq+", "--plan", "w4a4"),
    "qvit": trained("qvit", "--budget", "3bit"),
    "qvit-clipping": trained("qvit", "--budget", "3bit", "-o", "width_gradient=clipping"),
    "qvit-difference": trained(
        "qvit", "--budget", "3bit", "-o", "width_gradient=difference", "-o", "switchable_scale=false"
    ),
    "vvtq": trained("vvtq", "--plan", "w3a3"),
    "qvit+vvtq": trained("qvit+vvtq", "--budget", "3bit"),
    "irm": trained("irm", "--plan", "w3a3"),
    "ofq": trained("ofq", "--plan", "w3a3"),
    "dq": trained("dq", "--budget", "4bit"),
    "edmips": trained("edmips", "--budget", "4bit"),
    "resumed": trained("qvit", "--budget", "3bit", epochs=4),
    "ptq": [*PTQ, "--budget", "w4a4"],
    "ptq-log": [*PTQ, "--budget", "w4a4", "--probs", "log2"],
    "ptq-reconstruct": [*PTQ, "--budget", "w4a4", "--reconstruct", "--steps", "20"],
    "ptq-mixed": [*PTQ, "--budget", "4bit", "--metric", "fisher"],
    "patchwise": ["patchwise", "vit_digits", "--data", "digits", "--weights", "float", "--budget", "4bit"],
}


def qvit(tree: Path, folder: Path, words: list[str], *, kill_after_epoch: Path | None = None) -> None:
    """Runs the command line of a checkout in a folder, to its end or until a run has a checkpoint."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, *words], cwd=folder, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    while kill_after_epoch is not None and process.poll() is None:
        if any(kill_after_epoch.glob("checkpoints/step-*")):
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return
        time.sleep(0.05)
    text, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{tree}: qvit {' '.join(words)} failed:\n{text[-1500:]}")


def make(tree: Path, folder: Path, name: str) -> Path:
    """The directory of a case, made with the code of a checkout."""
    words = [*CASES[name], "--out", name]
    if name == "resumed":
        qvit(tree, folder, words, kill_after_epoch=folder / name)
        words = ["train", "--resume", name]
    qvit(tree, folder, words)
    if name not in ("float", "patchwise"):
        qvit(tree, folder, ["pack", name])
    return folder / name


def differences(one: Path, two: Path) -> list[str]:
    """Names of what is not the same in two directories."""
    found = []
    for name in ("packed.safetensors", "plan.json"):
        before, after = (path.read_bytes() if path.exists() else None for path in (one / name, two / name))
        found += [] if before == after else [name]
    if (one / "model.safetensors").exists():
        old, new = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
        same = old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)
        found += [] if same else ["model.safetensors"]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--only", nargs="+", choices=CASES, help="cases; `float` always runs, the others start from it")
    options = parser.parse_args()
    names, wrong = list(dict.fromkeys(["float", *(options.only or CASES)])), 0
    with tempfile.TemporaryDirectory() as place:
        folders = [Path(place) / side for side in ("before", "after")]
        for folder in folders:
            folder.mkdir()
        for name in names:
            trees = (options.before.resolve(), options.after.resolve())
            made = [make(tree, folder, name) for tree, folder in zip(trees, folders, strict=True)]
            found = differences(*made)
            wrong += bool(found)
            print(f"{name:18} {'differs: ' + ', '.join(found) if found else 'same'}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
