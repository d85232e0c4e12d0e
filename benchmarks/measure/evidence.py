"""Tables 1 and 3 and Figures 4 and 5 of the Q-ViT paper in small, and rivals: do the methods do what is said of them?

Every row starts from the same float weights per seed, with the same images, schedule and learning rate. A part is a
table:

    budgets         LSQ+, Q-ViT, VVTQ without soft labels, and the last two together, at the bit operations of w4a4,
                    w3a3, w2a2                                                                              (Table 1)
    post-training   widths from a sensitivity and an integer program: as they are, and as the start of Q-ViT
    rivals          other ways to find widths: FracBits, DQ, EdMIPS; sensitivities (Fisher in one pass, KL of one tensor
                    at a time) with an integer program, trained as LSQ+; other ways to train: OFQ, IRM
    scales          the scales of LSQ+ in VVTQ, and those of VVTQ in LSQ+
    widths alone    LSQ+ from the start at the widths that Q-ViT ended with: what they are worth without the search; and
                    at the same widths in the wrong blocks
    ablations       at one budget: the gradient of widths, where they start, when they come to rest; widths per head, on
                    the right and on the wrong axis, switchable scales, length of the search, shared scales (Table 3)
    by differences  the same for the cheaper gradient of widths (not run unless it is named)

and all rows tell the widths that they learned for each kind of tensor (Figures 4 and 5). Sets of images: `sets.py`.
Nothing here was chosen by test images. Finished runs are not run again, so a run that was stopped goes on. Fisher plans
are made on the CPU, whatever the device of the trainings. With --repeats, the accuracy of a seed is the mean of its
runs: other hardware rounds otherwise, so they differ. With --add, rows are added to those of the results file, or put
in their place; the others stay.

    python benchmarks/measure/evidence.py --set digits --runs DIR
    python benchmarks/measure/evidence.py --set cifar10-trained --data FOLDER --float-images 20000 \
        --train-images 2500 --test-images 5000 --runs DIR
    python benchmarks/measure/evidence.py --set tiny-imagenet --data FOLDER --device cuda --precision bf16 \
        --float-images 20000 --train-images 8000 --test-images 5000 --workers 15 --runs DIR
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from controls import on_wrong_axis, with_blocks_reversed
from record import RESULTS, record_of
from rich.console import Console
from sets import SETS, add_arguments, common_of, float_jobs, float_of, parsed, spread
from systems import MIXED

from qvit.documents.base import read_document
from qvit.documents.run import Outcome
from qvit.errors import QvitError
from qvit.files import write_json
from qvit.plan.quant_plan import QuantPlan
from qvit.runs.directory import CONFIG, PLAN, RESULT
from qvit.runs.jobs import Job, run_jobs, work
from qvit.training.config import TrainConfig

#: A post-training plan on the grids of trained rows: uniform, one scale per head.
GRIDS = {"weights": "per-head", "probs": "uniform", "heads": "per-head", "reparameterize": False, "min_width": 2}


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        name: What it is called.
        method, options: What it trains with; `ptq` does not train.
        start: What gives its widths, or those that it starts from: a post-training plan by this metric, or `qvit`.
        settings: Options of the run that differ from those of the set.
        work: What runs it.
    """

    name: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    start: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    work: Callable[[str, dict[str, Any]], dict[str, Any]] = work


#: In a row's options: the N of a budget of N bits, and the next; the learning rate of the weights.
AT_BUDGET, ABOVE, OF_WEIGHTS = "N", "N + 1", "that of the weights"
#: Some choices of the paper alone.
CLIPPING = {"width_gradient": "clipping", "initial_bits": ABOVE, "width_schedule": "run"}
#: The search of the paper: all options of `recipes/*-qvit-paper.toml`.
PUBLISHED = CLIPPING | {
    "searching_ratio": 0.9,
    "penalty": "absolute",
    "penalty_weight": 0.1,
    "penalty_widths": "rounded",
    "width_lr": OF_WEIGHTS,
}
#: The same with a penalty as strong as the paper's on DeiT-T (at 3 bits), in units that do not depend on the model.
AS_STRONG = PUBLISHED | {"penalty": "relative", "penalty_weight": 16.6}


#: The cheaper of the two gradients that every element has its say in.
DIFFERENCES = {"width_gradient": "difference"}
#: What the full method is compared with; `wrong axis` is no option, so it has a job of its own.
ABLATIONS: dict[str, dict[str, Any]] = {
    "widths start at N + 1": {"initial_bits": ABOVE},
    "the widths' rate falls with the weights'": {"width_schedule": "run"},
    "one width for all heads": {"head_wise": False},
    "one scale for all widths": {"switchable_scale": False},
    "one scale for all heads": {"scales": "shared"},
    "σ = 0.5": {"searching_ratio": 0.5},
    "σ = 0.7": {"searching_ratio": 0.7},
    "σ = 0.9": {"searching_ratio": 0.9},
    "σ = 1.0": {"searching_ratio": 1.0},
}
#: Metrics whose plans are trained besides those of Fisher and KL.
METRICS = {metric: options for metric, options in MIXED.items() if metric not in ("fisher", "greedy", "kl")}
PARTS: dict[str, list[Row]] = {
    "budgets": [
        Row("lsq+", "lsq+"),
        Row("qvit", "qvit"),
        Row("qvit by differences", "qvit", DIFFERENCES),
        Row("qvit, the published search", "qvit", PUBLISHED),
        Row("qvit, the published search, penalty as on DeiT-T", "qvit", AS_STRONG),
        Row("qvit, by clipping from N + 1, rate over the run", "qvit", CLIPPING),
        Row("vvtq", "vvtq"),
        Row("qvit+vvtq", "qvit+vvtq"),
        Row("qvit+vvtq, the widths' rate falling over the run", "qvit+vvtq", {"width_schedule": "run"}),
    ],
    "post-training": [
        Row("Fisher plan, not trained", "ptq", {**GRIDS, "metric": "fisher"}),
        Row("qvit from the Fisher plan", "qvit", start="fisher"),
        Row("qvit by differences from the Fisher plan", "qvit", DIFFERENCES, start="fisher"),
    ],
    "rivals": [
        Row("FracBits", "qvit", {"width_gradient": "interpolation", "head_wise": False, "width_schedule": "run"}),
        Row("DQ", "dq"),
        Row("EdMIPS", "edmips"),
        Row("Fisher + integer program", "lsq+", start="fisher"),
        Row("Fisher + integer program, all layers", "lsq+", start="fisher-free"),
        Row("Fisher + greedy descent", "lsq+", start="fisher-greedy"),
        Row("KL one by one + integer program", "lsq+", start="kl"),
        Row("KL one by one + integer program, all layers", "lsq+", start="kl-free"),
        *(Row(f"{metric} + integer program", "lsq+", start=metric) for metric in METRICS),
        Row("OFQ", "ofq"),
        Row("IRM", "irm"),
    ],
    "scales": [
        Row("vvtq with a scale per head", "vvtq", {"scales": "per-head"}),
        Row("lsq+ with one scale for all heads", "lsq+", {"scales": "shared"}),
    ],
    "widths alone": [
        Row("lsq+ at the widths of qvit", "lsq+", start="qvit"),
        Row("lsq+ at these, blocks reversed", "lsq+", start="qvit", work=with_blocks_reversed),
    ],
    "ablations": [
        Row("width gradient by clipping", "qvit", {"width_gradient": "clipping"}),
        Row("heads of weights on the wrong axis", "qvit", work=on_wrong_axis),
        *(Row(name, "qvit", options) for name, options in ABLATIONS.items()),
    ],
    "by differences": [
        Row(f"{name}, by differences", "qvit", DIFFERENCES | options) for name, options in ABLATIONS.items()
    ],
}
STARTS = {
    metric: Row(metric, "ptq", {**GRIDS, "metric": metric, **METRICS.get(metric, {})})
    for metric in ("fisher", "kl", *METRICS)
}
STARTS |= {
    f"{metric}-free": Row(f"{metric}-free", "ptq", {**STARTS[metric].options, "boundary": "free"})
    for metric in ("fisher", "kl")
}
STARTS["fisher-greedy"] = Row("fisher-greedy", "ptq", {**GRIDS, **MIXED["greedy"]})
STARTS["qvit"] = Row("qvit", "qvit")


def main() -> None:
    options = parse()
    console, started = Console(stderr=True), time.perf_counter()
    runs = options.runs.absolute()
    repeats = range(options.repeats)
    wanted = [
        (part, budget, row)
        for part in options.parts
        for budget in options.budgets_of(part)
        for row in PARTS[part]
        if options.rows is None or row.name in options.rows
    ]
    jobs = Jobs(options)
    floats = float_jobs(options, jobs.cut)
    for repeat in repeats:
        for _, budget, row in wanted:  # a list that is cut short has rows with all seeds
            for seed in options.seeds:
                jobs.add(budget, row, seed, repeat)
    failed: QvitError | None = None
    try:
        if not options.table_only:
            run_jobs(runs, [*floats, *jobs.all.values()], workers=options.workers, console=console)
    except QvitError as error:  # the others are in the table
        failed = error
    rows = []
    for part, budget, row in wanted:
        places = [{jobs.place(budget, row, seed, repeat): None for repeat in repeats} for seed in options.seeds]
        found = [[runs / name for name in own if (runs / name / RESULT).is_file()] for own in places]
        found = [own for own in found if own]
        if found:
            about = {"part": part, "budget": budget, "row": row.name, "method": row.method, "start": row.start}
            plans = [runs / jobs.place(budget, STARTS[row.start], seed) for seed in options.seeds] if row.start else []
            search = {} if row.start == "qvit" else searched(plans)
            rows.append({**about, "method_options": row.options, **summary(found), **search})
    everything = [runs / name for name in [job.name for job in floats] + list(jobs.all)]
    finished = [run for run in everything if (run / RESULT).is_file()]
    data = {
        "set": options.set,
        "title": SETS[options.set].get("title", ""),
        "settings": SETS[options.set],
        "precision": options.precision,
        "train_images": 1200 if options.set == "digits" else options.train_images,
        "float_images": 1200 if options.set == "digits" else options.float_images or options.train_images,
        "rows": rows,
        "hours": round(sum(read(run)["seconds"]["total"] for run in finished) / 3600, 2),
        "seconds": round(time.perf_counter() - started, 1),
        **record_of(device=options.device, switches=("--table-only",)),
        **where_and_when(finished),
    }
    out = options.out or RESULTS / f"evidence_{options.set}.json"
    write_json(out, added_to(json.loads(out.read_text(encoding="utf-8")), data) if options.add else data)
    if failed:
        raise SystemExit(str(failed))


class Jobs:
    """The runs of all rows, without repetition: rows that start from one plan share the run that makes it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.runs = options, options.runs.absolute()
        self.cut = {"epochs": 1, "warmup_epochs": 0} if options.short else {}
        self.common = {**common_of(options), **SETS[options.set]["quantized"], **self.cut}
        self.all: dict[str, Job] = {}

    def place(self, budget: str, row: Row, seed: int, repeat: int = 0) -> str:
        """The directory of a row's run."""
        if row.method == "ptq":
            made = [row.options[name] for name in ("metric", "boundary", "solver") if name in row.options]
            return f"plan-{'-'.join(made)}-{budget}-seed{seed}"
        words = "".join(c if c.isalnum() else " " for c in row.name).split()
        return f"{budget}-{'-'.join(words)}-seed{seed}" + (f"-run{repeat + 1}" if repeat else "")

    def add(self, budget: str, row: Row, seed: int, repeat: int = 0) -> None:
        """Adds the run of a row, and before it the run of the plan that it starts from."""
        known = {AT_BUDGET: int(budget[0]), ABOVE: int(budget[0]) + 1, OF_WEIGHTS: self.common["lr"]}
        values = {
            key: known.get(value, value) if isinstance(value, str) else value for key, value in row.options.items()
        }
        about = {"seed": seed, "budget": budget, "method": row.method, "method_options": values}
        own = {**self.common, **about, **row.settings}
        if row.options.get("metric") == "fisher":  # so that they can be made elsewhere, before a GPU is at hand
            own["device"] = "cpu"
        after = None if self.options.weights else float_of(self.options, seed)
        own["weights"] = str(self.options.weights.absolute() if after is None else self.runs / after)
        if row.start is not None:
            plan = STARTS[row.start]
            self.add(budget, plan, seed, repeat)
            after = self.place(budget, plan, seed, repeat)
            own["plan"] = str(self.runs / after / PLAN)
            if row.method == "lsq+":
                del own["budget"]
        name = self.place(budget, row, seed, repeat)
        self.all.setdefault(name, Job(name, TrainConfig.create(**own), after, row.work))


def added_to(before: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """Results with the rows of later runs, which say in `added` where they are from."""

    def key(row: dict[str, Any]) -> tuple[str, str, str]:
        return row["part"], row["budget"], row["row"]

    def place(row: dict[str, Any]) -> int:
        """Rows have the order of `PARTS`."""
        names = [own.name for own in PARTS[row["part"]]]
        return names.index(row["row"]) if row["row"] in names else len(names)

    new = {key(row): row for row in data["rows"]}
    rows = [row for row in before["rows"] if key(row) not in new] + list(new.values())
    order = list(dict.fromkeys((row["part"], row["budget"]) for row in before["rows"] + data["rows"]))
    rows.sort(key=lambda row: (order.index((row["part"], row["budget"])), place(row)))
    about = {name: data[name] for name in ("command", "hardware", "date", "versions")}
    earlier = [
        {**one, "rows": left}
        for one in before.get("added", [])
        if (left := [own for own in one["rows"] if tuple(own) not in new])
    ]
    added = [*earlier, {"rows": [list(own) for own in new], **about}]
    return before | {"rows": rows, "added": added, "hours": round(before["hours"] + data["hours"], 2)}


def read(run: Path) -> dict[str, Any]:
    return read_document(Outcome, run / RESULT, "result")


def config_of(run: Path) -> dict[str, Any]:
    return json.loads((run / CONFIG).read_text(encoding="utf-8"))


def where_and_when(runs: list[Path]) -> dict[str, Any]:
    """Hardware, versions and date, as the runs themselves have them: they may have come from another machine."""
    configs = [config_of(run) for run in runs]
    versions = {name: sorted({own["versions"][name] for own in configs}) for name in configs[0]["versions"]}
    return {
        "hardware": " and ".join(sorted({own["hardware"] for own in configs})),
        "versions": {name: " and ".join(found) for name, found in versions.items()},
        "date": max(own["started"] for own in configs)[:10],
    }


def summary(by_seed: list[list[Path]]) -> dict[str, Any]:
    """Accuracies in percent with their deviation over seeds (n - 1), costs, and the widths by kind of tensor.

    Of several runs of a seed the mean counts.
    """
    of_seeds = [[read(run) for run in runs] for runs in by_seed]
    results = [result for own in of_seeds for result in own]
    accuracies = [statistics.mean(result["accuracy"] for result in own) for own in of_seeds]
    widths = [widths_by_kind(QuantPlan.load(run / PLAN)) for runs in by_seed for run in runs]
    counts = {kind: Counter(width for own in widths for width in own[kind]) for kind in widths[0]}
    return {
        **spread("accuracy", accuracies),
        "accuracies": accuracies,
        "runs": [[result["accuracy"] for result in own] for own in of_seeds],
        "float_accuracies": [statistics.mean(result["float_accuracy"] for result in own) for own in of_seeds],
        "bit_operations": max(result["bit_operations"] for result in results),
        "weight_bytes": statistics.mean(result["weight_bytes"] for result in results),
        "mean_widths": {kind: statistics.mean(own.elements()) for kind, own in counts.items()},
        "width_counts": {kind: {str(width): own[width] for width in sorted(own)} for kind, own in counts.items()},
        "hardware": sorted({config_of(run)["hardware"] for runs in by_seed for run in runs}),
        "images": results[0]["images"],
        "seconds_mean": statistics.mean(result["seconds"]["total"] for result in results),
        "seeds": [own[0]["seed"] for own in of_seeds],
    }


def searched(plans: list[Path]) -> dict[str, float]:
    """What finding the widths of plans took: all but calibrating and judging them; nothing where none was made."""
    found = [read(plan)["seconds"] for plan in plans if (plan / RESULT).is_file()]
    took = [own["total"] - own["calibrate"] - own["evaluate"] for own in found]
    return {"search_seconds_mean": statistics.mean(took)} if took else {}


def widths_by_kind(plan: QuantPlan) -> dict[str, list[int]]:
    """The widths of the blocks' tensors by kind, such as `attn.probs`, one for each head."""
    found: dict[str, list[int]] = {}
    for site, spec in plan.sites.items():
        inner = re.fullmatch(r"blocks\.\d+\.(.+)", site)
        if inner and spec is not None:
            found.setdefault(inner.group(1), []).extend(spec.widths)
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS)[:-1])
    parser.add_argument("--budgets", nargs="+", default=["4bit", "3bit", "2bit"])
    parser.add_argument("--rivals", nargs="+", default=["3bit", "2bit"], help="the budgets of rivals and plans")
    parser.add_argument("--ablations", nargs="+", default=["3bit"], help="the budgets of ablations and widths alone")
    parser.add_argument("--rows", nargs="+", help="only these rows")
    parser.add_argument("--repeats", type=int, default=1, help="runs per row and seed; what is there is summed up")
    parser.add_argument("--table-only", action="store_true", help="run nothing: sum up what is there")
    parser.add_argument("--add", action="store_true", help="to the rows that the results file has")
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence"))
    options = parsed(parser)
    own = dict.fromkeys(PARTS, options.rivals) | {"budgets": options.budgets}
    own |= dict.fromkeys(("widths alone", "ablations", "by differences"), options.ablations)
    options.budgets_of = own.__getitem__
    return options


if __name__ == "__main__":
    main()
