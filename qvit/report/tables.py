"""Groups of runs → rows: means and deviations, and what they say in one sentence.

Only finished runs count. The deviation is the sample standard deviation over seeds,

    std = sqrt( Σ (a_i - mean)² / (n - 1) ),      0.0 for a single run,

and a sentence about a difference always gives it, or says that one seed has none. Costs of a group are means, because
runs that learn their widths end at slightly different costs. "Float" costs are 32 · 32 bit operations per
multiply-accumulate.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from qvit.plan.cost import FLOAT_BITS
from qvit.report.groups import Group, group_runs, mean_std, short_names
from qvit.report.runs import Run
from qvit.report.units import bytes_text, column, difference, duration, fixed, percent, plus_minus, significant, titled


def results_table(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row per group of runs, as plain data (JSON types only).

    Returns:
        Rows with `model`, `variant` (the model with its options), `data`, `method`, `budget`, `plan`, `label`,
        `seeds` and `n_seeds` (finished runs), `unfinished` (a count), `accuracy_mean`, `accuracy_std`,
        `float_accuracy`, `agreement` (percent), `divergence` (nats), `cosine` (of features), `bit_operations`,
        `bit_operations_g`, `float_bit_operations`, `weight_bytes` and `seconds` (means). What no finished run
        tells is None; so are accuracies where images have no labels.
    """
    groups = group_runs(runs)
    return [_row(group, groups) for group in groups]


def display_table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and cells as text, for a terminal, markdown or a page: one unit per column, enough digits."""
    bops_unit, bops = column([row["bit_operations"] for row in rows], "bops")
    byte_unit, sizes = column([row["weight_bytes"] for row in rows], "bytes")
    columns = {
        "model": [row["variant"] for row in rows],
        "method": [f"{row['method']} {row['setting']}".strip() for row in rows],
        "budget": [row["budget"] or row["plan"] or "" for row in rows],
        "accuracy (%)": [_accuracy(row) for row in rows],
        "points vs float": [_gap(row) for row in rows],
        "as float (%)": [fixed(row["agreement"]) for row in rows],
        "divergence": ["" if row["divergence"] is None else significant(row["divergence"], 3) for row in rows],
        "cosine": [fixed(row["cosine"], 4) for row in rows],
        titled("BOPs", bops_unit): bops,
        "BOPs vs float": [f"÷ {ratio}" if (ratio := _times_fewer(row)) else "" for row in rows],
        titled("weights", byte_unit): sizes,
        "time per run": [duration(row["seconds"]) for row in rows],
        "seeds": [
            f"{row['n_seeds']} (+ {row['unfinished']} unfinished)" if row["unfinished"] else str(row["n_seeds"])
            for row in rows
        ],
    }
    if len(set(columns["model"])) <= 1:
        del columns["model"]
    if not any(_without_labels(row) and row["cosine"] is None for row in rows):
        del columns["as float (%)"], columns["divergence"]
    if all(row["cosine"] is None for row in rows):
        del columns["cosine"]
    return list(columns), [list(cells) for cells in zip(*columns.values(), strict=True)]


def _without_labels(row: Mapping[str, Any]) -> bool:
    """Whether a row has finished runs, and they were judged without labels."""
    return bool(row["n_seeds"]) and row["accuracy_mean"] is None


def _accuracy(row: Mapping[str, Any]) -> str:
    if _without_labels(row):
        return "no labels" if row["cosine"] is None else "features"
    if row["n_seeds"] > 1:
        return plus_minus(row["accuracy_mean"], row["accuracy_std"])
    return fixed(row["accuracy_mean"]) or "no finished run"


def _gap(row: Mapping[str, Any]) -> str:
    if row["method"] == "float" or None in (row["accuracy_mean"], row["float_accuracy"]):
        return ""
    return difference(row["accuracy_mean"] - row["float_accuracy"])


def _times_fewer(row: Mapping[str, Any]) -> str:
    """By how much the float model's bit operations are divided; empty if it is not known."""
    if row["method"] == "float" or not (row["float_bit_operations"] and row["bit_operations"]):
        return ""
    return significant(row["float_bit_operations"] / row["bit_operations"], 3)


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `results_table` as a markdown table."""
    header, cells = display_table(rows)
    lines = [header, ["---"] * len(header), *cells]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def verdict(runs: Sequence[Run]) -> list[str]:
    """What the results say: per budget a sentence that compares the last method with the best of the others.

    The order is that of `group_runs`: uniform baselines first, qvit last. Where there is one method, its result is
    stated; where runs ended above their budget, a further sentence says so.
    """
    groups = [group for group in group_runs(runs) if group.finished]
    rows = {group.label: _row(group, groups) for group in groups}
    families: dict[tuple[str, ...], list[Group]] = {}
    for group in groups:
        if not group.is_float:
            families.setdefault(group.peers, []).append(group)
    names = short_names(runs)
    sentences = []
    for members in families.values():
        subject = members[-1]
        run, name = subject.first, names[subject.peers[:2]]
        budget = f"the {run.budget} budget" if run.budget else f"plan {run.plan_name or 'unknown'}"
        where = f"At {budget}{f' ({name})' if name else ''}"
        row, others = rows[subject.label], [rows[other.label] for other in members[:-1]]
        if unlabelled := list(filter(_without_labels, [*others, row])):
            sentences += [_as_float(where, one) for one in unlabelled]
        else:
            sentences.append(_compared(where, row, others) if others else _alone(where, row))
        sentences += filter(None, map(_over_budget, members))
    if sentences or not groups:
        return sentences or ["No run has finished yet, so there is no result to compare."]
    row = rows[groups[0].label]
    if _without_labels(row):
        return ["The float model was judged on images without labels; no quantized run has finished."]
    return [f"The float model reaches {row['accuracy_mean']:.2f} %{_spread(row)}; no quantized run has finished."]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _row(group: Group, groups: Sequence[Group]) -> dict[str, Any]:
    run, results = group.first, group.results
    accuracy, deviation = mean_std(group.accuracies) if group.accuracies else (None, None)
    floats = [g for g in groups if g.is_float and g.peers[:2] == group.peers[:2]]
    reference = _mean([result.float_accuracy for result in results])
    if reference is None:
        reference = _mean([result.accuracy for g in floats for result in g.results])
    macs = _mean([member.cost.macs for g in (group, *floats) for member in g.runs if member.cost is not None])
    keys = ("bit_operations", "weight_bytes", "agreement", "divergence")
    cost, size, agreement, divergence = (_mean([getattr(result, key) for result in results]) for key in keys)
    cosine = _mean([result.features and result.features.cosine for result in results])
    return {
        "model": run.model,
        "variant": group.peers[1],
        "data": group.peers[0] or None,
        "method": run.method,
        "setting": group.setting,
        "budget": run.budget,
        "plan": run.plan_name,
        "label": group.label,
        "seeds": [member.seed for member in group.finished],
        "n_seeds": len(results),
        "unfinished": len(group.runs) - len(results),
        "accuracy_mean": accuracy,
        "accuracy_std": deviation,
        "float_accuracy": reference,
        "agreement": agreement,
        "divergence": divergence,
        "cosine": cosine,
        "bit_operations": None if cost is None else round(cost),
        "bit_operations_g": None if cost is None else cost / 1e9,
        "float_bit_operations": None if macs is None else round(macs * FLOAT_BITS * FLOAT_BITS),
        "weight_bytes": None if size is None else round(size),
        "seconds": _mean([r.seconds.get("total") for r in results]),
    }


def _spread(row: Mapping[str, Any]) -> str:
    if row["n_seeds"] == 1:
        return " (one seed, so the deviation is not known)"
    return f" ({row['n_seeds']} seeds, standard deviation {row['accuracy_std']:.2f})"


def _alone(where: str, row: Mapping[str, Any]) -> str:
    text = f"{where} {row['method']} reaches {row['accuracy_mean']:.2f} %{_spread(row)}"
    if row["float_accuracy"] is not None:
        text += f", {_points(row['accuracy_mean'] - row['float_accuracy'])} the float model"
    if ratio := _times_fewer(row):
        text += f", with {ratio} times fewer bit operations than float"
    return text + f" and {bytes_text(row['weight_bytes'])} of weights."


def _as_float(where: str, row: Mapping[str, Any]) -> str:
    if row["cosine"] is not None:
        return f"{where} {row['method']} has a cosine of {row['cosine']:.4f} with the float model's features."
    if row["agreement"] is None:
        return f"{where} {row['method']} was judged on images without labels, beside no float model."
    text = f"{where} {row['method']} answers as the float model on {row['agreement']:.2f} % of images without labels"
    if row["divergence"] is not None:
        text += f", at a divergence of {significant(row['divergence'], 3)} nats"
    return text + "."


def _compared(where: str, row: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    other = max(others, key=lambda row: row["accuracy_mean"])
    gap = row["accuracy_mean"] - other["accuracy_mean"]
    counts, deviations = (row["n_seeds"], other["n_seeds"]), (row["accuracy_std"], other["accuracy_std"])
    seeds = f"{counts[0]} seeds each" if counts[0] == counts[1] else f"{counts[0]} and {counts[1]} seeds"
    noise = f"{seeds}, standard deviations {deviations[0]:.2f} and {deviations[1]:.2f}"
    if min(counts) == 1:
        noise = "one seed each" if counts == (1, 1) else f"{counts[0]} and {counts[1]} seeds"
        noise += ": how much of this is chance is not known"
    elif abs(gap) <= max(deviations):
        noise += ": no more than the seeds differ among themselves"
    text = f"{where} {row['method']} is {_points(gap)} {other['method']}"
    text += f", the best of {len(others)} others" if len(others) > 1 else ""
    if row["bit_operations"] and other["bit_operations"]:
        more = row["bit_operations"] / other["bit_operations"] - 1
        costs = f"with {percent(abs(more))} {'more' if more > 0 else 'fewer'}" if abs(more) >= 5e-4 else "at equal"
        text += f", {costs} bit operations"
    return f"{text} ({noise})."


def _over_budget(group: Group) -> str:
    """A sentence if runs ended above their budget."""
    shares = [
        run.result.bit_operations / run.log.budget_bit_operations - 1
        for run in group.runs
        if run.result is not None and run.log.budget_bit_operations
    ]
    over = [share for share in shares if share > 0]
    many = "" if len(shares) == 1 else f" in {len(over)} of {len(shares)} runs"
    return f"{group.label} exceeds its budget{many}, by up to {percent(max(over))}." if over else ""


def _points(gap: float) -> str:
    """`0.40 points above`, `0.40 points below` or `level with`."""
    if math.isclose(round(gap, 2), 0.0, abs_tol=1e-9):
        return "level with"
    return f"{abs(gap):.2f} points {'above' if gap > 0 else 'below'}"
