"""Greedy descent against the integer program: predicted loss at equal budgets of bit operations.

On DeiT-T with real weights and photographs (the folder of `QVIT_DATA`, or ../shared/data), by the metric `fisher`. Both
solvers get the same sensitivity; `descent` is the greedy one before it spends what is left of the budget.

    python benchmarks/measure/solvers.py        writes benchmarks/results/solvers.json
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from record import RESULTS, record_of
from sensitivity import MODEL, folder, images_of

from qvit.allocate import Problem, solve
from qvit.allocate.choices import choices
from qvit.allocate.greedy import descent, greedy
from qvit.allocate.units import Unit
from qvit.files import write_json
from qvit.measure import measure_sensitivity
from qvit.models.create import create_model
from qvit.models.families import inspect_model


def descended(problem: Problem) -> list[int]:
    """The last widths of the descent alone."""
    start = [options[-1] for options in problem.options]
    return (deque(descent(problem, start), maxlen=1) or deque([start])).pop()


SOLVERS: dict[str, Callable[[Problem], list[int]]] = {"program": solve, "greedy": greedy, "descent": descended}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budgets", nargs="+", default=["3bit", "4bit", "5bit", "6bit"])
    parser.add_argument("--out", type=Path, default=RESULTS / "solvers.json")
    options = parser.parse_args()
    data = folder()
    model = create_model(MODEL, weights=data / f"{MODEL}.safetensors").eval()
    found = measure_sensitivity(model, images_of(model, data, options.images, options.seed), seed=options.seed)
    cost, unit = inspect_model(model), Unit("bit_operations")
    rows = []
    for widths in (found.widths, (4, 6, 8)):
        problem = choices(cost, found.at_widths(widths), unit)
        for budget in options.budgets:
            limit = unit.parse(budget, cost)
            if problem.extremes()[0] > limit:
                continue
            for solver, answers in SOLVERS.items():
                started = time.monotonic()
                answer = answers(problem.within(limit))
                rows.append(
                    {
                        "widths": list(widths),
                        "budget": budget,
                        "solver": solver,
                        "predicted_loss": problem.problem.damage(answer),
                        "bit_operations": problem.problem.cost(answer),
                        "limit": limit,
                        "seconds": round(time.monotonic() - started, 3),
                    }
                )
                sys.stdout.write(f"{rows[-1]}\n")
    write_json(
        options.out,
        record_of()
        | {
            "model": MODEL,
            "images": options.images,
            "seed": options.seed,
            "units": len(choices(cost, found, unit).problem.options),
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
