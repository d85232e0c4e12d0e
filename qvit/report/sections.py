"""The sections of the report, one function each: groups of runs → HTML, or "" where there is nothing to say.

Figures go to the `Canvas`; the HTML only has places for them. A section that could be expected and is missing says
why in a sentence, such as the map of widths when all widths are uniform. The sections on widths follow Figures 4 and
5 and Table 2 of the Q-ViT paper (Li et al. 2022, arXiv 2201.07703).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean

from qvit.report import figures, widths
from qvit.report.markup import Canvas, escape, folded, select, table, tensor_name, variants
from qvit.report.runs import Change, Freeze, Run
from qvit.report.sites import ATTENTION_PANELS, layer_labels, locate, natural_key
from qvit.report.tables import Group, display_table, results_table
from qvit.report.units import bops_text, column, difference, percent, titled

MAX_CHANGES = 400
PRINTED_CHANGES = 30  # also in the style sheet


def run_name(run: Run, group: Group) -> str:
    """The group and the seed of a run, as text."""
    return group.label + ("" if run.seed is None else f" · seed {run.seed}")


def results(groups: Sequence[Group]) -> str:
    """The summary table."""
    header, cells = display_table(results_table([run for group in groups for run in group.runs]))
    rows = [[escape(cell) for cell in row] for row in cells]
    note = (
        "Mean over seeds ± sample standard deviation. Costs are for one image, weights are packed. “Points vs float” "
        "is the difference in accuracy; “BOPs vs float” says by how much the float model's bit operations are divided."
    )
    return (
        f'<p class="muted">{note}</p>{table([escape(cell) for cell in header], rows, text=header.index("budget") + 1)}'
    )


def accuracy(groups: Sequence[Group], canvas: Canvas) -> str:
    """Accuracy against bit operations and against weight bytes."""
    drawn = {cost: figures.accuracy_figure(groups, cost) for cost in figures.COST_NAMES}
    headings = {"bit_operations": "Bit operations", "weight_bytes": "Weight bytes"}
    names = {"bit_operations": "accuracy-bops", "weight_bytes": "accuracy-bytes"}
    plots = [
        canvas.plot(names[cost], [figure], heading=headings[cost])
        for cost, figure in drawn.items()
        if figure is not None
    ]
    if not plots:
        return ""
    box = f'<input type="checkbox" data-log="{" ".join(names.values())}" autocomplete="off">'
    note = ""
    if any(len(group.finished) > 1 for group in groups):
        note = "Large marks are means over seeds with their standard deviation, small marks single runs. "
    if len([group for group in groups if group.finished and not group.is_float]) > 1:
        note += "Marks of one method are joined. "
    return (
        f'<div class="controls"><label>{box} logarithmic cost axis</label></div>'
        f'<div class="grid">{"".join(plots)}</div>'
        f'<p class="muted">{note}The dashed line is the float model.</p>'
    )


def width_maps(groups: Sequence[Group], canvas: Canvas) -> str:
    """The map of widths of every run with mixed widths, and a table for first and last layers."""
    if not any(run.plan for _, run in _runs(groups)):
        return ""
    shown = [(group, run) for group, run in _runs(groups) if _has_map(run)]
    uniform = _uniform_note(groups)
    outside = _boundary_table(groups)
    maps = [figure for _, run in shown if (figure := widths.width_map(run)) is not None]
    if not maps:
        return f"<p>No run has learned bit-widths, so there is no map to draw.</p>{uniform}{outside}"
    chips = "".join(
        f'<li style="background:{colour};color:{"#fff" if bits > widths.DARK_ABOVE else "#16202b"}">{bits} bits</li>'
        for bits, colour in widths.WIDTH_COLOURS.items()
    )
    box = select("map-run", "Run", [run_name(run, group) for group, run in shown], ["map"])
    states = [
        "" if run.finished else f'<p class="warning">This run is not finished ({escape(run.state)}).</p>'
        for _, run in shown
    ]
    caption = (
        "Rows are layers, columns are tensors; tensors of the attention have one width per head, numbered below. "
        "W are weights, the others activations."
    )
    return (
        f'{box}{variants("map-run", states)}<ul class="key" aria-label="Colours">{chips}</ul>'
        f"{canvas.plot('map', maps, caption)}{uniform}{outside}"
    )


def _has_map(run: Run) -> bool:
    return bool(run.plan) and (run.learned or widths.is_mixed(run))


def _uniform_note(groups: Sequence[Group]) -> str:
    """Which groups have one width inside the layers, as HTML."""
    uniform: dict[int, list[str]] = {}
    for group in groups:
        inner = {w for site, ws in group.first.bit_widths.items() if locate(site).layer for w in ws}
        if len(inner) == 1 and not any(_has_map(run) for run in group.runs):
            uniform.setdefault(inner.pop(), []).append(escape(group.label))
    if not uniform:
        return ""
    parts = "; ".join(f"{bits} bits in {', '.join(names)}" for bits, names in sorted(uniform.items(), reverse=True))
    return f'<p class="muted">Uniform in all layers but the first and the last: {parts}.</p>'


def _boundary_table(groups: Sequence[Group]) -> str:
    """Widths of the sites outside of layers: the paper's Table 2."""
    shown = [(group, [run.bit_widths for run in group.runs if run.plan]) for group in groups]
    shown = [(group, plans) for group, plans in shown if plans]
    sites = dict.fromkeys(site for _, plans in shown for plan in plans for site in plan if not locate(site).layer)
    if not sites:
        return ""
    several, rows = False, []
    for group, plans in shown:
        cells = []
        for site in sites:
            found = [", ".join(map(str, plan.get(site, ("float",)))) for plan in plans]
            differ = len(set(found)) > 1
            several |= differ
            cells.append(" / ".join(found) if differ else found[0])
        rows.append([escape(group.label), *cells])
    header = ["runs", *(f"<code>{escape(site)}</code>" for site in sites)]
    note = '<p class="muted">Where seeds differ, one width per seed.</p>' if several else ""
    return f"<h3>First and last layers (bits)</h3>{note}{table(header, rows)}"


def attention(groups: Sequence[Group], canvas: Canvas) -> str:
    """The paper's Figure 4: box plots of the widths of q, k, v and A over heads, layer by layer."""
    panels = [(group, widths.attention_figures(group)) for group in groups if any(map(_has_map, group.runs))]
    panels = [(group, drawn) for group, drawn in panels if drawn and drawn.keys() == panels[0][1].keys()]
    if not panels:
        return ""
    titles = list(panels[0][1])
    names = [f"attention-{index}" for index in range(len(titles))]
    plots = "".join(
        canvas.plot(name, [drawn[title] for _, drawn in panels], heading=escape(title))
        for name, title in zip(names, titles, strict=True)
    )
    box = select("attention-group", "Runs", [group.label for group, _ in panels], names)
    notes = [_pooled_note(group) + _attention_table(group) for group, _ in panels]
    note = (
        "Boxes span the quartiles over heads, the line inside is the median, whiskers reach the smallest and largest "
        "width that is no outlier, circles are outliers, × is the mean (as Figure 4 of the Q-ViT paper)."
    )
    return f'{box}<div class="grid">{plots}</div><p class="muted">{note}</p>{variants("attention-group", notes)}'


def _pooled_note(group: Group) -> str:
    runs = widths.runs_with_widths(group)
    if len(runs) == 1:
        return ""
    seeds = ", ".join("?" if run.seed is None else str(run.seed) for run in runs)
    return f'<p class="muted">The heads of {len(runs)} seeds ({escape(seeds)}) are pooled.</p>'


def _attention_table(group: Group) -> str:
    runs = widths.runs_with_widths(group)
    columns = {tensor: widths.attention_widths(runs, tensor) for tensor in ATTENTION_PANELS}
    layers = list(dict.fromkeys(layer for values in columns.values() for layer in values))
    rows = []
    for layer, row in zip(layers, layer_labels(layers), strict=True):
        found = [values.get(layer, []) for values in columns.values()]
        cells = [f"{fmean(bits):.2f} ({min(bits)} to {max(bits)})" if bits else "" for bits in found]
        rows.append([escape(row), *cells])
    header = ["layer", *(escape("A" if tensor == "probs" else tensor) for tensor in columns)]
    return folded("Means and ranges as a table", table(header, rows))


def gelu(groups: Sequence[Group], canvas: Canvas) -> str:
    """The paper's Figure 5: the width of the GELU output by layer."""
    shown = [group for group in groups if any(map(_has_map, group.runs))]
    figure = widths.gelu_figure(shown)
    if figure is None:
        return ""
    found = [(g, run, widths.gelu_widths(run)) for g in shown for run in widths.runs_with_widths(g)]
    layers = sorted({layer for _, _, values in found for layer in values}, key=natural_key)
    rows = [
        [escape(run_name(run, group)), *(f"{values[layer]:.3g}" if layer in values else "" for layer in layers)]
        for group, run, values in found
    ]
    header = ["run \\ layer", *map(escape, layer_labels(layers))]
    caption = "The dashed line is the width of the uniform model with the same budget (as Figure 5 of the Q-ViT paper)."
    return canvas.plot("gelu", [figure], caption) + folded("Widths as a table", table(header, rows))


def training(groups: Sequence[Group], canvas: Canvas) -> str:
    """Bit operations over steps with budget and freeze, and the mean width per kind of tensor over epochs."""
    parts = []
    overall = figures.bit_operations_figure(groups)
    if overall is not None:
        caption = (
            "One line per run. Dashed lines are the budgets; a diamond marks the freeze, after which widths are fixed."
        )
        parts.append(canvas.plot("budget", [overall], caption, "Bit operations over training steps"))
    means = [(group, run, figure) for group, run in _runs(groups) if (figure := widths.mean_width_figure(run))]
    if means:
        box = select("means-run", "Run", [run_name(run, group) for group, run, _ in means], ["means"])
        caption = "Weights are dashed, activations solid; partners of a product share a colour."
        plot = canvas.plot("means", [figure for _, _, figure in means], caption)
        parts.append(f"<h3>Mean width per kind of tensor</h3>{box}{plot}")
    return "".join(parts)


def freeze(groups: Sequence[Group]) -> str:
    """What the freeze changed: costs of the learned, rounded and final widths, and the widths that were moved."""
    frozen = [(group, run, run.log.freeze) for group, run in _runs(groups) if run.log.freeze is not None]
    frozen_runs = [(group, run, event) for group, run, event in frozen if event is not None]
    if not frozen_runs:
        return ""
    rows = [[escape(run_name(run, group)), *_freeze_cells(event)] for group, run, event in frozen_runs]
    header = [
        "run",
        "step",
        "BOPs learned",
        "rounded",
        "final",
        "budget",
        "final / budget",
        "raised",
        "lowered",
        "kept",
    ]
    box = select("freeze-run", "Widths of run", [run_name(run, group) for group, run, _ in frozen_runs])
    tables = [_changes_table(event) for _, _, event in frozen_runs]
    note = (
        "At the freeze the learned real-valued widths are rounded, then raised or lowered until the plan fits into "
        "the budget. “Raised” and “lowered” count the widths that ended above or below their rounded value."
    )
    return f"<p>{note}</p>{table(header, rows)}{box}{variants('freeze-run', tables)}"


def _freeze_cells(event: Freeze) -> list[str]:
    costs = (
        event.bit_operations_learned,
        event.bit_operations_rounded,
        event.bit_operations,
        event.budget_bit_operations,
    )
    share = ""
    if event.budget_bit_operations and event.bit_operations is not None:
        share = percent(event.bit_operations / event.budget_bit_operations)
    raised = sum(change.final > change.rounded for change in event.changes)
    lowered = sum(change.final < change.rounded for change in event.changes)
    counts = (raised, lowered, len(event.changes) - raised - lowered)
    return [str(event.step), *("" if c is None else bops_text(c) for c in costs), share, *map(str, counts)]


def _changes_table(event: Freeze) -> str:
    def weight(change: Change) -> tuple[bool, float]:
        return change.final == change.rounded, -abs(change.final - change.learned)

    if not event.changes:
        return '<p class="muted">The log lists no widths.</p>'
    ordered = sorted(event.changes, key=weight)[:MAX_CHANGES]
    rows = [
        [
            f"<code>{escape(change.site)}</code>",
            "" if change.head is None else str(change.head),
            f"{change.learned:.2f}",
            str(change.rounded),
            str(change.final),
            difference(change.final - change.learned),
        ]
        for change in ordered
    ]
    moved = [change.final != change.rounded for change in ordered]
    caption = f"{sum(moved)} widths moved from their rounded value (bold), then the others, the largest change first"
    caption += f"; {len(ordered)} of {len(event.changes)} shown." if len(ordered) < len(event.changes) else "."
    header = ["site", "head", "learned", "rounded", "final", "final − learned"]
    cut = ""
    if len(rows) > PRINTED_CHANGES:
        cut = f'<p class="paper muted">On paper, the first {PRINTED_CHANGES} rows.</p>'
    return f'<p class="muted">{caption}</p>{cut}<div class="tall">{table(header, rows, bold=moved)}</div>'


def curves(groups: Sequence[Group], canvas: Canvas) -> str:
    """Loss, held-out accuracy and learning rate."""
    drawn = figures.curve_figures(groups)
    plots = "".join(
        canvas.plot(f"curve-{index}", [figure], heading=escape(title))
        for index, (title, figure) in enumerate(drawn.items())
    )
    note = f"One line per run, seeds of a group in one colour, at most {figures.MAX_POINTS} points per line."
    return f'<div class="grid">{plots}</div><p class="muted">{note}</p>' if plots else ""


def costs(groups: Sequence[Group], canvas: Canvas) -> str:
    """Bit operations and bytes by kind of tensor."""
    parts = []
    for cost, heading in (("bit_operations", "Bit operations"), ("weight_bytes", "Weight bytes")):
        figure = figures.cost_figure(groups, cost)
        if figure is None:
            continue
        name, kind = figures.COST_NAMES[cost]
        rows = {g.label: c for g in groups if not g.is_float and (c := figures.costs_by_tensor(g, cost))}
        tensors = list(dict.fromkeys(tensor for values in rows.values() for tensor in values))
        unit, cells = column([values.get(t) for t in tensors for values in rows.values()], kind)
        lines = [[tensor_name(t), *cells[i * len(rows) : (i + 1) * len(rows)]] for i, t in enumerate(tensors)]
        header = [escape(titled(name, unit)), *map(escape, rows)]
        parts.append(canvas.plot(f"costs-{kind}", [figure], heading=heading))
        parts.append(folded(f"{heading} as a table", table(header, lines)))
    if not parts:
        return ""
    note = "Means over seeds. A product of two activations, q·kᵀ or A·v, has bit operations but no weights."
    return f'<p class="muted">{note}</p>{"".join(parts)}'


def _runs(groups: Iterable[Group]) -> list[tuple[Group, Run]]:
    return [(group, run) for group in groups for run in group.runs]
