"""What the commands share: the options that mean the same everywhere, KEY=VALUE pairs, and how numbers are written.

Standard output is for results, standard error for failures and progress. Lines of text are never broken at the width of
the window: what is printed can be searched for and copied, paths above all.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from qvit.errors import UsageError
from qvit.files import parse_json
from qvit.locks import remove_leftovers, writing_file
from qvit.training.progress import PlainLines

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no messages.")]
out, err = Console(), Console(stderr=True)
_MOST_COLUMNS = 500


def say(text: str) -> None:
    """Prints one line of plain text as it is: no markup, no colours, no line breaks."""
    out.print(escape(text), highlight=False, soft_wrap=True)


def without_labels(result: Mapping[str, Any]) -> str:
    """How near a run's answers or features are to the float model's, where no label counts; within a line."""
    if features := result.get("features"):
        return f"features beside the float model's on {result['images']} images: {features_in_words(features)}"
    if result["agreement"] is None:
        return f"{result['images']} images without labels"
    return (
        f"same answer as the float model on {result['agreement']:.2f} % of {result['images']} images without labels, "
        f"divergence {result['divergence']:.3g} nats"
    )


def features_in_words(scores: Mapping[str, Any]) -> str:
    """How near features are to the float model's (`measure/features.py`); for the middle of a line."""
    text = f"cosine {scores['cosine']:.4f} (least {scores['cosine_least']:.4f}"
    if worst := scores["worst_token"]:
        text += f"; worst token: {worst['name']}, {worst['cosine']:.4f}"
    text += f"), relative error {scores['relative_error']:.3g}"
    if scores["neighbours"] is not None:
        text += f", same nearest neighbour for {scores['neighbours']:.2f} % of {scores['neighbour_images']} images"
    if "knn" in scores:
        text += f", 1-NN accuracy {scores['knn']:.2f} % (float {scores['knn_reference']:.2f} %)"
    return text


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    title: str | None = None,
    align: str = "<>",
    whole: bool = False,
    bold: Collection[int] = (),
    wide: bool = False,
) -> None:
    """Prints plain text as a table.

    Args:
        columns: Headings.
        rows: Cells of each row.
        title: Above the table.
        align: `<` or `>` for each column; the last one holds for the rest.
        whole: Never breaks or shortens the first column.
        bold: Rows that stand out, by number.
        wide: Outside of a terminal, which has a width, as wide as the cells are.
    """
    lines = [[str(cell) for cell in row] for row in rows]
    table = Table(title=None if title is None else escape(title))
    for number, column in enumerate(columns):
        first = whole and number == 0
        table.add_column(
            escape(column),
            justify="left" if align[min(number, len(align) - 1)] == "<" else "right",
            no_wrap=first,
            min_width=max((len(line[0]) for line in lines), default=0) if first else None,
        )
    for number, line in enumerate(lines):
        table.add_row(*map(escape, line), style="bold" if number in bold else None)
    (Console(width=_MOST_COLUMNS) if wide and not out.is_terminal else out).print(table)


def notifier(quiet: bool) -> Callable[[str], None]:
    """`say`, or what says nothing."""
    return (lambda _: None) if quiet else say


@contextmanager
def progress_bar(*, hidden: bool) -> Iterator[Callable[..., None]]:
    """A bar with the seconds spent and left, on stderr; lines now and then where that is not a terminal.

    It is moved by a text, what is done, how much there is, and figures to show beside it, if any. It is seen from
    the first of these until all is done: others may follow.
    """
    if not hidden and not err.is_terminal:
        yield PlainLines(err).tell
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:.0f}/{task.total}"),
        TextColumn("{task.fields[figures]}"),
    )
    bar = Progress(
        *columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        console=err, transient=True, disable=hidden,
    )  # fmt: skip
    task = bar.add_task("", total=1, figures="")

    def tell(text: str, done: int, total: int, figures: str = "") -> None:
        if done < bar.tasks[0].completed:
            bar.reset(task)
        bar.update(task, description=text, completed=done, total=total, figures=figures)
        if done < total:
            bar.start()
        else:
            bar.stop()

    try:
        yield tell
    finally:
        bar.stop()


@contextmanager
def kept_beside(target: Path | None) -> Iterator[Path | None]:
    """The file of what a command has found so far, beside the one that it writes; gone once that is there."""
    if target is None:
        yield None
        return
    partial = target.with_name(f"{target.name}.partial")
    with writing_file(target):
        yield partial
        partial.unlink(missing_ok=True)
        remove_leftovers(target.parent, (target.name, partial.name))


def print_json(data: Any) -> None:
    """Prints JSON, and nothing else."""
    sys.stdout.write(json.dumps(data, indent=1) + "\n")


def pairs(items: list[str] | None) -> dict[str, Any]:
    """KEY=VALUE options as a dict; values are JSON where they parse as such, else text."""
    found: dict[str, Any] = {}
    for item in items or []:
        key, sign, text = item.partition("=")
        if not sign or not key:
            raise UsageError(f"'{item}' is not KEY=VALUE")
        try:
            found[key.strip()] = parse_json(text)
        except ValueError:
            found[key.strip()] = {"True": True, "False": False, "None": None}.get(text, text)
    return found


def integers(text: str, option: str) -> list[int]:
    """The numbers of an option: a range such as 2-8, or a list such as 2,4,8."""
    try:
        if "-" in text:
            low, high = map(int, text.split("-"))
            return list(range(low, high + 1))
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} '{text}' is neither a range such as 2-8 nor a list such as 2,4,8") from None


def boundary_width(text: str) -> int | None:
    """The width of the first and the last layer that an option names; None for `free`."""
    if text.strip().lower() == "free":
        return None
    if not text.strip().isdecimal():
        raise UsageError(f"boundary '{text}' must be a width such as 8, or free")
    return int(text)


def spread(mean: float, deviation: float) -> str:
    """`97.00 ± 0.50`."""
    return f"{mean:.2f} ± {deviation:.2f}"


def bops(value: float) -> str:
    """Bit operations in G or M."""
    return f"{value / 1e9:.3f} G" if value >= 1e8 else f"{value / 1e6:.3f} M"


def size(value: float) -> str:
    """Bytes in GB, MB or kB (powers of ten)."""
    if value >= 1e9:
        return f"{value / 1e9:.2f} GB"
    return f"{value / 1e6:.2f} MB" if value >= 1e6 else f"{value / 1e3:.1f} kB"


def bits(value: int | list[int], tokens: Mapping[str, Any] | None = None) -> str:
    """One width, or one per head; with the lower one of other tokens, where `token_bit_width` says so."""
    own = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    if tokens is None:
        return own
    share = f"{100 * tokens['share']:g} %"
    if "high" in tokens:
        return f"{own} | {tokens['high']} | {tokens['low']} (prefix tokens | tokens: {share} | rest)"
    which = f"tokens: {share}" if tokens["share"] else "prefix tokens"
    return f"{own} | {tokens['low']} ({which} | rest)"
