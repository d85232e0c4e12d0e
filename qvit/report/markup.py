"""The small pieces of HTML that the report is made of: tables, select boxes, places for figures.

Everything that comes from a file is escaped: as HTML by `escape`, inside the JSON of the figures by writing `<`, `>`
and `&` as escapes, so that no string can end the script element around it. Parameters are HTML where their
description says so, else text.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

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
        parts = []
        for name, choices in self.figures.items():
            plain = [json.loads(str(figure.to_json())) for figure in choices]
            for figure in plain:
                figure["layout"].pop("template", None)
            parts.append(f"{json.dumps(name)}:{json.dumps(plain, separators=(',', ':'), allow_nan=False)}")
        return embedded("{" + ",\n".join(parts) + "}")


def embedded(text: str) -> str:
    """JSON so written that it can stand inside a script element."""
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def escape(value: object) -> str:
    """Any value as HTML text, also safe inside quoted attributes."""
    return html.escape(str(value))


def tensor_name(name: str) -> str:
    """The name of a tensor as HTML: escaped, `W_q` with a true subscript."""
    return re.sub(r"^W_(\w+)$", r"W<sub>\1</sub>", escape(name))


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


def folded(summary: str, body: str) -> str:
    """HTML that is shown on request; `summary` is text."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def select(name: str, caption: str, options: Sequence[str], plots: Sequence[str] = ()) -> str:
    """A select box that switches plots and `variants`; a plain line if there is only one option."""
    if len(options) == 1:
        return f'<p class="muted">{escape(caption)}: <strong>{escape(options[0])}</strong></p>'
    inside = "".join(f"<option>{escape(option)}</option>" for option in options)
    box = f'<select id="{name}" data-plots="{" ".join(plots)}" autocomplete="off">{inside}</select>'
    return f'<div class="controls"><label for="{name}">{escape(caption)}: {box}</label></div>'


def variants(name: str, parts: Sequence[str]) -> str:
    """HTML parts of which the select box of that name shows one."""
    return "".join(
        f'<div data-choice="{name}" data-value="{index}"{" hidden" if index else ""}>{part}</div>'
        for index, part in enumerate(parts)
    )
