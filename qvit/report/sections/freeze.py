"""What freezing changed: costs of the learned, rounded and final widths, and the widths that were moved."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qvit.documents.log import ChangeEvent, FreezeEvent
from qvit.report.groups import Group, runs_of
from qvit.report.markup import Canvas, escape, muted, select, table, table_of, variants
from qvit.report.sections.base import section
from qvit.report.units import bops_text, difference, fixed, percent

MAX_CHANGES = 400
PRINTED_CHANGES = 30  # also in the style sheet
NOTE = (
    "At the freeze the learned real-valued widths are rounded, then raised or lowered until the plan fits into "
    "the budget. “Raised” and “lowered” count the widths that ended above or below their rounded value."
)
CHANGES: dict[str, Callable[[ChangeEvent], str]] = {
    "site": lambda change: f"<code>{escape(change.site)}</code>",
    "head": lambda change: "" if change.head is None else str(change.head),
    "learned": lambda change: fixed(change.learned),
    "rounded": lambda change: str(change.rounded),
    "final": lambda change: str(change.final),
    "final − learned": lambda change: difference(change.final - change.learned),
}
HEADER = ["run", "step", "BOPs learned", "rounded", "final", "budget", "final / budget", "raised", "lowered", "kept"]


@section("freeze", "What freezing changed", order=70)
def freeze(groups: Sequence[Group], canvas: Canvas) -> str:
    """A row per run, and the widths of one."""
    frozen = [(group.name_of(run), event) for group, run in runs_of(groups) if (event := run.log.freeze) is not None]
    if not frozen:
        return ""
    overall = table(HEADER, [[escape(name), *_cells(event)] for name, event in frozen])
    box = select("freeze-run", "Widths of run", [name for name, _ in frozen])
    return f"<p>{NOTE}</p>{overall}{box}{variants('freeze-run', [_changes(event) for _, event in frozen])}"


def _cells(event: FreezeEvent) -> list[str]:
    final, budget = event.bit_operations, event.budget_bit_operations
    share = final / budget if budget and final is not None else None
    raised = sum(change.final > change.rounded for change in event.changes)
    lowered = sum(change.final < change.rounded for change in event.changes)
    costs = (event.bit_operations_learned, event.bit_operations_rounded, final, budget)
    counts = (event.step, raised, lowered, len(event.changes) - raised - lowered)
    step, *moved = map(str, counts)
    return [step, *map(bops_text, costs), percent(share), *moved]


def _changes(event: FreezeEvent) -> str:
    """The widths, those that were moved first, then by the size of the change."""

    def weight(change: ChangeEvent) -> tuple[bool, float]:
        return change.final == change.rounded, -abs(change.final - change.learned)

    if not event.changes:
        return muted("The log lists no widths.")
    ordered = sorted(event.changes, key=weight)[:MAX_CHANGES]
    moved = [change.final != change.rounded for change in ordered]
    caption = f"{sum(moved)} widths moved from their rounded value (bold), then the others, the largest change first"
    caption += f"; {len(ordered)} of {len(event.changes)} shown." if len(ordered) < len(event.changes) else "."
    cut = ""
    if len(ordered) > PRINTED_CHANGES:
        cut = f'<p class="paper muted">On paper, the first {PRINTED_CHANGES} rows.</p>'
    return f'{muted(caption)}{cut}<div class="tall">{table_of(CHANGES, ordered, bold=moved)}</div>'
