"""What fewer bits bring by instruction set: the native engine's forms on one processor, DeiT-T by plans of 8 to 2 bits.

The engine has a form for each instruction set, and loads a model in any that the processor has. Forms and plans take
turns in rounds, as engines do in `qvit bench`, so ratios to w8a8 of the same form hold where milliseconds do not.
`AVX2` is the code that runs on processors without VNNI, whose clock and caches are others. Weights and photographs are
those of `bits_ms.py`, or noise. Nothing else should run on the machine meanwhile.

    python benchmarks/measure/forms.py                               writes benchmarks/results/native_forms.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from functools import partial
from itertools import product
from pathlib import Path

from bits_ms import MODEL, PLANS, files
from record import RESULTS, record_of
from torch import Tensor

from qvit.deploy.bench.hardware import cpu_instructions, hardware
from qvit.deploy.bench.timing import measure
from qvit.deploy.native.library import forms
from qvit.deploy.native.model import NativeModel
from qvit.files import write_json
from qvit.runs.bench import open_bench
from qvit.runs.requests import BenchRequest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", nargs="+", default=PLANS)
    parser.add_argument("--forms", nargs="+", default=[name for name in forms() if name != "portable"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=2.0, help="least time of each form, plan and batch size")
    parser.add_argument("--out", type=Path, default=RESULTS / "native_forms.json")
    options = parser.parse_args()
    given = files()
    request = BenchRequest.create(model=MODEL, plans=options.plans, **given)
    with tempfile.TemporaryDirectory() as folder:
        subject = open_bench(request, Path(folder), lambda line: print(line, file=sys.stderr), lambda *_: None)
    models = {
        f"{form} {packed.plan}": NativeModel(packed.artifact.to_bytes(), threads=options.threads, form=form)
        for form in options.forms
        for packed in subject.packed
    }
    rows = []
    for batch in options.batches:
        runners = {key: partial(run, model) for key, model in models.items()}
        times = measure(runners, subject.judged[:batch], rounds=options.rounds, seconds=options.seconds).seconds
        for form, plan in product(options.forms, [packed.plan for packed in subject.packed]):
            own = times[f"{form} {plan}"]
            low, median, high = (1e3 * value for value in statistics.quantiles(own, n=4, method="inclusive"))
            first = 1e3 * statistics.median(times[f"{form} {options.plans[0]}"])
            rows.append(
                {
                    "form": form,
                    "plan": plan,
                    "batch": batch,
                    "milliseconds_median": round(median, 4),
                    "milliseconds_quartiles": [round(low, 4), round(high, 4)],
                    "ratio_to_first": round(median / first, 4),
                    "calls": len(own),
                }
            )
    note = subject.note
    for file in given.values():
        note = note.replace(file, Path(file).name)
    head = {**record_of(threads=options.threads), "hardware": hardware(), "instructions": cpu_instructions()}
    write_json(options.out, {**head, "model": MODEL, "images": note, "plans": options.plans, "rows": rows})


def run(model: NativeModel, images: Tensor) -> None:
    model(images.numpy())


if __name__ == "__main__":
    main()
