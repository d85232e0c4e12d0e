"""`python worker.py TARGET FOLDER FIRST COUNT`: attacks one kind of file with the cases FIRST..FIRST+COUNT.

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

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

MEMORY = 3 << 30


def main(name: str, folder: str, first: int, count: int) -> None:
    """Runs the cases."""
    import torch

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    from targets import TARGETS, DefectError

    from qvit.errors import QvitError

    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    target = TARGETS[name](place)
    list(target.read())  # the whole files are read, or refusals of mutated ones say nothing
    pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (pages + MEMORY, pages + MEMORY))
    for case in range(first, first + count):
        print(json.dumps({"case": case}), flush=True)
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
        print(json.dumps({"case": case, "what": what, "verdict": verdict, "why": why}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
