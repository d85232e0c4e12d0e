"""Systems beside each other: what `benchmarks/measure/systems.py` measured after training, and training's evidence.

The evidence of small ViTs has more rows than systems: parts of methods and their settings stay on its own page.
"""

from __future__ import annotations

from statistics import median

from rendering import Data, added, origin, spread, table, table_of
from scipy.stats import binomtest

#: Systems that train, by the names of their rows in the evidence.
TRAINED = {
    "lsq+": "LSQ+",
    "qvit": "Q-ViT",
    "qvit, the published search": "Q-ViT, the paper's settings throughout",
    "vvtq": "VVTQ, without soft labels",
    "qvit+vvtq": "Q-ViT and VVTQ",
    "qvit+vvtq, the widths' rate falling over the run": "Q-ViT and VVTQ, the widths' rate falling over the run",
    "FracBits": "FracBits",
    "DQ": "DQ",
    "EdMIPS": "EdMIPS",
    "OFQ": "OFQ",
    "IRM": "Q-ViT (Y. Li et al.), IRM",
    "Fisher + integer program": "Fisher plan, LSQ+",
    "Fisher + integer program, all layers": "Fisher plan of all layers, LSQ+",
    "Fisher + greedy descent": "MPTQ-ViT's greedy widths by Fisher, LSQ+",
    "KL one by one + integer program": "KL one by one, LSQ+",
    "KL one by one + integer program, all layers": "KL one by one of all layers, LSQ+",
    "hessian + integer program": "HAWQ plan, LSQ+",
    "relevance + integer program": "LRP-QViT plan, LSQ+",
    "mix-qvit + integer program": "Mix-QViT plan, LSQ+",
    "nuclear-norm + integer program": "PTQ for ViT's widths (nuclear norm), LSQ+",
    "lampq + integer program": "LampQ plan, LSQ+",
    "ompq + integer program": "OMPQ plan, LSQ+",
    "topological-entropy + integer program": "GMPQ-TE plan, LSQ+",
}


@table_of("systems.json", "`python benchmarks/measure/systems.py --help`")
def systems_tables(data: Data) -> str:
    """Post-training systems by budget: one width everywhere, and mixed widths by a metric."""
    return "\n\n".join([_note(data), *_by_budget(data, "uniform"), origin(data)])


@table_of("pmq_arms.json", "`python benchmarks/measure/systems.py --arms plain class pmq chance`")
def pmq_arms_tables(data: Data) -> str:
    """The parts of PMQ by budget, and all of it beside each of its parts."""
    right = {(row["budget"], row["arm"]): row["right"] for row in data["rows"]}
    budgets = dict.fromkeys(budget for budget, _ in right)
    cells = []
    for other in ("chance", "class"):
        pairs = [list(zip(right[budget, "pmq"], right[budget, other], strict=True)) for budget in budgets]
        counts = [(own.count(("1", "0")), own.count(("0", "1"))) for own in pairs]
        p_values = [binomtest(gained, gained + lost).pvalue if gained + lost else 1.0 for gained, lost in counts]
        told = [f"{gained} / {lost} ({p:.2g})" for (gained, lost), p in zip(counts, p_values, strict=True)]
        cells.append([f"`{other}`", *told])
    beside = "Images that only `pmq`, or only the other, is right about (p):\n\n"
    beside += table(["`pmq` beside", *(f"`{budget}`" for budget in budgets)], cells, left=1)
    return "\n\n".join([_note(data), *_by_budget(data, "plain"), beside, origin(data)])


@table_of("nonlinear.json", "`python benchmarks/measure/systems.py --help`")
def nonlinear_tables(data: Data) -> str:
    """Integer forms of LayerNorm, softmax and GELU at one width everywhere, and the SQNR of each."""
    parts = [_note(data), *_by_budget(data, "float-glue")]
    measured = [place for row in data["rows"] for way in row.get("sqnr", ()) for place in way.items()]
    if measured:
        parts += ["SQNR of the forms, in dB: the median over places and ways (the least).", _ratios(measured)]
    return "\n\n".join([*parts, origin(data)])


def _ratios(measured: list[tuple[str, dict[str, float]]]) -> str:
    """A table of forms by operation."""
    found: dict[str, dict[str, list[float]]] = {}
    for place, ratios in measured:
        leaf = place.rpartition(".")[2]
        kind = {"softmax": "softmax", "act": "GELU"}.get(leaf, "LayerNorm")
        for form, decibels in ratios.items():
            found.setdefault(form, {}).setdefault(kind, []).append(decibels)
    kinds = ("LayerNorm", "softmax", "GELU")
    cells = [
        [f"`{form}`", *(f"{median(own[kind]):.1f} ({min(own[kind]):.1f})" if kind in own else "" for kind in kinds)]
        for form, own in found.items()
    ]
    return table(["form", *kinds], cells, left=1)


@table_of("evidence_*.json", "`python benchmarks/measure/evidence.py --help`")
def trained_systems_tables(data: Data) -> str:
    """Accuracy of what was trained at 3 and 2 bits, and the seconds of a run and of the search before it."""
    found = {(row["row"], row["budget"]): row for row in data["rows"] if row["part"] in ("budgets", "rivals")}
    budgets = [own for own in ("3bit", "2bit") if ("lsq+", own) in found]
    names = [name for name in TRAINED if any((name, budget) in found for budget in budgets)]
    cells = []
    for name in names:
        rows = [found.get((name, budget)) for budget in budgets]
        numbers = ["" if row is None else spread(row["accuracy_mean"], row["accuracy_std"], 3) for row in rows]
        seconds = ["" if row is None else f"{row['seconds_mean']:.0f}" for row in rows]
        search = [row["search_seconds_mean"] for row in rows if row and "search_seconds_mean" in row]
        cells.append([TRAINED[name], *numbers, *seconds, f"{max(search):.0f}" if search else ""])
    header = ["trained", *(f"{own}, top-1 (%)" for own in budgets), *(f"{own}, seconds of a run" for own in budgets)]
    header += ["search (s)"]
    title = data["title"] or f"`{data['settings']['common']['model']}` on {data['set']}"
    return "\n\n".join([f"{title}:", table(header, cells, left=1), origin(data) + added(data, TRAINED)])


def _note(data: Data) -> str:
    return (
        f"{data['model']} on {data['images']}, cut into two halves by class (seed {data['split_seed']}): calibrated "
        f"on {data['calibration_images']} images of one, judged on the other, "
        f"{'both ways' if data['ways'] == 2 else 'one way'}."
    )


def _by_budget(data: Data, first: str) -> list[str]:
    """A table for each budget; p compares with the row `first`."""
    parts = []
    for budget in dict.fromkeys(row["budget"] for row in data["rows"]):
        rows = [row for row in data["rows"] if row["budget"] == budget]
        cells = []
        for row in rows:
            counts = f"{row['only_this_right']} / {row['only_first_right']}" if row["arm"] != first else ""
            p_value = f"{row['p_value']:.2g}" if row["arm"] != first else ""
            search = row.get("search_seconds")
            program = [sum(took for part, took in way.items() if part != "sensitivity") for way in search or ()]
            searched = first != "plain" or bool(search)  # `chance` takes the plan of another arm
            seconds = searched * row.get("metric_seconds", 0.0) + (sum(program) / len(program) if program else 0.0)
            numbers = [f"{row['top1']:.1f}", f"{row['agreement']:.1f}", counts, p_value]
            bits = f"{max(row['bit_operations']) / 1e9:.3f}"
            took = [f"{seconds:.0f}" if seconds else "", f"{row['processor_seconds']:.0f}"]
            cells.append([f"`{row['arm']}`", *numbers, bits, *took])
        header = ["system", "top-1 (%)", "same answer (%)", f"only this / only {first} right", "p"]
        header += ["bit operations (G)", "search (s)", "processor time of all (s)"]
        images = sum(rows[0]["images"])
        parts += [
            f"Budget `{budget}`, {images} images, float {rows[0]['top1_float']:.1f} %:",
            table(header, cells, left=1),
        ]
    return parts
