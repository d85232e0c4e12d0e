"""The small pieces of HTML that the report is made of: tables, lists of facts, select boxes, places for figures.

Everything that comes from a file is escaped: as HTML by `escape`, inside the JSON of the figures by writing `<`, `>`
and `&` as escapes, so that no string can end the script element around it. Parameters are HTML where their
description says so, else text.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import plotly.graph_objects as go


@dataclass
class Canvas:
    """The figures of a page: per place one, or one for each option of the select box that belongs to it."""

    figures: dict[str, list[go.Figure]] = field(default_factory=dict)

    def plot(self, name: str, choices: Sequence[go.Figure], caption: str = "", heading: str = "") -> str:
        """The HTML of a place for figures; `caption` and `heading` are HTML."""
        self.figures[name] = list(choices)
        alt = escape(choices[0].layout.meta["alt"])
        height = choices[0].layout.height
        head = f"<h3>{heading}</h3>" if heading else ""
        foot = f"<figcaption>{caption}</figcaption>" if caption else ""
        plot = f'<div class="plot" id="plot-{name}" role="img" aria-label="{alt}" style="min-height:{height}px"></div>'
        return f'<figure>{head}<div class="scroll" tabindex="0">{plot}</div>{foot}</figure>'

    def to_json(self) -> str:
        """All figures as JSON that can stand inside a script element."""
        plain = {name: [json.loads(str(one.to_json())) for one in choices] for name, choices in self.figures.items()}
        for figure in (figure for choices in plain.values() for figure in choices):
            figure["layout"].pop("template", None)
        return embedded(plain)


def embedded(data: object) -> str:
    """JSON so written that it can stand inside a script element."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def escape(value: object) -> str:
    """Any value as HTML text, also safe inside quoted attributes."""
    return html.escape(str(value))


def label(text: str) -> str:
    """Any text as HTML and as plotly reads it: special characters escaped, `W_q` with a true subscript."""
    return re.sub(r"^W_(\w+)$", r"W<sub>\1</sub>", html.escape(text, quote=False))


def muted(content: str, tag: str = "p") -> str:
    """A paragraph of lesser weight; `content` is HTML, nothing for nothing."""
    return f'<{tag} class="muted">{content}</{tag}>' if content else ""


def grid(plots: Iterable[str]) -> str:
    """Plots side by side where there is room; HTML."""
    return f'<div class="grid">{"".join(plots)}</div>'


def verdict_box(sentences: Iterable[str], *, most: int = 1000) -> str:
    """What a page says first: a paragraph for each sentence (text), folded after the `most`; nothing for none."""
    said = [f"<p>{escape(sentence)}</p>" for sentence in sentences]
    rest = folded(f"{len(said) - most} more", "".join(said[most:])) if len(said) > most else ""
    return f'<div class="verdict">{"".join(said[:most])}{rest}</div>' if said else ""


def facts(named: Mapping[str, str], *, kind: str = "facts") -> str:
    """A list of facts, name → HTML."""
    inside = "".join(f"<dt>{escape(name)}</dt><dd>{fact}</dd>" for name, fact in named.items())
    return f'<dl class="{kind}">{inside}</dl>'


def lead(sentences: Iterable[str], named: Mapping[str, object], command: str = "") -> str:
    """What a page of a file begins with: what it says, and facts, name → text; the `command` last, if there is one."""
    shown = {name: escape(fact) for name, fact in named.items()}
    return verdict_box(sentences) + facts(shown | ({"Command": f"<code>{escape(command)}</code>"} if command else {}))


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, bold: Sequence[bool] = (), text: int = 1) -> str:
    """A table.

    Args:
        header: Column headings, as HTML.
        rows: Cells, as HTML; the first cell of a row is its heading.
        bold: Which rows stand out.
        text: How many columns, from the left, hold text; the others hold numbers and are aligned at the right.
    """
    style = [' class="text"' if column < text else "" for column in range(len(header))]
    head = "".join(f'<th scope="col"{style[column]}>{cell}</th>' for column, cell in enumerate(header))
    body = []
    for position, (first, *rest) in enumerate(rows):
        mark = ' class="bold"' if position < len(bold) and bold[position] else ""
        cells = "".join(f"<td{style[column]}>{cell}</td>" for column, cell in enumerate(rest, 1))
        body.append(f'<tr{mark}><th scope="row" class="text">{first}</th>{cells}</tr>')
    inside = f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody>"
    return f'<div class="scroll" tabindex="0"><table>{inside}</table></div>'


def table_of(columns: Mapping[str, Callable[[Any], str]], rows: Iterable[Any], **style: Any) -> str:
    """A table of records: heading → what makes its cell of a record, both as HTML; `style` as for `table`."""
    return table(list(columns), [[cell(row) for cell in columns.values()] for row in rows], **style)


def folded(summary: str, body: str) -> str:
    """HTML that is shown on request; `summary` is text."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def select(name: str, caption: str, options: Sequence[str], plots: Sequence[str] = ()) -> str:
    """A select box that switches plots and `variants`; a plain line if there is only one option."""
    if len(options) == 1:
        return muted(f"{escape(caption)}: <strong>{escape(options[0])}</strong>")
    inside = "".join(f"<option>{escape(option)}</option>" for option in options)
    box = f'<select id="{name}" data-plots="{" ".join(plots)}" autocomplete="off">{inside}</select>'
    return f'<div class="controls"><label for="{name}">{escape(caption)}: {box}</label></div>'


def log_axis(caption: str, plots: Sequence[str]) -> str:
    """A box to tick that makes the first axis of plots logarithmic."""
    box = f'<input type="checkbox" data-log="{" ".join(plots)}" autocomplete="off">'
    return f'<div class="controls"><label>{box} {escape(caption)}</label></div>'


def variants(name: str, parts: Sequence[str]) -> str:
    """HTML parts of which the select box of that name shows one."""
    return "".join(
        f'<div data-choice="{name}" data-value="{index}"{" hidden" if index else ""}>{part}</div>'
        for index, part in enumerate(parts)
    )
