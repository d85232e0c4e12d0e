"""What renders files of results into the documentation: the registers of tables and figures, and parts of text.

`table_of` registers a function that makes text of one file of results, `figures_of` one that makes plotly figures of
it. Text shows a figure where it has `place(NAME)`; `docs/hooks.py` draws the figure there when the site is built.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import plotly.graph_objects as go

Data = dict[str, Any]
T = TypeVar("T")
#: Name of the section → its text, from the folder of results.
TABLES: dict[str, Callable[[Path], str]] = {}
#: Functions from the folder of results to figures by name.
FIGURES: list[Callable[[Path], dict[str, go.Figure]]] = []
#: Instruction set → the kind of processor.
KINDS = {"avx2": "AVX2", "avx512": "AVX-512"}
WRONG = (KeyError, TypeError, ValueError, IndexError, StopIteration, ZeroDivisionError, AttributeError)


class RenderError(Exception):
    """A file that cannot be rendered, or a document with broken markers."""


def table_of(files: str, command: str) -> Callable[[Callable[[Data], str]], Callable[[Data], str]]:
    """Decorator: `NAME_tables` makes the table NAME from what each file holds that `files` matches.

    `command` is what measures it. A file that lacks what the function asks for is a RenderError.
    """

    def register(function: Callable[[Data], str]) -> Callable[[Data], str]:
        def render(results: Path) -> str:
            return "\n\n".join(_each(files, function, results)) or f"Not measured yet: {command}."

        TABLES[function.__name__.removesuffix("_tables")] = render
        return function

    return register


def figures_of(
    files: str,
) -> Callable[[Callable[[Data], dict[str, go.Figure]]], Callable[[Data], dict[str, go.Figure]]]:
    """Decorator: the function makes figures by name from what each file holds that `files` matches."""

    def register(function: Callable[[Data], dict[str, go.Figure]]) -> Callable[[Data], dict[str, go.Figure]]:
        def render(results: Path) -> dict[str, go.Figure]:
            return {name: figure for own in _each(files, function, results) for name, figure in own.items()}

        FIGURES.append(render)
        return function

    return register


def _each(files: str, function: Callable[[Data], T], results: Path) -> list[T]:
    found = []
    for file in sorted(results.glob(files)):
        try:
            found.append(function(read(file)))
        except WRONG as error:
            what = f"{type(error).__name__} {error}"
            raise RenderError(f"{file} is not what the benchmark writes: {what}") from None
    return found


def figure_text(figure: go.Figure) -> str:
    """A figure as JSON that is the same every time: sorted, numbers with six digits.

    The template is left out: it is plotly's own and changes with its version.
    """
    data = figure.to_plotly_json()
    data["layout"].pop("template", None)
    return json.dumps(_rounded(data), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(own) for key, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(own) for own in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def place(name: str) -> str:
    """Where a figure stands in a text."""
    return f'<div class="figure" data-figure="figures/{name}.json"></div>'


def wrapped(text: str, width: int = 100) -> str:
    """Markdown with paragraphs and list items broken at `width`; tables, code, headings and HTML stay as they are.

    Lines break at spaces outside of short spans of code, and none begins with what would start a list or a heading.
    """
    done: list[str] = []
    paragraph: list[str] = []
    in_code = in_list = False

    def flush() -> None:
        done.extend(_broken(paragraph, width) if any(len(line) > width for line in paragraph) else paragraph)
        paragraph.clear()

    for line in text.split("\n"):
        fence = line.lstrip().startswith("```")
        code = line.startswith("    ") and not paragraph and not in_list
        if in_code or fence or code or re.match(r"\s*([|#<]|$)|\[[^\]]+\]:", line):
            flush()
            done.append(line)
            in_code ^= fence
        else:
            if _ITEM.match(line):
                flush()
                in_list = True
            elif line[0] != " " and not paragraph:
                in_list = False
            paragraph.append(line)
    flush()
    return "\n".join(done)


_ITEM = re.compile(r"\s*([-*+]|\d+[.)]) +")
_SPACE = re.compile(r"`[^`]{1,50}`|( +)")


def _broken(paragraph: Sequence[str], width: int) -> list[str]:
    """A paragraph or an item of a list in lines of at most `width`, as far as its words allow."""
    item = _ITEM.match(paragraph[0])
    first = item.group() if item else re.match(" *", paragraph[0]).group()  # type: ignore[union-attr]
    rest = " " * len(first)
    content = " ".join([paragraph[0][len(first) :], *(line.strip() for line in paragraph[1:])])
    words = _SPACE.sub(lambda match: "\n" if match[1] else match[0], content).split("\n")
    lines = [first + words[0]]
    for position, word in enumerate(words[1:], 1):
        following = words[position + 1] if position + 1 < len(words) else ""
        glued = f"{word} {following}" if _ITEM.match(following + " ") or following[:1] in "#>|" and following else word
        if len(lines[-1]) + 1 + len(glued) <= width or _ITEM.match(word + " ") or word[:1] in "#>|":
            lines[-1] += f" {word}"
        else:
            lines.append(rest + word)
    return lines


def read(file: Path) -> Data:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RenderError(f"cannot read {file}: {error}") from None
    if not isinstance(data, dict):
        raise RenderError(f"{file} must hold a JSON object, not a {type(data).__name__}")
    return data


def origin(data: Data) -> str:
    """Where a measurement comes from, in a sentence."""
    seeds = f", seeds {', '.join(map(str, data['seeds']))}" if data.get("seeds") else ""
    versions = ", ".join(f"{name} {version}" for name, version in (data.get("versions") or {}).items())
    where = f"{data['hardware']}{seeds}, {data['date']}" + (f" ({versions})" if versions else "")
    return f"Measured with `{data['command'].strip()}` on {where}."


def added(data: Data, names: Iterable[str] | None = None) -> str:
    """Rows of evidence (of these names) that were measured later than the others, and with which command."""
    pieces = []
    for one in data.get("added", []):
        rows: dict[str, list[str]] = {}
        for _, budget, name in one["rows"]:
            if names is None or name in names:
                rows.setdefault(name, []).append(budget)
        named = "; ".join(f"{name} ({', '.join(dict.fromkeys(budgets))})" for name, budgets in rows.items())
        pieces += [f"\n\nAdded later: {named}. {origin(one)}"] if rows else []
    return "".join(pieces)


def kinds_of(data: Data) -> dict[str, list[Data]]:
    """The rows of each kind of processor; an empty name where a file does not tell kinds apart."""
    kinds: dict[str, list[Data]] = {}
    for row in data["rows"]:
        kinds.setdefault(KINDS[row["instructions"]] if "instructions" in row else "", []).append(row)
    return kinds


def spread(mean: float, deviation: float, seeds: int) -> str:
    return f"{mean:.2f} ± {deviation:.2f}" if seeds > 1 else f"{mean:.2f}"


def unit(values: Sequence[float], units: Sequence[tuple[str, float]], threshold: float) -> tuple[str, float]:
    """The first unit if a value reaches the threshold, else the second."""
    return units[0] if max(values) >= threshold else units[1]


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, left: int) -> str:
    """A markdown table; the first `left` columns are text, the others numbers."""
    rule = ["---" if column < left else "---:" for column in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *rows])
