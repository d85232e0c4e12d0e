"""`python worker.py FOLDER TARGET FIRST COUNT [TARGET FIRST COUNT ...]`: attacks kinds of files with numbered cases.

Before each case its number goes to standard output, after it the verdict: whoever started this process sees which case
ended it, or does not end. Address space is limited, so memory without bounds ends in an error here and not elsewhere.
"""

from __future__ import annotations

import json
import logging
import random
import resource
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

MEMORY = 3 << 30


def main(folder: str, jobs: list[tuple[str, int, int]]) -> None:
    """Runs the cases of all jobs: target, first case, how many."""
    import torch

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    from targets import TARGETS

    for name, first, count in jobs:
        place = Path(folder) / f"{name}-{first}"
        place.mkdir(parents=True, exist_ok=True)
        target = TARGETS[name](place)
        list(target.read())  # the whole files are read, or refusals of mutated ones say nothing
        pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        most = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (pages + MEMORY, most))
        for case in range(first, first + count):
            run(target, name, case)


def run(target: Any, name: str, case: int) -> None:
    """Says the number of a case and what came of it."""
    import torch
    from targets import DefectError

    from qvit.errors import QvitError

    print(json.dumps({"name": name, "case": case}), flush=True)
    what = target.mutate(random.Random(f"{name} {case}"))
    try:
        wrong = [part for part in target.read() if not bool(torch.isfinite(part).all())]
        verdict, why = ("value", "a number that is not finite") if wrong else ("read", "")
    except QvitError as error:
        verdict, why = "refused", str(error)[:300]
    except DefectError as error:
        verdict, why = "defect", str(error)
    except Exception as error:
        verdict, why = "defect", "".join(traceback.format_exception(error))[-1500:]
    print(json.dumps({"name": name, "case": case, "what": what, "verdict": verdict, "why": why}), flush=True)


if __name__ == "__main__":
    words = sys.argv[2:]
    main(sys.argv[1], [(words[i], int(words[i + 1]), int(words[i + 2])) for i in range(0, len(words), 3)])
