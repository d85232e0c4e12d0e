"""What fewer bits bring by instruction set: the native engine's forms on one processor, DeiT-T by plans of 8 to 2 bits.

The engine has a form for each instruction set, and loads a model in any that the processor has. Forms and plans take
turns call by call, each call after one that is not counted, so ratios to w8a8 of the same form hold where milliseconds
do not. `AVX2` is the code that runs on processors without VNNI, whose clock and caches are others. Weights and
photographs are those of `bits_ms.py`, or noise. Nothing else should run on the machine meanwhile.

    python benchmarks/measure/forms.py                               writes benchmarks/results/native_forms.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

from bits_ms import MODEL, PLANS, files
from record import RESULTS, record_of

from qvit.deploy.bench.hardware import cpu_instructions, hardware
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
    parser.add_argument("--calls", type=int, default=300, help="of each form, plan and batch size; fewer of large ones")
    parser.add_argument("--out", type=Path, default=RESULTS / "native_forms.json")
    options = parser.parse_args()
    given = files()
    request = BenchRequest.create(model=MODEL, plans=options.plans, **given)
    with tempfile.TemporaryDirectory() as folder:
        subject = open_bench(request, Path(folder), lambda line: print(line, file=sys.stderr), lambda *_: None)
    models = {
        (form, packed.plan): NativeModel(packed.artifact.to_bytes(), threads=options.threads, form=form)
        for form in options.forms
        for packed in subject.packed
    }
    rows = []
    for batch in options.batches:
        images = subject.judged[:batch].numpy()
        taken: dict[tuple[str, str], list[float]] = {key: [] for key in models}
        for turn in range(max(5, options.calls // batch)):
            for key in list(models)[:: 1 - 2 * (turn % 2)]:
                models[key](images)
                begin = time.perf_counter()
                models[key](images)
                taken[key].append(1e3 * (time.perf_counter() - begin))
        for (form, plan), times in taken.items():
            median, widest = (statistics.median(own) for own in (times, taken[form, options.plans[0]]))
            quartiles = statistics.quantiles(times, n=4)
            rows.append(
                {
                    "form": form,
                    "plan": plan,
                    "batch": batch,
                    "milliseconds_median": round(median, 4),
                    "milliseconds_quartiles": [round(quartiles[0], 4), round(quartiles[2], 4)],
                    "ratio_to_first": round(median / widest, 4),
                }
            )
    note = subject.note
    for file in given.values():
        note = note.replace(file, Path(file).name)
    head = {**record_of(threads=options.threads), "hardware": hardware(), "instructions": cpu_instructions()}
    write_json(options.out, {**head, "model": MODEL, "images": note, "plans": options.plans, "rows": rows})


if __name__ == "__main__":
    main()
