"""How long commands take that compute next to nothing: the start of Python, imports, and a model's shapes.

Each command is started several times in a process of its own, after a first time that is not counted. Processor time is
user and system time of that process; its median says more than that of wall-clock time where other work runs.

    python benchmarks/measure/startup.py                  writes benchmarks/results/startup.json
    python benchmarks/measure/startup.py --times 20
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from record import RESULTS

from qvit.deploy.bench.hardware import cpu_instructions, hardware
from qvit.files import write_json
from qvit.version import __version__

MODEL = "deit_tiny_patch16_224"
#: Name → words of the command; RUN and FILE are made first.
COMMANDS = {
    "python -c pass": None,
    "qvit --help": ["--help"],
    "qvit plan show RUN": ["plan", "show", "RUN"],
    "qvit plan diff RUN RUN": ["plan", "diff", "RUN", "RUN"],
    "qvit report RUN": ["report", "RUN"],
    "qvit inspect FILE": ["inspect", "FILE"],
    f"qvit cost {MODEL}": ["cost", MODEL],
    "qvit cost vit_large_patch16_224": ["cost", "vit_large_patch16_224"],
    f"qvit plan show w4a4 --model {MODEL}": ["plan", "show", "w4a4", "--model", MODEL],
}


def once(words: list[str]) -> tuple[float, float]:
    """Wall-clock and processor seconds of one process."""
    started = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if process.returncode or status:
        raise SystemExit(f"{' '.join(words)} failed")
    return time.perf_counter() - started, usage.ru_utime + usage.ru_stime


def measure(words: list[str], times: int) -> dict[str, Any]:
    once(words)
    wall, processor = zip(*(once(words) for _ in range(times)), strict=True)
    return {
        "seconds_median": round(statistics.median(wall), 3),
        "seconds_min": round(min(wall), 3),
        "processor_seconds_median": round(statistics.median(processor), 3),
        "processor_seconds_min": round(min(processor), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS / "startup.json")
    options = parser.parse_args()
    qvit = [sys.executable, "-m", "qvit.cli"]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        training = ["--method", "lsq", "--plan", "w4a4", "--epochs", "1", "--data", "digits", "--out", str(run)]
        once([*qvit, "train", "vit_digits", *training])
        once([*qvit, "pack", str(run)])
        places = {"RUN": str(run), "FILE": str(run / "packed.safetensors")}
        load = os.getloadavg()[0]
        rows = []
        for name, words in COMMANDS.items():
            line = [sys.executable, "-c", "pass"] if words is None else [*qvit, *(places.get(w, w) for w in words)]
            rows.append({"command": name, **measure(line, options.times)})
            sys.stderr.write(f"{rows[-1]}\n")
    result = {
        "command": f"python benchmarks/measure/startup.py --times {options.times}",
        "date": datetime.date.today().isoformat(),
        "hardware": ", ".join([hardware(), *(cpu_instructions() or [])]),
        "versions": {"qvit": __version__, **{name: version(name) for name in ("torch", "timm", "typer")}},
        "load_before": round(load, 1),
        "rows": rows,
    }
    write_json(options.out, result)


if __name__ == "__main__":
    main()
