"""The evidence: tables of what `benchmarks/measure/evidence.py` measured, evidence_*.json, each set a part of its own.

A difference is taken seed by seed, to the row `lsq+` of the same budget (ablations: to the full `qvit`), because the
rows of a seed share float weights and images; its deviation is that of these differences over seeds (n - 1). Sentences
are made by rule: a difference counts where it exceeds its deviation. The figures are in `evidence_figures.py`.
"""

from __future__ import annotations

import statistics

from evidence_data import ABLATIONS, KINDS, Gain, Row, figure_names, floats_of, learned, paired, reference_of, rows_of
from rendering import Data, added, origin, place, spread, table, table_of

from qvit.report.units import column, difference, titled

PARTS = {
    "budgets": "At equal bit operations",
    "post-training": "Plans without training, and training that starts from them",
    "rivals": "Rivals",
    "scales": "VVTQ and its scales",
    "widths alone": "Learned widths without the search",
}


@table_of("evidence_*.json", "`python benchmarks/measure/evidence.py --help`")
def evidence_tables(data: Data) -> str:
    """All tables of one set of images, with the places of its figures."""
    first, shown = data["rows"][0], figure_names(data)
    by_seed = floats_of(data)
    floats, seeds = statistics.mean(by_seed.values()), ", ".join(map(str, by_seed))
    above = _above_float(data, floats)
    pieces = [
        f"## {data['set']}",
        f"{title_of(data)} {first['images']} test images; float {floats:.2f} %. "
        f"Mean ± standard deviation over seeds {seeds}; differences are taken seed by seed.{above}",
        "Accuracy against cost, all rows but those about parts of `qvit`; error bars are standard deviations over "
        "seeds, points of (nearly) equal cost stand side by side, and rows far below the others have an axis of their "
        "own.",
        *(place(name) for key, name in shown.items() if key in ("bit-operations", "weight-bytes")),
    ]
    for part, heading in PARTS.items():
        rows = rows_of(data, part)
        if rows:
            pieces += [f"### {heading}", *_compared(rows, data, "lsq+")]
    pieces += _ablations(data, shown)
    pieces += _widths(data, shown)
    hours = f" All runs together: {data['hours']:.1f} hours." if data.get("hours") else ""
    return "\n\n".join([*pieces, origin(data) + hours + added(data) + _where(data)])


@table_of("evidence_tiny-imagenet.json", "`python benchmarks/measure/evidence.py --help`")
def budgets_tables(data: Data) -> str:
    """What Q-ViT is worth at equal bit operations, on the set that is nearest to ImageNet."""
    title = f"{title_of(data)} {data['rows'][0]['images']} test images."
    return "\n\n".join([title, *_compared(rows_of(data, "budgets"), data, "lsq+"), origin(data)])


def _above_float(data: Data, floats: float) -> str:
    above = sum(row["accuracy_mean"] > floats for row in data["rows"])
    if not above:
        return ""
    return f" {above} of {len(data['rows'])} rows are above the float model: their training went on where its ended."


def title_of(data: Data) -> str:
    """Sentences about the model and its training."""
    common, quantized = data["settings"]["common"], data["settings"]["quantized"]
    title = data.get("title") or f"`{common['model']}`"
    own = data["settings"]["float"]
    of_floats = f"{own['epochs']} epoch{'s' * (own['epochs'] != 1)}"
    floats = f" Float models: {of_floats} of {data.get('float_images', data['train_images'])} images."
    precision = f", {data['precision']}" if data.get("precision", "fp32") != "fp32" else ""
    length = f"{quantized['epochs']} epochs of {data['train_images']} images"
    batch = quantized.get("batch_size") or common["batch_size"]
    steps = f"batches of {batch}, learning rate {quantized['lr']:g}{precision}"
    return f"{title.rstrip('.')}.{floats} Quantized: {length}, {steps};"


def _compared(rows: list[Row], data: Data, reference: str) -> list[str]:
    """A table of rows with their differences to a reference, and the sentence about these."""
    gains = [paired(row, reference_of(row, data, reference)) for row in rows]
    seeds = len(floats_of(data))
    prefix, costs = column([row["bit_operations"] for row in rows], "bops")
    unit, sizes = column([row["weight_bytes"] for row in rows], "bytes")
    cells = [
        [
            row["budget"],
            row["row"] + _about(row, seeds),
            spread(row["accuracy_mean"], row["accuracy_std"], len(row["seeds"])),
            "" if gain is None else f"{difference(gain[0])} ± {gain[1]:.2f}",
            cost,
            size,
        ]
        for row, gain, cost, size in zip(rows, gains, costs, sizes, strict=True)
    ]
    header = ["budget", "method", "top-1 (%)", f"less {reference}, paired", titled("bit operations", prefix)]
    pieces = [table([*header, titled("weights", unit)], cells, left=2), *_settings(rows)]
    return [*pieces, verdict(rows, gains, reference)]


def _settings(rows: list[Row]) -> list[str]:
    """What rows set that is not the default of their method, and what is to be known about them."""
    told = {
        row["row"]: ", ".join(f"{name} = {_value(value)}" for name, value in row["method_options"].items())
        for row in rows
        if row["method_options"] and row["method"] != "ptq"
    }
    notes: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if "note" in row:
            notes.setdefault((row["row"], row["note"]), []).append(row["budget"])
    lines = [f"- *{name}*: `{options}`" for name, options in told.items()]
    pieces = ["Options that rows set:\n\n" + "\n".join(lines)] if lines else []
    if notes:
        pieces.append("\n".join(f"- *{name}* at {', '.join(own)}: {text}" for (name, text), own in notes.items()))
    return pieces


def _value(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _about(row: Row, seeds: int) -> str:
    """Which seeds a row has if it lacks some, and how often each was run if that was more than once."""
    runs = max(map(len, row["runs"]))
    about = [f"seeds {', '.join(map(str, row['seeds']))}"] * (len(row["seeds"]) < seeds)
    about += [f"{runs} runs per seed"] * (runs > 1)
    return f" ({'; '.join(about)})" if about else ""


def verdict(rows: list[Row], gains: list[Gain | None], reference: str) -> str:
    """Which differences exceed their deviation over seeds, from the numbers alone."""
    found: dict[str, dict[str, list[str]]] = {"above": {}, "below": {}, "not": {}}
    for row, gain in zip(rows, gains, strict=True):
        if gain is not None:
            key = "not" if abs(gain[0]) <= gain[1] else "above" if gain[0] > 0 else "below"
            amount = "" if key == "not" else f" ({difference(gain[0])})"
            found[key].setdefault(row["row"], []).append(f"{row['budget']}{amount}")
    if not any(found.values()):
        return f"There are no two seeds to compare with `{reference}`: nothing is said about differences."
    above, below, rest = (
        "; ".join(f"{name} at {', '.join(budgets)}" for name, budgets in own.items()) or "none"
        for own in found.values()
    )
    return (
        f"By more than the deviation of the paired differences above `{reference}`: {above}. Below it: {below}. "
        f"Within the deviation: {rest}."
    )


def _where(data: Data) -> str:
    """What ran where, if not all ran on one kind of machine."""
    rows: dict[str, dict[str, list[str]]] = {}
    for row in data["rows"]:
        budgets = rows.setdefault(" and ".join(row["hardware"]), {}).setdefault(row["row"], [])
        if row["budget"] not in budgets:
            budgets.append(row["budget"])
    if len(rows) < 2:
        return ""
    told = {where: [f"{name} ({', '.join(own)})" for name, own in found.items()] for where, found in rows.items()}
    return "\n\n" + "\n".join(f"- On {where}: {'; '.join(names)}." for where, names in told.items())


def _ablations(data: Data, shown: dict[str, str]) -> list[str]:
    pieces = []
    for part, (figure, name) in ABLATIONS.items():
        rows = rows_of(data, part)
        if rows:
            full = reference_of(rows[0], data, name)
            pieces += [f"### Parts of `{name}`", *_compared([*([full] if full else []), *rows], data, name)]
        if figure in shown:
            pieces += [f"Differences to the full `{name}`, with their deviations:", place(shown[figure])]
    return pieces


def _widths(data: Data, shown: dict[str, str]) -> list[str]:
    rows = learned(data)
    if not rows:
        return []
    cells = [
        [title, *(f"{row['mean_widths'][kind]:.2f}" for row in rows)]
        for kind, title in KINDS.items()
        if kind in rows[0]["mean_widths"]
    ]
    pieces = ["### Learned widths", "Mean width that `qvit` learned in the blocks, in bits:"]
    pieces.append(table(["tensor", *(row["budget"] for row in rows)], cells, left=1))
    pieces.append("\n".join(filter(None, map(_of_the_paper, rows))))
    if "widths" in shown:
        pieces += ["The same less the width that `lsq+` has at that budget:", place(shown["widths"])]
    if "heads" in shown:
        pieces += ["Head by head, of all blocks and seeds (Figure 4):", place(shown["heads"])]
    return pieces


def _of_the_paper(row: Row) -> str:
    """What the paper says about learned widths (Figures 4 and 5), and whether it is so here."""
    widths = row["mean_widths"]
    if not {"attn.query", "attn.key", "attn.value", "attn.probs", "mlp.fc2.input"} <= widths.keys():
        return ""
    low, high = ((widths[f"attn.{a}"] + widths[f"attn.{b}"]) / 2 for a, b in (("query", "key"), ("value", "probs")))
    gelu, rest = widths["mlp.fc2.input"], statistics.mean(widths.values())
    return (
        f"- {row['budget']}: q and k have {low:.2f} bits, v and probabilities {high:.2f} ({_agrees(low, high)}, "
        f"Figure 4); GELU's output has {gelu:.2f}, the mean over kinds is {rest:.2f} ({_agrees(rest, gelu)}, Figure 5)."
    )


def _agrees(low: float, high: float) -> str:
    """Whether the width that is the higher one in the paper is it here, by more than a twentieth of a bit."""
    if abs(high - low) < 0.05:
        return "no difference, unlike the paper"
    return "as in the paper" if low < high else "unlike the paper"
